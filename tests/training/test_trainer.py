"""The loop learns, and a run that was interrupted is the run that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX
from tests.training.conftest import MakeConfig
from training.checkpoint import Checkpoint
from training.trainer import CHECKPOINT, LOG, WEIGHTS, Trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    trainer.save()
    return Checkpoint.load(trainer.folder / CHECKPOINT).tensors


def read_log(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.folder / LOG).read_text().splitlines()]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_few_steps_lower_the_loss_of_a_fixed_batch(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trainer = Trainer(make_config(optimizer={"name": name, "learning_rate": 5e-3}, run={"steps": 100}))
    batch = trainer.data.batch(0)
    monkeypatch.setattr(trainer.data, "batch", lambda step: batch)
    losses = [trainer.train_step()["loss"] for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(make_config: MakeConfig, precision: str) -> None:
    whole = Trainer(make_config("whole", run={"precision": precision, "steps": 6}))
    lines = [whole.train_step() for _ in range(6)]

    first = Trainer(make_config("parts", run={"precision": precision, "steps": 6}))
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(make_config("parts", run={"precision": precision, "steps": 6}))
    assert second.step == 3
    resumed = [second.train_step() for _ in range(3)]

    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines[3:]]
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {name.split(".")[0] for name in expected} == {"model", "average", "optimizer"}


def test_a_run_logs_checkpoints_and_exports(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(run={"steps": 3, "evaluate_every": 2}))
    trainer.run()
    assert [line["step"] for line in read_log(trainer)] == [1, 2, 3]
    assert {"loss", "pixel", "pyramid", "structure", "kl", "gradient_norm"} <= read_log(trainer)[0].keys()
    assert Checkpoint.load(trainer.folder / CHECKPOINT).scalars["step"] == 3
    AutoencoderKLCogVideoX.from_pretrained(trainer.folder / WEIGHTS)


def test_a_stopped_run_leaves_a_checkpoint_of_where_it_was(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_config(run={"steps": 100}))
    step = trainer.train_step

    def stop_at_two() -> dict[str, float]:
        if trainer.step == 1:
            trainer.stop()
        return step()

    monkeypatch.setattr(trainer, "train_step", stop_at_two)
    trainer.run()
    assert Checkpoint.load(trainer.folder / CHECKPOINT).scalars["step"] == 2
    assert not (trainer.folder / WEIGHTS).exists()


def test_an_update_that_is_not_finite_is_left_out(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_config())
    before = {name: tensor.clone() for name, tensor in trainer.vae.state_dict().items()}
    batch = trainer.data.batch(0)
    monkeypatch.setattr(trainer.data, "batch", lambda step: batch * float("nan"))
    trainer.train_step()
    assert (trainer.step, trainer.num_updates) == (1, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.vae.state_dict().items())


def test_training_starts_from_given_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    source = Trainer(make_config("source"))
    source.vae.save_pretrained(tmp_path / "vae")
    tuned = Trainer(make_config("tuned", model={"init": str(tmp_path / "vae"), "block_out_channels": (4, 4)}))
    assert tuned.vae.config.block_out_channels == (8, 8, 8, 8)
    expected = source.vae.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in tuned.vae.state_dict().items())
    tuned.train_step()


def test_a_folder_with_another_run_is_refused(make_config: MakeConfig) -> None:
    Trainer(make_config()).save()
    with pytest.raises(ValueError, match=r"run\.seed is 7, the run in .* has 0"):
        Trainer(make_config(run={"seed": 7}))
    with pytest.raises(ValueError, match="another architecture"):
        Trainer(make_config(model={"layers_per_block": 2}))


def test_a_damaged_checkpoint_is_refused_and_nothing_partial_is_left(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    trainer.save()
    path = trainer.folder / CHECKPOINT
    assert [p.name for p in trainer.folder.iterdir()] == [CHECKPOINT]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no checkpoint of this trainer"):
        Trainer(make_config())
