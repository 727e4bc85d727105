"""The plan on disk: a sequence of immutable generations under ``plan/<g>/``.

A generation's files have unique names; its ``index.json`` names them and is put if absent. Who loses that
race adopts the winner's generation, and the loser's files are never read.

    plan/00000/index.json             counts, recipe, column schema, file names
    plan/00000/shards-<try>.parquet   one row a shard: where its clips are
    plan/00000/clips-<try>-000.parquet  one row a clip, one row group a shard
    plan/00000/rejected-<try>.parquet one row per video that gave no clip
"""

from __future__ import annotations

import base64
import io
import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.schema import REJECTION_SCHEMA
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import ConfigError, DatasetError
from pipeline.plan import PlannedClip, PlannedShard
from pipeline.recipe import Recipe, digest
from pipeline.storage import Storage
from pipeline.types import Bucket, Clip, Crop, Rejection

logger = logging.getLogger(__name__)

SHARDS_PER_FILE = 512
FORMAT_VERSION = 1

_CLIP_FIELDS = pa.schema(
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
    ]
)
_SHARD_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("index", pa.int64()),
        ("bucket", pa.string()),
        ("num_clips", pa.int64()),
        ("file", pa.string()),
        ("row_group", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """A planned shard without its clips: what the driver keeps in memory."""

    generation: int
    shard_id: str
    index: int
    bucket: Bucket
    num_clips: int
    file: str
    row_group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A published generation of the plan."""

    number: int
    recipe: dict[str, object]
    recipe_fingerprint: str
    settings: dict[str, object]
    """What decided which clips are planned, as ``RunConfig.plan_settings`` gives it."""
    columns: pa.Schema
    """Types of the columns that pass through."""
    num_clips: int
    num_shards: int
    quarantined: int
    filtered: int
    shards_file: str
    rejected_file: str

    @property
    def num_planned(self) -> int:
        """Everything the account must find again: clips, and videos that gave none."""
        return self.num_clips + self.quarantined + self.filtered


def publish_generation(
    storage: Storage,
    number: int,
    shards: list[PlannedShard],
    rejections: list[Rejection],
    *,
    recipe: Recipe,
    settings: dict[str, object],
    columns: pa.Schema,
) -> Generation:
    """Write generation ``number``, or adopt the one that another driver has published meanwhile."""
    folder, attempt = f"plan/{number:05d}", uuid.uuid4().hex[:8]
    refs = []
    for first in range(0, len(shards), SHARDS_PER_FILE):
        name = f"{folder}/clips-{attempt}-{first // SHARDS_PER_FILE:03d}.parquet"
        part = shards[first : first + SHARDS_PER_FILE]
        storage.put(name, _clips_file(part, columns))
        refs += [_shard_row(shard, name, row_group) for row_group, shard in enumerate(part)]
    shards_file = f"{folder}/shards-{attempt}.parquet"
    storage.put(shards_file, _table_bytes(pa.Table.from_pylist(refs, schema=_SHARD_SCHEMA)))
    rejected_file = f"{folder}/rejected-{attempt}.parquet"
    rows = [asdict(rejection) for rejection in rejections]
    storage.put(rejected_file, _table_bytes(pa.Table.from_pylist(rows, schema=REJECTION_SCHEMA)))
    counts = Counter(rejection.status for rejection in rejections)
    index = {
        "format_version": FORMAT_VERSION,
        "generation": number,
        "recipe": asdict(recipe),
        "recipe_fingerprint": recipe.fingerprint,
        "settings": settings,
        "columns": base64.b64encode(columns.serialize().to_pybytes()).decode(),
        "column_types": {column.name: str(column.type) for column in columns},
        "num_clips": sum(len(shard.clips) for shard in shards),
        "num_shards": len(shards),
        "quarantined": counts["quarantined"],
        "filtered": counts["filtered"],
        "shards_file": shards_file,
        "rejected_file": rejected_file,
    }
    storage.put_if_absent(f"{folder}/index.json", json.dumps(index, indent=2).encode())
    return _read_generation(storage, f"{folder}/index.json")


def read_generations(storage: Storage) -> list[Generation]:
    """Every published generation, oldest first; empty for a new output."""
    return [_read_generation(storage, found.uri) for found in storage.list("plan", "index.json")]


def _read_generation(storage: Storage, path: str) -> Generation:
    index = storage.read_json(path)
    if index.get("format_version") != FORMAT_VERSION:
        raise DatasetError(f"{storage.uri}/{path}: format {index.get('format_version')}, this version reads {FORMAT_VERSION}")
    return Generation(
        number=index["generation"],
        recipe=index["recipe"],
        recipe_fingerprint=index["recipe_fingerprint"],
        settings=index["settings"],
        columns=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(index["columns"]))),
        num_clips=index["num_clips"],
        num_shards=index["num_shards"],
        quarantined=index["quarantined"],
        filtered=index["filtered"],
        shards_file=index["shards_file"],
        rejected_file=index["rejected_file"],
    )


def read_shards(storage: Storage, generation: Generation) -> list[ShardRef]:
    """The shards of a generation, in plan order."""
    rows = pq.read_table(io.BytesIO(storage.read(generation.shards_file))).to_pylist()
    return [ShardRef(generation=generation.number, bucket=Bucket.parse(row.pop("bucket")), **row) for row in rows]


def read_clips(storage: Storage, shard: ShardRef) -> list[PlannedClip]:
    """The clips of one shard, in plan order: one row group of one file."""
    rows = ShardFile(storage, shard.file).parquet().read_row_group(shard.row_group).to_pylist()
    return [_clip_from_row(row) for row in rows]


def read_rejections(storage: Storage, generation: Generation) -> Iterator[Rejection]:
    """What the plan itself left out."""
    for batch in ShardFile(storage, generation.rejected_file).parquet().iter_batches():
        yield from (Rejection(**row) for row in batch.to_pylist())


def read_known_videos(storage: Storage, generations: Iterable[Generation]) -> set[str]:
    """Keys of the videos that earlier generations list, as ``ProbedVideo.key`` makes them.

    Those that gave no clip are known too: each video is accounted for once.
    """
    known: set[str] = set()
    for generation in generations:
        known.update(rejection.sample_id for rejection in read_rejections(storage, generation))
        for name in sorted({shard.file for shard in read_shards(storage, generation)}):
            for batch in ShardFile(storage, name).parquet().iter_batches(columns=["uri", "size_bytes", "version"]):
                known.update(digest(row["uri"], row["size_bytes"], row["version"]) for row in batch.to_pylist())
    return known


def column_schema(values: list[dict[str, Any]], declared: pa.Schema | None, fixed: pa.Schema | None) -> pa.Schema:
    """Types of the columns that pass through, fixed by the first generation of a dataset.

    Args:
        values: the columns of every video.
        declared: the input's own types, where it has them; else they are inferred, text where values disagree.
        fixed: the types of the dataset so far.

    Raises:
        ConfigError: the input brings columns or types that the dataset does not have.
    """
    if fixed is None:
        return _infer(values) if declared is None else pa.schema([_as_text_if_null(column) for column in declared])
    for name in _names(values) if declared is None else declared.names:
        if name not in fixed.names:
            raise ConfigError(
                f"column {name!r} is not in this dataset (its columns: {', '.join(fixed.names) or 'none'}); "
                "leave it out of the input, or start a new dataset"
            )
        if declared is None or pa.types.is_null(declared.field(name).type):
            continue
        if fixed.field(name).type != declared.field(name).type:
            raise ConfigError(f"column {name!r} is {declared.field(name).type} here and {fixed.field(name).type} in this dataset")
    return fixed


def _as_text_if_null(column: pa.Field) -> pa.Field:
    """A column without a single value has no type yet; as text it can take any later."""
    return column.with_type(pa.string()) if pa.types.is_null(column.type) else column


def _names(values: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for columns in values for name in columns)
    names.setdefault("caption", None)  # always there, so that captions can be appended later
    return list(names)


def _infer(values: list[dict[str, Any]]) -> pa.Schema:
    fields = []
    for name in _names(values):
        kinds = frozenset(type(columns[name]) for columns in values if columns.get(name) is not None)
        if len(kinds) > 1 and kinds not in _SCALARS:
            logger.warning("column %s holds %s: stored as text", name, " and ".join(sorted(kind.__name__ for kind in kinds)))
        fields.append(pa.field(name, _SCALARS.get(kinds, pa.string())))
    return pa.schema(fields)


_SCALARS = {
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


def _cast(value: Any, kind: pa.DataType) -> Any:
    """A value as its column holds it: what is no text becomes JSON text in a text column."""
    if pa.types.is_floating(kind) and type(value) is int:
        return float(value)  # Arrow refuses those that a float cannot hold exactly
    if value is None or not pa.types.is_string(kind) or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _clips_file(shards: list[PlannedShard], columns: pa.Schema) -> bytes:
    schema = _CLIP_FIELDS.append(pa.field("columns", pa.struct(list(columns))))
    if not columns.names:  # Parquet has no empty struct
        schema = _CLIP_FIELDS
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for shard in shards:
            rows = [_clip_row(planned, columns) for planned in shard.clips]
            for column in columns:
                _check_values(column, rows)
            table = pa.Table.from_pylist(rows, schema=schema)
            writer.write_table(table, row_group_size=max(1, len(rows)))
    return sink.getvalue()


def _check_values(column: pa.Field, rows: list[dict[str, Any]]) -> None:
    """Raises: ConfigError: a value that the column cannot hold, as earlier generations or the other videos fixed it."""
    try:
        pa.array([row["columns"][column.name] for row in rows], column.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        if len(rows) > 1:
            for row in rows:
                _check_values(column, [row])
        raise ConfigError(
            f"column {column.name!r} is {column.type} in this dataset, but has another value for {rows[0]['uri']}: {error}"
        ) from error


def _clip_row(planned: PlannedClip, columns: pa.Schema) -> dict[str, Any]:
    clip = planned.clip
    row = {name: getattr(clip, name) for name in _CLIP_FIELDS.names if hasattr(clip, name)}
    row["bucket"] = clip.bucket.key
    row.update({f"crop_{side}": getattr(clip.crop, side) for side in "xywh"})
    row["columns"] = {column.name: _cast(planned.columns.get(column.name), column.type) for column in columns}
    return row


def _clip_from_row(row: dict[str, Any]) -> PlannedClip:
    columns = row.pop("columns", None) or {}
    crop = Crop(**{side: row.pop(f"crop_{side}") for side in "xywh"})
    return PlannedClip(clip=Clip(bucket=Bucket.parse(row.pop("bucket")), crop=crop, **row), columns=columns)


def _shard_row(shard: PlannedShard, file: str, row_group: int) -> dict[str, Any]:
    return {
        "shard_id": shard.shard_id,
        "index": shard.index,
        "bucket": shard.bucket.key,
        "num_clips": len(shard.clips),
        "file": file,
        "row_group": row_group,
    }


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
