#!/usr/bin/env python3
"""Show what a dataset holds, and decode one of its latents to a video.

python jobs/show_dataset.py demo/latents --sample 0 --output demo/preview.mp4
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.show import decode_sample, describe


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="folder of the dataset, on any fsspec URL")
    parser.add_argument("--sample", type=int, default=0, help="number of the sample to decode (default 0)")
    parser.add_argument("--output", type=Path, help="mp4 file to write; without it nothing is decoded")
    parser.add_argument("--weights", help="VAE to decode with (default: the one that encoded the dataset)")
    options = parser.parse_args(arguments)
    try:
        for line in describe(options.dataset):
            print(line)
        if options.output is not None:
            decode_sample(options.dataset, options.sample, options.output, options.weights)
            print(f"decoded sample {options.sample} to {options.output}")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
