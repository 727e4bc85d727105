"""A run small enough for a test: a few thousand parameters, frames of 16 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import TrainConfig

MakeConfig = Callable[..., TrainConfig]


def tiny_config(output: Path, **sections: dict[str, Any]) -> TrainConfig:
    settings: dict[str, dict[str, Any]] = {
        "run": {"output": str(output), "steps": 4, "log_every": 1, "device": "cpu"},
        "model": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4},
        "data": {"num_pictures": 3, "shapes": ("2x9x16x16", "2x17x16x16")},
        "optimizer": {"warmup_steps": 2},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return TrainConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(name: str = "run", **sections: dict[str, Any]) -> TrainConfig:
        return tiny_config(tmp_path / name, **sections)

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Nothing here is large enough for two, and a busy machine makes two slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
