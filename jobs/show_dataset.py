#!/usr/bin/env python3
"""Show what a dataset holds, and what was left out.

python jobs/show_dataset.py demo/latents
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.show import describe


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="folder of the dataset, on any fsspec URL")
    options = parser.parse_args(arguments)
    try:
        for line in describe(options.dataset):
            print(line)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
