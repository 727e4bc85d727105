"""Bytes and columns of shards: one memory-map slice or one ranged GET for a blob, row groups for the rest.

Everything that a process cannot share with its children (maps, connections, locks, threads) is held in one
object that belongs to one process and is made again in the next.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset.catalog import Location
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import DatasetError
from pipeline.storage import Storage

_MAX_MAPS = 256  # each holds a file descriptor, of which a process has about a thousand
_MAX_TABLE_BYTES = 256 << 20
_MAX_GROUP_BYTES = 128 << 20
_CONNECTIONS = 16

V = TypeVar("V")
A = TypeVar("A")
R = TypeVar("R")


class ShardAccess:
    """Reads parts of shards. Safe to use from threads, after a fork, and when pickled."""

    def __init__(self, storage: Storage) -> None:
        self._uri, self._options = storage.uri, storage.options
        self._mine = _Process(storage)

    def __getstate__(self) -> dict[str, Any]:
        return {"_uri": self._uri, "_options": self._options, "_mine": None}

    @property
    def _process(self) -> _Process:
        if self._mine is None or self._mine.pid != os.getpid():
            self._mine = _Process(Storage(self._uri, self._options))
        return self._mine

    def read_blob(self, location: Location, column: str) -> memoryview:
        """The bytes of one blob, read-only.

        Raises:
            DatasetError: they lie outside the file.
        """
        process = self._process
        if location.offset is None:
            return self._read_from_group(location, column)
        if not process.storage.is_local:
            return memoryview(process.storage.read_range(location.file, location.offset, location.length))
        mapped = process.maps.get(location.file, lambda: _map_file(process.storage.local_path(location.file)))
        data = mapped[location.offset : location.offset + location.length]
        if len(data) != location.length:
            raise DatasetError(f"{location.file}: cut short: it ends before byte {location.offset + location.length}")
        return data

    def read_facts(self, file: str, columns: Sequence[str]) -> pa.Table:
        """Small columns of a whole shard; kept, since its other rows will be wanted too."""
        process = self._process
        return process.tables.get((file, *columns), lambda: _read_columns(process.storage, file, columns))[0]

    def read_fact_rows(
        self, file: str, row_groups: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Small columns of some samples of a shard; kept as those of ``read_facts``."""
        process = self._process
        table, starts = process.tables.get((file, *columns), lambda: _read_columns(process.storage, file, columns))
        return table.take(pa.array(starts[row_groups] + rows))

    def read_fact_row(self, file: str, row_group: int, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Small columns of one sample."""
        process = self._process
        table, starts = process.tables.get((file, *columns), lambda: _read_columns(process.storage, file, columns))
        values: dict[str, Any] = table.slice(int(starts[row_group]) + row, 1).to_pylist()[0]
        return values

    def map(self, call: Callable[[A], R], items: Sequence[A]) -> list[R]:
        """Results in order; on remote storage several requests at a time."""
        process = self._process
        if process.storage.is_local or len(items) < 2:
            return [call(item) for item in items]
        return list(process.pool().map(call, items))

    def _read_from_group(self, location: Location, column: str) -> memoryview:
        process = self._process
        key = (location.file, location.row_group, column)
        values = process.groups.get(key, lambda: _read_group(process.storage, location, column))
        return memoryview(values[location.row].as_buffer())


class _Process:
    """What one process holds open."""

    def __init__(self, storage: Storage) -> None:
        self.pid = os.getpid()
        self.storage = storage
        self.maps: _Cache[memoryview] = _Cache(_MAX_MAPS, lambda value: 1)
        self.tables: _Cache[tuple[pa.Table, Any]] = _Cache(_MAX_TABLE_BYTES, lambda value: int(value[0].nbytes))
        self.groups: _Cache[pa.ChunkedArray] = _Cache(_MAX_GROUP_BYTES, lambda value: int(value.nbytes))
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="latents")
            return self._pool


class _Cache(Generic[V]):
    """Least recently used values up to a total cost; the newest stays whatever it costs."""

    def __init__(self, limit: int, cost: Callable[[V], int]) -> None:
        self._limit, self._cost = limit, cost
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], V]) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = load()  # outside the lock: two threads may load the same, none waits for another's request
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._total += self._cost(value)
            while self._total > self._limit and len(self._values) > 1:
                # Only forgotten, never closed: another thread may still read it.
                self._total -= self._cost(self._values.popitem(last=False)[1])
        return value


def _map_file(path: str) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_columns(storage: Storage, file: str, columns: Sequence[str]) -> tuple[pa.Table, Any]:
    """The table, and the number of the first row of each row group."""
    parquet = ShardFile(storage, file).parquet()
    present = set(parquet.schema_arrow.names)
    metadata = parquet.metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    try:
        table = parquet.read(columns=[name for name in columns if name in present])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: damaged: {error}") from error
    for name in columns:
        if name not in present:  # a generation that was written without this source column
            table = table.append_column(name, pa.nulls(metadata.num_rows))
    return table.select(list(columns)), np.cumsum([0, *sizes])


def _read_group(storage: Storage, location: Location, column: str) -> pa.ChunkedArray:
    try:
        return ShardFile(storage, location.file).parquet().read_row_group(location.row_group, columns=[column])[column]
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.file}: damaged row group {location.row_group}: {error}") from error
