"""Encode and decode against diffusers: the same weights and input, in turns, outputs compared first.

    python benchmarks/bench_vae.py [--sizes 9x192x192,17x96x96] [--dtypes float32,bfloat16] [--rounds 5] [--device cpu]
    python benchmarks/bench_vae.py --tiny

Random weights, the published architecture, one clip; --tiny: a small model, which shows that this file works. One JSON line
for every size, dtype and direction:

    ours              exact, as the model is made
    ours strips       exact, with the least memory budget that the model accepts
    diffusers         untiled
    ours blend        tiles of half the frame, about a quarter of a tile as overlap
    diffusers tiled   the same tiles

with the median seconds of each, the peers' over ours, and the share of the rate at which this machine multiplies
matrices of the same dtype. FLOP are torch's own count, on the meta device. float32 is float32 on a GPU too: no TF32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cogvae import AutoencoderKLCogVideoX

Run = Callable[[], Tensor]
TINY = {"block_out_channels": (8, 8, 16, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
# (ours, the peer): seconds of the second over the first.
RATIOS = [("ours", "diffusers"), ("ours", "diffusers tiled"), ("ours strips", "diffusers"), ("ours blend", "diffusers tiled")]
# What two ways of one meaning may differ by.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the VAE against diffusers.")
    parser.add_argument("--tiny", action="store_true", help="a small model instead of the published one")
    parser.add_argument("--sizes", default="9x96x96", help="FRAMESxHEIGHTxWIDTH, several with commas between them")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    wanted = parser.parse_args()
    config: dict[str, Any] = TINY if wanted.tiny else {}
    # Of matrices it is off already.
    torch.backends.cudnn.allow_tf32 = False
    for name in wanted.dtypes.split(","):
        dtype = getattr(torch, name)
        theirs, ours = make_models(config, dtype, wanted.device)
        rate = measure_matmul(dtype, wanted.device)
        for size in wanted.sizes.split(","):
            frames, height, width = map(int, size.split("x"))
            channels = ours.config.latent_channels
            shapes = {
                "encode": (1, 3, frames, height, width),
                "decode": (1, channels, (frames + 3) // 4, height // 8, width // 8),
            }
            for direction, shape in shapes.items():
                report = compare(ours, theirs, direction, shape, wanted.rounds)
                about = {"bench": "vae", "size": size, "dtype": name, "device": wanted.device}
                about |= {"threads": torch.get_num_threads(), "matmul_gflop_s": round(rate / 1e9, 1)}
                print(json.dumps({**about, "direction": direction, **add_shares(report, rate)}), flush=True)


def make_models(config: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[Any, AutoencoderKLCogVideoX]:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLCogVideoX(**config).eval()
    ours = AutoencoderKLCogVideoX(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


@torch.inference_mode()
def compare(ours: AutoencoderKLCogVideoX, theirs: Any, direction: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Median seconds, ratios, errors and FLOP of every way to do one thing."""
    x = torch.randn(shape).clamp(-1, 1).to(ours.device, ours.dtype)
    ways = list_ways(ours, theirs, direction, x)
    errors = {
        name: relative_error(ways[name](), ways[peer]())
        for name, peer in (("ours", "diffusers"), ("ours strips", "diffusers"), ("ours blend", "diffusers tiled"))
    }
    bound = BOUNDS[x.dtype]
    assert max(errors.values()) < bound, f"{direction} {shape}: relative errors {errors}, expected less than {bound}"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            synchronise(x)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "times_as_fast": {f"{name} / {peer}": round(seconds[peer] / seconds[name], 2) for name, peer in RATIOS},
        "relative_error": errors,
        "tflop": count_tflop(theirs, direction, x),
    }


def list_ways(ours: AutoencoderKLCogVideoX, theirs: Any, direction: str, x: Tensor) -> dict[str, Run]:
    height, width = (side * (1 if direction == "encode" else 8) for side in x.shape[3:])
    cells = height // 16, width // 16
    tiles = (cells[0] * 8, cells[1] * 8, find_overlap(cells[0]), find_overlap(cells[1]))
    least = (ours.least_encode_bytes if direction == "encode" else ours.least_decode_bytes)(x.shape)

    def run(vae: Any, *tile: float, **settings: Any) -> Run:
        def once() -> Tensor:
            vae.disable_tiling()
            if tile or settings:
                vae.enable_tiling(*tile, **settings)
            result: Tensor = vae.encode(x)[0].parameters if direction == "encode" else vae.decode(x)[0]
            return result

        return once

    return {
        "ours": run(ours),
        "ours strips": run(ours, mode="exact", memory_budget_bytes=least),
        "diffusers": run(theirs),
        "ours blend": run(ours, *tiles),
        "diffusers tiled": run(theirs, *tiles),
    }


def find_overlap(cells: int) -> float:
    """The share of a tile of so many latent cells, from a quarter on, that is whole and stays so in diffusers' arithmetic."""
    for overlap in range(max(1, cells // 4), cells):
        share = overlap / cells
        if all(int(n * cells * (1 - share)) == n * (cells - overlap) and int(n * cells * share) == n * overlap for n in (1, 8)):
            return share
    raise ValueError(f"tiles of {cells} latent cells, half of the frame, cannot overlap: give frames of 32 pixels or more")


def count_tflop(model: Any, direction: str, x: Tensor) -> dict[str, float]:
    # On the meta device float32 is counted as on a processor, where pairs of frames take fewer multiplications.
    dtype = x.dtype if x.device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLCogVideoX.from_config(model.config).to(dtype)
        ours = AutoencoderKLCogVideoX.from_config(model.config).to(dtype)
        ways = list_ways(ours, theirs, direction, torch.empty(x.shape, dtype=dtype))
    counted = {}
    for name, run in ways.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counted[name] = counter.get_total_flops() / 1e12
    return counted


def add_shares(report: dict[str, Any], rate: float) -> dict[str, Any]:
    """With the share of the matmul rate, by the FLOP that each way does itself."""
    shares = {name: round(1e12 * report["tflop"][name] / seconds / rate, 3) for name, seconds in report["seconds"].items()}
    return {
        **report,
        "tflop": {name: float(f"{value:.4g}") for name, value in report["tflop"].items()},
        "share_of_matmul": shares,
    }


@torch.inference_mode()
def measure_matmul(dtype: torch.dtype, device: str) -> float:
    """FLOP a second of the best of a few products of square matrices."""
    side = 2048 if device == "cpu" else 8192
    a = torch.randn(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        synchronise(a)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    main()
