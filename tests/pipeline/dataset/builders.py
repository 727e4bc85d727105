"""Small datasets with random latents, made by the public functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset import DatasetInfo, Manifest, ShardWriter, build_row, build_schema, publish_dataset, shard_path
from pipeline.dataset.schema import tensor_size_bytes
from pipeline.storage import Storage
from pipeline.types import Bucket, Clip, Crop, EncodedClip, Rejection, ShardSummary, TensorBytes

BUCKET = Bucket.parse("49x64x96@8")
CAPTIONS = pa.schema([("caption", pa.string())])
SHAPE = (16, 13, 8, 12)
"""Latents of ``BUCKET``: 40 kB in bfloat16, above the writer's page size."""


def make_clip(number: int, bucket: Bucket = BUCKET) -> Clip:
    return Clip(
        sample_id=f"sample-{number:04d}",
        uri=f"videos/{number}.mp4",
        size_bytes=1,
        version="1",
        bucket=bucket,
        frame_start=number,
        frame_end=number + bucket.num_frames,
        crop=Crop(x=1, y=2, w=3, h=4),
        source_fps=29.97,
        source_width=640,
        source_height=360,
    )


def make_tensor(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16") -> TensorBytes:
    """Standard normal values; bfloat16 by cutting float32 in half."""
    values = rng.standard_normal(shape, dtype=np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    data = stored.tobytes()
    assert len(data) == tensor_size_bytes(shape, dtype)
    return TensorBytes(data=memoryview(data), shape=shape, dtype=dtype)


def make_encoded(number: int, *, logvar: bool = True, first_frame: bool = False, dtype: str = "bfloat16") -> EncodedClip:
    rng = np.random.default_rng(number)
    frame = (SHAPE[0], 1, *SHAPE[2:])
    return EncodedClip(
        latent=make_tensor(rng, dtype=dtype),
        logvar=make_tensor(rng, dtype=dtype) if logvar else None,
        first_frame_latent=make_tensor(rng, frame, dtype) if first_frame else None,
        first_frame_logvar=make_tensor(rng, frame, dtype) if first_frame and logvar else None,
        first_frame_png=b"\x89PNG" + rng.bytes(100 + number) if first_frame else None,
        source_hash="ab" * 16,
        psnr=None if number % 2 else 30.0 + number,
    )


def make_summary(writer: ShardWriter | None = None, **changes: Any) -> ShardSummary:
    summary = ShardSummary(
        shard_id="0123abcd",
        generation=0,
        index=0,
        bucket_key=BUCKET.key,
        attempt_id="attempt-1",
        recipe="recipe-1",
        num_rows=writer.num_rows if writer else 0,
        size_bytes=writer.size_bytes if writer else 0,
    )
    return dataclasses.replace(summary, **changes)


def make_rejection(number: int, status: Any = "quarantined") -> Rejection:
    return Rejection(
        sample_id=f"rejected-{number}",
        uri=f"bad/{number}.mp4",
        frame_start=0,
        frame_end=49,
        status=status,
        stage="decode",
        reason="not_a_video",
        detail="no video stream; drop it",
    )


def write_shard(
    path: Path,
    numbers: range,
    *,
    logvar: bool = True,
    first_frame: bool = False,
    dtype: str = "bfloat16",
    compression: Any = "none",
    row_group_bytes: int = 300_000,
    **changes: Any,
) -> ShardSummary:
    schema = build_schema(logvar=logvar, first_frame=first_frame, passthrough=CAPTIONS)
    with ShardWriter(path, schema, row_group_bytes=row_group_bytes, compression=compression) as writer:
        for number in numbers:
            encoded = make_encoded(number, logvar=logvar, first_frame=first_frame, dtype=dtype)
            writer.write(build_row(make_clip(number), encoded, {"caption": f"caption {number}"}))
        summary = make_summary(writer, **changes)
        writer.close(summary)
    return summary


def commit_shards(
    storage: Storage, folder: Path, sizes: tuple[int, ...] = (7, 5), **settings: Any
) -> list[tuple[str, ShardSummary]]:
    """Shards of so many samples each, numbered through."""
    shards, first = [], 0
    for index, size in enumerate(sizes):
        shard = {"index": index, "shard_id": f"{index:08x}", **settings}
        summary = write_shard(folder / f"{index}.parquet", range(first, first + size), **shard)
        path = shard_path(summary.bucket_key, summary.index, summary.shard_id)
        assert storage.put_file_if_absent(path, folder / f"{index}.parquet")
        shards.append((path, summary))
        first += size
    return shards


def make_info(*, logvar: bool = True, first_frame: bool = False, dtype: str = "bfloat16") -> DatasetInfo:
    schema = build_schema(logvar=logvar, first_frame=first_frame, passthrough=CAPTIONS)
    return DatasetInfo(schema=schema, scaling_factor=0.7, dtype=dtype, model="cogvideox-5b")


def make_dataset(storage: Storage, folder: Path, sizes: tuple[int, ...] = (7, 5), **settings: Any) -> Manifest:
    shards = commit_shards(storage, folder, sizes, **settings)
    info = make_info(**{name: settings[name] for name in ("logvar", "first_frame", "dtype") if name in settings})
    return publish_dataset(storage, [path for path, _ in shards], [], info, threads=2)
