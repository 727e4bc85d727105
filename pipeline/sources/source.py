"""What every source yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceItem:
    """One file, of a video or of latents, as the input lists it."""

    uri: str
    size_bytes: int | None = None
    """None: not known from the listing; asked for when the file is probed."""
    version: str | None = None
    sidecars: tuple[str, ...] = ()
    """URIs of caption files beside the video, read when it is probed."""
    sidecar_versions: tuple[str, ...] = ()
    """Size and version of each, as the listing has them: other captions are another item."""
    problem: str | None = None
    """Why the input's own entry names no file."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the input says about it; passed through to the dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceListing:
    """The items of an input, and the Arrow types of their columns where the input has types."""

    items: Iterator[SourceItem]
    schema: pa.Schema | None = None
