"""A clip that crashes or hangs its actor each time: it alone is quarantined, and no other clip is lost or changed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.account import ExitCode
from pipeline.types import Frames
from tests.jobs.conftest import read_quarantine, read_rows, run_decode, run_encode
from tests.jobs.sabotage import load_poisoned

pytestmark = pytest.mark.usefixtures("cluster")


def is_grey(frames: Frames) -> bool:
    """As only the film of 1906 is."""
    return bool(np.abs(frames[..., 0].astype(int) - frames[..., 2]).mean() < 3)


def is_bright(latent: torch.Tensor) -> bool:
    return bool(latent.mean() > 5)


def test_a_clip_that_crashes_its_actor_is_found_among_its_batch(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan.MIN_SHARDS", 1)  # one shard of four clips, two batches
    undisturbed = make_config(encode={"batch_size": 2}, output={"uri": str(tmp_path / "undisturbed")})
    assert run_encode(undisturbed) == ExitCode.COMPLETE
    config = make_config(encode={"batch_size": 2, "max_attempts": 1})
    assert run_encode(config, functools.partial(load_poisoned, "crash", is_grey)) == ExitCode.COMPLETE
    (row,) = read_quarantine(Path(config.output.uri))
    assert Path(row["uri"]).name == "grand_prix_1906.avi"
    assert (row["stage"], row["reason"]) == ("encode", "crashed_actor")
    assert row["detail"] == "the process crashed each time that it was at work alone"
    before, after = read_rows(Path(undisturbed.output.uri)), read_rows(Path(config.output.uri))
    assert before.keys() - after.keys() == {row["sample_id"]}
    for sample_id, kept in after.items():  # what is batched with what differs by rounding
        latents = [np.frombuffer(row["vae_latent_bytes"], np.float32) for row in (kept, before[sample_id])]
        np.testing.assert_allclose(*latents, rtol=1e-3, atol=1e-4)


def test_a_latent_that_hangs_its_actor_is_found_by_its_deadline(make_decode_config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    for number in range(3):
        save_file({"latent": torch.full((16, 2, 4, 6), 9.0 if number == 1 else 0.1 * number)}, folder / f"{number}.safetensors")
    config = make_decode_config(input={"scale": "none"}, decode={"batch_timeout_s": 4, "max_attempts": 1})
    assert run_decode(config, functools.partial(load_poisoned, "hang", is_bright)) == ExitCode.COMPLETE
    (row,) = read_quarantine(Path(config.output.uri))
    assert (Path(row["uri"]).name, row["reason"]) == ("1.safetensors", "hung_actor")
    status = json.loads(Path(config.output.uri, "status.json").read_text())
    assert (status["written"], status["quarantined"], status["pending"]) == (2, 1, 0)
