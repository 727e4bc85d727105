"""Video in, latents out: planning, decoding, engine, actors, dataset format, driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset.reader import LatentDataset

__all__ = ["LatentDataset"]


def __getattr__(name: str) -> Any:
    # On first use: the reader needs torch, which a decode task does not.
    if name == "LatentDataset":
        from pipeline.dataset.reader import LatentDataset

        return LatentDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
