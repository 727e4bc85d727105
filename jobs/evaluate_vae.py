#!/usr/bin/env python3
"""PSNR and SSIM of a VAE's reconstructions: one line a video of a folder, 17 frames at 128 to 256 pixels each.

python jobs/evaluate_vae.py configs/quickstart/vae configs/quickstart/clips
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cogvae import AutoencoderKLCogVideoX
from pipeline.errors import PipelineError
from pipeline.progress import LogHandler
from training.data import decode_held_out
from training.evaluate import score_clips, table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="folder, fsspec URL or hub id of the VAE")
    parser.add_argument("clips", help="local folder of videos")
    parser.add_argument("--subfolder", help="folder of the VAE inside the weights, usually vae for a whole pipeline")
    options = parser.parse_args(arguments)
    logging.basicConfig(level="WARNING", handlers=[LogHandler()])
    logging.getLogger("training").setLevel("INFO")
    try:
        vae = AutoencoderKLCogVideoX.from_pretrained(options.weights, subfolder=options.subfolder)
        for line in table(score_clips(vae, decode_held_out(options.clips))):
            print(line)
    except (ValueError, OSError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
