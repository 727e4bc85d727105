"""Writing a generation of the plan, a part at a time: memory holds one Parquet file of bounded size, whatever the plan's.

Parts have unique names and are read only through the ``index.json`` that names them, which is put if absent. Who
loses that race adopts the winner's generation, and the loser's parts are never read.
"""

from __future__ import annotations

import json
import uuid
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Generic

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import failpoints
from pipeline.columns import columns_array
from pipeline.plan import Item, PlannedShard
from pipeline.plan_rows import RowFormat
from pipeline.plan_store import (
    FORMAT_VERSION,
    OUTCOME_SCHEMA,
    SHARD_SCHEMA,
    Generation,
    OutcomeRef,
    index_path,
    plan_folder,
    read_generation,
)
from pipeline.quarantine import REJECTION_SCHEMA
from pipeline.recipe import Recipe
from pipeline.storage import Storage
from pipeline.types import Rejection

PART_ROWS = 1 << 17
PART_BYTES = 64 << 20
"""A part is closed at the first of these."""
GROUP_ROWS = 1 << 11
GROUP_BYTES = 1 << 20
"""Of the row groups of clips, which hold whole shards: what a worker fetches for one shard."""
_BATCH_ROWS = 1 << 13


class _Parts:
    """Row groups into numbered Parquet files, each put when it is large enough."""

    def __init__(self, storage: Storage, stem: str, schema: pa.Schema) -> None:
        self.files: list[str] = []
        self.schema = schema
        self._storage, self._stem = storage, stem
        self._writer: pq.ParquetWriter | None = None
        self._sink = pa.BufferOutputStream()
        self._rows = self._groups = 0

    def write(self, table: pa.Table) -> tuple[str, int]:
        """Write one row group. Returns its file and its number there."""
        if self._writer is not None and (self._rows >= PART_ROWS or self._sink.tell() >= PART_BYTES):
            self.close()
        if self._writer is None:
            self.files.append(f"{self._stem}-{len(self.files):05d}.parquet")
            self._sink = pa.BufferOutputStream()
            self._writer = pq.ParquetWriter(self._sink, self.schema, compression="zstd", write_page_checksum=True)
            self._rows = self._groups = 0
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        self._rows += len(table)
        self._groups += 1
        return self.files[-1], self._groups - 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._storage.put(self.files[-1], self._sink.getvalue().to_pybytes())


class GenerationWriter(Generic[Item]):
    """Takes first what is left out, then the shards, and publishes them as one generation."""

    def __init__(self, storage: Storage, number: int, rows: RowFormat[Item]) -> None:
        self.number = number
        self.num_clips = self.num_shards = 0
        self.counts: Counter[str] = Counter()
        """Rejections by status."""
        self._storage, self._rows = storage, rows
        self._stem = f"{plan_folder(number)}/{{}}-{uuid.uuid4().hex[:8]}"
        self._rejected = _Parts(storage, self._stem.format("rejected"), REJECTION_SCHEMA)
        self._shards = _Parts(storage, self._stem.format("shards"), SHARD_SCHEMA)
        self._clips: _Parts | None = None
        self._left_out: list[dict[str, Any]] = []
        self._shard_rows: list[dict[str, Any]] = []
        self._group: list[pa.Table] = []
        self._grouped: list[dict[str, Any]] = []
        self._group_rows = self._group_bytes = 0

    def reject(self, rejection: Rejection) -> None:
        self.counts[rejection.status] += 1
        self._left_out.append({name: getattr(rejection, name) for name in REJECTION_SCHEMA.names})
        if len(self._left_out) >= _BATCH_ROWS:
            _flush(self._rejected, self._left_out)

    def fix_columns(self, columns: pa.Schema) -> None:
        """Say the types of what passes through, before the first shard."""
        self._columns = columns
        schema = self._rows.schema
        if columns.names:  # Parquet has no empty struct
            schema = schema.append(pa.field("columns", pa.struct(list(columns))))
        self._clips = _Parts(self._storage, self._stem.format("clips"), schema)

    def add_shard(self, shard_id: str, bucket_key: str, table: pa.Table, columns: list[dict[str, Any]]) -> None:
        """Add one shard: its items' rows, and what passes through beside each.

        Raises:
            ConfigError: a value does not fit its column.
        """
        assert self._clips is not None, "a shard before the types of its columns"
        if self._columns.names:
            values = columns_array(columns, self._columns, table["uri"].to_pylist())
            table = table.append_column(self._clips.schema.field("columns"), values)
        row = {"shard_id": shard_id, "index": self.num_shards, "bucket": bucket_key, "num_clips": len(table)}
        self._grouped.append(row | {"first_row": self._group_rows})
        self._group.append(table)
        self._group_rows += len(table)
        self._group_bytes += table.nbytes
        self.num_shards += 1
        self.num_clips += len(table)
        if self._group_rows >= GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._write_group()

    def publish(
        self,
        recipe: Recipe,
        settings: dict[str, object],
        *,
        superseded: Iterable[OutcomeRef] = (),
        again: Iterable[OutcomeRef] = (),
    ) -> Generation:
        """Put the generation's index, or adopt the one that another driver has put meanwhile.

        Args:
            superseded: rejections of earlier generations that this one replaces, each as often as it stands there.
            again: those that a further generation is to replace, by looking at their files again.
        """
        assert self._clips is not None, "published without the types of its columns"
        self._write_group()
        _flush(self._shards, self._shard_rows)
        _flush(self._rejected, self._left_out)
        for parts in (self._clips, self._shards, self._rejected):
            parts.close()
        superseded_files, num_superseded = self._write_outcomes("superseded", superseded)
        again_files, _ = self._write_outcomes("again", again)
        index = {
            "format_version": FORMAT_VERSION,
            "generation": self.number,
            "work": self._rows.work,
            "recipe": asdict(recipe),
            "recipe_fingerprint": recipe.fingerprint,
            "settings": settings,
            "columns": b64encode(self._columns.serialize().to_pybytes()).decode(),
            "column_types": {column.name: str(column.type) for column in self._columns},
            "num_clips": self.num_clips,
            "num_shards": self.num_shards,
            "quarantined": self.counts["quarantined"],
            "filtered": self.counts["filtered"],
            "clip_files": self._clips.files,
            "shard_files": self._shards.files,
            "rejected_files": self._rejected.files,
            "num_superseded": num_superseded,
            "superseded_files": superseded_files,
            "again_files": again_files,
        }
        path = index_path(self.number)
        failpoints.reach("plan.before_index")
        self._storage.put_if_absent(path, json.dumps(index, indent=2).encode())
        return read_generation(self._storage, path)

    def _write_outcomes(self, name: str, outcomes: Iterable[OutcomeRef]) -> tuple[list[str], int]:
        parts = _Parts(self._storage, self._stem.format(name), OUTCOME_SCHEMA)
        rows: list[dict[str, Any]] = []
        count = 0
        for outcome in outcomes:
            count += 1
            rows.append(outcome._asdict())
            if len(rows) >= _BATCH_ROWS:
                _flush(parts, rows)
        _flush(parts, rows)
        parts.close()
        return parts.files, count

    def _write_group(self) -> None:
        if not self._group:
            return
        assert self._clips is not None, "rows before the types of their columns"
        file, row_group = self._clips.write(pa.concat_tables(self._group))
        self._shard_rows += [row | {"file": file, "row_group": row_group} for row in self._grouped]
        self._group.clear()
        self._grouped.clear()
        self._group_rows = self._group_bytes = 0
        if len(self._shard_rows) >= _BATCH_ROWS:
            _flush(self._shards, self._shard_rows)


def publish_generation(
    storage: Storage,
    number: int,
    shards: Iterable[PlannedShard[Item]],
    rejections: Iterable[Rejection],
    *,
    rows: RowFormat[Item],
    recipe: Recipe,
    settings: dict[str, object],
    columns: pa.Schema,
    superseded: Iterable[OutcomeRef] = (),
    again: Iterable[OutcomeRef] = (),
) -> Generation:
    """Write generation ``number`` from shards that are at hand, or adopt the one that another driver has published."""
    writer = GenerationWriter(storage, number, rows)
    for rejection in rejections:
        writer.reject(rejection)
    writer.fix_columns(columns)
    for shard in shards:
        table = pa.Table.from_pylist([rows.to_row(item) for item in shard.items], schema=rows.schema)
        writer.add_shard(shard.shard_id, shard.bucket_key, table, [item.columns for item in shard.items])
    return writer.publish(recipe, settings, superseded=superseded, again=again)


def _flush(parts: _Parts, rows: list[dict[str, Any]]) -> None:
    if rows:
        parts.write(pa.Table.from_pylist(rows, schema=parts.schema))
        rows.clear()
