"""Coded videos kept on disk for the next request, those used longest ago given up first.

All replicas of a machine share the folder. A video is a file under its key; it appears whole, never changes, and a
reader keeps it by a hard link of its own, so that giving it up disturbs nobody.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.service.spool import FOLDER_LOCK, locked_folder, make_private_folder


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
            self._make_room(0)  # the limit may be lower than last time

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
            self._make_room(size_bytes)
            with contextlib.suppress(FileExistsError):
                os.link(source, self._folder / name)

    def used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _make_room(self, size_bytes: int) -> None:
        files = sorted(self._files())
        total = size_bytes + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each was last used, its size, and its path."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name == FOLDER_LOCK:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    yield found.st_atime_ns, found.st_size, Path(entry.path)
