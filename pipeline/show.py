"""A first look at a finished dataset: what is in it, what is not and why, and one latent decoded again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from pipeline.config import REDACTED, RunConfig
from pipeline.dataset import LatentDataset
from pipeline.dataset.publish import QUARANTINE_PATH
from pipeline.engine import best_device, load_engine
from pipeline.storage import Storage
from pipeline.types import Bucket
from pipeline.video_writer import encode_video

MOST_ROWS = 20


def describe(uri: str) -> Iterator[str]:
    """The lines of a short account of a dataset."""
    manifest = LatentDataset(uri).manifest
    has_captions = manifest is not None and any(column["name"] == "caption" for column in manifest.columns)
    dataset = LatentDataset(uri, columns=["source_uri", "caption"] if has_captions else ["source_uri"])
    yield f"{len(dataset)} samples in {uri}"
    for index in range(min(len(dataset), MOST_ROWS)):
        item = dataset[index]
        latent = item["latent"]
        name, caption = item["source_uri"].rpartition("/")[2], item.get("caption") or ""
        yield f"  {index:3d}  {item['bucket_key']:<14} latent {list(latent.shape)} {latent.dtype}  {name}  {caption}"
    if len(dataset) > MOST_ROWS:
        yield f"  … and {len(dataset) - MOST_ROWS} more"
    rows = pq.read_table(io.BytesIO(Storage(uri).read(QUARANTINE_PATH))).to_pylist()
    yield f"left out: {len(rows)}"
    for row in rows[:MOST_ROWS]:
        yield f"  {row['status']}  {row['reason']}: {row['detail']}"


def decode_sample(uri: str, index: int, path: Path, weights: str | None = None) -> None:
    """Decode one stored latent to an mp4 file, which appears under its name when it is whole.

    Args:
        weights: of the VAE; None: those that the dataset was made with, as its ``run.yaml`` says.
    """
    config = RunConfig(**yaml.safe_load(Storage(uri).read("run.yaml")))
    if weights is not None:
        config.vae.weights, config.vae.subfolder = weights, None
    item = LatentDataset(uri)[index]
    # Credentials were replaced when the settings were saved; they come from the environment.
    config.vae.storage_options = {name: value for name, value in config.vae.storage_options.items() if value != REDACTED}
    engine = load_engine(config, None, best_device(), None)
    chunks = (frames for (frames,) in engine.decode_chunks([item["latent"]]))
    video = encode_video(chunks, Bucket.parse(item["bucket_key"]).exact_fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(video)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
