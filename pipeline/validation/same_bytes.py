"""A shard is a function of its rows: written again by the same version of the writer, it has the same bytes.

That finds what no checksum covers: page headers, statistics, page index and footer.
"""

from __future__ import annotations

import contextlib
import io
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.writer import FOOTER_KEYS, shard_settings, stored_schema
from pipeline.validation.whole_file import WholeFile


class Rewriter:
    """Writes a shard's row groups again, into nothing, and compares. Used as a context manager.

    Raises:
        pa.ArrowException, OSError: the rows do not fit the schema that the footer names.
    """

    def __init__(self, metadata: pq.FileMetaData, whole: WholeFile) -> None:
        self._sink = _Comparison(whole)
        values = metadata.metadata or {}
        self._schema = stored_schema(metadata)
        self._metadata = {key: values[key] for key in FOOTER_KEYS if key in values}
        self._writer = pq.ParquetWriter(self._sink, self._schema, **shard_settings(self._schema, _compression(metadata)))

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # after an error, which says more
            self._writer.close()

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table.cast(self._schema), row_group_size=len(table))

    def finish(self) -> tuple[int, str, str] | None:
        """The first byte that differs: its position, what it should be, what it is; None if there is none."""
        self._writer.add_key_value_metadata(self._metadata)
        self._writer.close()
        return self._sink.end()


class _Comparison(io.RawIOBase):
    """A file that is not written but compared with one that is there."""

    def __init__(self, whole: WholeFile) -> None:
        super().__init__()
        self._whole = whole
        self._position = 0
        self._difference: tuple[int, str, str] | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        expected = memoryview(data).cast("B")
        if self._difference is None:
            there = memoryview(self._whole.data)[self._position : self._position + len(expected)]
            if there != expected:
                self._difference = self._compare(np.frombuffer(expected, np.uint8), np.frombuffer(there, np.uint8))
            there.release()
        self._position += len(expected)
        return len(expected)

    def end(self) -> tuple[int, str, str] | None:
        size = len(self._whole.data)
        if self._difference is None and self._position != size:
            return min(self._position, size), f"{self._position} bytes", f"{size} bytes"
        return self._difference

    def _compare(self, expected: Any, there: Any) -> tuple[int, str, str]:
        common = min(len(expected), len(there))
        differs = np.flatnonzero(expected[:common] != there[:common])
        if not len(differs):
            return self._position + common, f"byte {expected[common]:#04x}", "the end of the file"
        first = int(differs[0])
        return self._position + first, f"byte {expected[first]:#04x}", f"byte {there[first]:#04x}"


def _compression(metadata: pq.FileMetaData) -> str:
    """Of the blobs, which stand last in every row group."""
    if not metadata.num_row_groups:
        return "none"
    group = metadata.row_group(0)
    return "none" if group.column(group.num_columns - 1).compression == "UNCOMPRESSED" else "zstd"
