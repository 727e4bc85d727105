"""One request to a store: on a clock, checked for its length, and of one version of the object.

Where the store is S3, objects are read and written by S3's own calls: s3fs turns to multipart by itself, mixes
two versions of an object that is replaced while it is read, and does not say which version it read. Every
object that is put carries the hash of its content, which is compared when it is read whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import fsspec
import xxhash
from fsspec.asyn import sync

from pipeline.errors import ConfigError, TransientError
from pipeline.storage.faults import is_lost_race, retry

PIECE_BYTES = 32 << 20
"""Larger objects are read in pieces of this size, each repeated on its own."""
REQUEST_TIMEOUT_S = 30.0
"""Wall clock of one request, beyond the time that its bytes take."""
LISTING_TIMEOUT_S = 600.0
"""Wall clock of a listing that the store's client turns into many requests."""
_SLOWEST_BYTES_PER_S = 1 << 20
_READ_AGAIN = 3
_HASH_KEY = "xxh3"
_S3_CONFIG: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "max_pool_connections": 32,  # as many as threads read at a time, else they wait for each other on the clock
    "retries": {"mode": "standard", "total_max_attempts": 1},
}


class ObjectChangedError(Exception):
    """An object is no longer the version that was asked for."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed file."""

    uri: str
    size_bytes: int
    version: str
    """ETag where the store has one, else the modification time."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What S3 gave of one object. ``data`` is None where the object is larger than one piece."""

    data: bytes | None
    size_bytes: int
    etag: str
    xxh3: str | None


def client_options(uri: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a store's client: timeouts, no retries and no cache of its own, and what the user gives beside or instead."""
    merged = dict(options or {})
    if _scheme(uri) in ("s3", "s3a"):
        merged["config_kwargs"] = {**_S3_CONFIG, **merged.get("config_kwargs", {})}
        merged.setdefault("use_listings_cache", False)
    return merged


def open_filesystem(uri: str, options: dict[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI, with timeouts and without retries of its own, and the path inside it.

    Raises:
        ConfigError: the scheme is unknown, or its client is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri, **client_options(uri, options))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{uri}: no filesystem for {_scheme(uri)}://: {error}") from error
    if hasattr(fs, "retries"):
        fs.retries = 1  # ours stand around every request
    return fs, path


def call(fs: fsspec.AbstractFileSystem, name: str, *arguments: Any, timeout_s: float | None = None, **named: Any) -> Any:
    """A filesystem's method; where it talks to a network, given up after ``timeout_s`` or ``REQUEST_TIMEOUT_S``.

    A client's own timeouts count from one received byte to the next, so that a store which drips holds it for ever.
    """
    if not fs.async_impl:
        return getattr(fs, name)(*arguments, **named)
    return sync(fs.loop, getattr(fs, f"_{name}"), *arguments, timeout=timeout_s or REQUEST_TIMEOUT_S, **named)


def object_version(info: dict[str, Any]) -> str:
    """What tells one content of a path from another, without reading it."""
    for key in ("ETag", "etag", "md5Hash"):
        if info.get(key):
            return str(info[key]).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("created") or ""
    return f"{modified:.6f}" if isinstance(modified, float) else str(modified)


def stat_object(fs: fsspec.AbstractFileSystem, path: str, what: str) -> dict[str, Any]:
    """What a remote store says of a path.

    Raises:
        PermissionError: it may not be read; with the store's own name for why.
    """
    try:
        return cast(dict[str, Any], retry(what, partial(call, fs, "info", path)))
    except OSError as error:
        if _is_s3(fs) and not isinstance(error, FileNotFoundError):
            _get(fs, path)  # the answer to a HEAD has no body, and so no reason: a GET says whether a credential ran out
        raise


def read_object(fs: fsspec.AbstractFileSystem, path: str, what: str) -> bytes:
    """All bytes of a remote object, of one version of it.

    Raises:
        FileNotFoundError: there is none.
        TransientError: the store does not deliver it, or not as it was put.
    """
    if not _is_s3(fs):
        return cast(bytes, retry(what, lambda: call(fs, "cat_file", path, timeout_s=LISTING_TIMEOUT_S)))
    for _ in range(_READ_AGAIN):
        first = retry(what, partial(_get, fs, path))
        if first.data is not None:
            return first.data
        with contextlib.suppress(ObjectChangedError):
            data = b"".join(_pieces(fs, path, what, first.size_bytes, first.etag))
            if _is_what_was_put(data, first):
                return data
    raise TransientError(f"{what}: read {_READ_AGAIN} times, and each time it was replaced meanwhile or is not what was put")


def read_span(fs: fsspec.AbstractFileSystem, path: str, offset: int, length: int, what: str, version: str | None = None) -> bytes:
    """Bytes ``offset`` to ``offset + length`` of a remote object.

    Args:
        version: what the object must be, as ``object_version`` gives it. Held by S3; elsewhere nothing tells.

    Raises:
        FileNotFoundError: there is no such object.
        ObjectChangedError: it has another version.
        TransientError: the store does not deliver them, or another length.
    """
    if not _is_s3(fs):
        return retry(what, partial(_cat_span, fs, path, offset, length))
    if length > PIECE_BYTES:
        return b"".join(_pieces(fs, path, what, offset + length, version, offset))
    return retry(what, partial(_get_span, fs, path, offset, length, version))


def fetch_object(fs: fsspec.AbstractFileSystem, path: str, target: Path, found: StoredObject, what: str) -> None:
    """Copy a remote object into a local file, as the version that was found.

    Raises:
        FileNotFoundError: there is no such object.
        ObjectChangedError: it is another one by now.
        TransientError: the store does not deliver it.
    """
    if not _is_s3(fs):
        retry(what, partial(_download, fs, path, target, found.size_bytes))
        if object_version(retry(what, partial(call, fs, "info", path))) != found.version:
            raise ObjectChangedError(f"{what}: replaced while it was read")
        return
    with target.open("wb") as file:
        if found.size_bytes <= PIECE_BYTES:
            answer = retry(what, partial(_get, fs, path, found.version))
            if answer.data is None or len(answer.data) != found.size_bytes:
                raise ObjectChangedError(f"{what}: {answer.size_bytes} bytes now, {found.size_bytes} when it was listed")
            file.write(answer.data)
        else:
            file.writelines(_pieces(fs, path, what, found.size_bytes, found.version))


def put_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes, *, if_absent: bool) -> None:
    """One attempt to put a remote object whole. What it raises may hide that it took effect.

    One whole PUT: an object store's conditional completion of a multipart upload is not atomic everywhere.
    """
    timeout_s = _timeout_s(len(data))
    if not _is_s3(fs):
        call(fs, "pipe_file", path, data, mode="create" if if_absent else "overwrite", timeout_s=timeout_s)
        return
    bucket, key, _ = fs.split_path(path)
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
    metadata = {_HASH_KEY: xxhash.xxh3_128_hexdigest(data)}
    call(fs, "call_s3", "put_object", Bucket=bucket, Key=key, Body=data, Metadata=metadata, timeout_s=timeout_s, **condition)


def list_objects(fs: fsspec.AbstractFileSystem, folder: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and description of every file below a folder; none where it is not there. S3 is read in pages."""
    if _is_s3(fs):
        yield from _list_pages(fs, folder, what)
        return

    def find() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        try:
            found = call(fs, "find", folder, detail=True, timeout_s=LISTING_TIMEOUT_S)
            return cast(dict[str, dict[str, Any]], found)
        except FileNotFoundError:
            return {}

    yield from retry(what, find).items()


def _list_pages(fs: Any, folder: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    bucket, key, _ = fs.split_path(folder)
    place: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    while True:
        try:
            page = retry(what, partial(call, fs, "call_s3", "list_objects_v2", **place))
        except FileNotFoundError:  # no such bucket
            return
        entries = page.get("Contents", [])
        for entry in entries:
            if not entry["Key"].endswith("/"):  # what some tools put in place of a folder
                yield f"{bucket}/{entry['Key']}", {"size": entry["Size"], "ETag": entry["ETag"]}
        if not page.get("IsTruncated") or not entries:
            return
        place["StartAfter"] = entries[-1]["Key"]  # and not a token: a page can be asked for again


def _scheme(uri: str) -> str:
    return uri.split("://", 1)[0] if "://" in uri else "file"


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return hasattr(fs, "call_s3")


def _timeout_s(size_bytes: int) -> float:
    return REQUEST_TIMEOUT_S + size_bytes / _SLOWEST_BYTES_PER_S


def _pieces(fs: Any, path: str, what: str, end: int, version: str | None, start: int = 0) -> Iterator[bytes]:
    for offset in range(start, end, PIECE_BYTES):
        yield retry(what, partial(_get_span, fs, path, offset, min(PIECE_BYTES, end - offset), version))


def _get(fs: Any, path: str, version: str | None = None) -> _Answer:
    """A whole object, if one piece holds it."""
    answer = _request(fs, path, version, {})
    if answer.data is not None:
        _check_length(answer.data, path, 0, answer.size_bytes)
        if not _is_what_was_put(answer.data, answer):
            raise OSError(f"{path}: the {answer.size_bytes} bytes that arrived are not what was put: their hash is another")
    return answer


def _get_span(fs: Any, path: str, offset: int, length: int, version: str | None) -> bytes:
    if not length:
        return b""
    answer = _request(fs, path, version, {"Range": f"bytes={offset}-{offset + length - 1}"})
    return _check_length(answer.data or b"", path, offset, length)


def _request(fs: Any, path: str, version: str | None, span: dict[str, str]) -> _Answer:
    condition = {"IfMatch": f'"{version}"'} if version else {}
    try:
        answer: _Answer = sync(fs.loop, _answer, fs, path, {**condition, **span}, timeout=_timeout_s(PIECE_BYTES))
    except Exception as error:
        if version and is_lost_race(error):
            raise ObjectChangedError(f"{path}: is no longer version {version}") from error
        raise
    return answer


async def _answer(fs: Any, path: str, arguments: dict[str, str]) -> _Answer:
    bucket, key, _ = fs.split_path(path)
    response = await fs._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
    body = response["Body"]
    try:
        data = await body.read() if response["ContentLength"] <= PIECE_BYTES else None
    finally:
        body.close()
    size_bytes = response["ContentLength"]
    return _Answer(data, size_bytes, response["ETag"].strip('"'), response.get("Metadata", {}).get(_HASH_KEY))


def _is_what_was_put(data: bytes, answer: _Answer) -> bool:
    return answer.xxh3 is None or xxhash.xxh3_128_hexdigest(data) == answer.xxh3


def _check_length(data: bytes, path: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        raise OSError(f"{path}: asked for {length} bytes at {offset}, got {len(data)}")
    return data


def _cat_span(fs: Any, path: str, offset: int, length: int) -> bytes:
    data = call(fs, "cat_file", path, start=offset, end=offset + length, timeout_s=_timeout_s(length))
    return _check_length(data, path, offset, length)


def _download(fs: Any, path: str, target: Path, size_bytes: int) -> None:
    call(fs, "get_file", path, str(target), timeout_s=_timeout_s(size_bytes))
    if target.stat().st_size != size_bytes:  # some clients end a broken transfer without an error
        raise OSError(f"{path}: expected {size_bytes} bytes, got {target.stat().st_size}")
