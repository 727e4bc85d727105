"""The plan on disk: a sequence of immutable generations under ``plan/<g>/``, read in pieces.

    plan/00000/index.json                  counts, recipe, column schema, file names
    plan/00000/shards-<try>-00000.parquet  one row a shard: where its clips are
    plan/00000/clips-<try>-00000.parquet   one row a clip or latent; a row group holds whole shards
    plan/00000/rejected-<try>-00000.parquet  one row per input file that gave nothing
    plan/00001/superseded-<try>-00000.parquet  outcomes of earlier generations that no longer count
    plan/00001/again-<try>-00000.parquet   outcomes whose files the next run is to look at again

``plan_writer`` writes them.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.compact_set import CompactSet
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import DatasetError
from pipeline.plan import Item
from pipeline.plan_rows import RowFormat
from pipeline.recipe import digest
from pipeline.storage import Storage
from pipeline.types import Rejection

FORMAT_VERSION = 2

SHARD_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("index", pa.int64()),
        ("bucket", pa.string()),
        ("num_clips", pa.int64()),
        ("file", pa.string()),
        ("row_group", pa.int64()),
        ("first_row", pa.int64()),
    ]
)

OUTCOME_SCHEMA = pa.schema([("place", pa.string()), ("sample_id", pa.string()), ("uri", pa.string())])


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
    first_row: int = 0
    """Of the shard's clips in the row group."""


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
    clip_files: tuple[str, ...]
    shard_files: tuple[str, ...]
    rejected_files: tuple[str, ...]
    num_superseded: int = 0
    """Rejections of earlier generations that this one replaces."""
    superseded_files: tuple[str, ...] = ()
    """Of those."""
    again_files: tuple[str, ...] = ()
    """Of the outcomes that a further generation is to replace, by looking at their files again."""

    @property
    def place(self) -> str:
        """Where the outcomes of its planning stand."""
        return plan_folder(self.number)

    @property
    def num_planned(self) -> int:
        """Everything the account must find again: clips, and videos that gave none."""
        return self.num_clips + self.quarantined + self.filtered


def plan_folder(number: int) -> str:
    return f"plan/{number:05d}"


def index_path(number: int) -> str:
    """The file whose existence publishes a generation."""
    return f"{plan_folder(number)}/index.json"


def read_generations(storage: Storage) -> list[Generation]:
    """Every published generation, oldest first; empty for a new output."""
    found: list[Generation] = []
    for number in count():  # asked for one by one: beside them lie hundreds of thousands of probing's findings
        try:
            found.append(read_generation(storage, index_path(number)))
        except FileNotFoundError:
            return found
    raise AssertionError("unreachable")


def read_generation(storage: Storage, path: str) -> Generation:
    """Raises: FileNotFoundError; DatasetError: it is of another format."""
    index = storage.read_json(path)
    if index.get("format_version") != FORMAT_VERSION:
        raise DatasetError(f"{storage.uri}/{path}: format {index.get('format_version')}, this version reads {FORMAT_VERSION}")
    return Generation(
        number=index["generation"],
        work=index["work"],
        recipe=index["recipe"],
        recipe_fingerprint=index["recipe_fingerprint"],
        settings=index["settings"],
        columns=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(index["columns"]))),
        num_clips=index["num_clips"],
        num_shards=index["num_shards"],
        quarantined=index["quarantined"],
        filtered=index["filtered"],
        clip_files=tuple(index["clip_files"]),
        shard_files=tuple(index["shard_files"]),
        rejected_files=tuple(index["rejected_files"]),
        num_superseded=index.get("num_superseded", 0),
        superseded_files=tuple(index.get("superseded_files", ())),
        again_files=tuple(index.get("again_files", ())),
    )


def list_plan_files(generation: Generation) -> set[str]:
    """Every file that a published generation names, and its index."""
    items = (*generation.clip_files, *generation.shard_files, *generation.rejected_files)
    return {index_path(generation.number), *items, *generation.superseded_files, *generation.again_files}


def read_shards(storage: Storage, generation: Generation) -> Iterator[ShardRef]:
    """The shards of a generation, in plan order."""
    for row in _read_rows(storage, generation.shard_files):
        bucket, file = sys.intern(row.pop("bucket")), sys.intern(row.pop("file"))  # a few texts, of very many shards
        yield ShardRef(generation=generation.number, bucket_key=bucket, file=file, **row)


def read_items(storage: Storage, shard: ShardRef, rows: RowFormat[Item]) -> list[Item]:
    """What one shard holds, in plan order: a part of one row group of one file. Raises: DatasetError: it is damaged."""
    table = ShardFile(storage, shard.file).row_group(shard.row_group)
    return [rows.from_row(row) for row in table.slice(shard.first_row, shard.num_clips).to_pylist()]


def read_column(storage: Storage, generation: Generation, name: str) -> Iterator[Any]:
    """One column of all planned items of a generation."""
    return (row[name] for row in read_columns(storage, generation, [name]))


def read_rejections(storage: Storage, generation: Generation) -> Iterator[Rejection]:
    """What the plan itself left out."""
    return (Rejection(**row) for row in _read_rows(storage, generation.rejected_files))


def read_outcomes(storage: Storage, files: Iterable[str]) -> Iterator[OutcomeRef]:
    """What the ``superseded_files`` or ``again_files`` of a generation name."""
    return (OutcomeRef(**row) for row in _read_rows(storage, files))


def read_known_files(storage: Storage, generations: Iterable[Generation]) -> CompactSet:
    """Keys of the input files that earlier generations list, as ``ProbedVideo.key`` makes them.

    Those that gave nothing are known too: each file is accounted for once.
    """
    known = CompactSet()
    for generation in generations:
        for rejected in _read_rows(storage, generation.rejected_files, ["sample_id"]):
            known.add(rejected["sample_id"])
        last: dict[str, Any] = {}
        for row in read_columns(storage, generation, ["uri", "size_bytes", "version"]):
            if row != last:  # the clips of one video mostly follow each other
                known.add(digest(row["uri"], row["size_bytes"], row["version"]))
            last = row
    return known


def read_columns(storage: Storage, generation: Generation, names: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all planned items of a generation; a column that the plan does not have is left out."""
    return _read_rows(storage, generation.clip_files, names)


def _read_rows(storage: Storage, files: Iterable[str], names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for file in files:
        data = pa.BufferReader(storage.read(file))
        try:
            part = pq.ParquetFile(data, page_checksum_verification=True)
            missing = part.metadata.num_rows
            for batch in part.iter_batches(batch_size=1 << 13, columns=names):
                yield from batch.to_pylist()
                missing -= len(batch)
            if missing:  # the header of a page, which is skipped if it is of an unknown kind, has no checksum
                raise ValueError(f"{missing} rows of {part.metadata.num_rows} are missing")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DatasetError(f"{storage.uri}/{file}: damaged: {error}; restore it, or plan into a new output") from error
