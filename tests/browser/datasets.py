"""Datasets for a person to look at: many samples, hostile text, and latents whose every value is known."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.dataset import DatasetInfo, ShardWriter, build_row, build_schema, publish_dataset, shard_path
from pipeline.storage import Storage
from pipeline.types import Bucket, EncodedClip, ShardSummary, TensorBytes
from tests.pipeline.dataset.builders import make_clip, make_summary

WIDE = Bucket.parse("9x32x48@8")
TALL = Bucket.parse("17x48x32@8")
NUM_WIDE, NUM_TALL = 57, 5

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script> & <b>bold</b>"
CAPTIONS = {0: "two cockatoos look up", 3: HOSTILE, 4: None}
"""Of the samples whose caption is not ``clip N``."""
FRAME_COLOUR = (200, 40, 90)
"""Of every stored first frame."""


def sample_id(number: int) -> str:
    return make_clip(number).sample_id


def caption(number: int) -> str | None:
    return CAPTIONS.get(number, f"clip {number}")


def make_latent(number: int, bucket: Bucket, dtype: str) -> torch.Tensor:
    """``[16, F, H, W]``: noise with another mean and spread in each channel, another of each sample."""
    shape = (16, (bucket.num_frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    channels = torch.arange(16.0).reshape(16, 1, 1, 1)
    return ((noise + channels - 8) * (1 + channels / 4)).to(getattr(torch, dtype))


def make_broken_latent(dtype: str) -> torch.Tensor:
    """A latent with three values in channel 2 that are no numbers, and tiny ones in channel 3."""
    latent = make_latent(1, WIDE, dtype)
    latent[2, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=latent.dtype)
    latent[3] *= 1e-6
    return latent


def make_walk(folder: Path) -> None:
    """62 samples of two buckets in bfloat16, with first frames."""
    wide = [(number, make_latent(number, WIDE, "bfloat16")) for number in range(NUM_WIDE)]
    tall = [(number, make_latent(number, TALL, "bfloat16")) for number in range(NUM_WIDE, NUM_WIDE + NUM_TALL)]
    _make_dataset(folder, [(WIDE, wide), (TALL, tall)], "bfloat16", first_frame=True)


def make_half(folder: Path) -> None:
    """Two samples in float16, the second of them broken; no first frames; of another VAE than the service's."""
    samples = [(0, make_latent(0, WIDE, "float16")), (1, make_broken_latent("float16"))]
    _make_dataset(folder, [(WIDE, samples)], "float16", first_frame=False, model="cogvideox-2b", scaling_factor=1.15258426)


def make_full(folder: Path) -> None:
    """One sample in float32."""
    _make_dataset(folder, [(WIDE, [(0, make_latent(0, WIDE, "float32"))])], "float32", first_frame=False)


def _make_dataset(
    folder: Path,
    shards: list[tuple[Bucket, list[tuple[int, torch.Tensor]]]],
    dtype: str,
    *,
    first_frame: bool,
    model: str = "cogvideox-5b",
    scaling_factor: float = 0.7,
) -> None:
    storage = Storage(str(folder))
    schema = build_schema(logvar=False, first_frame=first_frame, passthrough=pa.schema([("caption", pa.string())]))
    committed = []
    for index, (bucket, samples) in enumerate(shards):
        spool = folder.with_name(f"{folder.name}-{index}.parquet")
        summary = _write_shard(spool, schema, index, bucket, samples, first_frame)
        path = shard_path(summary.bucket_key, summary.index, summary.shard_id)
        assert storage.put_file_if_absent(path, spool)
        committed.append(path)
    info = DatasetInfo(schema=schema, scaling_factor=scaling_factor, dtype=dtype, model=model)
    publish_dataset(storage, committed, [], info, threads=1)


def _write_shard(
    path: Path, schema: pa.Schema, index: int, bucket: Bucket, samples: list[tuple[int, torch.Tensor]], first_frame: bool
) -> ShardSummary:
    with ShardWriter(path, schema) as writer:
        for number, latent in samples:
            encoded = EncodedClip(
                latent=_tensor_bytes(latent),
                logvar=None,
                first_frame_latent=_tensor_bytes(latent[:, :1]) if first_frame else None,
                first_frame_logvar=None,
                first_frame_png=_picture(bucket) if first_frame else None,
                source_hash="ab" * 16,
                psnr=None if number % 2 else 30.125 + number,
            )
            writer.write(build_row(make_clip(number, bucket), encoded, {"caption": caption(number)}))
        summary = dataclasses.replace(make_summary(writer), index=index, shard_id=f"{index:08x}", bucket_key=bucket.key)
        writer.close(summary)
    return summary


def _tensor_bytes(latent: torch.Tensor) -> TensorBytes:
    data = latent.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorBytes(data=memoryview(data), shape=tuple(latent.shape), dtype=str(latent.dtype).removeprefix("torch."))


def _picture(bucket: Bucket) -> bytes:
    png = io.BytesIO()
    Image.fromarray(np.full((bucket.height, bucket.width, 3), FRAME_COLOUR, np.uint8)).save(png, "PNG")
    return png.getvalue()
