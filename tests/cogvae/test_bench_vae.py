"""The comparison with diffusers runs, at its own default size, and its tiles are what both sides compute alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from bench_vae import find_overlap  # noqa: E402


def test_a_small_model_goes_all_the_way_at_the_default_size() -> None:
    command = [sys.executable, "benchmarks/bench_vae.py", "--tiny", "--rounds", "1", "--dtypes", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    assert [(report["direction"], report["size"]) for report in reports] == [("encode", "9x96x96"), ("decode", "9x96x96")]
    for report in reports:
        assert set(report["seconds"]) == {"ours", "ours strips", "diffusers", "ours blend", "diffusers tiled"}
        assert report["tflop"]["ours"] < report["tflop"]["diffusers"] < report["tflop"]["diffusers tiled"]


def test_an_overlap_is_whole_for_every_tile() -> None:
    for cells in range(2, 200):
        share = find_overlap(cells)
        assert int(cells * (1 - share)) == cells - round(cells * share)
        assert int(8 * cells * (1 - share)) == 8 * (cells - round(cells * share))
        assert share < 0.35 or cells < 4
    assert find_overlap(6) == 1 / 6
    with pytest.raises(ValueError, match="32 pixels"):
        find_overlap(1)
