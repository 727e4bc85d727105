"""Coded videos on disk: written at the model's speed, read at each client's own.

The model never waits for a client, and what a slow client has not yet taken lies in a file, within a budget. A file
lives as long as somebody writes or reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import shutil
import stat
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.service.errors import RequestError

_CHUNK_BYTES = 256 << 10
_LOCK_NAME = "owner.lock"
FOLDER_LOCK = ".lock"


class SpooledVideo:
    """One coded video: a file that grows until it ends or fails. Made by ``Spool``.

    Threads write, coroutines read. Who reads or writes holds it; when the last holder releases it, the file is removed.
    """

    def __init__(self, name: str, path: Path, reserved_bytes: int, on_removed: Callable[[SpooledVideo], None]) -> None:
        self.name = name
        """Says what it is: equal names, equal videos."""
        self.path = path
        self.reserved_bytes = reserved_bytes
        self.on_unread: Callable[[], None] = _do_nothing
        """Called when the last reader left before the end. Set before there are readers."""
        self._on_removed = on_removed
        self._lock = threading.Lock()
        self._readers = 1
        self._is_written = False
        self._size_bytes = 0
        self._ended = False
        self._error: RequestError | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def size_bytes(self) -> int:
        """Bytes that may be read so far."""
        return self._size_bytes

    @property
    def is_whole(self) -> bool:
        return self._ended and self._error is None

    def join(self) -> bool:
        """Read it too. False: it is gone already, or failed."""
        with self._lock:
            if self._readers == 0 or self._error is not None:
                return False
            self._readers += 1
            return True

    def leave(self) -> None:
        """Read it no longer."""
        with self._lock:
            self._readers -= 1
            is_unread = self._readers == 0 and not self._ended
            is_unused = self._readers == 0 and not self._is_written
        if is_unread:
            self.on_unread()
        if is_unused:
            self._on_removed(self)

    def begin(self) -> bool:
        """Start to write. False: nobody waits for it any more."""
        with self._lock:
            self._is_written = self._readers > 0
            return self._is_written

    def open_growing(self) -> io.RawIOBase:
        """A file to append to; readers see every byte at once."""
        return _GrowingFile(self)

    def grow(self, size_bytes: int) -> None:
        """So much can be read by now."""
        with self._lock:
            self._size_bytes = size_bytes
        self._wake()

    def finish(self, error: RequestError | None = None) -> None:
        """It is whole, or will never be. Who writes calls this once."""
        with self._lock:
            self._ended, self._error = True, error
            if error is None:
                self._size_bytes = self.path.stat().st_size
            is_unused = self._readers == 0 and self._is_written
            self._is_written = False
        self.on_unread = _do_nothing  # it holds the latent, which slow readers need not
        self._wake()
        if is_unused:
            self._on_removed(self)

    async def wait_begun(self) -> None:
        """Until the first bytes are there. Raises: RequestError: there will be none."""
        await self._wait_beyond(0)
        if self._error is not None and self._size_bytes == 0:
            raise self._error

    async def wait_whole(self) -> None:
        """Until the video is whole. Raises: RequestError: it failed."""
        while not self._ended:
            await self._wait(lambda: self._ended)
        if self._error is not None:
            raise self._error

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Its bytes as they come. Raises: RequestError: it failed, perhaps after its first bytes."""
        await self.wait_begun()
        with self.path.open("rb") as file:
            offset = 0
            while True:
                await self._wait_beyond(offset)
                size_bytes, ended = self._size_bytes, self._ended
                while offset < size_bytes:
                    length = min(_CHUNK_BYTES, size_bytes - offset)
                    data = await asyncio.to_thread(os.pread, file.fileno(), length, offset)
                    offset += len(data)
                    yield data
                if self._error is not None:
                    raise self._error
                if ended and offset >= self._size_bytes:
                    return

    async def _wait_beyond(self, offset: int) -> None:
        await self._wait(lambda: self._ended or self._size_bytes > offset)

    async def _wait(self, is_true: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if is_true():
                    return
                future = loop.create_future()
                self._waiters.append((loop, future))
            await future

    def _wake(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_set_done, future)


def _do_nothing() -> None: ...


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _GrowingFile(io.RawIOBase):
    """Appends to a spooled video. Not seekable, so that no byte changes after it was read."""

    def __init__(self, video: SpooledVideo) -> None:
        self._video = video
        self._file = video.path.open("wb", buffering=0)
        self._size_bytes = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += self._file.write(view[written:]) or 0
        self._size_bytes += written
        self._video.grow(self._size_bytes)
        return written

    def close(self) -> None:
        self._file.close()
        super().close()


class Spool:
    """A folder of spooled videos, of one process, within a byte budget. Thread-safe.

    Folders of processes that ended without closing theirs are removed.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()
        folder = make_private_folder(folder)
        with locked_folder(folder):
            _remove_stale(folder)
            self._folder = folder / uuid.uuid4().hex
            self._folder.mkdir(mode=0o700)
            self._owner = (self._folder / _LOCK_NAME).open("wb")
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def used_bytes(self) -> int:
        """On disk or promised."""
        return self._used_bytes

    def create(self, name: str, at_most_bytes: int) -> SpooledVideo:
        """An empty video with one reader.

        Raises:
            RequestError: 413: larger than the whole budget. 429: others take too much of it now.
        """
        if at_most_bytes > self._limit_bytes:
            raise RequestError(
                413,
                "video_too_large",
                f"the video may take {at_most_bytes} bytes on disk, service.spool_bytes is {self._limit_bytes}; ask for fewer "
                "frames or pixels",
            )
        with self._lock:
            if self._used_bytes + at_most_bytes > self._limit_bytes:
                raise RequestError(
                    429,
                    "spool_full",
                    f"{self._used_bytes} bytes of videos are being made or sent, this one may take {at_most_bytes} and "
                    f"service.spool_bytes is {self._limit_bytes}; try again when others have fetched theirs",
                    retry_after_s=5,
                )
            self._used_bytes += at_most_bytes
        return SpooledVideo(name, self._folder / uuid.uuid4().hex, at_most_bytes, self._remove)

    def shrink(self, video: SpooledVideo) -> None:
        """Give back what a video that was written did not need."""
        size_bytes = video.path.stat().st_size
        with self._lock:
            self._used_bytes += size_bytes - video.reserved_bytes
            video.reserved_bytes = size_bytes

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._owner.close()

    def _remove(self, video: SpooledVideo) -> None:
        video.path.unlink(missing_ok=True)
        with self._lock:
            self._used_bytes -= video.reserved_bytes
            video.reserved_bytes = 0


def make_private_folder(folder: Path) -> Path:
    """A folder that nobody else can write to; the one above it must be there.

    Whoever owns the one above can put another in its place: begin with ``service.folder``.

    Raises:
        ConfigError: it is somebody else's.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"service.folder: {folder}: {error.strerror}; name a folder that can be written") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"service.folder: {folder}: is no folder that only this user writes to; name another one")
    return folder


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    with (folder / FOLDER_LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_stale(folder: Path) -> None:
    for other in folder.iterdir():
        try:
            lock = (other / _LOCK_NAME).open("rb")
        except OSError:
            continue  # no spool
        with lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
