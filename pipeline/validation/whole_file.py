"""A whole file of an output, mapped into memory: where it lies on a local disk, else as a copy of it.

A shard is read twice, by pyarrow and byte by byte, and in no order that ranged requests would suit.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import DatasetError
from pipeline.storage import Storage

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class WholeFile:
    """All bytes of one file. Implements ``shard_file.Ranges``."""

    data: mmap.mmap

    def size(self, path: str) -> int:
        return len(self.data)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@contextlib.contextmanager
def open_whole(storage: Storage, path: str, size_bytes: int) -> Iterator[WholeFile]:
    """The file while the context lasts; a remote one is copied to this machine's disk, a block at a time.

    Raises:
        DatasetError: it is empty.
        FileNotFoundError, TransientError: it cannot be read.
    """
    if not size_bytes:
        raise DatasetError(f"{path}: empty")
    with contextlib.ExitStack() as held:
        file: BinaryIO
        if storage.is_local:
            file = held.enter_context(open(storage.local_path(path), "rb"))
        else:
            file = held.enter_context(tempfile.TemporaryFile())
            for offset in range(0, size_bytes, _BLOCK_BYTES):
                file.write(storage.read_range(path, offset, min(_BLOCK_BYTES, size_bytes - offset)))
            file.flush()
        yield WholeFile(held.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
