"""``manifest.json``: the small file whose presence says that a dataset is complete.

It is written last and names everything a reader needs; until it is there, a reader refuses.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import xxhash

from pipeline.dataset.writer import FORMAT_VERSION
from pipeline.errors import DatasetError
from pipeline.storage import Storage

MANIFEST_PATH = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFile:
    """One piece of the index; its name holds its content's hash, and it never changes."""

    path: str
    num_rows: int
    size_bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished dataset holds."""

    format_version: int = FORMAT_VERSION
    num_samples: int
    num_shards: int
    num_quarantined: int
    num_filtered: int
    size_bytes: int
    """Bytes of tensors."""
    buckets: dict[str, int]
    """Samples by bucket key."""
    recipes: tuple[str, ...]
    """Fingerprints of what made the latents; more than one is a mixed dataset."""
    model: str | None
    """Name under which to scale the latents, such as ``cogvideox-5b``."""
    scaling_factor: float
    """The VAE's own factor. The stored latents are unscaled."""
    dtype: str
    columns: tuple[dict[str, Any], ...]
    """Name, Arrow type and nullability of the shards' columns."""
    generations: int = 0
    """Of the plan; a later one may give other reasons for the same counts."""
    index: tuple[IndexFile, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """Names the samples and their order; a training state belongs to one of these."""
        return xxhash.xxh3_128_hexdigest("".join(file.xxh3 for file in self.index).encode())

    def to_json(self) -> bytes:
        """The file: its fields, and their hash, by which ``validate_dataset.py`` knows a damaged one."""
        values = dataclasses.asdict(self)
        values["xxh3"] = xxhash.xxh3_128_hexdigest(json.dumps(values).encode())
        return (json.dumps(values, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, source: str = MANIFEST_PATH) -> Manifest:
        """Raises: DatasetError: damaged, or of a format version that this program does not know."""
        try:
            values = json.loads(data)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{source}: not a manifest of latents: {error}") from error
        if version != FORMAT_VERSION:
            raise DatasetError(f"{source}: format version {version}, but this program reads {FORMAT_VERSION}; update it")
        try:
            values.pop("xxh3", None)
            values["index"] = tuple(IndexFile(**entry) for entry in values["index"])
            values |= {"recipes": tuple(values["recipes"]), "columns": tuple(values["columns"])}
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{source}: damaged manifest: {error}") from error


def read_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a dataset; None while it is not finished. Raises: DatasetError: as ``from_json``."""
    try:
        data = storage.read(MANIFEST_PATH)
    except FileNotFoundError:
        return None
    return Manifest.from_json(data, f"{storage.uri}/{MANIFEST_PATH}")
