"""The datasets that the service shows: pages of samples, one sample's columns, latent and first frame."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.torch
import torch

from pipeline.dataset import LatentDataset
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schema import FIRST_FRAME_PNG, LATENT
from pipeline.errors import ConfigError, DatasetError, TransientError
from pipeline.filters import Filter, parse_filter
from pipeline.service.config import ServedDataset
from pipeline.service.errors import RequestError
from pipeline.service.searching import Rows, match_rows
from pipeline.types import exact_fps

Indices = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

_LISTED = ("num_frames", "height", "width", "fps", "caption", "source_uri")
_KEPT_SELECTIONS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which samples are wanted."""

    bucket: str | None = None
    caption: str | None = None
    """Text that the caption contains, whatever the case."""
    filters: tuple[str, ...] = ()
    """Conditions such as ``psnr>30``; all must hold."""


class ServedDatasets:
    """The datasets of a configuration, opened when the service starts. Thread-safe.

    Args:
        scaling_factor: of the VAE that will decode them; None: nothing will.

    Raises:
        ConfigError, DatasetError: one of them cannot be opened.
    """

    def __init__(self, datasets: Mapping[str, ServedDataset], scaling_factor: float | None = None) -> None:
        # One thread for all searches: they never take those that requests with latents need.
        searching = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._shown = {name: ShownDataset(name, served, searching, scaling_factor) for name, served in datasets.items()}

    def describe(self) -> list[dict[str, Any]]:
        return [shown.describe() for shown in self._shown.values()]

    def find(self, name: str) -> ShownDataset:
        """Raises: RequestError: 404: there is none of this name."""
        if name not in self._shown:
            there = ", ".join(self._shown) or "none"
            raise RequestError(404, "no_dataset", f"there is no dataset {name[:100]!r}; there are: {there}")
        return self._shown[name]


@dataclass(slots=True)
class _Search:
    """One that is under way or waits for its turn."""

    result: Future[Indices]
    given_up: threading.Event
    waiting: int = 0
    """Requests that want its result."""


class ShownDataset:
    """One dataset."""

    def __init__(self, name: str, served: ServedDataset, searching: Executor, scaling_factor: float | None) -> None:
        self.name = name
        self._searching = searching
        self._searches: dict[Query, _Search] = {}
        self._dataset = LatentDataset(
            served.uri, storage_options=served.storage_options, allow_incomplete=True, allow_mixed_recipes=True
        )
        manifest = self._dataset.manifest
        self._model = manifest.model if manifest else None
        self._warning = _compare(manifest, scaling_factor) if manifest and scaling_factor is not None else None
        if self._warning:
            logger.warning("another model dataset=%s: %s", name, self._warning)
        self._columns = self._dataset.fact_columns
        self._has_first_frame = FIRST_FRAME_PNG in self._dataset.blob_columns
        self._buckets = {key: len(indices) for key, indices in self._dataset.buckets.items()}
        self._selections: OrderedDict[Query, Indices] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_samples": len(self._dataset),
            "buckets": self._buckets,
            "columns": self._columns,
            "model": self._model,
            "has_first_frame": self._has_first_frame,
            "warning": self._warning,
        }

    async def search(self, query: Query) -> Indices:
        """Indices of the samples that a query asks for, in order; those of the last queries are kept.

        Equal queries at the same time are one search, which stops when nobody waits for it any more.

        Raises:
            RequestError: 422: a condition that cannot be read.
        """
        if query in self._selections:
            self._selections.move_to_end(query)
            return self._selections[query]
        search = self._searches.get(query)
        if search is None:
            given_up = threading.Event()
            search = self._searches[query] = _Search(self._searching.submit(self._select, query, given_up), given_up)
        search.waiting += 1
        try:
            indices = await asyncio.shield(asyncio.wrap_future(search.result))
        finally:
            search.waiting -= 1
            if search.waiting == 0:
                del self._searches[query]
                search.given_up.set()
        self._selections[query] = indices
        if len(self._selections) > _KEPT_SELECTIONS:
            self._selections.popitem(last=False)
        return indices

    def list_samples(self, indices: Indices, offset: int, limit: int) -> dict[str, Any]:
        """One page of what a search found."""
        page = [self._summary(int(index)) for index in indices[offset : offset + limit]]
        return {"total": len(indices), "offset": offset, "limit": limit, "samples": page}

    def show_sample(self, sample_id: str) -> dict[str, Any]:
        """All small columns of a sample. Raises: RequestError: 404."""
        index = self._index_of(sample_id)
        columns = self._facts(index, self._columns)
        latent = {"shape": columns.get(f"{LATENT}_shape"), "dtype": columns.get(f"{LATENT}_dtype")}
        return {"id": sample_id, "latent": latent, "columns": _jsonable(columns), "has_first_frame": self._has_first_frame}

    def read_latent(self, sample_id: str) -> torch.Tensor:
        """Unscaled ``[C, F, H, W]``, as stored. Raises: RequestError: 404, 422: its bytes are damaged."""
        index = self._index_of(sample_id)
        with _explained():
            latent: torch.Tensor = self._dataset[index]["latent"]
            return latent

    def read_latent_file(self, sample_id: str) -> bytes:
        """As safetensors, under the key ``latent``. Raises: RequestError: as ``read_latent``."""
        data: bytes = safetensors.torch.save({"latent": self.read_latent(sample_id)}, {"sample_id": sample_id})
        return data

    def read_fps(self, sample_id: str) -> Fraction:
        """Frames a second; 8 where the dataset does not say."""
        index = self._index_of(sample_id)
        fps = self._facts(index, ["fps"])["fps"] if "fps" in self._columns else None
        if not fps or not 0 < float(fps) < 1000:
            return Fraction(8)
        return exact_fps(float(fps))

    def read_first_frame(self, sample_id: str) -> bytes:
        """PNG. Raises: RequestError: 404: there is no such sample, or no frame is stored."""
        index = self._index_of(sample_id)
        if not self._has_first_frame:
            detail = f"{self.name} stores no first frames; it was made with output.first_frame: false"
            raise RequestError(404, "no_first_frame", detail)
        with _explained():
            return self._dataset.blob(index, FIRST_FRAME_PNG)

    def _index_of(self, sample_id: str) -> int:
        with self._lock:  # the first call makes the table of ids
            try:
                return self._dataset.index_of(sample_id)
            except KeyError:
                raise RequestError(404, "no_sample", f"{self.name} has no sample {sample_id[:100]!r}") from None

    def _summary(self, index: int) -> dict[str, Any]:
        values = self._facts(index, [name for name in _LISTED if name in self._columns])
        return {"id": values.pop("sample_id"), **dict.fromkeys(_LISTED), **_jsonable(values)}

    def _facts(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        with _explained():
            return self._dataset.facts(index, names)

    def _select(self, query: Query, given_up: threading.Event) -> Indices:
        conditions = self._parse(query)
        passes = self._in_bucket(query.bucket)
        if conditions:
            names = list(dict.fromkeys(condition.column for condition in conditions))
            with _explained():
                for indices, table in self._dataset.fact_tables(names):
                    if given_up.is_set():
                        raise RequestError(503, "given_up", "nobody waits for this search any more")
                    passes[indices] &= _match(table, conditions)
        return np.flatnonzero(passes)

    def _parse(self, query: Query) -> list[Filter]:
        try:
            conditions = [parse_filter(text) for text in query.filters]
        except ConfigError as error:
            raise RequestError(422, "bad_filter", str(error)) from error
        if query.caption:
            conditions.append(Filter("caption", "~", query.caption))
        for condition in conditions:
            if condition.column not in self._columns:
                raise RequestError(
                    422,
                    "no_column",
                    f"{self.name} has no column {condition.column[:100]!r}; there are {', '.join(self._columns)}",
                )
        return conditions

    def _in_bucket(self, bucket: str | None) -> Rows:
        if bucket is None:
            return np.ones(len(self._dataset), np.bool_)
        buckets = self._dataset.buckets
        if bucket not in buckets:
            there = ", ".join(list(buckets)[:20]) or "none"
            raise RequestError(422, "no_bucket", f"{self.name} has no bucket {bucket[:100]!r}; there are: {there}")
        passes = np.zeros(len(self._dataset), np.bool_)
        passes[buckets[bucket]] = True
        return passes


def _compare(manifest: Manifest, scaling_factor: float) -> str | None:
    """What is wrong with decoding a dataset by a VAE of this factor; VAEs of one factor are taken for the same."""
    if math.isclose(manifest.scaling_factor, scaling_factor, rel_tol=1e-6):
        return None
    maker = f"{manifest.scaling_factor:g} ({manifest.model or 'no known model'})"
    return (
        f"These latents were made by a VAE with scaling factor {maker}, and this service decodes with one of "
        f"{scaling_factor:g}: the videos will not look right. Serve them with their own VAE."
    )


def _match(table: pa.Table, conditions: Sequence[Filter]) -> Rows:
    try:
        return match_rows(table, conditions)
    except ConfigError as error:
        raise RequestError(422, "bad_filter", str(error)) from error


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Faults of a dataset's storage, as the service says them."""
    try:
        yield
    except DatasetError as error:
        logger.error("sample damaged error=%s", error)
        raise RequestError(422, "damaged", str(error)) from error
    except (TransientError, ConfigError, OSError) as error:
        logger.error("storage failed error=%s", error)
        detail = f"the dataset's storage did not answer: {type(error).__name__}"
        raise RequestError(503, "storage", detail, retry_after_s=5) from error


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without bytes; NaN and infinities, which JSON has not, become null; dates become text."""
    text = json.dumps({name: value for name, value in values.items() if not isinstance(value, bytes)}, default=str)
    found: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
    return found
