"""Coded videos kept on disk for the next request, those used longest ago given up first.

All replicas of a machine share the folder. A video is a file under its key; it appears whole, never changes, and a
reader keeps it by a hard link of its own, so that giving it up disturbs nobody. The bytes of all are written down beside
them, so that the folder is looked through only when it is full.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.service.spool import locked_folder, make_private_folder

_TOTAL = ".total"
_FULL = 0.9
"""Share of the limit that is left when the cache was full, so that it is not full again at once."""


class VideoCache:
    """Files under keys, within a byte limit. Safe for threads and for other processes on the same folder.

    Args:
        folder: on the same filesystem as the spool.
        limit_bytes: of all files together; 0 keeps none.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = make_private_folder(folder)
        self._limit_bytes = limit_bytes
        with locked_folder(self._folder):
            files = sorted(self._files())  # the limit may be lower than last time, and the total may be lost
            self._write_total(self._make_room(0, files) if _total(files) > limit_bytes else _total(files))

    def fetch(self, name: str, target: Path) -> bool:
        """Give a kept video a second name. False: it is not kept."""
        path = self._folder / name
        try:
            os.link(path, target)
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def size_of(self, name: str) -> int | None:
        """Bytes of a kept video; None: it is not kept."""
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def keep(self, name: str, source: Path) -> None:
        """Keep a whole video; larger ones than the limit are not kept."""
        with source.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > self._limit_bytes:
                return
            os.fsync(file.fileno())  # what appears under the key is whole, also after a power cut
        with locked_folder(self._folder):
            if self.size_of(name) is not None:
                return
            total = self.used_bytes()
            if total + size_bytes > self._limit_bytes:
                total = self._make_room(size_bytes, sorted(self._files()))
            os.link(source, self._folder / name)
            self._write_total(total + size_bytes)

    def used_bytes(self) -> int:
        """Of all replicas of this machine."""
        return int((self._folder / _TOTAL).read_text())

    def _write_total(self, size_bytes: int) -> None:
        partial = self._folder / f"{_TOTAL}.partial"
        partial.write_text(str(size_bytes))
        partial.replace(self._folder / _TOTAL)

    def _make_room(self, size_bytes: int, files: list[tuple[int, int, Path]]) -> int:
        """Give up files, oldest first, until some space is free beside the new bytes; gives the bytes that are left."""
        total = _total(files)
        for _, size, path in files:
            if total + size_bytes <= _FULL * self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each was last used, its size, and its path."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    yield found.st_atime_ns, found.st_size, Path(entry.path)


def _total(files: list[tuple[int, int, Path]]) -> int:
    return sum(size for _, size, _ in files)
