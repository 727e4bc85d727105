#!/usr/bin/env python3
"""Read an output again, and say what is not as it should be. Runs on this machine alone, on threads.

    python jobs/validate_dataset.py s3://latents/train
    python jobs/validate_dataset.py s3://latents/train --quick
    python jobs/validate_dataset.py s3://latents/train --repair

Takes a dataset of latents or the videos of the decode job. Exit codes: 0 nothing is wrong, 1 something is, 2 usage, or
it cannot be read.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.account import ExitCode
from pipeline.errors import PipelineError
from pipeline.progress import start_logging
from pipeline.status import refuse_second_run
from pipeline.storage import Storage
from pipeline.validation import Validation, repair_output


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    start_logging("info")
    try:
        storage = Storage(options.output)
        if options.repair:
            refuse_second_run(storage, takeover=False)  # before reading all of it, not only after
        validation = Validation(storage=storage, threads=options.threads, sample=0 if options.quick else options.sample)
        for finding in validation.findings():
            print(json.dumps(asdict(finding)) if options.json else finding, flush=True)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    summary = validation.summary()
    print(json.dumps({"summary": summary}) if options.json else ", ".join(f"{name} {value}" for name, value in summary.items()))
    if not summary["findings"]:
        return ExitCode.COMPLETE
    return _repair(validation) if options.repair else ExitCode.FAILED


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder of a dataset or of decoded videos, on any fsspec URL")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--sample", type=_count, metavar="N", help="read N shards whole, drawn at random; of the others the footer"
    )
    depth.add_argument("--quick", action="store_true", help="read footers only")
    parser.add_argument("--threads", type=_count, default=8, metavar="N", help="shards at a time; each may take its size on disk")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, the summary last")
    parser.add_argument(
        "--repair", action="store_true", help="move what nothing needs to trash/, write index and manifest again; nothing else"
    )
    return parser.parse_args(arguments)


def _count(value: str) -> int:
    if (count := int(value)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return count


def _repair(validation: Validation) -> int:
    try:
        for line in repair_output(validation):
            print(line, file=sys.stderr)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.COMPLETE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
