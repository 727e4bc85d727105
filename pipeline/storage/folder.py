"""The folder that everybody else sees: paths, whole files, ranges, listings, and the conditional put."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from fsspec.implementations.local import LocalFileSystem

from pipeline import failpoints
from pipeline.errors import ConfigError, TransientError
from pipeline.storage import local
from pipeline.storage.client import (
    LISTING_TIMEOUT_S,
    StoredObject,
    call,
    list_objects,
    object_version,
    open_filesystem,
    put_object,
    read_object,
    read_span,
)
from pipeline.storage.faults import explained, hint, is_lost_race, retry, store_code

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_PREFIX = ".probe-"
"""Of objects that try out what a store can do; one is left where the process was killed meanwhile."""


class Storage:
    """A folder on a local disk or in an object store. Paths are relative to it, with forward slashes.

    Instances pickle, with their options; each process opens its own connection.
    """

    def __init__(self, uri: str, options: dict[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self._fs, self._root = open_filesystem(uri, self.options)
        self._root = self._root.rstrip("/")
        self.uri = self._fs.unstrip_protocol(self._root) if not self.is_local else self._root
        # The path alone does not name the host of an sftp:// or http:// address; a local one may be relative.
        self._address = self._root if self.is_local else uri
        self._conditional: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self._address, self.options), {"_conditional": self._conditional})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._conditional = state["_conditional"]

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"  # options may hold secrets

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    @property
    def has_conditional_put(self) -> bool:
        """Whether ``put_if_absent`` lets one of several win. Tried out when first asked, on a name of its own.

        Where it is known to be False, ``put_if_absent`` looks first and then puts: two that come at the same time both
        win, and the later one's bytes stand. Never give the same work to two at a time there.

        Raises:
            ConfigError, StorageFullError: as ``put``.
        """
        if self._conditional is None:
            self._conditional = self._try_conditional_put()
        return self._conditional

    def local_path(self, path: str) -> str:
        """The file's path on this machine's disk. Raises: ValueError: the storage is remote."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not on a local disk")
        return self._full(path)

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises: FileNotFoundError."""
        target = self._full(path)
        with explained(self.uri, "read"):
            if self.is_local:
                return cast(bytes, self._fs.cat_file(target))
            return read_object(self._fs, target, f"read {self.uri}/{path}")

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Bytes ``offset`` to ``offset + length``. Raises: TransientError: the store gave another length."""
        target, what = self._full(path), f"read {self.uri}/{path}"
        with explained(self.uri, "read"):
            if not self.is_local:
                return read_span(self._fs, target, offset, length, what)
            data = cast(bytes, self._fs.cat_file(target, start=offset, end=offset + length))
            if len(data) != length:
                raise OSError(f"{path}: asked for {length} bytes at {offset}, got {len(data)}")
            return data

    def size(self, path: str) -> int:
        return int(self._ask("size", path))

    def exists(self, path: str) -> bool:
        try:
            self._ask("info", path)  # fsspec's own "exists" takes every fault for a no
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str, suffix: str = "") -> list[StoredObject]:
        """The files below a folder, sorted by path; ``uri`` holds the path relative to this storage."""
        return sorted(self._list(prefix, suffix), key=lambda found: found.uri)

    def walk(self, folder: str, suffix: str = "") -> Iterator[StoredObject]:
        """As ``list``, a page at a time and in the store's own order: for folders of millions of files.

        Disks and S3 are read in pages; another store's client lists the folder whole.
        """
        if not self.is_local:
            return self._list(folder, suffix)
        return (found for found in local.walk(self._root, self._full(folder)) if found.uri.endswith(suffix))

    def _list(self, folder: str, suffix: str) -> Iterator[StoredObject]:
        skip = len(self._root) + 1
        with explained(self.uri, "read"):
            for path, info in list_objects(self._fs, self._full(folder), f"list {self.uri}/{folder}"):
                if path.endswith(suffix):
                    yield StoredObject(path[skip:], int(info["size"]), object_version(info))

    def names(self) -> builtins.list[str]:
        """What lies directly in the folder; empty if the folder is not there."""
        try:
            listed = cast(builtins.list[str], self._ask("ls", "", detail=False))
        except FileNotFoundError:
            return []
        found = (path.rstrip("/") for path in listed)
        return sorted(path.rpartition("/")[2] for path in found if path != self._root)

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, replacing what was there; readers see the old or the new.

        Raises:
            ConfigError: there is no such bucket, or it may not be written.
            StorageFullError: there is no room left.
        """
        target = self._full(path)
        with self._explained_refusal():
            failpoints.reach("storage.before_put")
            if self.is_local:
                local.replace(self._root, target, data)
            else:
                retry(f"put {self.uri}/{path}", partial(self._put_object, target, data, if_absent=False))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file whole unless it exists. Returns whether this call's bytes are known to stand there.

        False can also mean that an earlier try of this very call took effect and its reply was lost: who
        must know reads the object back.

        Raises:
            ConfigError, StorageFullError: as ``put``.
        """
        if self._conditional is False:
            if self.exists(path):
                return False
            self.put(path, data)
            return True
        with self._explained_refusal():
            failpoints.reach("storage.before_put")
            try:
                return self._put_if_absent(path, data)
            except TransientError:  # each try failed, but one may have taken effect
                if self.exists(path):
                    return False
                raise

    def put_file_if_absent(self, path: str, source: str | Path) -> bool:
        """``put_if_absent`` of a local file's bytes."""
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
        copy = partial(call, self._fs, "cp_file", self._full(path), self._full(target), timeout_s=LISTING_TIMEOUT_S)
        with self._explained_refusal():
            retry(f"copy {self.uri}/{path}", copy)
            if self.size(target) != size_bytes:
                raise TransientError(f"{self.uri}/{target}: is not a whole copy of {path}, which was left where it is")
            retry(f"remove {self.uri}/{path}", partial(call, self._fs, "rm_file", self._full(path)))

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, (json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n").encode())

    def _put_if_absent(self, path: str, data: bytes) -> bool:
        target = self._full(path)
        if self.is_local:
            return local.link(self._root, target, data)
        try:
            retry(f"put {self.uri}/{path}", partial(self._put_object, target, data, if_absent=True))
        except Exception as error:
            if is_lost_race(error):
                return False
            raise
        return True

    def _put_object(self, target: str, data: bytes, *, if_absent: bool) -> None:
        put_object(self._fs, target, data, if_absent=if_absent)
        failpoints.reach("storage.after_put")

    def _try_conditional_put(self) -> bool:
        """Two conditional puts of one small object: only a store that refuses the second has them."""
        with self._explained_refusal():
            if self.is_local:
                return local.has_links(self._root)
            probe = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
            try:
                # The first may be said to have lost where its reply was lost; then it stands all the same.
                self._put_if_absent(probe, b"first")
                return not self._put_if_absent(probe, b"second")
            except Exception as error:
                if not _is_unsupported(error):
                    raise
                logger.debug("conditional put refused error=%s", error)
                return False
            finally:
                self._remove(probe)

    def _remove(self, path: str) -> None:
        """Best effort: a run may have no right to delete, and needs none."""
        try:
            retry(f"remove {self.uri}/{path}", partial(call, self._fs, "rm_file", self._full(path)))
        except Exception as error:
            logger.debug("left behind path=%s error=%s", path, error)

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} does not stay inside {self.uri}")
        return f"{self._root}/{path}" if path else self._root

    def _ask(self, method: str, path: str, **named: Any) -> Any:
        request: Callable[[], Any] = partial(call, self._fs, method, self._full(path), **named)
        with explained(self.uri, "read"):
            return retry(f"{method} {self.uri}/{path}", request, local=self.is_local)

    @contextlib.contextmanager
    def _explained_refusal(self) -> Iterator[None]:
        try:
            with explained(self.uri, "written"):
                yield
        except FileNotFoundError as error:
            advice = "its folder was removed" if self.is_local else hint(error) or "create the bucket first"
            raise ConfigError(f"{self.uri}: cannot be written: {error}; {advice}") from error


def _is_unsupported(error: Exception) -> bool:
    """Whether a store or its client does not know conditional puts at all."""
    if isinstance(error, (NotImplementedError, TypeError, ValueError)):
        return True
    return getattr(error, "errno", None) == errno.ENOSYS or store_code(error) in ("NotImplemented", "InvalidArgument")
