"""The files that a run reads, wherever they are: listed, looked at, and brought to this machine.

What is wrong with one file is a ``TerminalError`` and ends that clip, never the run.
"""

from __future__ import annotations

import contextlib
import errno
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, PipelineError, TerminalError, TransientError
from pipeline.storage import (
    LISTING_TIMEOUT_S,
    ObjectChangedError,
    StoredObject,
    call,
    credential_problem,
    fetch_object,
    is_transient,
    list_objects,
    object_version,
    open_filesystem,
    read_object,
    read_span,
    retry,
    stat_object,
)

_WILDCARD = re.compile(r"[*?\[]")
# What a local disk says of one file, where every other OSError may pass: a symlink loop, a device that is not there.
_OF_THE_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP, errno.EOVERFLOW)
_FETCHES = 3


def list_inputs(uri: str, options: dict[str, Any] | None = None, *, recursive: bool = True) -> Iterator[StoredObject]:
    """The files that a folder, a glob or a single file names, sorted, with absolute URIs.

    A name that holds ``*``, ``?`` or ``[`` and exists is taken as it stands, not as a pattern. Hidden files and
    folders (``.name``) are passed over, as a shell does.

    Raises:
        ConfigError: nothing is there, or it may not be listed.
    """
    fs, path = open_filesystem(uri, options)
    local = isinstance(fs, LocalFileSystem)
    folder = path

    def find() -> dict[str, dict[str, Any]]:
        nonlocal folder
        if _WILDCARD.search(path) and not call(fs, "exists", path):
            folder = _WILDCARD.split(path)[0].rpartition("/")[0]
            return cast(dict[str, dict[str, Any]], call(fs, "glob", path, detail=True, timeout_s=LISTING_TIMEOUT_S))
        if recursive and not local:
            objects = dict(list_objects(fs, path, f"list {uri}"))
            if objects:
                return objects
        try:  # a disk, or a single file
            depth = None if recursive else 1
            found = call(fs, "find", path, maxdepth=depth, detail=True, timeout_s=LISTING_TIMEOUT_S)
            return cast(dict[str, dict[str, Any]], found)
        except FileNotFoundError:
            return {}

    try:
        found = retry(f"list {uri}", find, local=local)
    except PermissionError as error:
        raise ConfigError(f"input.uri {uri}: may not be listed: {error}") from error
    if not found:
        raise ConfigError(f"input.uri {uri}: there is nothing there")
    shows_hidden = "/." in path[len(folder) :]
    for name, info in sorted(found.items()):
        if info.get("type") != "directory" and (shows_hidden or "/." not in name[len(folder) :]):
            yield StoredObject(name if local else fs.unstrip_protocol(name), int(info["size"]), object_version(info))


def stat_input(uri: str, options: dict[str, Any] | None = None) -> StoredObject:
    """Size and version of one file. Raises: TerminalError: it is no file, or may not be read."""
    with _as_terminal(uri):
        fs, path = open_filesystem(uri, options)
        local = isinstance(fs, LocalFileSystem)
        info = fs.info(path) if local else stat_object(fs, path, f"stat {uri}")
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
        if local and info["type"] != "file":  # opening a pipe would wait for its writer for ever
            raise TerminalError("fetch", "unreadable", f"{uri}: is no regular file")
    return StoredObject(path if local else fs.unstrip_protocol(path), int(info["size"]), object_version(info))


def read_input(uri: str, options: dict[str, Any] | None = None) -> bytes:
    """All bytes of one small file, such as a caption. Raises: TerminalError: as ``stat_input``."""
    with _as_terminal(uri):
        fs, path = open_filesystem(uri, options)
        local = isinstance(fs, LocalFileSystem)
        if not local:
            return read_object(fs, path, f"read {uri}")
        stat_input(uri, options)
        return cast(bytes, fs.cat_file(path))


def read_input_range(uri: str, options: dict[str, Any] | None, offset: int, length: int, version: str | None = None) -> bytes:
    """Bytes ``offset`` to ``offset + length`` of one file.

    Args:
        version: what the file must be, as its listing gave it. S3 holds it, of a local file it is asked before the read; other
            stores do not tell.

    Raises:
        TerminalError: as ``stat_input``; or the file has another version.
        TransientError: the store or the disk does not deliver them.
    """
    with _as_terminal(uri):
        fs, path = open_filesystem(uri, options)
        local = isinstance(fs, LocalFileSystem)
        if not local:
            try:
                return read_span(fs, path, offset, length, f"read {uri}", version)
            except ObjectChangedError as error:
                raise TerminalError("fetch", "changed", f"{uri}: {error}; run again with --append to plan it anew") from error
        found = stat_input(uri, options)
        if version is not None and found.version != version:
            raise TerminalError("fetch", "changed", f"{uri}: was replaced; run again with --append to plan it anew")
        data = cast(bytes, fs.cat_file(path, start=offset, end=offset + length))
        if len(data) != length:
            raise OSError(f"{path}: asked for {length} bytes at {offset}, got {len(data)}")
        return data


@contextlib.contextmanager
def fetch_input(uri: str, options: dict[str, Any] | None, folder: str | Path) -> Iterator[tuple[Path, StoredObject]]:
    """A local path with the file's bytes while the context lasts, and what the file is now.

    A remote file is copied into ``folder``; a local one is not copied.

    Raises:
        TerminalError: the file does not exist or may not be read.
        TransientError: the store or the disk does not deliver it.
    """
    with _as_terminal(uri):
        fs, path = open_filesystem(uri, options)
    if isinstance(fs, LocalFileSystem):
        found = stat_input(uri, options)
        with _as_terminal(uri), open(path, "rb"):  # says at once whether it can be read
            pass
        yield Path(path), found
        return
    copy = Path(folder) / uuid.uuid4().hex
    try:
        yield copy, _fetch(uri, options, copy)
    finally:
        copy.unlink(missing_ok=True)


def _fetch(uri: str, options: dict[str, Any] | None, copy: Path) -> StoredObject:
    """Copy one version of a remote file, and say which."""
    for _ in range(_FETCHES):
        found = stat_input(uri, options)
        with contextlib.suppress(ObjectChangedError), _as_terminal(uri):
            fs, path = open_filesystem(uri, options)
            fetch_object(fs, path, copy, found, f"fetch {uri}")
            return found
    raise TerminalError("fetch", "changed", f"{uri}: was replaced {_FETCHES} times while it was copied; let it come to rest")


@contextlib.contextmanager
def _as_terminal(uri: str) -> Iterator[None]:
    """What will be the same next time is wrong with this one file: it ends the clip, never the run."""
    try:
        yield
    except FileNotFoundError as error:
        raise TerminalError("fetch", "not_found", f"{uri}: no such file") from error
    except PermissionError as error:
        _raise_for_surroundings(uri, error)
        raise TerminalError("fetch", "not_permitted", f"{uri}: may not be read: {error}") from error
    except ObjectChangedError:
        raise
    except Exception as error:
        _raise_for_surroundings(uri, error)
        if isinstance(error, PipelineError) and not isinstance(error, ConfigError):
            raise
        if is_transient(error) and getattr(error, "errno", None) not in _OF_THE_FILE:
            raise TransientError(f"{uri}: cannot be read now: {type(error).__name__}: {error}") from error
        raise TerminalError("fetch", "unreadable", f"{uri}: cannot be read: {type(error).__name__}: {error}") from error


def _raise_for_surroundings(uri: str, error: Exception) -> None:
    """A credential that ran out says nothing about a file, nor does a full disk here."""
    if problem := credential_problem(error):
        raise ConfigError(f"{uri}: may not be read: {error}; {problem}") from error
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise TransientError(f"{uri}: no room on this machine for its copy: {error}") from error
