#!/usr/bin/env python3
"""Encode videos into a Parquet dataset of CogVideoX latents.

    python jobs/encode_dataset.py --config configs/cogvideox-5b.yaml --input.uri s3://videos --output.uri s3://latents
    ray job submit --working-dir . -- python jobs/encode_dataset.py --config …

Without arguments it runs the quick start on the clips that come with the project.
"""

import sys
from pathlib import Path

# The short form of `ray job submit` runs this file without installing the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import RunConfig
from pipeline.encode_work import EncodeWork
from pipeline.job import run_job


def main(arguments: list[str]) -> int:
    return run_job(
        arguments,
        RunConfig,
        EncodeWork,
        about="Encodes videos into a Parquet dataset of CogVideoX latents.",
        example="configs/example.yaml",
        quick_start=Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
