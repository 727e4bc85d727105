"""The index of a dataset as its manifest names it, looked up file by file; a few pieces in memory at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.dataset.manifest import IndexFile, Manifest
from pipeline.storage import Storage
from pipeline.validation.findings import Finding, damaged

_PIECES_HELD = 2


@dataclass(slots=True)
class IndexView:
    """Which rows of the index belong to which shard."""

    storage: Storage
    _spans: dict[str, tuple[IndexFile, int, int]] = field(default_factory=dict)
    """By file: the piece, the first row and how many."""
    _held: OrderedDict[str, pa.Table] = field(default_factory=OrderedDict)
    _asked: set[str] = field(default_factory=set)
    _is_whole: bool = True
    """Whether every piece could be read; of what is in the others nothing can be said."""

    def open(self, manifest: Manifest) -> Iterator[Finding]:
        """Look at every piece once, and say what is wrong with it."""
        for piece in manifest.index:
            try:
                data = self.storage.read(piece.path)
                digest = xxhash.xxh3_128_hexdigest(data)
                table = pq.ParquetFile(pa.BufferReader(data)).read()
                facts = (("xxh3", piece.xxh3, digest), ("rows", piece.num_rows, len(table)))
                yield from (
                    Finding(piece.path, "checksum" if name == "xxh3" else "count", f"{name} {expected}", str(found))
                    for name, expected, found in facts
                    if expected != found
                )
                yield from self._find_spans(piece, table)
            except Exception as error:  # whatever the parser says of it
                self._is_whole = False
                yield damaged(piece.path, error)

    def check(self, file: str, expected: pa.Table) -> Iterator[Finding]:
        """Compare the rows of one shard with those that its own pages give."""
        self._asked.add(file)
        if file not in self._spans:
            if len(expected) and self._is_whole:
                yield Finding(file, "index", f"{len(expected)} rows in the index", "none")
            return
        piece, first, count = self._spans[file]
        rows = self._load(piece).slice(first, count)
        if count != len(expected):
            yield Finding(piece.path, "index", f"{len(expected)} rows of {file}", f"{count}")
            return
        for name in dict.fromkeys([*expected.column_names, *rows.column_names]):
            if name not in rows.column_names or name not in expected.column_names:
                yield Finding(piece.path, "index", f"columns of {file}", f"column {name} in one of both")
            elif not (ours := _plain(expected[name])).equals(theirs := _plain(rows[name])):
                at = next(i for i in range(count) if ours[i].as_py() != theirs[i].as_py())
                place = f"{name} {ours[at].as_py()} in row {first + at}, of {file}"
                yield Finding(piece.path, "index", place, str(theirs[at].as_py()))

    def count_rows(self, file: str) -> int:
        """How many rows the index has of a shard, for where its pages are not read."""
        self._asked.add(file)
        return self._spans[file][2] if file in self._spans else 0

    def end(self) -> Iterator[Finding]:
        """What the index names and nobody asked for."""
        for file in sorted(self._spans.keys() - self._asked):
            yield Finding(self._spans[file][0].path, "index", "shards of the plan only", f"rows of {file}")

    def _load(self, piece: IndexFile) -> pa.Table:
        if piece.path not in self._held:
            self._held[piece.path] = pq.ParquetFile(pa.BufferReader(self.storage.read(piece.path))).read()
            if len(self._held) > _PIECES_HELD:
                self._held.popitem(last=False)
        return self._held[piece.path]

    def _find_spans(self, piece: IndexFile, table: pa.Table) -> Iterator[Finding]:
        files = _plain(table["file"]).to_numpy(zero_copy_only=False)
        if not len(files):
            return
        starts = [0, *(np.flatnonzero(files[1:] != files[:-1]) + 1), len(files)]
        for first, end in pairwise(starts):
            file = str(files[first])
            if file in self._spans:
                yield Finding(piece.path, "index", f"the rows of {file} once, together", "again, or apart")
            else:
                self._spans[file] = (piece, int(first), int(end - first))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    column = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
