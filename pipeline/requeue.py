"""Trying clips of the quarantine again: a further generation of the plan that says whose outcomes it replaces.

A clip that failed in a shard is planned again as it stands. A file that could not be looked at, or that has changed
since, is looked at again by the next run of the job, which plans what it finds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.committed import CommitFormat, commit_format
from pipeline.errors import DatasetError, RunRefusedError
from pipeline.outcomes import Outcome, read_rejected, read_to_look_at_again
from pipeline.plan import Item, PlannedShard, ProbedFile, shard_id_of, shard_sizes
from pipeline.plan_store import (
    Generation,
    OutcomeRef,
    ShardRef,
    read_column,
    read_generations,
    read_items,
    read_rejections,
    read_shards,
)
from pipeline.plan_writer import publish_generation
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import Rejection

_WHOLE_SHARD = 1 << 40
_CHANGED = "changed"
"""The reason of a clip whose file is another one than was planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """What a requeue did."""

    generation: Generation | None
    """None: nothing was to do."""
    clips: int
    """Planned again as they stand."""
    files: int
    """To be looked at again."""
    waiting: int
    """Asked for before, and not looked at yet."""


def read_quarantine(storage: Storage) -> Iterator[Outcome]:
    """Every clip and file that is left out and whose outcome is the latest.

    Raises:
        DatasetError: there is no plan, or something committed is damaged.
    """
    return read_rejected(storage, _read_plan(storage))


def requeue(storage: Storage, wanted: Callable[[Rejection], bool]) -> Requeued:
    """Publish a generation in which the quarantined clips that are wanted are to be tried again.

    Nothing is done to what is filtered: the rule that left it out still stands.

    Raises:
        DatasetError: as ``read_quarantine``.
        RunRefusedError: another program published a generation meanwhile.
    """
    generations = _read_plan(storage)
    commits = commit_format(storage, generations)
    waiting = set(read_to_look_at_again(storage, generations))
    chosen = [o for o in read_rejected(storage, generations) if o.rejection.status == "quarantined" and wanted(o.rejection)]
    asked_before = [outcome for outcome in chosen if outcome.ref in waiting]
    chosen = [outcome for outcome in chosen if outcome.ref not in waiting]
    of_planning = {generation.place for generation in generations}
    again = [o.ref for o in chosen if o.place in of_planning or o.rejection.reason == _CHANGED]
    clips = [o.ref for o in chosen if not (o.place in of_planning or o.rejection.reason == _CHANGED)]
    published = None
    if chosen:
        published = _publish(storage, commits, generations, clips, again)
    return Requeued(generation=published, clips=len(clips), files=len({ref.uri for ref in again}), waiting=len(asked_before))


class Requested:
    """Outcomes whose files are looked at again. A video in a tar is asked for by its own address, or by the tar's."""

    def __init__(self, outcomes: Sequence[OutcomeRef]) -> None:
        self.outcomes = outcomes
        self.ids = frozenset(outcome.sample_id for outcome in outcomes)
        self._uris = frozenset(outcome.uri for outcome in outcomes)
        self._tars = frozenset(tar for uri in self._uris for tar in _around(uri))

    def lists(self, item: SourceItem) -> bool:
        """Whether it is, or holds, one of the files."""
        return item.uri in self._uris or (item.is_tar and item.uri in self._tars)

    def wants(self, file: ProbedFile) -> bool:
        """Whether it is one of the files; a tar is looked at whole."""
        return file.uri in self._uris or any(tar in self._uris for tar in _around(file.uri))

    def unanswered(self, uris: Iterable[str]) -> Iterator[OutcomeRef]:
        """Those of whose files none is among these."""
        answered = {address for uri in uris for address in (uri, *_around(uri))}
        return (outcome for outcome in self.outcomes if outcome.uri not in answered)


def _around(uri: str) -> Iterator[str]:
    """What may be the tar that a file lies in, see ``TarMember.uri``."""
    return (uri[:end] for end, character in enumerate(uri) if character == "#")


def choose_replanned(
    storage: Storage, earlier: list[Generation], requested: Requested, planned: Iterable[Item | Rejection]
) -> list[Item | Rejection]:
    """What takes the place of some outcomes, of all that their files give now.

    What another outcome accounts for already is left to it. An outcome whose file gives nothing any more is
    filtered as ``not_listed``, so that it is not asked for for ever.
    """
    planned = list(planned)
    candidates = {one.sample_id for one in planned} - requested.ids
    taken = {name for name in _planned_ids(storage, earlier) if name in candidates} if candidates else set()
    chosen = [one for one in planned if one.sample_id not in taken]
    return [*chosen, *map(_not_listed, requested.unanswered(one.uri for one in planned))]


def _planned_ids(storage: Storage, generations: list[Generation]) -> Iterator[str]:
    for generation in generations:
        yield from read_column(storage, generation, "sample_id")
        yield from (rejection.sample_id for rejection in read_rejections(storage, generation))


def _not_listed(outcome: OutcomeRef) -> Rejection:
    return Rejection(
        sample_id=outcome.sample_id,
        uri=outcome.uri,
        status="filtered",
        stage="plan",
        reason="not_listed",
        detail=f"{outcome.uri}: was to be looked at again, but the input does not name it any more",
    )


def _read_plan(storage: Storage) -> list[Generation]:
    generations = read_generations(storage)
    if not generations:
        raise DatasetError(f"{storage.uri}: there is no plan; expected the output of an encode or decode job")
    return generations


def _publish(
    storage: Storage, commits: CommitFormat, generations: list[Generation], clips: list[OutcomeRef], again: list[OutcomeRef]
) -> Generation:
    newest = generations[-1]
    recipe = commits.recipe(**newest.recipe)  # type: ignore[arg-type]  # as it was stored
    if recipe.fingerprint != newest.recipe_fingerprint:
        raise DatasetError(
            f"{storage.uri}: planned with recipe {newest.recipe_fingerprint}, which this version reads as {recipe.fingerprint}; "
            "requeue with the version that planned it"
        )
    number = newest.number + 1
    published = publish_generation(
        storage,
        number,
        _plan_again(storage, commits, generations, clips, number, recipe.fingerprint),
        [],
        rows=commits.rows,
        recipe=recipe,
        settings=newest.settings,
        columns=_columns(generations),
        superseded=clips,
        again=again,
    )
    if (published.num_superseded, bool(published.again_files)) != (len(clips), bool(again)):
        raise RunRefusedError(f"{storage.uri}: another program published generation {number} meanwhile; look again, and repeat")
    return published


def _plan_again(
    storage: Storage,
    commits: CommitFormat,
    generations: list[Generation],
    clips: list[OutcomeRef],
    number: int,
    recipe: str,
) -> list[PlannedShard[Any]]:
    """The clips as they were planned, in shards no larger than those that they come from."""
    wanted: dict[str, set[str]] = {}
    for ref in clips:
        wanted.setdefault(ref.place, set()).add(ref.sample_id)
    by_shape: dict[str, list[Any]] = defaultdict(list)
    largest: Counter[str] = Counter()
    for shard in _shards(storage, generations):
        if shard.shard_id in wanted:
            names = wanted[shard.shard_id]
            items = read_items(storage, shard, commits.rows)
            by_shape[shard.bucket_key] += [item for item in items if item.sample_id in names]
            largest[shard.bucket_key] = max(largest[shard.bucket_key], shard.num_clips)
    shapes = {key: (len(members), _WHOLE_SHARD // largest[key]) for key, members in by_shape.items()}
    shards: list[PlannedShard[Any]] = []
    for key, sizes in shard_sizes(shapes, _WHOLE_SHARD):
        members = iter(by_shape[key])
        for size in sizes:
            part = tuple(islice(members, size))
            shard_id = shard_id_of(number, recipe, [item.sample_id for item in part])
            shards.append(PlannedShard(shard_id=shard_id, index=len(shards), bucket_key=key, items=part))
    return shards


def _shards(storage: Storage, generations: list[Generation]) -> Iterable[ShardRef]:
    return (shard for generation in generations for shard in read_shards(storage, generation))


def _columns(generations: list[Generation]) -> pa.Schema:
    """Every column that there is; text where generations of decoded videos differ. Those of a dataset are all the same."""
    kinds: dict[str, pa.DataType] = {}
    for column in (column for generation in generations for column in generation.columns):
        kinds[column.name] = column.type if kinds.get(column.name, column.type) == column.type else pa.string()
    return pa.schema(list(kinds.items()))
