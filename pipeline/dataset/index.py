"""The index: for every sample its file, its row and the byte range of every blob.

A row group is the unit of ordinary Parquet readers; with the index, the sample is ours.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.pages import Extents, locate_values
from pipeline.dataset.schema import LATENT, blob_column, blob_names, is_blob, tensor_name
from pipeline.dataset.shard_file import ShardFile
from pipeline.errors import DatasetError

logger = logging.getLogger(__name__)

_STRINGS = pa.dictionary(pa.int32(), pa.string())


def index_schema(blobs: list[str]) -> pa.Schema:
    """Columns of the index: where the row is, and for each blob where its bytes are and what they mean.

    ``<blob>_offset`` and ``<blob>_length`` are bytes in the file, null where a blob cannot be read by offset;
    ``<blob>_shape``, ``_dtype`` and ``_xxh3`` are null where the blob is no tensor, or has no digest.
    """
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("bucket_key", _STRINGS, nullable=False),
        pa.field("file", _STRINGS, nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # within the row group
    ]
    for blob in blobs:
        fields += [
            pa.field(f"{blob}_offset", pa.int64()),
            pa.field(f"{blob}_length", pa.int64()),
            pa.field(f"{blob}_shape", pa.list_(pa.int64())),
            pa.field(f"{blob}_dtype", _STRINGS),
            pa.field(f"{blob}_xxh3", pa.string()),
        ]
    return pa.schema(fields)


def index_shard(file: ShardFile, *, foreign: bool = False) -> pa.Table:
    """The index rows of one Parquet file, in its row order.

    Args:
        foreign: written by another program. It needs the columns ``vae_latent_bytes``, ``_shape`` and ``_dtype``;
            a missing ``sample_id`` becomes ``<file>#<row>``, a missing ``bucket_key`` the latent's shape, and
            what has no byte ranges is left to be read through row groups.

    Raises:
        DatasetError: the file is damaged, or foreign without the latent's columns.
    """
    parquet = file.parquet()
    schema = parquet.schema_arrow
    blobs = _foreign_blobs(schema, file.path) if foreign else blob_names(schema)
    extents = _locate(file, schema, blobs, foreign)
    wanted = ["sample_id", "bucket_key"] + [f"{blob}_{part}" for blob in blobs for part in ("shape", "dtype", "xxh3")]
    try:
        facts = parquet.read(columns=[name for name in wanted if name in schema.names])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file.path}: damaged: {error}") from error
    return _assemble(file.path, parquet.metadata, facts, blobs, extents)


def _foreign_blobs(schema: pa.Schema, path: str) -> list[str]:
    """Tensors by their columns alone: other programs declare the bytes as binary, and nullable."""
    tensors = [name for column in schema.names if (name := tensor_name(schema.names, column))]
    if LATENT not in tensors:
        raise DatasetError(f"{path}: no latents: it lacks {LATENT}_bytes, {LATENT}_shape or {LATENT}_dtype")
    return tensors


def _locate(file: ShardFile, schema: pa.Schema, blobs: list[str], foreign: bool) -> dict[str, Extents]:
    columns = [blob_column(schema, blob) for blob in blobs]
    try:
        return locate_values(file, [column for column in columns if is_blob(schema.field(column))])
    except DatasetError as error:
        if not foreign:
            raise
        logger.info("no byte ranges, reading by row groups file=%s error=%s", file.path, error)
        return {}


def _assemble(path: str, metadata: pq.FileMetaData, facts: pa.Table, blobs: list[str], extents: dict[str, Extents]) -> pa.Table:
    groups, rows = _positions(metadata)
    num_rows = len(rows)
    schema = index_schema(blobs)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "file": pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int32), [path]),
        "row_group": pa.array(groups),
        "row": pa.array(rows),
    }
    for blob in blobs:
        found = extents.get(f"{blob}_bytes", extents.get(blob))
        if found is not None:
            columns |= {f"{blob}_offset": pa.array(found.offsets), f"{blob}_length": pa.array(found.lengths)}
    columns |= {name: facts[name] for name in facts.column_names}
    if "sample_id" not in columns:
        columns["sample_id"] = pa.array([f"{path}#{row}" for row in range(num_rows)], pa.string())
    if "bucket_key" not in columns:
        shapes = columns[f"{LATENT}_shape"].to_pylist()
        columns["bucket_key"] = pa.array(["x".join(map(str, shape)) for shape in shapes], pa.string())
    typed = [_as_type(columns.get(field.name, pa.nulls(num_rows)), field.type) for field in schema]
    return pa.table(typed, schema=schema)


def _as_type(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_dictionary(kind) and not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    return column.cast(kind)


def _positions(metadata: pq.FileMetaData) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Row group, and row within it, of every row."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.empty(0, np.int32), *(np.arange(size, dtype=np.int32) for size in sizes)])
    return groups, rows
