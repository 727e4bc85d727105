"""What became of every planned clip: the latest outcome counts.

A committed object and a published generation never change, so a clip that failed there stays written there. A
later generation that plans the clip again names the old outcome as superseded: from then on it is in no count and
in no table, and the clip is pending until its new shard is committed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.committed import read_committed
from pipeline.plan import Item, PlannedItem
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, read_column, read_outcomes, read_rejections
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rejection that counts, and where it stands."""

    place: str
    """As in ``OutcomeRef``."""
    rejection: Rejection

    @property
    def ref(self) -> OutcomeRef:
        return OutcomeRef(self.place, self.rejection.sample_id, self.rejection.uri)


def read_superseded(storage: Storage, generations: Iterable[Generation]) -> frozenset[OutcomeRef]:
    """Every outcome that a later generation has replaced."""
    return frozenset(ref for generation in generations for ref in read_outcomes(storage, generation.superseded_file))


def count_planned(generations: Iterable[Generation], superseded: Collection[OutcomeRef]) -> int:
    """Everything the account must find again, each clip once."""
    return sum(generation.num_planned for generation in generations) - len(superseded)


def read_left_out(
    storage: Storage, generations: Iterable[Generation], superseded: Collection[OutcomeRef] | None = None
) -> Iterator[Rejection]:
    """What planning left out and no later generation has planned again.

    Args:
        superseded: as ``read_superseded`` gives it, where it is at hand.
    """
    generations = list(generations)
    gone = read_superseded(storage, generations) if superseded is None else superseded
    for generation in generations:
        yield from _latest(generation.place, read_rejections(storage, generation), gone)


def split_superseded(
    shard: ShardRef, items: Iterable[Item], superseded: Collection[OutcomeRef]
) -> tuple[list[Item], list[Rejection]]:
    """The clips of a shard that are still its own, and rejections that say so of the others.

    There are others only where a committed shard was lost and is made again: its clips that had failed are another
    generation's by now, and would be rows of both.
    """
    own: list[Item] = []
    others: list[Rejection] = []
    for item in items:
        if OutcomeRef(shard.shard_id, item.sample_id, item.uri) in superseded:
            others.append(_planned_again(item))
        else:
            own.append(item)
    return own, others


def _planned_again(item: PlannedItem) -> Rejection:
    return Rejection(
        sample_id=item.sample_id,
        uri=item.uri,
        frame_start=0,
        frame_end=0,
        status="filtered",
        stage="plan",
        reason="superseded",
        detail=f"{item.uri}: a later generation has planned this clip again",
        file_key=item.file_key,
    )


def latest_summary(summary: ShardSummary, superseded: Collection[OutcomeRef]) -> ShardSummary:
    """The account of a committed shard without the clips that a later generation has planned again."""
    if not summary.rejections or not superseded:
        return summary
    return replace(summary, rejections=tuple(_latest(summary.shard_id, summary.rejections, superseded)))


def read_rejected(storage: Storage, generations: list[Generation]) -> Iterator[Outcome]:
    """Every rejection that counts, of planning and of committed shards; reads their footers."""
    superseded = read_superseded(storage, generations)
    for generation in generations:
        for rejection in _latest(generation.place, read_rejections(storage, generation), superseded):
            yield Outcome(generation.place, rejection)
    for shard, summary in read_committed(storage, generations):
        for rejection in latest_summary(summary, superseded).rejections:
            yield Outcome(shard.shard_id, rejection)


def read_to_look_at_again(storage: Storage, generations: list[Generation]) -> list[OutcomeRef]:
    """Outcomes whose files somebody asked to look at again, and no run has yet."""
    asked = [ref for generation in generations for ref in read_outcomes(storage, generation.again_file)]
    superseded = read_superseded(storage, generations) if asked else frozenset()
    return [ref for ref in dict.fromkeys(asked) if ref not in superseded]


def find_replaced(storage: Storage, generations: list[Generation], keys: Mapping[str, str]) -> list[OutcomeRef]:
    """Rejections of files that have another content now: what is planned of that content is their latest outcome.

    Args:
        keys: by URI, the ``file_key`` of what a further generation is about to plan.
    """
    if not keys or not generations:
        return []
    superseded = read_superseded(storage, generations)

    def replaced(place: str, rejections: Iterable[Rejection]) -> Iterator[OutcomeRef]:
        for rejection in _latest(place, rejections, superseded):
            if rejection.file_key and keys.get(rejection.uri, rejection.file_key) != rejection.file_key:
                yield OutcomeRef(place, rejection.sample_id, rejection.uri)

    found = [ref for g in generations for ref in replaced(g.place, read_rejections(storage, g))]
    # Footers are read only where a file that gave clips before is planned anew.
    if any(uri in keys for generation in generations for uri in read_column(storage, generation, "uri")):
        found += [
            ref for shard, summary in read_committed(storage, generations) for ref in replaced(shard.shard_id, summary.rejections)
        ]
    return list(dict.fromkeys(found))


def _latest(place: str, rejections: Iterable[Rejection], superseded: Collection[OutcomeRef]) -> Iterator[Rejection]:
    return (rejection for rejection in rejections if OutcomeRef(place, rejection.sample_id, rejection.uri) not in superseded)
