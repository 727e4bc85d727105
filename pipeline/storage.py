"""The one door to files and object stores, through fsspec.

Everything that the pipeline keeps is either immutable and *put if absent*, which is how work is committed,
or small and replaced whole (``status.json``). Nothing specific to one store stands outside this module.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, PipelineError, TerminalError, TransientError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ATTEMPTS = 5
_FIRST_DELAY_S = 0.2
# A store's answer that will be the same next time. EEXIST is how a lost race looks.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# The S3 client raises these beside OSError; matched by module, so that no store's client is imported here.
_WILDCARD = re.compile(r"[*?\[]")
# Requests that a server asks to repeat; every other 4xx is its last word.
_REPEATABLE_STATUS = (408, 425, 429)
_CLIENT_MODULES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure", "requests", "urllib3")
_S3_DEFAULTS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed file."""

    uri: str
    size_bytes: int
    version: str
    """ETag where the store has one, else the modification time."""


def open_filesystem(uri: str, options: dict[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI, with timeouts and bounded retries, and the path inside it.

    Raises:
        ConfigError: the scheme is unknown, or its client is not installed.
    """
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    defaults = _S3_DEFAULTS if scheme in ("s3", "s3a") else {}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **{**defaults, **(options or {})})
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{uri}: no filesystem for {scheme}://: {error}") from error
    if hasattr(fs, "retries"):
        fs.retries = 2  # s3fs nests its retries in botocore's; ours stand around both
    return fs, path


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _FINAL) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _REPEATABLE_STATUS
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError)) or module in _CLIENT_MODULES


def is_lost_race(error: BaseException) -> bool:
    """Whether a conditional put was refused because the object exists.

    Stores name the condition differently: s3fs turns SeaweedFS's 412 into ``OSError(EINVAL)``.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, FileExistsError) or "PreconditionFailed" in str(link) or "conditionNotMet" in str(link):
            return True
        link = link.__cause__
    return False


def retry(what: str, call: Callable[[], T], *, local: bool = False) -> T:
    """Run a storage call, again with backoff and jitter while its faults are transient.

    Raises:
        TransientError: it still fails after five attempts. Faults of a local disk are raised as they are.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if local or not is_transient(error) or is_lost_race(error):
                raise
            if attempt == _ATTEMPTS:
                raise TransientError(f"{what}: failed {attempt} times, last by {type(error).__name__}: {error}") from error
            delay = _FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            logger.warning("storage retry what=%s attempt=%d error=%s", what, attempt, type(error).__name__)
            time.sleep(delay)
    raise AssertionError("unreachable")


class Storage:
    """A folder on a local disk or in an object store. Paths are relative to it, with forward slashes.

    Instances pickle; each process opens its own connection.
    """

    def __init__(self, uri: str, options: dict[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self._fs, self._root = open_filesystem(uri, self.options)
        self._root = self._root.rstrip("/")
        self.uri = self._fs.unstrip_protocol(self._root) if not self.is_local else self._root

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self.uri, self.options))

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"  # options may hold secrets

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def local_path(self, path: str) -> str:
        """The file's path on this machine's disk. Raises: ValueError: the storage is remote."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not on a local disk")
        return self._full(path)

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises: FileNotFoundError."""
        return cast(bytes, self._retry("read", path, lambda: self._fs.cat_file(self._full(path))))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Bytes ``offset`` to ``offset + length``. Raises: TransientError: the store gave another length."""

        def read() -> bytes:
            data = cast(bytes, self._fs.cat_file(self._full(path), start=offset, end=offset + length))
            if len(data) != length:
                raise OSError(f"{path}: asked for {length} bytes at {offset}, got {len(data)}")
            return data

        return self._retry("read", path, read)

    def open(self, path: str) -> BinaryIO:
        """A seekable binary file."""
        return cast(BinaryIO, self._retry("open", path, lambda: self._fs.open(self._full(path), "rb")))

    def size(self, path: str) -> int:
        return int(self._retry("size", path, lambda: self._fs.size(self._full(path))))

    def exists(self, path: str) -> bool:
        return bool(self._retry("exists", path, lambda: self._fs.exists(self._full(path))))

    def list(self, prefix: str, suffix: str = "") -> list[StoredObject]:
        """The files below a folder, sorted by path; ``uri`` holds the path relative to this storage."""

        def find() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                return cast(dict[str, dict[str, Any]], self._fs.find(self._full(prefix), detail=True))
            except FileNotFoundError:
                return {}

        found = self._retry("list", prefix, find)
        skip = len(self._root) + 1
        return [
            StoredObject(path[skip:], int(info["size"]), object_version(info))
            for path, info in sorted(found.items())
            if path.endswith(suffix)
        ]

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, replacing what was there; readers see the old or the new.

        Raises:
            ConfigError: there is no such bucket, or it may not be written.
        """
        target = self._full(path)
        with self._explained_refusal():
            if self.is_local:
                with self._temporary(data) as temporary:
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(temporary, target)
            else:
                self._retry("put", path, lambda: self._put_object(target, data, "overwrite"))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file whole unless it exists. Returns whether this call's bytes are known to stand there.

        False can also mean that an earlier try of this very call took effect and its reply was lost: who
        must know reads the object back.

        Raises:
            ConfigError: as ``put``.
        """
        target = self._full(path)
        with self._explained_refusal():
            if self.is_local:
                with self._temporary(data) as temporary:
                    return _link(temporary, target)
            try:
                self._retry("put", path, lambda: self._put_object(target, data, "create"))
            except Exception as error:
                if is_lost_race(error):
                    return False
                raise
        return True

    def put_file_if_absent(self, path: str, source: str | Path) -> bool:
        """``put_if_absent`` of a local file's bytes."""
        # One whole PUT: an object store's conditional completion of a multipart upload is not atomic everywhere.
        return self.put_if_absent(path, Path(source).read_bytes())

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} does not stay inside {self.uri}")
        return f"{self._root}/{path}" if path else self._root

    def _retry(self, what: str, path: str, call: Callable[[], T]) -> T:
        try:
            return retry(f"{what} {self.uri}/{path}", call, local=self.is_local)
        except PermissionError as error:
            raise ConfigError(f"{self.uri}: access refused: {error}") from error

    def _put_object(self, target: str, data: bytes, mode: str) -> None:
        whole = {"chunksize": len(data) + 1} if hasattr(self._fs, "call_s3") else {}
        self._fs.pipe_file(target, data, mode=mode, **whole)

    @contextlib.contextmanager
    def _explained_refusal(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ConfigError(f"{self.uri}: cannot be written: {error}. Create the bucket first") from error
        except (PermissionError, NotADirectoryError) as error:
            raise ConfigError(f"{self.uri}: cannot be written: {error}") from error

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """A durable file on the output's own disk, outside every folder that readers list."""
        folder = Path(self._root) / ".tmp"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / uuid.uuid4().hex
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield str(temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: str, target: str) -> bool:
    """Give a local file its name, durably, unless the name is taken."""
    folder = Path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def object_version(info: dict[str, Any]) -> str:
    """What tells one content of a path from another, without reading it."""
    for key in ("ETag", "etag", "md5Hash"):
        if info.get(key):
            return str(info[key]).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("created") or ""
    return f"{modified:.6f}" if isinstance(modified, float) else str(modified)


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
        if _WILDCARD.search(path) and not fs.exists(path):
            folder = _WILDCARD.split(path)[0].rpartition("/")[0]
            return cast(dict[str, dict[str, Any]], fs.glob(path, detail=True))
        try:
            return cast(dict[str, dict[str, Any]], fs.find(path, maxdepth=None if recursive else 1, detail=True))
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
        info = retry(f"stat {uri}", lambda: fs.info(path), local=local)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
    return StoredObject(path if local else fs.unstrip_protocol(path), int(info["size"]), object_version(info))


def read_input(uri: str, options: dict[str, Any] | None = None) -> bytes:
    """All bytes of one small file, such as a caption. Raises: TerminalError: as ``stat_input``."""
    with _as_terminal(uri):
        fs, path = open_filesystem(uri, options)
        return cast(bytes, retry(f"read {uri}", lambda: fs.cat_file(path), local=isinstance(fs, LocalFileSystem)))


@contextlib.contextmanager
def fetch_input(uri: str, options: dict[str, Any] | None, folder: str | Path) -> Iterator[tuple[Path, StoredObject]]:
    """A local path with the file's bytes while the context lasts, and what the file is now.

    A remote file is copied into ``folder``; a local one is not copied.

    Raises:
        TerminalError: the file does not exist or may not be read.
        TransientError: the store does not deliver it.
    """
    found = stat_input(uri, options)
    fs, path = open_filesystem(uri, options)
    if isinstance(fs, LocalFileSystem):
        with _as_terminal(uri), open(path, "rb"):  # says at once whether it can be read
            pass
        yield Path(path), found
        return
    copy = Path(folder) / uuid.uuid4().hex
    try:
        with _as_terminal(uri):
            retry(f"fetch {uri}", lambda: _download(fs, path, copy, found.size_bytes))
        yield copy, found
    finally:
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_terminal(uri: str) -> Iterator[None]:
    """What will be the same next time is wrong with this one file: it ends the clip, never the run."""
    try:
        yield
    except FileNotFoundError as error:
        raise TerminalError("fetch", "not_found", f"{uri}: no such file") from error
    except PermissionError as error:
        raise TerminalError("fetch", "not_permitted", f"{uri}: may not be read: {error}") from error
    except Exception as error:
        if is_transient(error) or (isinstance(error, PipelineError) and not isinstance(error, ConfigError)):
            raise
        raise TerminalError("fetch", "unreadable", f"{uri}: cannot be read: {type(error).__name__}: {error}") from error


def _download(fs: fsspec.AbstractFileSystem, path: str, copy: Path, size_bytes: int) -> None:
    fs.get_file(path, str(copy))
    if copy.stat().st_size != size_bytes:  # some clients end a broken transfer without an error
        raise OSError(f"{path}: expected {size_bytes} bytes, got {copy.stat().st_size}")
