"""A training run on disk: one safetensors file that holds all tensors and, in its header, all scalars.

One file, because it can be replaced in one step: weights and optimizer never disagree about the step they belong to.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_HEADER = "training"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and scalars as JSON holds them."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix.``, without it."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def save(self, path: Path) -> None:
        """Write it so that the file under this name is always whole, even after a power cut."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, partial, metadata={_HEADER: json.dumps(self.scalars)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises: ValueError: the file is no checkpoint of this trainer."""
        try:
            with safe_open(path, framework="pt") as file:
                scalars = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: no checkpoint of this trainer ({error!r}). Move it away to begin anew.") from error
        return cls(tensors, scalars)
