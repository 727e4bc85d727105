"""Making one generation of the plan: list, probe, find the items, group them into shards, publish.

Probing runs on the cluster and is resumable: each batch's findings are kept under the generation, and stay
there when it is published. No Ray here: how batches are probed is given.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.columns import column_schema
from pipeline.config import JobConfig
from pipeline.errors import TerminalError
from pipeline.outcomes import find_replaced
from pipeline.plan import Item, ProbedFile, group_into_shards
from pipeline.plan_rows import RowFormat
from pipeline.plan_store import Generation, OutcomeRef, publish_generation
from pipeline.recipe import Recipe, digest
from pipeline.requeue import choose_replanned
from pipeline.sources import SourceItem, SourceListing
from pipeline.storage import Storage
from pipeline.types import Rejection

logger = logging.getLogger(__name__)

PROBE_BATCH = 32
_KEPT_VERSION = 2
"""Of the findings that are kept; those of another version are not found, and probed again."""

Batch = list[SourceItem]
Found = TypeVar("Found", bound=ProbedFile)
ProbeBatches = Callable[[list[Batch]], Iterator[tuple[int, list[Found]]]]
"""Probes batches, several at once, and yields each one's position and findings as they come."""


@dataclass(slots=True, kw_only=True)
class Planner(ABC, Generic[Found, Item]):
    """Adds a generation to the plan of one output. What is listed and found depends on the kind of work."""

    config: JobConfig
    storage: Storage
    recipe: Recipe
    probe: ProbeBatches[Found]
    on_probed: Callable[[list[Found], int], None]
    """Told what was found since the last call, and how many files there are to look at."""

    @property
    @abstractmethod
    def rows(self) -> RowFormat[Item]:
        """How items stand in the plan."""

    def fixed_columns(self, earlier: list[Generation]) -> pa.Schema | None:
        """Types of the columns that pass through, as the first generation fixed them for the whole output."""
        return earlier[0].columns if earlier else None

    @property
    def probe_settings(self) -> str:
        """The settings that decide what probing finds."""
        return ""

    @property
    @abstractmethod
    def shard_bytes(self) -> int:
        """Aimed size of a shard."""

    @abstractmethod
    def item_bytes(self, item: Item) -> int:
        """Bytes of output of one item."""

    @abstractmethod
    def list_input(self) -> SourceListing:
        """What the input names. Raises: ConfigError: nothing usable is there."""

    @abstractmethod
    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> list[Found]:
        """What is in the input and not in earlier generations, probed by ``probe_all``."""

    @abstractmethod
    def plan(self, found: list[Found], earlier: list[Generation]) -> Iterator[Item | Rejection]:
        """The items of what was found, in order, and what gives none."""

    @abstractmethod
    def to_json(self, found: Found) -> dict[str, Any]:
        """What the kind of work adds to a finding, as JSON holds it."""

    @abstractmethod
    def from_json(self, common: dict[str, Any], row: dict[str, Any]) -> Found:
        """A finding again, from the fields that all findings have and those of ``to_json``."""

    def add_generation(self, earlier: list[Generation]) -> Generation | None:
        """List the input and publish what is new in it; None if nothing is.

        Raises:
            ConfigError: the input cannot be listed, or its columns do not fit the output.
            TransientError: storage does not answer. What was probed so far is kept.
        """
        listing = self.list_input()
        found = self.find(listing.items, earlier)
        items: list[Item] = []
        rejections: list[Rejection] = []
        for planned in self.plan(found, earlier):
            if isinstance(planned, Rejection):
                rejections.append(planned)
            else:
                items.append(planned)
        if not items and not rejections:
            return None
        values = [file.columns for file in found] + [item.columns for item in items]
        columns = column_schema(values, listing.schema, self.fixed_columns(earlier))
        keys = {item.uri: item.file_key for item in items} | {one.uri: one.file_key for one in rejections}
        return self._publish(len(earlier), items, rejections, columns, find_replaced(self.storage, earlier, keys))

    def replan(self, earlier: list[Generation], outcomes: Sequence[OutcomeRef]) -> Generation:
        """Look again at the files of some outcomes, and publish what comes of it in their place.

        Raises:
            ConfigError, TransientError: as ``add_generation``.
        """
        wanted = {outcome.uri for outcome in outcomes}
        listing = self.list_input()
        listed = [item for item in listing.items if item.uri in wanted]
        found = list(self.probe_all(len(earlier), listed)) if listed else []
        planned = list(self.plan_again(found, earlier, {outcome.sample_id for outcome in outcomes}))
        items, rejections = choose_replanned(self.storage, earlier, outcomes, planned)
        columns = column_schema([item.columns for item in items], listing.schema, self.fixed_columns(earlier))
        return self._publish(len(earlier), items, rejections, columns, outcomes)

    def plan_again(self, found: list[Found], earlier: list[Generation], again: set[str]) -> Iterator[Item | Rejection]:
        """``plan``, of files whose outcomes ``again`` are to be replaced."""
        return self.plan(found, earlier)

    def _publish(
        self,
        number: int,
        items: list[Item],
        rejections: list[Rejection],
        columns: pa.Schema,
        superseded: Collection[OutcomeRef],
    ) -> Generation:
        shards = group_into_shards(
            items,
            generation=number,
            recipe=self.recipe.fingerprint,
            item_bytes=self.item_bytes,
            shard_bytes=self.shard_bytes,
        )
        return publish_generation(
            self.storage,
            number,
            shards,
            rejections,
            rows=self.rows,
            recipe=self.recipe,
            settings=self.config.plan_settings(),
            columns=columns,
            superseded=superseded,
        )

    def probe_all(self, number: int, items: list[SourceItem]) -> Iterator[Found]:
        """Findings in listing order: those of an interrupted run from storage, the rest from the cluster."""
        batches = _split(items)
        folder = f"plan/{number:05d}/probed"
        paths = [f"{folder}/{_batch_key(self.probe_settings, batch)}.json" for batch in batches]
        stored = {found.uri for found in self.storage.list(folder, ".json")}
        findings = [self._read_kept(path) if path in stored else None for path in paths]
        todo = [position for position, files in enumerate(findings) if files is None]
        # What the input says about a file stays here; probing needs its address only.
        lean = [[replace(item, columns={}) for item in batches[position]] for position in todo]
        for which, files in self.probe(lean):
            position = todo[which]
            findings[position] = files
            if all(item.version for item in batches[position]):  # else nothing tells whether they still hold later
                self.storage.put(paths[position], self._dump(files))
            self.on_probed(files, sum(map(len, lean)))
        for batch, found in zip(batches, findings, strict=True):
            assert found is not None, "probing left a batch out"
            for item, file in zip(batch, found, strict=True):
                yield replace(file, columns={**item.columns, **file.columns})

    def _read_kept(self, path: str) -> list[Found] | None:
        """Stored findings; None if there is an error among them, which may have been mended since."""
        files = list(self._load(self.storage.read(path)))
        return None if any(file.error for file in files) else files

    def _dump(self, files: list[Found]) -> bytes:
        rows = []
        for file in files:
            error = [file.error.stage, file.error.reason, file.error.detail] if file.error else None
            common = {"uri": file.uri, "size_bytes": file.size_bytes, "version": file.version, "columns": file.columns}
            rows.append({"file": common, "error": error, "found": self.to_json(file)})
        return json.dumps(rows).encode()

    def _load(self, data: bytes) -> Iterator[Found]:
        for row in json.loads(data):
            error = TerminalError(*row["error"]) if row["error"] else None
            yield self.from_json({**row["file"], "error": error}, row["found"])


def _split(items: list[SourceItem]) -> list[Batch]:
    """Batches of one size, give or take one: a video that fails alone in its batch looks like an outage."""
    count = math.ceil(len(items) / PROBE_BATCH)
    ends = [math.ceil(len(items) * index / count) for index in range(count + 1)]
    return [items[first:end] for first, end in pairwise(ends)]


def _batch_key(settings: str, batch: Batch) -> str:
    return digest(
        _KEPT_VERSION,
        settings,
        *((item.uri, item.size_bytes, item.version, item.sidecars, item.sidecar_versions) for item in batch),
    )
