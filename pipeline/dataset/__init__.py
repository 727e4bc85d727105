"""The latent dataset: its table, its writer, its index, its reader.

``LatentDataset`` needs torch and is imported on first use; planning and writing do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.dataset.manifest import IndexFile, Manifest, read_manifest
from pipeline.dataset.publish import DatasetInfo, publish_dataset
from pipeline.dataset.scaling import scale_latents, scaling_multiplier, unscale_latents
from pipeline.dataset.schema import build_row, build_schema, passthrough_name
from pipeline.dataset.writer import FORMAT_VERSION, ShardWriter, read_summary, shard_path

if TYPE_CHECKING:
    from pipeline.dataset.reader import LatentDataset

__all__ = [
    "FORMAT_VERSION",
    "DatasetInfo",
    "IndexFile",
    "LatentDataset",
    "Manifest",
    "ShardWriter",
    "build_row",
    "build_schema",
    "passthrough_name",
    "publish_dataset",
    "read_manifest",
    "read_summary",
    "scale_latents",
    "scaling_multiplier",
    "shard_path",
    "unscale_latents",
]


def __getattr__(name: str) -> Any:
    if name == "LatentDataset":
        from pipeline.dataset.reader import LatentDataset

        return LatentDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
