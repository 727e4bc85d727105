"""Planned items on this machine's disk until all are known: how many shards a shape has follows from their number.

A plan of ten million clips takes about two gigabytes there, and a few thousand rows in memory.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa

from pipeline.plan import Item
from pipeline.plan_rows import RowFormat

PIECE_ROWS = 1 << 12
MAX_BUFFERED_ROWS = 1 << 16
"""Of all shapes together; an input of thousands of shapes holds a few rows of each."""

SpooledShard = tuple[pa.Table, list[dict[str, Any]]]
"""Rows of one shard without what passes through, and what passes through beside each of them."""


class ItemSpool(Generic[Item]):
    """Takes items of all shapes mixed, gives them back shape by shape in the order they came.

    Args:
        declared: types of the columns that pass through, where the input has them; else they are kept as JSON.
    """

    def __init__(self, rows: RowFormat[Item], declared: pa.Schema | None = None) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.firsts: dict[str, Item] = {}
        """The first item of each shape."""
        self._rows, self._declared = rows, declared
        kind = pa.string() if declared is None else pa.struct(list(declared))
        self._schema = rows.schema.append(pa.field("columns", kind))
        self._buffers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._num_buffered = 0
        self._pieces: dict[str, list[Path]] = defaultdict(list)
        self._num_pieces = 0

    def __enter__(self) -> ItemSpool[Item]:
        self._held = contextlib.ExitStack()
        self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="plan-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, item: Item) -> None:
        key = item.bucket_key
        self.counts[key] += 1
        self.firsts.setdefault(key, item)
        columns = json.dumps(item.columns) if self._declared is None else item.columns
        self._buffers[key].append(self._rows.to_row(item) | {"columns": columns})
        self._num_buffered += 1
        if len(self._buffers[key]) >= PIECE_ROWS:
            self._write(key)
        elif self._num_buffered >= MAX_BUFFERED_ROWS:
            for other in list(self._buffers):
                self._write(other)

    def read(self, key: str, sizes: Iterable[int]) -> Iterator[SpooledShard]:
        """The items of one shape, so many at a time."""
        if self._buffers.get(key):
            self._write(key)
        pieces = iter(self._pieces[key])
        left = self._schema.empty_table()
        for size in sizes:
            tables = [left]
            while sum(map(len, tables)) < size:
                tables.append(_read_piece(next(pieces)))
            table = pa.concat_tables(tables)
            left = table.slice(size)
            yield self._split(table.slice(0, size))

    def _split(self, table: pa.Table) -> SpooledShard:
        columns = table["columns"].to_pylist()
        return table.drop_columns(["columns"]), list(map(json.loads, columns)) if self._declared is None else columns

    def _write(self, key: str) -> None:
        rows = self._buffers.pop(key)
        self._num_buffered -= len(rows)
        path = self._folder / str(self._num_pieces)
        self._num_pieces += 1
        self._pieces[key].append(path)
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self._schema, options=options) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))


def _read_piece(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.read_all()
