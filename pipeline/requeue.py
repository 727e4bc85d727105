"""Trying clips of the quarantine again: a further generation of the plan that says whose outcomes it replaces.

A clip that failed in a shard is planned again as it stands. A file that could not be looked at, or that has changed
since, is looked at again by the next run of the job, which plans what it finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.committed import CommitFormat, commit_format
from pipeline.errors import DatasetError, RunRefusedError
from pipeline.outcomes import Outcome, read_rejected, read_to_look_at_again
from pipeline.plan import Item, PlannedShard, group_into_shards
from pipeline.plan_store import (
    Generation,
    OutcomeRef,
    ShardRef,
    publish_generation,
    read_column,
    read_generations,
    read_items,
    read_shards,
)
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


def read_quarantine(storage: Storage) -> list[Outcome]:
    """Every clip and file that is left out and whose outcome is the latest.

    Raises:
        DatasetError: there is no plan, or something committed is damaged.
    """
    return list(read_rejected(storage, _read_plan(storage)))


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
        files = len({ref.uri for ref in again})
    return Requeued(generation=published, clips=len(clips), files=files if chosen else 0, waiting=len(asked_before))


def choose_replanned(
    storage: Storage,
    earlier: list[Generation],
    outcomes: Sequence[OutcomeRef],
    planned: Iterable[Item | Rejection],
) -> tuple[list[Item], list[Rejection]]:
    """What takes the place of some outcomes, of all that their files give now.

    A clip that another outcome accounts for already is left to it. An outcome whose file gives nothing any more is
    filtered as ``not_listed``, so that it is not asked for for ever.
    """
    items: list[Item] = []
    rejections: list[Rejection] = []
    for one in planned:
        if isinstance(one, Rejection):
            rejections.append(one)
        else:
            items.append(one)
    candidates = {item.sample_id for item in items} - {outcome.sample_id for outcome in outcomes}
    taken = (
        {name for g in earlier for name in read_column(storage, g, "sample_id") if name in candidates} if candidates else set()
    )
    items = [item for item in items if item.sample_id not in taken]
    answered = {item.uri for item in items} | {rejection.uri for rejection in rejections}
    rejections += [_not_listed(outcome) for outcome in outcomes if outcome.uri not in answered]
    return items, rejections


def _not_listed(outcome: OutcomeRef) -> Rejection:
    return Rejection(
        sample_id=outcome.sample_id,
        uri=outcome.uri,
        frame_start=0,
        frame_end=0,
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
    if (published.num_clips, published.again_file is None) != (len(clips), not again):
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
    items: list[Any] = []
    largest: Counter[str] = Counter()
    for shard in _shards(storage, generations):
        if shard.shard_id in wanted:
            names = wanted[shard.shard_id]
            items += [item for item in read_items(storage, shard, commits.rows) if item.sample_id in names]
            largest[shard.bucket_key] = max(largest[shard.bucket_key], shard.num_clips)
    return group_into_shards(
        items,
        generation=number,
        recipe=recipe,
        item_bytes=lambda item: _WHOLE_SHARD // largest[item.bucket_key],
        shard_bytes=_WHOLE_SHARD,
    )


def _shards(storage: Storage, generations: list[Generation]) -> Iterable[ShardRef]:
    return (shard for generation in generations for shard in read_shards(storage, generation))


def _columns(generations: list[Generation]) -> pa.Schema:
    """Every column that there is; text where generations of decoded videos differ. Those of a dataset are all the same."""
    kinds: dict[str, pa.DataType] = {}
    for column in (column for generation in generations for column in generation.columns):
        kinds[column.name] = column.type if kinds.get(column.name, column.type) == column.type else pa.string()
    return pa.schema(list(kinds.items()))
