"""Encode and decode on a GPU in bfloat16: ours with the Triton kernels, ours with their twins, and diffusers if installed.

Random weights, the published architecture, 49x480x720 and 81x768x1360, one clip and four, untiled. Outputs are compared
first, the contenders take turns, the median counts. Peak memory is above weights and input. The share is of the rate of
a large matrix product, measured here. Prints one JSON line; without a GPU, a sentence. --tiny: a small model on a
processor, which shows that this file works and measures nothing.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogvae import AutoencoderKLCogVideoX

Run = Callable[[], torch.Tensor]
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Setting:
    device: str
    config: dict[str, Any]
    clips: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    rounds: int
    matmul: int
    tolerance: float


GPU = Setting(
    device="cuda",
    config={},
    clips=((49, 480, 720), (81, 768, 1360)),
    batches=(1, 4),
    rounds=5,
    matmul=8192,
    tolerance=0.1,  # of two computations in bfloat16, each of which is some per cent off
)
TINY = Setting(
    device="cpu",
    config={"block_out_channels": (8, 8, 16, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
    clips=((9, 16, 24),),
    batches=(1, 2),
    rounds=1,
    matmul=64,
    tolerance=0.1,
)


@torch.inference_mode()
def measure(setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    models = make_models(setting)
    rate = matmul_rate(setting)
    report: dict[str, Any] = {
        "bench": "gpu",
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "CPU: measures nothing",
        "torch": torch.__version__,
        "matmul_tflops": round(rate / 1e12, 3),
    }
    for frames, height, width in setting.clips:
        for batch in setting.batches:
            x = torch.rand(batch, 3, frames, height, width, device=setting.device).mul_(2).sub_(1).bfloat16()
            channels = models["ours"].config.latent_channels
            z = torch.randn(batch, channels, (frames + 3) // 4, height // 8, width // 8, device=setting.device).bfloat16()
            for direction, given in (("encode", x), ("decode", z)):
                runs = {name: make_run(model, direction, given) for name, model in models.items()}
                flops = count_flops(setting, direction, given)
                report[f"{direction} {batch}x{frames}x{height}x{width}"] = compare(setting, runs, flops, rate)
    return report


def make_models(setting: Setting) -> dict[str, Any]:
    """All with the same weights."""
    ours = AutoencoderKLCogVideoX(**setting.config).to(setting.device, torch.bfloat16).eval()
    twins = AutoencoderKLCogVideoX(**setting.config).to(setting.device, torch.bfloat16).eval()
    twins.load_state_dict(ours.state_dict())
    twins.use_triton = False
    models: dict[str, Any] = {"ours": ours, "ours, plain twins": twins}
    if importlib.util.find_spec("diffusers") is not None:
        import diffusers

        theirs = diffusers.AutoencoderKLCogVideoX(**setting.config).to(setting.device, torch.bfloat16).eval()
        theirs.load_state_dict(ours.state_dict())
        models["diffusers"] = theirs
    return models


def make_run(model: Any, direction: str, given: torch.Tensor) -> Run:
    if direction == "encode":
        return lambda: model.encode(given).latent_dist.parameters  # type: ignore[no-any-return]
    return lambda: model.decode(given).sample  # type: ignore[no-any-return]


def count_flops(setting: Setting, direction: str, given: torch.Tensor) -> int:
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX(**setting.config).bfloat16()
    with FlopCounterMode(display=False) as counter:
        make_run(model, direction, given.to("meta"))()
    return counter.get_total_flops()


def compare(setting: Setting, runs: dict[str, Run], flops: int, rate: float) -> dict[str, Any]:
    """Seconds, peak memory and share of the matmul rate of each, by the number of our multiplications."""
    peaks, errors = {}, {}
    # Diffusers, if it is there and its result fits, is what the others are held to.
    reference: torch.Tensor | None = None
    for name in reversed(runs):
        result, peaks[name] = peak_of(setting, runs[name])
        if result is None:
            continue
        if reference is None:
            reference = result
            continue
        errors[name] = float((result - reference).float().norm() / reference.float().norm())
        assert errors[name] < setting.tolerance, f"{name}: relative error {errors[name]}"
    del reference, result
    times: dict[str, list[float]] = {name: [] for name in runs if peaks[name] != OUT_OF_MEMORY}
    for _ in range(setting.rounds):
        for name, seconds in times.items():
            seconds.append(seconds_of(setting, runs[name]))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    found: dict[str, Any] = {
        "seconds": {name: round(seconds, 4) for name, seconds in medians.items()},
        "peak_gb": peaks,
        "relative_error": errors,
        "tflop": float(f"{flops / 1e12:.4g}"),
    }
    if "ours" in medians:
        found["share_of_matmul_rate"] = float(f"{flops / medians['ours'] / rate:.3g}")
        found["times_as_fast"] = {name: round(medians[name] / medians["ours"], 2) for name in medians if name != "ours"}
    return found


def peak_of(setting: Setting, run: Run) -> tuple[torch.Tensor | None, float | str | None]:
    """The result, and GB at the peak above what was there before; None on a processor, where torch does not count them."""
    if setting.device != "cuda":
        return run(), None
    run_once_to_load_libraries(run)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        result = run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, OUT_OF_MEMORY
    return result, round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def run_once_to_load_libraries(run: Run) -> None:
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()


def seconds_of(setting: Setting, run: Run) -> float:
    synchronize(setting)
    start = time.perf_counter()
    run()
    synchronize(setting)
    return time.perf_counter() - start


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(setting: Setting) -> float:
    """FLOP a second of a square matrix product in bfloat16."""
    size = setting.matmul
    a, b = torch.randn(2, size, size, device=setting.device).bfloat16()
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(seconds_of(setting, lambda: a @ b) for _ in range(10))


def main() -> None:
    if "--tiny" in sys.argv[1:]:
        print(json.dumps(measure(TINY)))
    elif torch.cuda.is_available():
        print(json.dumps(measure(GPU)))
    else:
        print("bench_gpu: torch finds no CUDA GPU here, so nothing was measured")


if __name__ == "__main__":
    main()
