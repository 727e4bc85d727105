"""What is known of latents on their way to the decoder: found in a file, then planned. Plain frozen values."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import TerminalError
from pipeline.latents.layout import Layout
from pipeline.plan import ProbedFile, file_key

Columns = dict[str, str | int | float | bool | None]
"""What is said about a latent beside it; lists, objects and dates are text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLatent:
    """One clip in a file, or why this one cannot be used where its neighbours may be."""

    key: str
    """Name of the tensor in its file; empty where the format has no names."""
    row: int | None = None
    """Row of a Parquet file."""
    member: int | None = None
    """Number of the clip in a tensor that holds several."""
    shape: tuple[int, ...] = ()
    """``(C, F, H, W)`` of the clip, front pad included."""
    layout: Layout = "CFHW"
    """Of the tensor that holds it."""
    dtype: str = ""
    columns: Columns = field(default_factory=dict)
    error: TerminalError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedLatents(ProbedFile):
    """A listed file, and the clips in it; a row's own columns go before the file's."""

    is_shard: bool = False
    """Written by our own ``ShardWriter``: its latents are unscaled."""
    latents: tuple[FoundLatent, ...] = ()

    def dump(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"latents": [_dump_found(found) for found in self.latents], "error": _dump_error(self.error)}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> ProbedLatents:
        """The inverse of ``dump``."""
        latents = tuple(
            FoundLatent(**{**found, "shape": tuple(found["shape"]), "error": _load_error(found["error"])})
            for found in values["latents"]
        )
        return cls(**{**values, "latents": latents, "error": _load_error(values["error"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLatent:
    """One clip to decode."""

    sample_id: str
    uri: str
    size_bytes: int
    version: str
    """ETag, or modification time: with the size, tells whether the file is still what was planned."""
    key: str
    row: int | None
    member: int | None
    layout: Layout
    """Of the tensor that holds the clip."""
    shape: tuple[int, int, int, int]
    """``(C, F, H, W)`` of what is decoded: without the front pad."""
    dtype: str
    """Of the stored tensor."""
    multiplier: float | None
    """What the latent was multiplied by; None: nothing."""
    drop_frames: int
    """Latent frames in front that are padding."""
    name: str
    """Unique stem of the video's file."""
    fps: float
    columns: Columns

    @property
    def place(self) -> str:
        """Where it is, for a message: file, tensor, row and number in a batch."""
        parts = [self.uri, f"tensor {self.key}" if self.key and self.row is None else ""]
        parts += [f"{what} {number}" for what, number in (("row", self.row), ("clip", self.member)) if number is not None]
        return " ".join(filter(None, parts))

    @property
    def bucket_key(self) -> str:
        """``16x13x60x90``: clips that can be decoded together."""
        return "x".join(map(str, self.shape))

    @property
    def file_key(self) -> str:
        return file_key(self.uri, self.size_bytes, self.version)

    @property
    def files(self) -> dict[str, str]:
        return {self.uri: self.file_key}

    @property
    def num_frames(self) -> int:
        """Frames of the video: 4(F-1)+1 for an odd F, 4F for an even one."""
        frames = self.shape[1]
        return 4 * (frames - 1) + 1 if frames % 2 else 4 * frames


def plain_columns(values: Mapping[str, Any]) -> Columns:
    """A row's values as ``Columns``; bytes are left out."""
    return {name: _plain(value) for name, value in values.items() if not isinstance(value, bytes | bytearray | memoryview)}


def _plain(value: Any) -> str | int | float | bool | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such numbers; many tools mean by it that there is none
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else str(value)


def _dump_found(found: FoundLatent) -> dict[str, Any]:
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return values | {"shape": list(found.shape), "error": _dump_error(found.error)}


def _dump_error(error: TerminalError | None) -> list[str] | None:
    return None if error is None else [error.stage, error.reason, error.detail]


def _load_error(values: list[str] | None) -> TerminalError | None:
    return None if values is None else TerminalError(*values)
