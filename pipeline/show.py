"""A first look at a finished dataset: what is in it, what is not and why."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import LatentDataset
from pipeline.quarantine import QUARANTINE_PATH
from pipeline.storage import Storage

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
    rows = pq.ParquetFile(pa.BufferReader(Storage(uri).read(QUARANTINE_PATH))).read().to_pylist()
    yield f"left out: {len(rows)}"
    for row in rows[:MOST_ROWS]:
        yield f"  {row['status']}  {row['reason']}: {row['detail']}"
