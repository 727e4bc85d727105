"""A Parquet file in storage, read by ranges: its tail in one request, then only what is asked for.

fsspec's own files read ahead by megabytes, which suits neither a footer nor one column among blobs.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError

# Holds the footer and the page index of a shard of a few hundred rows.
TAIL_BYTES = 256 << 10
_MAGIC = b"PAR1"


class Ranges(Protocol):
    """Where a file's bytes come from: a ``Storage``, or an input."""

    def size(self, path: str) -> int: ...

    def read_range(self, path: str, offset: int, length: int) -> bytes: ...


class ShardFile(io.RawIOBase):
    """A seekable file that pyarrow can read, with the footer at hand.

    Raises:
        DatasetError: the file has no Parquet footer.
    """

    def __init__(self, storage: Ranges, path: str, size_bytes: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.size_bytes = storage.size(path) if size_bytes is None else size_bytes
        self._storage = storage
        self._position = 0
        self._tail_start = max(0, self.size_bytes - TAIL_BYTES)
        self._tail = storage.read_range(path, self._tail_start, self.size_bytes - self._tail_start) if self.size_bytes else b""
        self._held_start, self._held = 0, b""
        self.footer = self._read_footer()

    def _read_footer(self) -> bytes:
        """The footer: FileMetaData in Thrift's compact protocol."""
        if self.size_bytes < 12 or self._tail[-4:] != _MAGIC:
            raise DatasetError(f"{self.path}: not a Parquet file, or cut short: {self.size_bytes} bytes without PAR1 at the end")
        length = int.from_bytes(self._tail[-8:-4], "little")
        if length > self.size_bytes - 12:
            raise DatasetError(f"{self.path}: damaged: its footer would take {length} of {self.size_bytes} bytes")
        return self.read_at(self.size_bytes - 8 - length, length)

    def metadata(self) -> pq.FileMetaData:
        """The footer as pyarrow reads it. Raises: DatasetError: it is damaged."""
        framed = _MAGIC + self.footer + len(self.footer).to_bytes(4, "little") + _MAGIC
        try:
            return pq.read_metadata(pa.BufferReader(framed))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DatasetError(f"{self.path}: damaged Parquet footer: {error}") from error

    def parquet(self) -> pq.ParquetFile:
        """The file's columns; the ranges of a row group are fetched together."""
        return pq.ParquetFile(self, metadata=self.metadata(), pre_buffer=True, page_checksum_verification=True)

    def row_group(self, number: int) -> pa.Table:
        """All columns of one row group, fetched in one request and decoded in this thread.

        Arrow's own reading ahead leaves threads that may still hold this file when the interpreter ends, which aborts it.

        Raises:
            DatasetError: the file is damaged: a page does not have its checksum, or cannot be read at all.
        """
        metadata = self.metadata()
        group = metadata.row_group(number)
        chunks = [group.column(column) for column in range(group.num_columns)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        end = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True))
        self._held_start, self._held = min(starts), self.read_at(min(starts), end - min(starts))
        try:
            parquet = pq.ParquetFile(self, metadata=metadata, pre_buffer=False, page_checksum_verification=True)
            table = parquet.read_row_group(number, use_threads=False)
            if len(table) != group.num_rows:  # a page with a damaged header is passed over
                raise ValueError(f"{len(table)} rows, expected {group.num_rows}")
            return table
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DatasetError(f"{self.path}: damaged row group {number}: {error}") from error

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes ``offset`` to ``offset + length``. Raises: DatasetError: they are not all inside the file."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise DatasetError(f"{self.path}: bytes {offset} to {offset + length} lie outside its {self.size_bytes}")
        if offset >= self._tail_start:
            return self._tail[offset - self._tail_start : offset - self._tail_start + length]
        if self._held_start <= offset and offset + length <= self._held_start + len(self._held):
            return self._held[offset - self._held_start : offset - self._held_start + length]
        return self._storage.read_range(self.path, offset, length)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size_bytes - self._position)
        length = left if size < 0 else min(size, left)
        data = self.read_at(self._position, length) if length else b""
        self._position += length
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
