"""The end of a run: index, quarantine table, dataset card and, last of all, the manifest.

Everything is made from the committed shards, in pieces. Running it again with the same shards writes the
same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import failpoints
from pipeline.dataset.card import dataset_card
from pipeline.dataset.index import index_shard
from pipeline.dataset.manifest import MANIFEST_PATH, IndexFile, Manifest
from pipeline.dataset.ordered_map import ordered_map
from pipeline.dataset.schema import describe_schema
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import summary_of
from pipeline.errors import DatasetError
from pipeline.quarantine import QUARANTINE_PATH, QuarantineTable
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary

INDEX_FOLDER = "index"
CARD_PATH = "README.md"

_ROWS_PER_PIECE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What the run knows and the shards do not say."""

    schema: pa.Schema
    """Of the shards, as ``build_schema`` gave it."""
    scaling_factor: float
    dtype: str
    """Of the stored latents."""
    model: str | None = None
    """Name under which readers scale the latents."""
    generations: int = 0
    """Of the plan."""


def publish_dataset(
    storage: Storage,
    shards: Iterable[str],
    rejections: Iterable[Rejection],
    info: DatasetInfo,
    *,
    latest: Callable[[ShardSummary], ShardSummary] = lambda summary: summary,
    num_samples: int | None = None,
    threads: int = 16,
) -> Manifest:
    """Make a folder of committed shards a dataset.

    Args:
        shards: path of every committed shard; their order is the order of the samples.
        rejections: clips that the plan already left out; those of the shards are added.
        latest: leaves out of a shard's account what a later generation has planned again.
        num_samples: how many there should be, where somebody has counted.
        threads: shards read at the same time, a few requests each.

    Raises:
        DatasetError: a shard is damaged, or holds other rows than its account says. Nothing was published.
    """
    totals = _Totals()
    pieces = _IndexPieces(storage)
    with QuarantineTable() as quarantine:
        for summary, table in ordered_map(lambda path: _index_shard(storage, path), shards, threads):
            pieces.add(summary.generation, table)
            totals.add(summary)
            for rejection in latest(summary).rejections:
                quarantine.add(rejection)
        for rejection in rejections:
            quarantine.add(rejection)
    if num_samples not in (None, totals.rows):
        raise DatasetError(f"{storage.uri}: the shards hold {totals.rows} rows, but {num_samples} were committed")
    failpoints.reach("publish.after_index")
    storage.put(QUARANTINE_PATH, quarantine.data)
    manifest = Manifest(
        num_samples=totals.rows,
        num_shards=totals.shards,
        num_quarantined=quarantine.counts["quarantined"],
        num_filtered=quarantine.counts["filtered"],
        size_bytes=totals.size_bytes,
        buckets=dict(sorted(totals.buckets.items())),
        recipes=tuple(sorted(totals.recipes)),
        model=info.model,
        scaling_factor=info.scaling_factor,
        dtype=info.dtype,
        generations=info.generations,
        columns=tuple(describe_schema(info.schema)),
        index=pieces.finish(),
    )
    storage.put(CARD_PATH, dataset_card(manifest).encode())
    failpoints.reach("publish.before_manifest")
    storage.put(MANIFEST_PATH, manifest.to_json())
    failpoints.reach("publish.after_manifest")
    return manifest


def _index_shard(storage: Storage, path: str) -> tuple[ShardSummary, pa.Table]:
    file = ShardFile(storage, path)
    summary, table = summary_of(file), index_shard(file)
    if len(table) != summary.num_rows:
        raise DatasetError(f"{path}: {len(table)} rows, but its account says {summary.num_rows}; it is not what was committed")
    return summary, table


@dataclass(slots=True)
class _Totals:
    rows: int = 0
    shards: int = 0
    size_bytes: int = 0
    buckets: Counter[str] = field(default_factory=Counter)
    recipes: set[str] = field(default_factory=set)

    def add(self, summary: ShardSummary) -> None:
        self.rows += summary.num_rows
        self.shards += 1
        self.size_bytes += summary.size_bytes
        self.buckets[summary.bucket_key] += summary.num_rows
        self.recipes.add(summary.recipe)


class _IndexPieces:
    """Index files of bounded size, each of one generation."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._open: dict[int, list[pa.Table]] = {}
        self._open_rows: Counter[int] = Counter()
        self._files: dict[int, list[IndexFile]] = {}

    def add(self, generation: int, table: pa.Table) -> None:
        if not len(table):
            return
        tables = self._open.setdefault(generation, [])
        if tables and tables[0].schema != table.schema:
            self._write(generation)
            tables = self._open.setdefault(generation, [])
        tables.append(table)
        self._open_rows[generation] += len(table)
        if self._open_rows[generation] >= _ROWS_PER_PIECE:
            self._write(generation)

    def finish(self) -> tuple[IndexFile, ...]:
        for generation in list(self._open):
            self._write(generation)
        return tuple(file for generation in sorted(self._files) for file in self._files[generation])

    def _write(self, generation: int) -> None:
        self._open_rows.pop(generation)
        table = pa.concat_tables(self._open.pop(generation)).unify_dictionaries()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        digest = xxhash.xxh3_128_hexdigest(data)
        files = self._files.setdefault(generation, [])
        path = f"{INDEX_FOLDER}/{generation:04d}-{len(files):05d}-{digest[:16]}.parquet"
        self._storage.put_if_absent(path, data)
        files.append(IndexFile(path=path, num_rows=len(table), size_bytes=len(data), xxh3=digest))
