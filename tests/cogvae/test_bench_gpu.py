"""The measurements for a GPU run: on a processor with a small model, or not at all but in peace."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_bench(*arguments: str) -> str:
    command = [sys.executable, "benchmarks/bench_gpu.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_without_a_gpu_it_says_so() -> None:
    assert run_bench() == "bench_gpu: torch finds no CUDA GPU here, so nothing was measured\n"


def test_a_small_model_goes_all_the_way() -> None:
    report = json.loads(run_bench("--tiny"))
    assert report["device"] == "CPU: measures nothing"
    for key in (f"{direction} {batch}x9x16x24" for direction in ("encode", "decode") for batch in (1, 2)):
        found = report[key]
        assert set(found["seconds"]) == {"ours", "ours, plain twins", "diffusers"}
        assert set(found["relative_error"]) == {"ours", "ours, plain twins"}
        assert set(found["times_as_fast"]) == {"ours, plain twins", "diffusers"}
        assert found["tflop"] > 0
        assert found["share_of_matmul_rate"] > 0
