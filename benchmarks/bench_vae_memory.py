"""Peak memory of one encode or decode above the weights, each in a process of its own: ours and diffusers'.

    python benchmarks/bench_vae_memory.py [SIZE ...]

Random weights, the published architecture, float32 on CPU, frames of SIZE x SIZE (192 if left out). The unit is one
activation of 128 channels, 9 frames, full resolution. Prints one JSON line a figure. Linux with glibc only.

    default     our model as it is made
    tightest    the least memory_budget_bytes that it accepts
    stream      encode_stream or decode_stream, results let go of as they come
    diffusers   untiled; and tiled, at half of SIZE
"""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

WAYS = [
    *((way, num_frames) for num_frames in (9, 17) for way in ("default", "tightest")),
    *(("stream", num_frames) for num_frames in (17, 97)),
    *((way, num_frames) for num_frames in (9, 17) for way in ("diffusers", "diffusers tiled")),
]


def read_status(key: str) -> int:
    """Bytes that the system says this process has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def make_model(way: str, direction: str, shape: tuple[int, ...], size: int) -> Any:
    if way.startswith("diffusers"):
        import diffusers

        vae = diffusers.AutoencoderKLCogVideoX().eval()
        if way.endswith("tiled"):
            vae.enable_tiling(size // 2, size // 2, 1 / 4, 1 / 4)
    else:
        from cogvae import AutoencoderKLCogVideoX

        vae = AutoencoderKLCogVideoX().eval()
        if way == "tightest":
            least = vae.least_encode_bytes(shape) if direction == "encode" else vae.least_decode_bytes(shape)
            vae.enable_tiling(mode="exact", memory_budget_bytes=least)
    if direction == "encode":
        del vae.decoder
    else:
        del vae.encoder
    return vae


def pieces(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A clip that comes frame by frame."""
    for _ in range(shape[2]):
        yield torch.rand(*shape[:2], 1, *shape[3:]) * 2 - 1


@torch.inference_mode()
def measure(way: str, direction: str, num_frames: int, size: int) -> float:
    """Units at the peak of a call, in this process."""
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")  # the plan that was chosen
    torch.manual_seed(0)
    shape = (1, 3, num_frames, size, size)
    if direction == "decode":
        shape = (1, 16, (num_frames + 3) // 4, size // 8, size // 8)
    vae = make_model(way, direction, shape, size)
    x = torch.empty(0) if way == "stream" else torch.rand(shape) * 2 - 1
    torch.nn.functional.conv2d(torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3))  # what the library takes once
    ctypes.CDLL(None).malloc_trim(0)  # what the deleted half left free would be used first, and not be counted
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = read_status("VmRSS")
    if way == "stream":
        stream = vae.encode_stream if direction == "encode" else vae.decode_stream
        for result in stream(pieces(shape), shape[2]):
            del result
    else:
        (vae.encode if direction == "encode" else vae.decode)(x)
    return (read_status("VmHWM") - before) / (128 * 9 * size * size * 4)


def main(arguments: list[str]) -> None:
    if len(arguments) == 4:
        way, direction, num_frames, size = arguments
        print(measure(way, direction, int(num_frames), int(size)))
        return
    for size in arguments or ["192"]:
        for direction in ("encode", "decode"):
            for way, num_frames in WAYS:
                command = [sys.executable, __file__, way, direction, str(num_frames), size]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                plan = next((line for line in done.stderr.splitlines() if line.startswith("plan chosen")), None)
                report = {"bench": "vae_memory", "size": int(size), "direction": direction, "way": way, "frames": num_frames}
                print(json.dumps({**report, "units": round(float(done.stdout), 2), "plan": plan}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
