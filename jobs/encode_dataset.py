#!/usr/bin/env python3
"""Encode videos into a Parquet dataset of CogVideoX latents.

    python jobs/encode_dataset.py --config configs/cogvideox-5b.yaml --input.uri s3://videos --output.uri s3://latents
    ray job submit --working-dir . -- python jobs/encode_dataset.py --config …

Without arguments it runs the quick start on the clips that come with the project.
"""

import logging
import sys
from pathlib import Path

# The short form of `ray job submit` runs this file without installing the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.account import ExitCode
from pipeline.command_line import parse_command_line
from pipeline.driver import run_work
from pipeline.encode_work import EncodeWork
from pipeline.errors import ConfigError, PipelineError, RunRefusedError
from pipeline.progress import LogHandler

QUICK_START = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(arguments: list[str]) -> int:
    config = parse_command_line(arguments, quick_start=QUICK_START)
    logging.basicConfig(level="WARNING", handlers=[LogHandler()])
    for package in ("pipeline", "cogvae"):
        logging.getLogger(package).setLevel(config.run.log_level.upper())
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # it prints its retries by itself
    try:
        return run_work(EncodeWork(config))
    except (ConfigError, RunRefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
