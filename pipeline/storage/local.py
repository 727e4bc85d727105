"""Files on a local disk: whole, durable, and under their name by one link or rename."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage.client import StoredObject

TEMPORARY_FOLDER = ".tmp"
"""Of files that are being written."""
# Disks without hard links: FAT, some network and FUSE mounts.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def temporary_file(root: str, data: bytes) -> Iterator[str]:
    """A durable file on the output's own disk, outside every folder that readers list."""
    folder = Path(root) / TEMPORARY_FOLDER
    _make_folder(folder)
    temporary = folder / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield str(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def replace(root: str, target: str, data: bytes) -> None:
    """Write a file whole, in place of what was there."""
    with temporary_file(root, data) as temporary:
        _make_folder(Path(target).parent)
        os.replace(temporary, target)
        _sync_folder(Path(target).parent)


def link(root: str, target: str, data: bytes) -> bool:
    """Write a file whole unless its name is taken. Returns whether it was free."""
    with temporary_file(root, data) as temporary:
        _make_folder(Path(target).parent)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        _sync_folder(Path(target).parent)
        return True


def has_links(root: str) -> bool:
    """Whether the disk has hard links, without which nothing can be put if absent."""
    with temporary_file(root, b"") as temporary:
        try:
            os.link(temporary, temporary + "-link")
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        os.unlink(temporary + "-link")
        return True


def walk(root: str, folder: str) -> Iterator[StoredObject]:
    """The files below a folder, one after the other; ``uri`` holds the path relative to ``root``."""
    with contextlib.ExitStack() as held:
        try:
            entries = held.enter_context(os.scandir(folder))
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise ConfigError(f"{folder}: may not be listed: {error}") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(root, entry.path)
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                found = entry.stat()
                yield StoredObject(entry.path[len(root) + 1 :], found.st_size, f"{found.st_mtime:.6f}")


def _make_folder(folder: Path) -> None:
    """A folder and those above it, each durable: a file is lost with any of them."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
