"""Planned latents as rows of the plan's Parquet files, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from pipeline.latents.types import PlannedLatent
from pipeline.plan_rows import RowFormat

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
        ("key", pa.string()),
        ("row", pa.int64()),
        ("member", pa.int64()),
        ("layout", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("dtype", pa.string()),
        ("multiplier", pa.float64()),
        ("drop_frames", pa.int64()),
        ("name", pa.string()),
        ("fps", pa.float64()),
    ]
)


def _to_row(planned: PlannedLatent) -> dict[str, Any]:
    values = {field.name: getattr(planned, field.name) for field in dataclasses.fields(planned)}
    return values | {"shape": list(planned.shape)}


def _from_row(row: dict[str, Any]) -> PlannedLatent:
    return PlannedLatent(**{**row, "shape": tuple(row["shape"]), "columns": row.get("columns") or {}})


LATENT_ROWS = RowFormat(work="decode", schema=_SCHEMA, to_row=_to_row, from_row=_from_row)
