"""A small real run: four real clips and a tiny real model."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cogvae import AutoencoderKLCogVideoX
from pipeline.account import ExitCode
from pipeline.config import RunConfig
from pipeline.decode_config import DecodeRunConfig
from pipeline.decode_work import DecodeWork
from pipeline.driver import run_work
from pipeline.encode_work import EncodeWork
from pipeline.engine import Engine, load_engine

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "configs" / "quickstart" / "clips"
GOOD_CLIPS = ("bunny_wakes_up.mp4", "cockatoo_looks_up.mkv", "bunny_stretches.webm", "grand_prix_1906.avi")


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def save_tiny_vae(folder: Path) -> Path:
    """Weights of the real architecture, as small as it gets, with norms and biases that do something."""
    torch.manual_seed(7)
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae.save_pretrained(folder)
    return folder


def copy_clips(folder: Path) -> Path:
    """A folder with four real clips, one of them with a caption in a text file, one in JSON."""
    folder.mkdir()
    for name in GOOD_CLIPS:
        for source in CLIPS.glob(Path(name).stem + ".*"):
            shutil.copy2(source, folder)  # with its modification time, which is part of a sample's identity
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return copy_clips(tmp_path / "clips")


@pytest.fixture
def many_clips(clips: Path) -> Path:
    """The four clips five times over, so that a run lasts long enough to be disturbed in the middle."""
    for number in range(4):
        for name in GOOD_CLIPS:
            shutil.copy2(CLIPS / name, clips / f"{number}-{name}")
    return clips


def small_config(clips: Path, vae: Path, dataset: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """Settings of a small run; keyword arguments replace those of a section. One actor: each takes seconds to start."""
    values: dict[str, dict[str, Any]] = {
        "input": {"uri": str(clips)},
        "output": {"uri": str(dataset)},
        "vae": {"weights": str(vae), "dtype": "float32"},
        "clip": {"buckets": ["9x32x48@8"]},
        "cluster": {"actors": 1, "threads_per_actor": 1, "frame_budget_bytes": 1 << 20},
        "run": {"progress": "log", "log_every_s": 0.5},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return RunConfig(**values)  # type: ignore[arg-type]


@pytest.fixture
def make_config(clips: Path, tiny_vae: Path, tmp_path: Path) -> Any:
    return functools.partial(small_config, clips, tiny_vae, tmp_path / "latents")


@pytest.fixture
def make_decode_config(tiny_vae: Path, tmp_path: Path) -> Any:
    """Settings of a small decode run; keyword arguments replace those of a section."""

    def make(**sections: dict[str, Any]) -> DecodeRunConfig:
        values: dict[str, dict[str, Any]] = {
            "input": {"uri": str(tmp_path / "latents")},
            "output": {"uri": str(tmp_path / "videos"), "container": "mkv"},
            "vae": {"weights": str(tiny_vae), "dtype": "float32"},
            "cluster": {"actors": 1, "threads_per_actor": 1, "frame_budget_bytes": 1 << 20},
            "run": {"progress": "log", "log_every_s": 0.5},
        }
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        return DecodeRunConfig(**values)  # type: ignore[arg-type]

    return make


@pytest.fixture
def ray_tmp() -> Iterator[Path]:
    """A folder for Ray's own files. Short, since Ray puts Unix sockets in it."""
    folder = Path(f"/tmp/rt{os.getpid()}{time.monotonic_ns() % 10**6}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_encode(config: RunConfig, make_engine: Callable[..., Engine] = load_engine) -> ExitCode:
    return run_work(EncodeWork(config, make_engine))


def run_decode(config: DecodeRunConfig, make_engine: Callable[..., Engine] = load_engine) -> ExitCode:
    return run_work(DecodeWork(config, make_engine))


def read_rows(dataset: Path) -> dict[str, dict[str, Any]]:
    """Every row of a dataset by its id; a row that stands twice fails the test."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((dataset / "data").rglob("*.parquet")):
        for row in pq.ParquetFile(file).read().to_pylist():
            assert row["sample_id"] not in rows
            rows[row["sample_id"]] = row
    return rows


def read_quarantine(dataset: Path) -> list[dict[str, Any]]:
    return pq.read_table(dataset / "quarantine.parquet").to_pylist()
