"""Planned items as rows of the plan's Parquet files, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import pyarrow as pa

from pipeline.plan import Item, PlannedClip
from pipeline.types import Bucket, Clip, Crop, TarMember


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat(Generic[Item]):
    """How one kind of work writes down what it plans.

    Every format has the columns ``sample_id``, ``uri``, ``size_bytes`` and ``version``. What passes through is
    added as a column ``columns``.
    """

    work: str
    """The kind of work, as the plan's index names it."""
    schema: pa.Schema
    to_row: Callable[[Item], dict[str, Any]]
    from_row: Callable[[dict[str, Any]], Item]


_CLIP_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
        ("bucket", pa.string()),
        ("frame_start", pa.int64()),
        ("frame_end", pa.int64()),
        ("crop_x", pa.int32()),
        ("crop_y", pa.int32()),
        ("crop_w", pa.int32()),
        ("crop_h", pa.int32()),
        ("source_fps", pa.float64()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        # Of a video in a tar; else null.
        ("member", pa.string()),
        ("member_offset", pa.int64()),
        ("member_bytes", pa.int64()),
    ]
)


def _clip_row(planned: PlannedClip) -> dict[str, Any]:
    clip = planned.clip
    row = {name: getattr(clip, name) for name in _CLIP_SCHEMA.names if hasattr(clip, name)}
    member = clip.member
    row["member"] = None if member is None else member.name
    row["member_offset"] = None if member is None else member.offset
    row["member_bytes"] = None if member is None else member.size_bytes
    row["bucket"] = clip.bucket.key
    row.update({f"crop_{side}": getattr(clip.crop, side) for side in "xywh"})
    return row


def _clip_from_row(row: dict[str, Any]) -> PlannedClip:
    columns = row.pop("columns", None) or {}
    crop = Crop(**{side: row.pop(f"crop_{side}") for side in "xywh"})
    name, offset, size_bytes = (row.pop(column) for column in ("member", "member_offset", "member_bytes"))
    member = None if name is None else TarMember(name=name, offset=offset, size_bytes=size_bytes)
    clip = Clip(bucket=Bucket.parse(row.pop("bucket")), crop=crop, member=member, **row)
    return PlannedClip(clip=clip, columns=columns)


CLIP_ROWS = RowFormat(work="encode", schema=_CLIP_SCHEMA, to_row=_clip_row, from_row=_clip_from_row)
