"""``LatentDataset``: the latents of a finished run as torch tensors, any sample in any order.

C channels, F latent frames, H/W latent cells. A sample is the unit of I/O: its place is known from the
index, so that a shuffled epoch costs one memory-map slice or one ranged GET a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash

from pipeline.dataset.access import ShardAccess
from pipeline.dataset.catalog import (
    Catalog,
    Filters,
    Location,
    filter_columns,
    list_shards,
    match_rows,
    open_catalog,
    scan_catalog,
)
from pipeline.dataset.manifest import MANIFEST_PATH, Manifest, read_manifest
from pipeline.dataset.scaling import Scale, scaling_multiplier
from pipeline.dataset.schema import LATENT, LOGVAR, tensor_digest, tensor_name, tensor_size_bytes
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage import Storage, StoredObject

Layout = Literal["CFHW", "FCHW"]
Sample = Literal["mode", "moments", "sample"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The tensors of a clip are called by what they are; their columns have FastVideo's names.
_COLUMN_OF = {"latent": LATENT, "logvar": LOGVAR}
_LOGVAR_OF = {"latent": "logvar", "first_frame_latent": "first_frame_logvar"}


class LatentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Map-style dataset of the samples of a run.

    An item holds ``sample_id``, ``bucket_key``, ``latent`` and the columns asked for. Tensors have the stored
    dtype and shape ``[C, F, H, W]``, or ``[F, C, H, W]`` in layout ``FCHW``; each belongs to the caller.

    Args:
        uri: folder of the dataset on any fsspec URL, or one Parquet file.
        columns: more to read: ``logvar``, ``first_frame_latent``, ``first_frame_logvar``, ``first_frame_png``
            (bytes), or any other column, such as ``caption``.
        scale: multiply latents for a model, ``"cogvideox-5b"``; role and convention with it: see ``scaling.Scale``.
            None: unscaled, as stored.
        filters: keep samples by conditions on columns, ``[("psnr", ">", 30)]``; of columns that the index does
            not hold, every shard is read once.
        storage_options: passed to fsspec.
        allow_incomplete: read what is committed although the run has not finished.
        allow_mixed_recipes: read latents that were made under different settings.
        verify: check the hash of a tensor when this process first reads it.
        layout: ``FCHW`` is what CogVideoX transformers take.
        sample: ``mode``: the posterior's mean. ``moments``: with ``logvar`` beside it. ``sample``: drawn from the
            posterior; the noise depends on ``seed``, the epoch and the sample id alone.
        seed: of the noise.

    Raises:
        DatasetError: the dataset is not finished, damaged, mixed, or of an unknown format version.
        ConfigError: a column, a model or an option that does not exist; the message names the choices.
    """

    def __init__(
        self,
        uri: str,
        *,
        columns: Sequence[str] = (),
        scale: Scale | str | float | None = None,
        filters: Filters | None = None,
        storage_options: Mapping[str, Any] | None = None,
        allow_incomplete: bool = False,
        allow_mixed_recipes: bool = False,
        verify: bool = True,
        layout: Layout = "CFHW",
        sample: Sample = "mode",
        seed: int = 0,
    ) -> None:
        _check_choice("layout", layout, Layout)
        _check_choice("sample", sample, Sample)
        self.uri, self.layout, self.sample, self.seed, self.epoch = uri, layout, sample, seed, 0
        storage, self.manifest, self._catalog = _open(uri, dict(storage_options or {}), allow_incomplete)
        if len(self._catalog.recipes) > 1 and not allow_mixed_recipes:
            raise DatasetError(
                f"{uri}: latents of {len(self._catalog.recipes)} recipes: {', '.join(self._catalog.recipes)}; "
                "pass allow_mixed_recipes=True to train on them together"
            )
        self._access = ShardAccess(storage)
        self._plan_columns(columns)
        self._multipliers = self._plan_scale(scale)
        if filters:
            self._catalog = self._catalog.take(self._match(filters))
        self._unverified = {name: np.full(len(self), verify) for name in self._tensors}
        self._index_of: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._catalog)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample. Raises: IndexError; DatasetError: its bytes are not those that were written."""
        number = range(len(self))[index]
        catalog = self._catalog
        item: dict[str, Any] = {"sample_id": catalog.sample_id(number), "bucket_key": catalog.bucket_key(number)}
        item |= {name: self._read_tensor(number, name) for name in self._tensors}
        item |= {name: bytes(self._access.read_blob(catalog.locate(number, name), name)) for name in self._blobs}
        if self._facts:
            item |= self._access.read_fact_row(*catalog.position(number), self._facts)
        return self._finish(item)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A batch of samples, in order; on remote storage fetched at the same time. DataLoader calls this."""
        return self._access.map(self.__getitem__, indices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"LatentDataset({self.uri!r}, {len(self)} samples in {len(self._catalog.bucket_keys)} buckets)"

    @property
    def sample_ids(self) -> list[str]:
        """Ids of all samples, in order. Makes a list each time."""
        ids: list[str] = self._catalog.sample_ids.to_pylist()
        return ids

    @property
    def bucket_keys(self) -> list[str]:
        """Bucket keys of all samples, in order. Makes a list each time."""
        keys = self._catalog.bucket_keys
        return [keys[code] for code in self._catalog.bucket_of]

    @property
    def buckets(self) -> dict[str, npt.NDArray[np.int64]]:
        """Indices of the samples of each bucket, which can be batched together."""
        of = self._catalog.bucket_of
        found = {key: np.flatnonzero(of == code) for code, key in enumerate(self._catalog.bucket_keys)}
        return {key: found[key] for key in sorted(found) if len(found[key])}

    @property
    def fingerprint(self) -> str:
        """Names these samples in this order; a training state that holds indices belongs to one of these."""
        digest = xxhash.xxh3_128()
        for batch in self._catalog.sample_ids.chunks:
            digest.update("\n".join(batch.to_pylist()).encode())
        return digest.hexdigest()

    def index_of(self, sample_id: str) -> int:
        """The index of a sample. Raises: KeyError: there is none of this id."""
        if self._index_of is None:
            self._index_of = {name: index for index, name in enumerate(self.sample_ids)}
        return self._index_of[sample_id]

    def get(self, sample_id: str) -> dict[str, Any]:
        """The sample of an id. Raises: KeyError: there is none."""
        return self[self.index_of(sample_id)]

    @property
    def fact_columns(self) -> list[str]:
        """Names of the columns that are no blobs: what ``facts`` can read."""
        blobs = {name for blob in self._catalog.blobs for name in (blob, f"{blob}_bytes")}
        return [name for name in self._catalog.columns if name not in blobs]

    @property
    def blob_columns(self) -> list[str]:
        """Names of the blobs that are no tensors, such as ``first_frame_png``."""
        stored = set(self._catalog.columns)
        return [name for name in self._catalog.blobs if name in stored and not _is_tensor(name, stored)]

    def facts(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """``sample_id``, ``bucket_key`` and these of ``fact_columns`` of one sample, without its tensors."""
        keys = {"sample_id": self._catalog.sample_id(index), "bucket_key": self._catalog.bucket_key(index)}
        rest = [name for name in columns if name not in keys]
        return {**keys, **(self._access.read_fact_row(*self._catalog.position(index), rest) if rest else {})}

    def fact_tables(self, columns: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """``facts`` of all samples, file by file: the indices of its samples, and a table with one row for each."""
        rest = [name for name in columns if name not in ("sample_id", "bucket_key")]
        for file, indices in self._catalog.samples_of_files():
            table = self._catalog.keys(indices)
            if rest:
                facts = self._access.read_fact_rows(file, *self._catalog.places(indices), rest)
                for name in rest:
                    table = table.append_column(name, facts[name])
            yield indices, table

    def blob(self, index: int, column: str) -> bytes:
        """One of ``blob_columns`` of one sample."""
        return bytes(self._access.read_blob(self._catalog.locate(index, column), column))

    def set_epoch(self, epoch: int) -> None:
        """Draw other posterior noise. Before the workers of an epoch start: they have copies of this object."""
        self.epoch = epoch

    def _read_tensor(self, index: int, name: str) -> torch.Tensor:
        location = self._catalog.locate(index, _COLUMN_OF.get(name, name))
        if location.shape is None:
            raise DatasetError(f"{location.file}: {self._catalog.sample_id(index)} has no {name}")
        data = self._access.read_blob(location, f"{_COLUMN_OF.get(name, name)}_bytes")
        self._verify(index, name, location, data)
        dtype = (location.dtype or "").removeprefix("torch.")
        shape = location.shape
        try:
            expected = tensor_size_bytes(shape, dtype)
        except ValueError as error:
            raise DatasetError(f"{location.file}: {name} of {self._catalog.sample_id(index)}: {error}") from error
        if len(data) != expected:
            raise DatasetError(
                f"{location.file}: {name} of {self._catalog.sample_id(index)} has {len(data)} bytes, "
                f"but {dtype} of shape {list(shape)} has {expected}"
            )
        # The one copy: out of the file's map, into memory that the caller may write to. bfloat16 by view, exact.
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(_DTYPES[dtype]).view(shape)

    def _verify(self, index: int, name: str, location: Location, data: memoryview) -> None:
        if location.xxh3 is None or not self._unverified[name][index]:
            return
        found = tensor_digest(data)
        if found != location.xxh3:
            raise DatasetError(
                f"{location.file}: {name} of {self._catalog.sample_id(index)} is damaged: the {location.length} bytes at "
                f"{location.offset} have xxh3 {found}, expected {location.xxh3}; copy the file again from its source"
            )
        self._unverified[name][index] = False

    def _finish(self, item: dict[str, Any]) -> dict[str, Any]:
        """Draw, scale and lay out the tensors of an item."""
        for name, logvar in self._drawn.items():
            noise_key = f"{self.seed}/{self.epoch}/{item['sample_id']}/{name}"
            item[name] = _draw(item[name], item[logvar], noise_key)
        for name in self._only_for_drawing:
            del item[name]
        for name, multiplier in self._multipliers.items():
            item[name].mul_(multiplier)
        if self.layout == "FCHW":
            for name in self._tensors:
                if name in item and item[name].ndim == 4:
                    item[name] = item[name].transpose(0, 1).contiguous()
        return item

    def _plan_columns(self, columns: Sequence[str]) -> None:
        """Sort the columns by how they are read, and say which tensors are drawn from which."""
        latents = ["latent"] + ["first_frame_latent"] * ("first_frame_latent" in columns)
        logvars = {name: _LOGVAR_OF[name] for name in latents} if self.sample != "mode" else {}
        stored = set(self._catalog.columns)
        wanted = dict.fromkeys([*latents, *logvars.values(), *columns])
        tensors = [name for name in wanted if _is_tensor(name, stored)]
        if missing := [name for name in logvars.values() if name not in tensors]:
            raise DatasetError(
                f"{self.uri}: sample={self.sample!r} needs {', '.join(missing)}, which this dataset does not store "
                "(it was made with output.logvar: false); use sample='mode'"
            )
        if unknown := [name for name in wanted if name not in tensors and name not in stored]:
            raise ConfigError(
                f"{self.uri}: no column {', '.join(unknown)}; there are {', '.join(_column_choices(self._catalog.columns))}"
            )
        rest = [name for name in wanted if name not in tensors and name not in ("sample_id", "bucket_key")]
        self._tensors = tensors
        self._blobs = [name for name in rest if name in self._catalog.blobs]
        self._facts = [name for name in rest if name not in self._catalog.blobs]
        self._drawn = logvars if self.sample == "sample" else {}
        self._only_for_drawing = [name for name in self._drawn.values() if name not in columns]

    def _plan_scale(self, scale: Scale | str | float | None) -> dict[str, float]:
        """The multiplier of each latent that is read."""
        if scale is None:
            return {}
        if isinstance(scale, str | float | int):
            scale = {"model": scale}
        if unknown := scale.keys() - Scale.__annotations__.keys():
            raise ConfigError(f"scale: unknown {', '.join(sorted(unknown))}; it takes {', '.join(Scale.__annotations__)}")
        if self.sample == "moments":
            raise ConfigError("scale does not go with sample='moments'; draw from them first, then use scale_latents")
        named = (self.manifest.model or self.manifest.scaling_factor) if self.manifest else None
        model = scale.get("model", named)
        if model is None:
            raise ConfigError("scale: name the model, since there is no manifest to name it")
        convention = scale.get("convention", "diffusers")
        return {
            name: scaling_multiplier(model, scale.get("role", "video" if name == "latent" else "first_frame"), convention)
            for name in _LOGVAR_OF
            if name in self._tensors
        }

    def _match(self, filters: Filters) -> npt.NDArray[np.int64]:
        """Indices of the samples that pass the filters."""
        columns = filter_columns(filters)
        if unknown := [name for name in columns if name not in self._catalog.columns]:
            raise ConfigError(f"filters: no column {', '.join(unknown)}; there are {', '.join(self._catalog.columns)}")
        if not len(self):
            return np.empty(0, np.int64)
        if {"sample_id", "bucket_key"}.issuperset(columns):
            table = pa.table({"sample_id": self._catalog.sample_ids, "bucket_key": self.bucket_keys})
        else:
            tables = self._access.map(lambda file: self._access.read_facts(file, columns), self._catalog.files)
            table = pa.concat_tables(tables, promote_options="default")
        try:
            return match_rows(table, filters)
        except pa.ArrowException as error:
            raise ConfigError(f"filters {filters}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index_of": None}


def _open(uri: str, options: dict[str, Any], allow_incomplete: bool) -> tuple[Storage, Manifest | None, Catalog]:
    if uri.endswith(".parquet"):
        folder, _, name = uri.rpartition("/")
        storage = Storage(folder or ".", options)
        return storage, None, scan_catalog(storage, [StoredObject(name, storage.size(name), "")])
    storage = Storage(uri, options)
    manifest = read_manifest(storage)
    if manifest is not None:
        return storage, manifest, open_catalog(storage, manifest)
    if not storage.names():
        raise DatasetError(f"{uri}: there is nothing there")
    if not allow_incomplete:
        raise DatasetError(
            f"{uri}: not a finished dataset: there is no {MANIFEST_PATH}. Let its run finish, or start it again: it resumes. "
            "allow_incomplete=True reads what is there"
        )
    shards = list_shards(storage)
    if not shards:
        raise DatasetError(f"{uri}: there are no Parquet files")
    return storage, None, scan_catalog(storage, shards)


def _is_tensor(name: str, stored: set[str]) -> bool:
    prefix = _COLUMN_OF.get(name, name)
    return {f"{prefix}_bytes", f"{prefix}_shape", f"{prefix}_dtype"} <= stored


def _column_choices(stored: Sequence[str]) -> list[str]:
    """Names that ``columns`` takes: of a tensor its own, not those of its parts."""
    name_of = {column: name for name, column in _COLUMN_OF.items()}
    prefixes = [prefix for column in stored if (prefix := tensor_name(stored, column))]
    parts = {f"{prefix}_{part}" for prefix in prefixes for part in ("bytes", "shape", "dtype", "xxh3")}
    return [name_of.get(prefix, prefix) for prefix in prefixes] + [column for column in stored if column not in parts]


def _draw(mean: torch.Tensor, logvar: torch.Tensor, noise_key: str) -> torch.Tensor:
    """A sample of the posterior, in float32 and then the stored dtype; clamped as diffusers does."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(noise_key.encode()))
    noise = torch.randn(mean.shape, generator=generator)
    std = torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0))
    return (mean.float() + std * noise).to(mean.dtype)


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{what} {value!r} is unknown; use one of {', '.join(get_args(choices))}")
