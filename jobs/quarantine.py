#!/usr/bin/env python3
"""Look at what an output lacks and why, and have it tried again.

    python jobs/quarantine.py list s3://latents/train
    python jobs/quarantine.py show s3://latents/train 5f0c…
    python jobs/quarantine.py requeue s3://latents/train --reason timeout

After a requeue the job's usual command tries what was requeued, and its latest outcome counts. Exit codes: 0 done,
1 nothing matches, 2 usage, or it cannot be read.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.account import ExitCode
from pipeline.errors import PipelineError
from pipeline.progress import start_logging
from pipeline.quarantine_view import Choice, list_lines, requeue_lines, show_lines
from pipeline.storage import Storage


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    start_logging("info")
    choice = Choice(reasons=frozenset(options.reason), stages=frozenset(options.stage), ids=frozenset(options.id))
    try:
        lines = list(options.run(Storage(options.output), choice, options))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    for line in lines:
        print(line)
    if not lines:
        print("nothing in the quarantine matches", file=sys.stderr)
    return ExitCode.COMPLETE if lines else ExitCode.FAILED


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="list | show | requeue")
    for name, run, about in (
        (
            "list",
            lambda storage, choice, options: list_lines(storage, choice, with_ids=options.ids),
            "counts by stage and reason",
        ),
        ("show", lambda storage, choice, options: show_lines(storage, choice), "everything about some of them, as JSON"),
        ("requeue", lambda storage, choice, options: requeue_lines(storage, choice), "have them tried again"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("output", help="folder of a dataset or of decoded videos, on any fsspec URL")
        command.add_argument("id", nargs="*", help="ids, as `list --ids` tells them")
        command.add_argument("--reason", action="append", default=[], help="those of this reason; may be given again")
        command.add_argument("--stage", action="append", default=[], help="those found at this stage; may be given again")
        command.set_defaults(run=run)
        if name == "list":
            command.add_argument("--ids", action="store_true", help="every one of them, with its id")
        if name == "requeue":
            command.add_argument("--all", action="store_true", help="everything that is quarantined")
    options = parser.parse_args(arguments)
    if getattr(options, "all", None) is False and not (options.id or options.reason or options.stage):
        parser.error("say what to requeue: ids, --reason, --stage or --all")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
