"""Peak memory of one encode or decode above the weights, each in a process of its own: ours and diffusers'.

Random weights, the published architecture, float32 on CPU, 9 frames of SIZE x SIZE (first argument, 192 if left out) and
17. The unit is one activation of 128 channels, 9 frames, full resolution. Prints one JSON line. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

BUDGET_UNITS = {"encode": 4.0, "decode": 5.5}


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def measure(who: str, direction: str, num_frames: int, size: int) -> float:
    """Units at the peak of a call, in this process."""
    unit = 128 * 9 * size * size * 4
    torch.manual_seed(0)
    if who == "diffusers":
        import diffusers

        vae = diffusers.AutoencoderKLCogVideoX().eval()
    else:
        from cogvae import AutoencoderKLCogVideoX

        vae = AutoencoderKLCogVideoX().eval()
    if who == "lean":
        chunks = 1 if num_frames <= 9 else 1.5
        vae.enable_tiling(mode="exact", memory_budget_bytes=int(BUDGET_UNITS[direction] * chunks * unit))
    if direction == "encode":
        del vae.decoder
        run, x = vae.encode, torch.rand(1, 3, num_frames, size, size) * 2 - 1
    else:
        del vae.encoder
        run, x = vae.decode, torch.randn(1, 16, (num_frames + 3) // 4, size // 8, size // 8)
    torch.nn.functional.conv2d(torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3))  # what the library takes once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = status_bytes("VmRSS")
    run(x)
    return (status_bytes("VmHWM") - before) / unit


def main() -> None:
    if len(sys.argv) == 5:
        print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 192
    report: dict[str, object] = {"bench": "vae_memory", "input": f"{size}x{size} float32 CPU"}
    for direction in ("encode", "decode"):
        for num_frames in (9, 17):
            for who in ("ours", "lean", "diffusers"):
                command = [sys.executable, __file__, who, direction, str(num_frames), str(size)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                report[f"{direction} {num_frames} {who}"] = round(float(found), 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
