"""Files of latents in every form, and the whole way from a URI to tensors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline.latents import (
    LatentInputConfig,
    LatentReader,
    PlannedLatent,
    ProbedLatents,
    list_latents,
    plan_latents,
    probe_latents,
)
from pipeline.latents.naming import Names
from pipeline.types import Rejection

CHANNELS = 16
SHAPE = (CHANNELS, 5, 4, 6)
LAYOUTS = ("CFHW", "FCHW", "BCFHW", "BFCHW")
FORMATS = (".safetensors", ".npy", ".npz", ".pt", ".parquet")


def make_latent(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lay_out(latent: torch.Tensor, layout: str) -> torch.Tensor:
    """``[C, F, H, W]`` in another layout; a batch of one."""
    ordered = latent.transpose(0, 1) if layout in ("FCHW", "BFCHW") else latent
    return (ordered.unsqueeze(0) if layout.startswith("B") else ordered).contiguous()


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """bfloat16 as numpy writes it for those who registered the dtype: two bytes without a meaning."""
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def triplet(tensor: torch.Tensor, name: str = "vae_latent") -> dict[str, Any]:
    return {
        f"{name}_bytes": to_bytes(tensor),
        f"{name}_shape": list(tensor.shape),
        f"{name}_dtype": str(tensor.dtype).removeprefix("torch."),
    }


def file_bytes(tensor: torch.Tensor, suffix: str) -> bytes:
    sink = io.BytesIO()
    if suffix == ".safetensors":
        return safetensors.torch.save({"latent": tensor})
    if suffix == ".npy":
        np.save(sink, as_numpy(tensor))
    elif suffix == ".npz":
        np.savez_compressed(sink, latent=as_numpy(tensor))
    elif suffix == ".pt":
        torch.save({"latent": tensor}, sink)
    else:
        pq.write_table(pa.Table.from_pylist([triplet(tensor)]), sink)
    return sink.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(uri: Any, **settings: Any) -> LatentInputConfig:
    return LatentInputConfig(uri=str(uri), **{"scale": "none", **settings})


def probe(config: LatentInputConfig, channels: int = CHANNELS) -> list[ProbedLatents]:
    return probe_latents(list(list_latents(config).items), config, channels)


def plan(config: LatentInputConfig, fps: float = 8.0) -> list[PlannedLatent | Rejection]:
    return list(plan_latents(probe(config), config, "recipe", fps, Names()))


def plan_all(config: LatentInputConfig, **rest: Any) -> list[PlannedLatent]:
    """What is planned, where nothing may be rejected."""
    planned = plan(config, **rest)
    assert not [item for item in planned if isinstance(item, Rejection)]
    return [item for item in planned if isinstance(item, PlannedLatent)]


def rejections(config: LatentInputConfig) -> list[Rejection]:
    return [item for item in plan(config) if isinstance(item, Rejection)]


def read_all(config: LatentInputConfig) -> list[torch.Tensor]:
    reader = LatentReader(config.storage_options, config.max_file_bytes)
    return [reader.read(item) for item in plan_all(config)]
