#!/usr/bin/env python3
"""Decode latents to videos: a dataset's, or those that a generator wrote.

    python jobs/decode_latents.py --input.uri s3://generated --input.scale cogvideox-5b --output.uri s3://videos \\
        --vae.weights THUDM/CogVideoX-5b --vae.subfolder vae
    ray job submit --working-dir . -- python jobs/decode_latents.py …
"""

import sys
from pathlib import Path

# The short form of `ray job submit` runs this file without installing the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.decode_config import DecodeRunConfig
from pipeline.decode_work import DecodeWork
from pipeline.job import run_job


def main(arguments: list[str]) -> int:
    return run_job(
        arguments,
        DecodeRunConfig,
        DecodeWork,
        about="Decodes CogVideoX latents to videos.",
        example="configs/decode.yaml",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
