"""The table of latents: which columns a shard has, and how a clip becomes a row.

Columns of our own come first, small ones together, so that one ranged read fetches them; then what the
source brought (captions and the like); then the *blobs*. A blob is a ``large_binary`` column that is not
null: the writer puts one row of it on a page, and the index holds its byte offset. A tensor is a blob
``<name>_bytes`` with its columns ``<name>_shape``, ``<name>_dtype`` and ``<name>_xxh3``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.errors import ConfigError
from pipeline.types import Clip, EncodedClip, TensorBytes

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

LATENT, LOGVAR = "vae_latent", "vae_logvar"
FIRST_FRAME_LATENT, FIRST_FRAME_LOGVAR = "first_frame_latent", "first_frame_logvar"
FIRST_FRAME_PNG = "first_frame_png"
TENSORS = (LATENT, LOGVAR, FIRST_FRAME_LATENT, FIRST_FRAME_LOGVAR)

_KEYS = (("sample_id", pa.string()), ("bucket_key", pa.string()))
_FACTS = (
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("fps", pa.float64()),
    ("source_uri", pa.string()),
    ("source_hash", pa.string()),
    ("frame_start", pa.int64()),
    ("frame_end", pa.int64()),
    ("source_fps", pa.float64()),
    ("source_width", pa.int32()),
    ("source_height", pa.int32()),
    ("crop_x", pa.int32()),
    ("crop_y", pa.int32()),
    ("crop_w", pa.int32()),
    ("crop_h", pa.int32()),
)
_MAYBE = (("degraded", pa.string()), ("psnr", pa.float32()))
_TENSOR_FACTS = (("shape", pa.list_(pa.int64())), ("dtype", pa.string()), ("xxh3", pa.string()))

# "bucket" is the key of the folders: readers of hive partitions reject a column of that name.
_RESERVED = frozenset(
    [name for name, _ in _KEYS + _FACTS + _MAYBE]
    + [f"{tensor}_{part}" for tensor in TENSORS for part in ("bytes", "shape", "dtype", "xxh3")]
    + [FIRST_FRAME_PNG, "bucket"]
)


def passthrough_name(name: str) -> str:
    """The stored name of a source column: its own, or ``input_<name>`` where ours has it already.

    ``fps`` in a source table is common and is not our ``fps``. Case does not count, since SQL engines
    take ``FPS`` and ``fps`` for one column.
    """
    return f"input_{name}" if name.casefold() in _RESERVED else name


def build_schema(*, logvar: bool, first_frame: bool, passthrough: pa.Schema | None = None) -> pa.Schema:
    """The schema of a run's shards; a tensor that the run does not make has no columns.

    Args:
        logvar: with the log-variance, so that training can sample the posterior.
        first_frame: with frame 0 encoded alone and its pixels.
        passthrough: the source's own columns, under the source's names.

    Raises:
        ConfigError: two source columns would be stored under one name.
    """
    tensors = [LATENT] + [LOGVAR] * logvar + [FIRST_FRAME_LATENT] * first_frame + [FIRST_FRAME_LOGVAR] * (first_frame and logvar)
    fields = [pa.field(name, kind, nullable=False) for name, kind in _KEYS]
    fields += [pa.field(f"{tensor}_{part}", kind, nullable=False) for tensor in tensors for part, kind in _TENSOR_FACTS]
    fields += [pa.field(name, kind, nullable=False) for name, kind in _FACTS]
    fields += [pa.field(name, kind) for name, kind in _MAYBE]
    fields += _passthrough_fields(passthrough)
    blobs = [f"{tensor}_bytes" for tensor in tensors] + [FIRST_FRAME_PNG] * first_frame
    fields += [pa.field(name, pa.large_binary(), nullable=False) for name in blobs]
    return pa.schema(fields)


def _passthrough_fields(passthrough: pa.Schema | None) -> list[pa.Field]:
    stored: dict[str, str] = {}
    fields = []
    for field in passthrough or ():
        name = passthrough_name(field.name)
        if name.casefold() in stored:
            raise ConfigError(
                f"source columns {stored[name.casefold()]!r} and {field.name!r} would both be stored as {name!r}; "
                "rename one of them in the source table"
            )
        stored[name.casefold()] = field.name
        fields.append(field.with_name(name).remove_metadata())
    # Blobs last, ours or not: what lies between small columns is read with them.
    return sorted(fields, key=is_blob)


def is_blob(field: pa.Field) -> bool:
    """Whether a column is stored one row a page and addressed by byte offset."""
    return not field.nullable and pa.types.is_large_binary(field.type)


def blob_names(schema: pa.Schema) -> list[str]:
    """The names of the blobs of a schema: of tensors without ``_bytes``, of others the column itself."""
    return [tensor_name(schema.names, field.name) or field.name for field in schema if is_blob(field)]


def tensor_name(names: Collection[str], column: str) -> str | None:
    """``vae_latent`` for ``vae_latent_bytes``, if its shape and dtype are there; None for other columns."""
    name = column.removesuffix("_bytes")
    is_tensor = name != column and {f"{name}_shape", f"{name}_dtype"} <= set(names)
    return name if is_tensor else None


def blob_column(schema: pa.Schema, name: str) -> str:
    """The column that holds a blob's bytes; the inverse of ``blob_names``."""
    return f"{name}_bytes" if f"{name}_bytes" in schema.names else name


def tensor_size_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor. Raises: ValueError: a dtype that the dataset does not store."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r} is not stored in latent datasets; use one of {', '.join(ITEM_BYTES)}")
    return math.prod(shape) * ITEM_BYTES[dtype]


def tensor_digest(data: bytes | memoryview) -> str:
    """xxh3-128 of a tensor's bytes, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def build_row(clip: Clip, encoded: EncodedClip, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One row of the table.

    Args:
        values: the source's own columns of this clip, under the source's names.

    Raises:
        ValueError: a tensor's bytes do not match its shape and dtype.
    """
    for mean, logvar in ((encoded.latent, encoded.logvar), (encoded.first_frame_latent, encoded.first_frame_logvar)):
        if logvar is not None and (mean is None or mean.shape != logvar.shape):
            raise ValueError(f"{clip.sample_id}: a log-variance of shape {logvar.shape} beside a mean of another, {mean}")
    row = clip_facts(clip)
    row |= {"source_hash": encoded.source_hash, "degraded": encoded.degraded, "psnr": encoded.psnr}
    row |= {passthrough_name(name): value for name, value in (values or {}).items()}
    tensors = (encoded.latent, encoded.logvar, encoded.first_frame_latent, encoded.first_frame_logvar)
    for name, tensor in zip(TENSORS, tensors, strict=True):
        if tensor is not None:
            row |= _tensor_columns(clip.sample_id, name, tensor)
    if encoded.first_frame_png is not None:
        row[FIRST_FRAME_PNG] = encoded.first_frame_png
    return row


def clip_facts(clip: Clip) -> dict[str, Any]:
    """The columns that follow from the plan alone."""
    bucket, crop = clip.bucket, clip.crop
    return {
        "sample_id": clip.sample_id,
        "bucket_key": bucket.key,
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": bucket.fps,
        "source_uri": clip.uri,
        "frame_start": clip.frame_start,
        "frame_end": clip.frame_end,
        "source_fps": clip.source_fps,
        "source_width": clip.source_width,
        "source_height": clip.source_height,
        "crop_x": crop.x,
        "crop_y": crop.y,
        "crop_w": crop.w,
        "crop_h": crop.h,
    }


def _tensor_columns(sample_id: str, name: str, tensor: TensorBytes) -> dict[str, Any]:
    data = tensor.data.cast("B") if isinstance(tensor.data, memoryview) else tensor.data
    expected = tensor_size_bytes(tensor.shape, tensor.dtype)
    if len(data) != expected:
        raise ValueError(
            f"{sample_id}: {name} has {len(data)} bytes, but {tensor.dtype} of shape {list(tensor.shape)} has {expected}"
        )
    return {
        f"{name}_bytes": data,
        f"{name}_shape": list(tensor.shape),
        f"{name}_dtype": tensor.dtype,
        f"{name}_xxh3": tensor_digest(data),
    }


def describe_schema(schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The columns as JSON holds them."""
    for field in schema:
        yield {"name": field.name, "type": str(field.type), "nullable": field.nullable}
