"""The one door to files and object stores, through fsspec.

Everything that the pipeline keeps is either immutable and *put if absent*, which is how work is committed,
or small and replaced whole (``status.json``). Nothing specific to one store stands outside this module.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, TransientError

logger = logging.getLogger(__name__)
T = TypeVar("T")

TEMPORARY_FOLDER = ".tmp"
"""Of files that are being written, on a local disk."""
_ATTEMPTS = 5
_FIRST_DELAY_S = 0.2
# A store's answer that will be the same next time. EEXIST is how a lost race looks.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# The S3 client raises these beside OSError; matched by module, so that no store's client is imported here.
# Requests that a server asks to repeat; every other 4xx is its last word.
_REPEATABLE_STATUS = (408, 425, 429)
_CLIENT_MODULES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure", "requests", "urllib3")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
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
        ConfigError: this machine has no credentials for the store.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if type(error).__name__ in _NO_CREDENTIALS:
                raise ConfigError(
                    f"{what}: no credentials: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; and "
                    "AWS_ENDPOINT_URL for a store that is not AWS's"
                ) from error
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
        # The path alone does not name the host of an sftp:// or http:// address; a local one may be relative.
        self._address = self._root if self.is_local else uri

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self._address, self.options))

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

    def names(self) -> builtins.list[str]:
        """What lies directly in the folder; empty if the folder is not there."""

        def ls() -> builtins.list[str]:
            try:
                return cast(builtins.list[str], self._fs.ls(self._root, detail=False))
            except FileNotFoundError:
                return []

        found = (path.rstrip("/") for path in self._retry("list", "", ls))
        return sorted(path.rpartition("/")[2] for path in found if path != self._root)

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

    def move(self, path: str, target: str) -> None:
        """Give a file another name, which must be free. In a store without renaming it is copied first.

        Raises:
            FileExistsError: the name is taken.
        """
        if self.exists(target):
            raise FileExistsError(f"{self.uri}/{target}: exists")
        if self.is_local:
            Path(self._full(target)).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self._full(path), self._full(target))
            return
        size_bytes = self.size(path)
        self._retry("copy", path, lambda: self._fs.cp_file(self._full(path), self._full(target)))
        if self.size(target) != size_bytes:
            raise TransientError(f"{self.uri}/{target}: is not a whole copy of {path}, which was left where it is")
        self._retry("remove", path, lambda: self._fs.rm_file(self._full(path)))

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, (json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n").encode())

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} does not stay inside {self.uri}")
        return f"{self._root}/{path}" if path else self._root

    def _retry(self, what: str, path: str, call: Callable[[], T]) -> T:
        try:
            return retry(f"{what} {self.uri}/{path}", call, local=self.is_local)
        except PermissionError as error:
            raise ConfigError(f"{self.uri}: access refused: {error}") from error
        except NotADirectoryError as error:
            raise ConfigError(f"{self.uri}: is not a folder: {error}") from error

    def _put_object(self, target: str, data: bytes, mode: str) -> None:
        whole = {"chunksize": len(data) + 1} if hasattr(self._fs, "call_s3") else {}
        self._fs.pipe_file(target, data, mode=mode, **whole)

    @contextlib.contextmanager
    def _explained_refusal(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            hint = "its folder was removed" if self.is_local else "create the bucket first"
            raise ConfigError(f"{self.uri}: cannot be written: {error}; {hint}") from error
        except (PermissionError, NotADirectoryError) as error:
            raise ConfigError(f"{self.uri}: cannot be written: {error}") from error

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """A durable file on the output's own disk, outside every folder that readers list."""
        folder = Path(self._root) / TEMPORARY_FOLDER
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
