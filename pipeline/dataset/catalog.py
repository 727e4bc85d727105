"""The index in memory: which samples there are, and where each of their blobs stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.dataset.index import index_schema, index_shard
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.ordered_map import ordered_map
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import DATA_FOLDER, is_shard, summary_of
from pipeline.errors import DatasetError
from pipeline.storage import Storage, StoredObject

Filters = Sequence[tuple[str, str, Any]] | Sequence[Sequence[tuple[str, str, Any]]]
"""Conditions ``(column, operator, value)`` that all must hold, or a list of such lists of which one must."""

_NOT_SAMPLES = ("index/", "plan/", "quarantine.parquet", "trash/")


class Location(NamedTuple):
    """Where one blob of one sample stands, and what its bytes mean."""

    file: str
    row_group: int
    row: int
    """Within the row group."""
    offset: int | None
    """First byte in the file; None: to be read through its row group."""
    length: int
    shape: tuple[int, ...] | None
    dtype: str | None
    xxh3: str | None


class Catalog:
    """Samples in a fixed order; some hundred bytes each. Pickles, so that every worker sees the same order."""

    def __init__(self, table: pa.Table, recipes: Iterable[str] = (), columns: Iterable[str] = ()) -> None:
        table = table.unify_dictionaries().combine_chunks()
        self.recipes = tuple(sorted(set(recipes)))
        self.columns = tuple(columns)
        """Names of the shards' columns."""
        self.blobs = tuple(name.removesuffix("_offset") for name in table.column_names if name.endswith("_offset"))
        self._table = table
        self._row_groups = table["row_group"].to_numpy()
        self._rows = table["row"].to_numpy()
        self._files, self._file_of = _dictionary(table["file"])
        self.bucket_keys, self.bucket_of = _dictionary(table["bucket_key"])
        """Distinct bucket keys, and for every sample which of them it has: ``int32 [N]``."""
        self._spans = {
            blob: [table[f"{blob}_{part}"].fill_null(-1).to_numpy() for part in ("offset", "length")] for blob in self.blobs
        }

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Catalog, (self._table, self.recipes, self.columns))

    @property
    def sample_ids(self) -> pa.ChunkedArray:
        return self._table["sample_id"]

    def sample_id(self, index: int) -> str:
        return str(self._table["sample_id"][index])

    def bucket_key(self, index: int) -> str:
        return str(self.bucket_keys[self.bucket_of[index]])

    def position(self, index: int) -> tuple[str, int, int]:
        """File, row group, and row within it."""
        return self._files[self._file_of[index]], int(self._row_groups[index]), int(self._rows[index])

    def keys(self, indices: npt.NDArray[np.int64]) -> pa.Table:
        """``sample_id`` and ``bucket_key`` of some samples."""
        codes = pa.DictionaryArray.from_arrays(self.bucket_of[indices], pa.array(self.bucket_keys, pa.string()))
        return pa.table({"sample_id": self.sample_ids.take(pa.array(indices)), "bucket_key": codes.cast(pa.string())})

    def places(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Row groups of some samples, and their rows within them."""
        return self._row_groups[indices], self._rows[indices]

    def locate(self, index: int, blob: str) -> Location:
        offsets, lengths = self._spans[blob]
        shape, dtype, xxh3 = (self._table[f"{blob}_{part}"][index].as_py() for part in ("shape", "dtype", "xxh3"))
        offset = int(offsets[index])
        return Location(
            *self.position(index),
            offset=offset if offset >= 0 else None,
            length=int(lengths[index]),
            shape=None if shape is None else tuple(shape),
            dtype=dtype,
            xxh3=xxh3,
        )

    @property
    def files(self) -> list[str]:
        """The files, in the order of their samples."""
        codes, first = np.unique(self._file_of, return_index=True)
        return [self._files[code] for code in codes[np.argsort(first)]]

    def samples_of_files(self) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """Each file with the indices of its samples, in the order of its first sample."""
        order = np.argsort(self._file_of, kind="stable")
        ends = np.flatnonzero(np.diff(self._file_of[order])) + 1
        groups = [group for group in np.split(order, ends) if len(group)]
        for group in sorted(groups, key=lambda group: int(group[0])):
            yield self._files[self._file_of[group[0]]], group

    def take(self, indices: npt.NDArray[np.int64]) -> Catalog:
        return Catalog(self._table.take(pa.array(indices)), self.recipes, self.columns)


def open_catalog(storage: Storage, manifest: Manifest, threads: int = 16) -> Catalog:
    """The samples that a manifest names. Raises: DatasetError: a piece of the index is damaged."""

    def read(piece: Any) -> pa.Table:
        data = storage.read(piece.path)
        if xxhash.xxh3_128_hexdigest(data) != piece.xxh3:
            raise DatasetError(f"{storage.uri}/{piece.path}: damaged: its content does not have the hash that the manifest names")
        return pq.ParquetFile(pa.BufferReader(data)).read()

    tables = list(ordered_map(read, manifest.index, threads))
    return Catalog(_concatenate(tables), manifest.recipes, [column["name"] for column in manifest.columns])


def scan_catalog(storage: Storage, files: Sequence[StoredObject], threads: int = 16) -> Catalog:
    """The samples of shards that no manifest names yet, or of another program's Parquet files.

    Raises:
        DatasetError: a file is damaged, or holds no latents.
    """
    recipes: set[str] = set()
    names: dict[str, None] = {}

    def read(stored: StoredObject) -> pa.Table:
        file = ShardFile(storage, stored.uri, stored.size_bytes)
        metadata = file.metadata()
        foreign = not is_shard(metadata)
        if not foreign:
            recipes.add(summary_of(file).recipe)
        names.update(dict.fromkeys(metadata.schema.to_arrow_schema().names))
        return index_shard(file, foreign=foreign)

    tables = list(ordered_map(read, files, threads))
    return Catalog(_concatenate(tables), recipes, names)


def list_shards(storage: Storage) -> list[StoredObject]:
    """Parquet files with samples: those of ``data/``, or in a foreign folder all."""
    shards = storage.list(DATA_FOLDER, ".parquet")
    return shards or [stored for stored in storage.list("", ".parquet") if not stored.uri.startswith(_NOT_SAMPLES)]


def match_rows(table: pa.Table, filters: Filters) -> npt.NDArray[np.int64]:
    """Numbers of the rows that pass."""
    numbered = table.append_column("__row", pa.array(np.arange(len(table))))
    rows: npt.NDArray[np.int64] = numbered.filter(pq.filters_to_expression(filters))["__row"].to_numpy()
    return rows


def filter_columns(filters: Filters) -> list[str]:
    """Names of the columns that conditions speak of."""
    flat = [item if isinstance(item[0], str) else None for item in filters]
    conditions: Any = filters if None not in flat else [condition for group in filters for condition in group]
    return list(dict.fromkeys(column for column, _, _ in conditions))


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables or [index_schema([]).empty_table()], promote_options="default")


def _dictionary(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int32]]:
    if not len(column):
        return [], np.empty(0, np.int32)
    encoded = pc.dictionary_encode(column.cast(pa.string())) if not pa.types.is_dictionary(column.type) else column
    array = encoded.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.dictionary.to_pylist(), array.indices.to_numpy()
