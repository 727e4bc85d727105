"""An encode run on object storage that is disturbed, and what must hold of it whatever the disturbance was."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipeline import failpoints
from pipeline.config import JobConfig, RunConfig
from pipeline.dataset import LatentDataset
from pipeline.engine import Engine, load_engine
from pipeline.errors import DatasetError
from pipeline.plan_store import read_column, read_generations, read_rejections
from pipeline.quarantine import QUARANTINE_PATH
from pipeline.storage import Storage
from pipeline.types import EncodedClip, Frames

READ_TIMEOUT_S = 3
MAX_ATTEMPTS = 3
LONGEST_BRAKE_S = 10.0


def make_config(clips: str, vae: Path, output: str, store: dict[str, Any]) -> RunConfig:
    """Settings of a run with ten clips or so. ``store`` holds endpoint and keys."""
    options = {**store, "config_kwargs": {"read_timeout": READ_TIMEOUT_S}}
    return RunConfig(
        input={"uri": clips, "storage_options": options},  # type: ignore[arg-type]
        output={"uri": output, "storage_options": options},  # type: ignore[arg-type]
        vae={"weights": str(vae), "dtype": "float32"},  # type: ignore[arg-type]
        clip={"buckets": ["9x32x48@8"], "windows": "all"},  # type: ignore[arg-type]
        encode={"max_attempts": MAX_ATTEMPTS},  # type: ignore[arg-type]
        cluster={"actors": 1, "threads_per_actor": 1, "frame_budget_bytes": 1 << 20},  # type: ignore[arg-type]
        run={"progress": "log", "log_every_s": 0.5},  # type: ignore[arg-type]
    )


class CountingEngine:
    """A real engine that notes every forward pass in the file ``tally``, across all actors of a run.

    A file ``brake`` beside it holds each pass up for a while.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._tally, self._brake = folder / "tally", folder / "brake"

    def encode(self, clips: Sequence[Frames]) -> Any:
        end = time.monotonic() + LONGEST_BRAKE_S
        while self._brake.exists() and time.monotonic() < end:
            time.sleep(0.05)
        with self._tally.open("ab") as file:
            file.write(b"." * len(clips))
        return self._engine.encode(clips)

    def decode(self, latents: Sequence[torch.Tensor]) -> Any:
        return self._engine.decode(latents)

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        return self._engine.measure_psnr(frames, encoded)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    def tighten(self) -> str | None:
        return None


def load_armed(folder: Path, armed: str, config: JobConfig, fingerprint: str, device: str, threads: int | None) -> Engine:
    """A model for an actor that fails as ``armed`` says, once in a run; then other actors do not.

    ``folder`` is where the actors of a run leave what they have to say: ``reached`` and ``tally``. The model works on the
    CPU; a cluster may claim GPUs that it does not have, to say where actors belong.
    """
    os.environ["FAILPOINTS_MARK"] = str(folder / "reached")
    failpoints.arm("" if (folder / "reached").exists() else armed)
    failpoints.reach("load")
    return CountingEngine(load_engine(config, fingerprint, "cpu", threads), folder)


def start_driver(config: RunConfig, folder: Path, armed: str = "", **environment: str) -> subprocess.Popen[bytes]:
    """A driver in a process of its own. RAY_ADDRESS among ``environment`` says on which cluster."""
    settings = folder / "config.json"
    settings.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "tests.faults.drive", str(settings), str(folder), armed]
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)


@dataclass
class Watcher:
    """Reads a dataset over and over while a run makes it, as somebody who cannot wait would."""

    storage: Storage
    num_rows: int
    """Of the finished dataset."""
    looks: int = 0
    problems: list[str] = field(default_factory=list)
    _whole: set[str] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watcher:
        self._thread = threading.Thread(target=self._watch, name="watcher")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            self.looks += 1
            self._ended.wait(0.2)

    def _look(self) -> None:
        for found in self.storage.list("data"):
            if found.uri not in self._whole:
                data = self.storage.read(found.uri)
                pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
                self._whole.add(found.uri)
        try:
            dataset = LatentDataset(self.storage.uri, storage_options=self.storage.options)
        except DatasetError as error:
            if "allow_incomplete" not in str(error) and "there is nothing there" not in str(error):
                raise
            return
        if len(dataset) != self.num_rows:
            self.problems.append(f"a manifest that names {len(dataset)} of {self.num_rows} samples")
        dataset[len(dataset) - 1]


def read_rows(storage: Storage) -> dict[str, dict[str, Any]]:
    """Every committed row by its id; one that stands twice fails the test."""
    rows: dict[str, dict[str, Any]] = {}
    for found in storage.list("data", ".parquet"):
        for row in pq.ParquetFile(io.BytesIO(storage.read(found.uri)), page_checksum_verification=True).read().to_pylist():
            assert row["sample_id"] not in rows
            rows[row["sample_id"]] = row
    return rows


def check_outcome(
    storage: Storage, expected: dict[str, dict[str, Any]], tally: Path, watcher: Watcher, most_passes: int | None = None
) -> None:
    """What must hold: every planned clip once, the rows of an undisturbed run, bounded work, nothing partial seen."""
    rows = read_rows(storage)
    quarantine = pq.read_table(io.BytesIO(storage.read(QUARANTINE_PATH))).to_pylist()
    left_out = [row["sample_id"] for row in quarantine]
    planned: list[str] = []
    for generation in read_generations(storage):
        planned += read_column(storage, generation, "sample_id")
        planned += [rejection.sample_id for rejection in read_rejections(storage, generation)]
    assert sorted(planned) == sorted([*rows, *left_out])
    assert rows == expected
    status = storage.read_json("status.json")
    assert (status["exit_code"], status["planned"], status["pending"]) == (0, len(planned), 0), json.dumps(status)
    assert len(LatentDataset(storage.uri, storage_options=storage.options)) == len(rows)
    assert tally.stat().st_size <= (most_passes or MAX_ATTEMPTS * len(rows))
    assert watcher.problems == []
    assert watcher.looks > 2


def wait_for(path: Path, deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.02)
