"""Encode and decode against diffusers: the same weights and input, in turns, outputs compared first.

Random weights, one clip of 9x96x96 in float32 on CPU, the published architecture. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import diffusers
import torch

from cogvae import AutoencoderKLCogVideoX

ROUNDS = 5


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLCogVideoX().eval()
    ours = AutoencoderKLCogVideoX().eval()
    ours.load_state_dict(theirs.state_dict())
    frames, latent = torch.rand(1, 3, 9, 96, 96) * 2 - 1, torch.randn(1, 16, 3, 12, 12)
    pairs: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
        "encode": (lambda: ours.encode(frames)[0].parameters, lambda: theirs.encode(frames)[0].parameters),
        "decode": (lambda: ours.decode(latent)[0], lambda: theirs.decode(latent)[0]),
    }
    report: dict[str, object] = {"bench": "vae", "input": "9x96x96 float32 CPU", "threads": torch.get_num_threads()}
    for name, (run_ours, run_theirs) in pairs.items():
        expected = run_theirs()
        error = float((run_ours() - expected).norm() / expected.norm())
        assert error < 1e-5, f"{name}: relative error {error}"
        times: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for _ in range(ROUNDS):
            for who, run in (("ours", run_ours), ("diffusers", run_theirs)):
                start = time.perf_counter()
                run()
                times[who].append(time.perf_counter() - start)
        seconds = {who: statistics.median(values) for who, values in times.items()}
        report[name] = {
            "seconds": {who: round(value, 3) for who, value in seconds.items()},
            "times_as_fast_as_diffusers": round(seconds["diffusers"] / seconds["ours"], 2),
            "relative_error": error,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
