"""The plan on disk: a sequence of immutable generations under ``plan/<g>/``.

A generation's files have unique names; its ``index.json`` names them and is put if absent. Who loses that
race adopts the winner's generation, and the loser's files are never read.

    plan/00000/index.json             counts, recipe, column schema, file names
    plan/00000/shards-<try>.parquet   one row a shard: where its clips are
    plan/00000/clips-<try>-000.parquet  one row a clip or latent, one row group a shard
    plan/00000/rejected-<try>.parquet one row per input file that gave nothing
    plan/00001/superseded-<try>.parquet  outcomes of earlier generations that no longer count
    plan/00001/again-<try>.parquet    outcomes whose files the next run is to look at again
"""

from __future__ import annotations

import base64
import io
import json
import logging
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import cast_value, check_values
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import DatasetError
from pipeline.plan import Item, PlannedShard
from pipeline.plan_rows import RowFormat
from pipeline.quarantine import REJECTION_SCHEMA
from pipeline.recipe import Recipe, digest
from pipeline.storage import Storage
from pipeline.types import Rejection

logger = logging.getLogger(__name__)

SHARDS_PER_FILE = 512
FORMAT_VERSION = 1

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


_OUTCOME_SCHEMA = pa.schema([("place", pa.string()), ("sample_id", pa.string()), ("uri", pa.string())])


class OutcomeRef(NamedTuple):
    """Names one rejection: a clip that failed in a shard, or a file that a generation's planning left out."""

    place: str
    """A shard id, or the generation's folder, ``plan/00000``."""
    sample_id: str
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """A planned shard without its clips: what the driver keeps in memory."""

    generation: int
    shard_id: str
    index: int
    bucket_key: str
    num_clips: int
    file: str
    row_group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A published generation of the plan."""

    number: int
    work: str
    """The kind of job whose plan it is: ``encode`` or ``decode``."""
    recipe: dict[str, object]
    recipe_fingerprint: str
    settings: dict[str, object]
    """What decided which items are planned, as ``JobConfig.plan_settings`` gives it."""
    columns: pa.Schema
    """Types of the columns that pass through."""
    num_clips: int
    num_shards: int
    quarantined: int
    filtered: int
    shards_file: str
    rejected_file: str
    superseded_file: str | None = None
    """Of the outcomes that this generation replaces."""
    again_file: str | None = None
    """Of the outcomes that a further generation is to replace, by looking at their files again."""

    @property
    def place(self) -> str:
        """Where the outcomes of its planning stand."""
        return _folder(self.number)

    @property
    def num_planned(self) -> int:
        """Everything the account must find again: clips, and videos that gave none."""
        return self.num_clips + self.quarantined + self.filtered


def publish_generation(
    storage: Storage,
    number: int,
    shards: list[PlannedShard[Item]],
    rejections: list[Rejection],
    *,
    rows: RowFormat[Item],
    recipe: Recipe,
    settings: dict[str, object],
    columns: pa.Schema,
    superseded: Collection[OutcomeRef] = (),
    again: Collection[OutcomeRef] = (),
) -> Generation:
    """Write generation ``number``, or adopt the one that another driver has published meanwhile."""
    folder, attempt = _folder(number), uuid.uuid4().hex[:8]
    refs = []
    for first in range(0, len(shards), SHARDS_PER_FILE):
        name = f"{folder}/clips-{attempt}-{first // SHARDS_PER_FILE:03d}.parquet"
        part = shards[first : first + SHARDS_PER_FILE]
        storage.put(name, _items_file(part, rows, columns))
        refs += [_shard_row(shard, name, row_group) for row_group, shard in enumerate(part)]
    shards_file = f"{folder}/shards-{attempt}.parquet"
    storage.put(shards_file, _table_bytes(pa.Table.from_pylist(refs, schema=_SHARD_SCHEMA)))
    rejected_file = f"{folder}/rejected-{attempt}.parquet"
    left_out = [asdict(rejection) for rejection in rejections]
    storage.put(rejected_file, _table_bytes(pa.Table.from_pylist(left_out, schema=REJECTION_SCHEMA)))
    counts = Counter(rejection.status for rejection in rejections)
    index = {
        "format_version": FORMAT_VERSION,
        "generation": number,
        "work": rows.work,
        "recipe": asdict(recipe),
        "recipe_fingerprint": recipe.fingerprint,
        "settings": settings,
        "columns": base64.b64encode(columns.serialize().to_pybytes()).decode(),
        "column_types": {column.name: str(column.type) for column in columns},
        "num_clips": sum(len(shard.items) for shard in shards),
        "num_shards": len(shards),
        "quarantined": counts["quarantined"],
        "filtered": counts["filtered"],
        "shards_file": shards_file,
        "rejected_file": rejected_file,
    }
    for name, outcomes in (("superseded", superseded), ("again", again)):
        if outcomes:
            index[f"{name}_file"] = path = f"{folder}/{name}-{attempt}.parquet"
            rows_of = [outcome._asdict() for outcome in outcomes]
            storage.put(path, _table_bytes(pa.Table.from_pylist(rows_of, schema=_OUTCOME_SCHEMA)))
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
        work=index.get("work", "encode"),  # the first plans had no other
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
        superseded_file=index.get("superseded_file"),
        again_file=index.get("again_file"),
    )


def read_shards(storage: Storage, generation: Generation) -> list[ShardRef]:
    """The shards of a generation, in plan order."""
    rows = pq.ParquetFile(pa.BufferReader(storage.read(generation.shards_file))).read().to_pylist()
    return [ShardRef(generation=generation.number, bucket_key=row.pop("bucket"), **row) for row in rows]


def list_plan_files(storage: Storage, generation: Generation) -> set[str]:
    """Every file that a published generation names, and its index."""
    named = {generation.shards_file, generation.rejected_file, generation.superseded_file, generation.again_file}
    items = {shard.file for shard in read_shards(storage, generation)}
    return {f"{generation.place}/index.json", *items, *(path for path in named if path is not None)}


def read_items(storage: Storage, shard: ShardRef, rows: RowFormat[Item]) -> list[Item]:
    """What one shard holds, in plan order: one row group of one file."""
    values = ShardFile(storage, shard.file).parquet().read_row_group(shard.row_group).to_pylist()
    return [rows.from_row(row) for row in values]


def read_column(storage: Storage, generation: Generation, name: str) -> Iterator[Any]:
    """One column of all planned items of a generation."""
    for row in _read_columns(storage, generation, [name]):
        yield row[name]


def read_rejections(storage: Storage, generation: Generation) -> Iterator[Rejection]:
    """What the plan itself left out."""
    for batch in ShardFile(storage, generation.rejected_file).parquet().iter_batches():
        yield from (Rejection(**row) for row in batch.to_pylist())


def read_outcomes(storage: Storage, path: str | None) -> Iterator[OutcomeRef]:
    """The outcomes that a generation's ``superseded_file`` or ``again_file`` names; none where it has no such file."""
    if path is not None:
        for batch in ShardFile(storage, path).parquet().iter_batches():
            yield from (OutcomeRef(**row) for row in batch.to_pylist())


def read_known_files(storage: Storage, generations: Iterable[Generation]) -> set[str]:
    """Keys of the input files that earlier generations list, as ``ProbedVideo.key`` makes them.

    Those that gave nothing are known too: each file is accounted for once.
    """
    known: set[str] = set()
    for generation in generations:
        known.update(rejection.sample_id for rejection in read_rejections(storage, generation))
        files = _read_columns(storage, generation, ["uri", "size_bytes", "version"])
        known.update(digest(row["uri"], row["size_bytes"], row["version"]) for row in files)
    return known


def _read_columns(storage: Storage, generation: Generation, names: list[str]) -> Iterator[dict[str, Any]]:
    for file in sorted({shard.file for shard in read_shards(storage, generation)}):
        for batch in ShardFile(storage, file).parquet().iter_batches(columns=names):
            yield from batch.to_pylist()


def _folder(number: int) -> str:
    return f"plan/{number:05d}"


def _items_file(shards: list[PlannedShard[Item]], rows: RowFormat[Item], columns: pa.Schema) -> bytes:
    schema = rows.schema.append(pa.field("columns", pa.struct(list(columns))))
    if not columns.names:  # Parquet has no empty struct
        schema = rows.schema
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for shard in shards:
            values = [rows.to_row(item) | {"columns": _columns_of(item, columns)} for item in shard.items]
            for column in columns:
                check_values(column, values)
            table = pa.Table.from_pylist(values, schema=schema)
            writer.write_table(table, row_group_size=max(1, len(values)))
    return sink.getvalue()


def _columns_of(item: Item, columns: pa.Schema) -> dict[str, Any]:
    return {column.name: cast_value(item.columns.get(column.name), column.type) for column in columns}


def _shard_row(shard: PlannedShard[Any], file: str, row_group: int) -> dict[str, Any]:
    return {
        "shard_id": shard.shard_id,
        "index": shard.index,
        "bucket": shard.bucket_key,
        "num_clips": len(shard.items),
        "file": file,
        "row_group": row_group,
    }


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
