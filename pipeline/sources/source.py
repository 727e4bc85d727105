"""What every source yields."""

from __future__ import annotations

import posixpath
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
    is_tar: bool = False
    """Whether the videos are its members; probing finds any number of them."""
    problem: str | None = None
    """Why the input's own entry names no file."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the input says about it; passed through to the dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceListing:
    """The items of an input, and the Arrow types of their columns where the input has types."""

    items: Iterator[SourceItem]
    schema: pa.Schema | None = None


def as_unnamable(uri: str) -> SourceItem | None:
    """An item that says so, if a file's name cannot be written down; Python reads its bytes as lone surrogates."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        name = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return SourceItem(uri=name, problem=f"{name}: its name is not UTF-8; rename it")
    return None


def resolve_address(path: str, table_uri: str) -> str | None:
    """The address of a file that a table or list names; None if it climbs above its bucket, which would name another one."""
    is_absolute = "://" in path or path.startswith("/")
    if is_absolute:
        return path
    folder = table_uri.rpartition("/")[0]
    scheme, separator, place = folder.rpartition("://")
    if not separator:
        return posixpath.normpath(f"{folder}/{path}")
    bucket, _, prefix = place.partition("/")
    key = posixpath.normpath(posixpath.join(prefix, path))  # an object store knows no "./" and "../"
    return None if key.split("/")[0] == ".." else f"{scheme}://{bucket}/{key}"
