"""What decides a decoded video, as one fingerprint."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.decode_config import DecodeRunConfig
from pipeline.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Recipe):
    """What decides a decoded video. How its latent is scaled is part of what is planned."""

    container: str
    crf: int | None
    """None where the container has no such quality."""

    @classmethod
    def from_config(cls, config: DecodeRunConfig, weights_fingerprint: str) -> VideoRecipe:
        output = config.output
        return cls(
            weights=weights_fingerprint,
            dtype=config.vae.decoder_dtype,
            tiling=config.vae.tiling,
            container=output.container,
            crf=output.crf if output.container == "mp4" else None,
        )
