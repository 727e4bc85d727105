"""One shard: rows into a local spool file, one row group in memory, its account in the footer.

The file is ordinary Parquet. What makes it special is the layout: a blob's row is a page of its own, not
compressed, so that a reader who knows the offset takes one sample with one read.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.dataset.schema import is_blob
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import DatasetError
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary

FORMAT_VERSION = 1
DATA_FOLDER = "data"

_VERSION_KEY = b"latent_dataset.format_version"
_SUMMARY_KEY = b"latent_dataset.shard"
_RECIPE_KEY = b"latent_dataset.recipe"
_SCHEMA_KEY = b"ARROW:schema"
_WRITER_KEY = b"latent_dataset.writer"
FOOTER_KEYS = (_VERSION_KEY, _SUMMARY_KEY, _RECIPE_KEY, _WRITER_KEY)
"""In the order in which they are written."""


class ShardWriter:
    """Writes one Parquet shard; used as a context manager, it leaves a file only after ``close``.

    Equal rows and settings give equal bytes, but for the attempt id in the footer.

    Args:
        path: local file; until ``close`` it stands as ``<path>.partial``.
        row_group_bytes: blobs of a row group, and so the memory held. A larger row has a group of its own.
        compression: of the blobs. ``zstd`` gives up reading one sample by its offset.
    """

    def __init__(
        self,
        path: str | Path,
        schema: pa.Schema,
        *,
        row_group_bytes: int = 24 << 20,
        compression: Literal["none", "zstd"] = "none",
    ) -> None:
        self.path = Path(path)
        self.num_rows = 0
        self.size_bytes = 0
        """Bytes of blobs written so far."""
        self._schema = schema
        self._required = [field.name for field in schema if not field.nullable]
        self._blobs = [field.name for field in schema if is_blob(field)]
        self._row_group_bytes = row_group_bytes
        self._rows: list[dict[str, Any]] = []
        self._buffered_bytes = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._partial, schema, **shard_settings(schema, compression))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row, as ``build_row`` makes it; absent nullable columns are null.

        Raises:
            ValueError: a column is unknown, or one that every row must have is absent.
        """
        if unknown := sorted(row.keys() - set(self._schema.names)):
            raise ValueError(f"{row.get('sample_id')}: columns {', '.join(unknown)} are not in the schema of this shard")
        if absent := [name for name in self._required if row.get(name) is None]:
            raise ValueError(f"{row.get('sample_id')}: columns {', '.join(absent)} have no value, but every row must have one")
        size_bytes = sum(len(row[name]) for name in self._blobs)
        if self._rows and self._buffered_bytes + size_bytes > self._row_group_bytes:
            self._flush()
        self._rows.append(dict(row))
        self._buffered_bytes += size_bytes
        self.num_rows += 1
        self.size_bytes += size_bytes

    def close(self, summary: ShardSummary) -> None:
        """Write the footer and give the file its name, durable on disk.

        Raises:
            ValueError: the summary counts other rows or bytes than were written.
        """
        if self._writer is None:
            raise ValueError(f"{self.path}: this shard is closed already")
        if (summary.num_rows, summary.size_bytes) != (self.num_rows, self.size_bytes):
            raise ValueError(
                f"shard {summary.shard_id}: the summary says {summary.num_rows} rows of {summary.size_bytes} bytes, "
                f"but {self.num_rows} of {self.size_bytes} were written"
            )
        self._flush()
        self._writer.add_key_value_metadata(_footer_metadata(summary))
        self._writer.close()
        self._writer = None
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.path)

    def abort(self) -> None:
        """Remove what was written; nothing after ``close``."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._rows.clear()
            with contextlib.suppress(OSError, pa.ArrowException):  # a full disk, say: why we are here in the first place
                writer.close()
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    def _flush(self) -> None:
        if self._rows:
            assert self._writer is not None
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._rows.clear()
            self._writer.write_table(table, row_group_size=len(table))
            self._buffered_bytes = 0


def shard_path(bucket_key: str, index: int, shard_id: str) -> str:
    """``data/bucket=49x480x720@8/part-000017-<shard id>.parquet``."""
    return f"{DATA_FOLDER}/bucket={bucket_key}/part-{index:06d}-{shard_id}.parquet"


def read_summary(storage: Storage, path: str, size_bytes: int | None = None) -> ShardSummary:
    """The account of a committed shard, from its footer alone.

    Args:
        size_bytes: of the object, if a listing gave it; saves one request.

    Raises:
        DatasetError: the file is damaged, foreign, or of an unknown format version.
    """
    return summary_of(ShardFile(storage, path, size_bytes))


def is_shard(metadata: pq.FileMetaData) -> bool:
    """Whether a Parquet file was written by ``ShardWriter``."""
    return _SUMMARY_KEY in (metadata.metadata or {})


def stored_schema(metadata: pq.FileMetaData) -> pa.Schema:
    """The schema as the writer was given it, which Parquet's own does not tell in full. Raises: ValueError, pa.ArrowException."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode((metadata.metadata or {}).get(_SCHEMA_KEY, b""), validate=True)))


def check_footer(path: str, metadata: pq.FileMetaData) -> str:
    """The version of pyarrow that wrote a shard; empty where its footer, of an older program, does not say.

    Raises:
        DatasetError: the footer contradicts itself.
    """
    values = metadata.metadata or {}
    if unknown := values.keys() - {*FOOTER_KEYS, _SCHEMA_KEY}:
        raise DatasetError(f"{path}: damaged footer: unknown entry {min(unknown)!r}")
    if _WRITER_KEY not in values:
        return ""
    try:
        writer = json.loads(values[_WRITER_KEY])
        version, digest = writer["pyarrow"], writer["summary_xxh3"]
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: damaged footer: its entry {_WRITER_KEY.decode()} is {values[_WRITER_KEY]!r}") from error
    if values.get(_WRITER_KEY) != _writer_entry(version, digest):
        raise DatasetError(f"{path}: damaged footer: its entry {_WRITER_KEY.decode()} is {values[_WRITER_KEY]!r}")
    if xxhash.xxh3_128_hexdigest(values.get(_SUMMARY_KEY, b"")) != digest:
        raise DatasetError(f"{path}: damaged footer: the shard's account does not have the hash {digest}")
    if metadata.created_by != f"parquet-cpp-arrow version {version}":
        raise DatasetError(f"{path}: damaged footer: created by {metadata.created_by!r} and by pyarrow {version!r}")
    return str(version)


def summary_of(file: ShardFile) -> ShardSummary:
    """The account in the footer of an open shard. Raises: DatasetError: as ``read_summary``."""
    footer = file.metadata()
    metadata = footer.metadata or {}
    if not is_shard(footer):
        raise DatasetError(f"{file.path}: a Parquet file of another kind: its footer has no {_SUMMARY_KEY.decode()}")
    version = metadata.get(_VERSION_KEY, b"").decode(errors="replace")
    if version != str(FORMAT_VERSION):
        raise DatasetError(f"{file.path}: format version {version!r}, but this program reads {FORMAT_VERSION}; update it")
    try:
        values = json.loads(metadata[_SUMMARY_KEY])
        values["rejections"] = tuple(Rejection(**rejection) for rejection in values["rejections"])
        return ShardSummary(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{file.path}: damaged shard account in the footer: {error}") from error


def _footer_metadata(summary: ShardSummary) -> dict[bytes, bytes]:
    account = json.dumps(dataclasses.asdict(summary)).encode()
    writer = _writer_entry(pa.__version__, xxhash.xxh3_128_hexdigest(account))
    return dict(zip(FOOTER_KEYS, (str(FORMAT_VERSION).encode(), account, summary.recipe.encode(), writer), strict=True))


def _writer_entry(version: str, summary_xxh3: str) -> bytes:
    return json.dumps({"pyarrow": version, "summary_xxh3": summary_xxh3}).encode()


def shard_settings(schema: pa.Schema, compression: str) -> dict[str, Any]:
    """Parquet settings under which a blob's row is one page."""
    blobs = {field.name for field in schema if is_blob(field)}
    others = [path for path in _leaf_paths(schema) if path not in blobs]
    return {
        "compression": {**dict.fromkeys(others, "zstd"), **dict.fromkeys(sorted(blobs), compression)},
        # Level of zstd; a dictionary would put a chunk's first row elsewhere, statistics would copy the blob.
        "compression_level": dict.fromkeys(others + sorted(blobs) * (compression == "zstd"), 1),
        "use_dictionary": others,
        "write_statistics": others,
        "write_batch_size": 1,
        "data_page_size": 16 << 10,
        "write_page_index": True,
        "write_page_checksum": True,
        "store_schema": True,
    }


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns, such as ``vae_latent_shape.list.element``."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
