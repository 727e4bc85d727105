"""From a command line to an exit code: what the entry points of both jobs do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.account import ExitCode
from pipeline.command_line import JOB_HELP, parse_command_line
from pipeline.config import JobConfig
from pipeline.driver import run_work
from pipeline.errors import ConfigError, PipelineError, RunRefusedError
from pipeline.progress import start_logging
from pipeline.work import Work

C = TypeVar("C", bound=JobConfig)


def run_job(
    arguments: list[str],
    settings: type[C],
    make_work: Callable[[C], Work],
    *,
    about: str,
    example: str,
    quick_start: Path | None = None,
) -> int:
    """Parse the command line, do the work, and say what went wrong. Returns the exit code.

    Args:
        settings: the job's own.
        about: one sentence, for ``--help``.
        example: the file that explains every setting, for ``--help``.
        quick_start: the settings to run with where there are no arguments at all.
    """
    config = parse_command_line(arguments, settings, about + "\n" + JOB_HELP.format(example=example), quick_start)
    start_logging(config.run.log_level)
    try:
        return run_work(make_work(config))
    except (ConfigError, RunRefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
