"""What decides a result, as one fingerprint.

Two runs with the same recipe may share an output; anything that changes a latent or a video must change the
fingerprint, and nothing else may: a smaller batch still resumes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property

import xxhash

from pipeline.config import RunConfig

# Raise when decoding, sampling, resizing or colour conversion changes what the model sees.
PIXELS_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that changes a result, apart from the item itself. Each kind of work adds its own."""

    weights: str
    """Content hash of the weight files and of the model's configuration."""
    dtype: str
    tiling: str
    """The engine. Its version, like a memory budget, changes rounding alone: a run resumes after an update."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())

    def differences(self, other: dict[str, object]) -> str:
        """The fields that differ from a stored recipe, for a message."""
        ours = asdict(self)
        return ", ".join(
            f"{name}: {other.get(name)!r} there, {ours.get(name)!r} here"
            for name in sorted(ours.keys() | other.keys())
            if ours.get(name) != other.get(name)
        )


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """What decides a stored latent."""

    stored_dtype: str
    logvar: bool
    first_frame: bool
    pixels_version: int = PIXELS_VERSION

    @classmethod
    def from_config(cls, config: RunConfig, weights_fingerprint: str) -> LatentRecipe:
        return cls(
            weights=weights_fingerprint,
            dtype=config.vae.dtype,
            tiling=config.vae.tiling,
            stored_dtype=config.stored.dtype,
            logvar=config.stored.logvar,
            first_frame=config.stored.first_frame,
        )


def digest(*parts: object) -> str:
    """A stable 128-bit hash of a few values, hexadecimal."""
    return xxhash.xxh3_128_hexdigest("\0".join(str(part) for part in parts).encode())
