"""Making one generation of the plan: list, probe, find the items, group them into shards, publish.

All of it goes by in pieces, so that the input may be larger than memory. Probing runs on the cluster and is
resumable: findings are kept under the generation, and stay there when it is published. No Ray here: how
batches are probed is given.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline import failpoints
from pipeline.columns import ColumnTypes
from pipeline.config import JobConfig
from pipeline.errors import TerminalError
from pipeline.outcomes import Contents, find_replaced
from pipeline.plan import Item, ProbedFile, shard_id_of, shard_sizes
from pipeline.plan_rows import RowFormat
from pipeline.plan_spool import ItemSpool
from pipeline.plan_store import Generation, OutcomeRef
from pipeline.plan_writer import GenerationWriter
from pipeline.recipe import Recipe, digest
from pipeline.requeue import Requested, choose_replanned
from pipeline.sources import SourceItem, SourceListing
from pipeline.storage import Storage
from pipeline.types import Rejection

logger = logging.getLogger(__name__)

PROBE_BATCH = 32
WINDOW_ITEMS = 1 << 15
"""Listed items in memory at a time; as many as a thousand cores probe at once."""
TAR_ITEMS = 512
"""Items that a tar counts as, for all that is found in it is in memory too: 64 tars at a time."""
WINDOW_PARTS = 32
"""Objects that the findings of a window are kept in: ten thousand for ten million videos."""
_KEPT_VERSION = 3
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
    """Told what was found since the last call, and how many files there are to look at so far; once more, of nothing,
    before the plan is published. What it raises ends the planning."""
    _num_asked: int = field(default=0, init=False)

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
    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> Iterator[Found]:
        """What is in the input and not in earlier generations, probed by ``probe_all``."""

    @abstractmethod
    def plan(self, found: Iterator[Found], earlier: list[Generation]) -> Iterator[Item | Rejection]:
        """The items of what was found, in order, and what gives none.

        Raises:
            ConfigError: at the end, if the settings fit nothing in the input.
        """

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
        types = ColumnTypes(listing.schema, self.fixed_columns(earlier))
        planned = self.plan(_seen(self.find(listing.items, earlier), types), earlier)
        first = next(planned, None)
        if first is None:
            return None
        planned = chain([first], planned)
        if not earlier:
            return self._publish(0, planned, types, ())
        contents = Contents()
        # Begins to look when the first is asked for: all that is planned has gone by then.
        replaced = find_replaced(self.storage, earlier, contents)
        return self._publish(len(earlier), contents.noting(planned), types, replaced)

    def replan(self, earlier: list[Generation], outcomes: Sequence[OutcomeRef]) -> Generation:
        """Look again at the files of some outcomes, and publish what comes of it in their place.

        Raises:
            ConfigError, TransientError: as ``add_generation``.
        """
        listing = self.list_input()
        types = ColumnTypes(listing.schema, self.fixed_columns(earlier))
        requested = Requested(outcomes)
        listed = [item for item in listing.items if requested.lists(item)]
        found = (file for file in self.probe_all(len(earlier), listed) if requested.wants(file))
        planned = self.plan_again(_seen(found, types), earlier, requested.ids)
        chosen = choose_replanned(self.storage, earlier, requested, planned)
        return self._publish(len(earlier), chosen, types, outcomes)

    def plan_again(self, found: Iterator[Found], earlier: list[Generation], again: frozenset[str]) -> Iterator[Item | Rejection]:
        """``plan``, of files whose outcomes ``again`` are to be replaced."""
        return self.plan(found, earlier)

    def _publish(
        self, number: int, items: Iterable[Item | Rejection], types: ColumnTypes, superseded: Iterable[OutcomeRef]
    ) -> Generation:
        writer = GenerationWriter(self.storage, number, self.rows)
        with ItemSpool(self.rows, types.declared) as spool:
            for planned in items:
                if isinstance(planned, Rejection):
                    writer.reject(planned)
                else:
                    types.see(planned.columns)
                    spool.add(planned)
            writer.fix_columns(types.schema())
            self._add_shards(spool, writer)
        self.on_probed([], self._num_asked)
        return writer.publish(self.recipe, self.config.plan_settings(), superseded=superseded)

    def _add_shards(self, spool: ItemSpool[Item], writer: GenerationWriter[Item]) -> None:
        shapes = {key: (count, self.item_bytes(spool.firsts[key])) for key, count in spool.counts.items()}
        for key, sizes in shard_sizes(shapes, self.shard_bytes):
            for table, columns in spool.read(key, sizes):
                shard_id = shard_id_of(writer.number, self.recipe.fingerprint, table["sample_id"].to_pylist())
                writer.add_shard(shard_id, key, table, columns)

    def probe_all(self, number: int, items: Iterable[SourceItem]) -> Iterator[Found]:
        """Findings in listing order: those of an interrupted run from storage, the rest from the cluster."""
        folder = f"plan/{number:05d}/probed"
        stored = {found.uri for found in self.storage.walk(folder)}
        for window in _windows(items):
            parts = [self._part(folder, batches) for batches in _grouped(_split(window))]
            for part in parts:
                if part.path in stored:
                    part.findings = self._read_kept(part)
            self._probe_rest(parts)
            for part in parts:
                for item, file in part.pairs():
                    yield replace(file, columns={**item.columns, **file.columns}) if item.columns else file

    def _part(self, folder: str, batches: list[Batch]) -> _Part[Found]:
        key = digest(*(_batch_key(self.probe_settings, batch) for batch in batches))
        return _Part(batches, f"{folder}/{key}.json", [None] * len(batches))

    def _probe_rest(self, parts: list[_Part[Found]]) -> None:
        """Probe what was not found in storage; a part is kept as soon as it is whole."""
        todo = [(part, position) for part in parts for position, files in enumerate(part.findings) if files is None]
        # What the input says about a file stays here; probing needs its address only.
        lean = [list(map(_bare, part.batches[position])) for part, position in todo]
        self._num_asked += sum(map(len, lean))
        for which, files in self.probe(lean) if lean else ():
            part, position = todo[which]
            part.findings[position] = files
            self._num_asked += len(files) - len(lean[which])  # a tar has as many as are found in it
            if part.is_whole and part.is_versioned:  # else nothing tells whether they still hold later
                self.storage.put(part.path, self._dump(part.findings))
                failpoints.reach("plan.after_probe")
            self.on_probed(files, self._num_asked)

    def _read_kept(self, part: _Part[Found]) -> list[list[Found] | None]:
        """Stored findings; None for a batch with an error, which may have been mended since."""
        rows = json.loads(self.storage.read(part.path))
        batches = [list(map(self._load, batch)) for batch in rows]
        return [None if any(file.error for file in files) else files for files in batches]

    def _dump(self, findings: list[list[Found] | None]) -> bytes:
        return json.dumps([[self._row(file) for file in files or ()] for files in findings]).encode()

    def _row(self, file: Found) -> dict[str, Any]:
        error = [file.error.stage, file.error.reason, file.error.detail] if file.error else None
        common = {"uri": file.uri, "size_bytes": file.size_bytes, "version": file.version, "columns": file.columns}
        return {"file": common, "error": error, "found": self.to_json(file)}

    def _load(self, row: dict[str, Any]) -> Found:
        error = TerminalError(*row["error"]) if row["error"] else None
        return self.from_json({**row["file"], "error": error}, row["found"])


@dataclass(slots=True)
class _Part(Generic[Found]):
    """Batches whose findings are kept in one object."""

    batches: list[Batch]
    path: str
    findings: list[list[Found] | None]
    """Of each batch; None: not known yet."""

    @property
    def is_whole(self) -> bool:
        return None not in self.findings

    @property
    def is_versioned(self) -> bool:
        return all(item.version for batch in self.batches for item in batch)

    def pairs(self) -> Iterator[tuple[SourceItem, Found]]:
        for batch, found in zip(self.batches, self.findings, strict=True):
            assert found is not None, "probing left a batch out"
            yield from zip(batch * len(found) if batch[0].is_tar else batch, found, strict=True)


def _bare(item: SourceItem) -> SourceItem:
    return replace(item, columns={}) if item.columns else item


def _seen(files: Iterator[Found], types: ColumnTypes) -> Iterator[Found]:
    for file in files:
        types.see(file.columns)
        yield file


def _windows(items: Iterable[SourceItem]) -> Iterator[list[SourceItem]]:
    """So many items at a time as memory holds; the last ones join those before them, so that no batch is tiny."""
    rest = iter(items)
    window = _next_window(rest)
    while window:
        following = _next_window(rest)
        if len(following) < PROBE_BATCH and not any(item.is_tar for item in following):
            window, following = window + following, []
        yield window
        window = following


def _next_window(rest: Iterator[SourceItem]) -> list[SourceItem]:
    window: list[SourceItem] = []
    room = WINDOW_ITEMS
    while room > 0 and (item := next(rest, None)):
        window.append(item)
        room -= TAR_ITEMS if item.is_tar else 1
    return window


def _grouped(batches: list[Batch]) -> Iterator[list[Batch]]:
    """What is kept together: one batch of a small input, so that little is lost with a driver that dies."""
    size = math.ceil(len(batches) / WINDOW_PARTS)
    return (batches[first : first + size] for first in range(0, len(batches), size))


def _split(items: list[SourceItem]) -> list[Batch]:
    """Batches of one size, give or take one: a video that fails alone in its batch looks like an outage.

    A tar is a batch of its own, and has any number of findings.
    """
    if any(item.is_tar for item in items):
        return [[item] for item in items]
    count = math.ceil(len(items) / PROBE_BATCH)
    ends = [math.ceil(len(items) * index / count) for index in range(count + 1)]
    return [items[first:end] for first, end in pairwise(ends)]


def _batch_key(settings: str, batch: Batch) -> str:
    return digest(
        _KEPT_VERSION,
        settings,
        *((item.uri, item.size_bytes, item.version, item.sidecars, item.sidecar_versions) for item in batch),
    )
