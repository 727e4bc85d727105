"""What became of every planned clip: the latest outcome counts.

A committed object and a published generation never change, so a clip that failed there stays written there. A
later generation that plans the clip again names the old outcome as superseded: from then on it is in no count and
in no table, and the clip is pending until its new shard is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.committed import read_committed
from pipeline.compact_set import CompactSet
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
    return frozenset(ref for generation in generations for ref in read_outcomes(storage, generation.superseded_files))


def count_planned(generations: Iterable[Generation]) -> int:
    """Everything the account must find again, each clip once."""
    return sum(generation.num_planned - generation.num_superseded for generation in generations)


def read_left_out(storage: Storage, generations: Iterable[Generation], superseded: Collection[OutcomeRef]) -> Iterator[Rejection]:
    """What planning left out and no later generation has planned again."""
    for generation in generations:
        yield from latest(generation.place, read_rejections(storage, generation), superseded)


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
    return replace(summary, rejections=tuple(latest(summary.shard_id, summary.rejections, superseded)))


def latest_of(superseded: Collection[OutcomeRef]) -> Callable[[ShardSummary], ShardSummary]:
    """``latest_summary``, for who reads the summaries and knows nothing of outcomes."""
    return partial(latest_summary, superseded=superseded)


def read_rejected(storage: Storage, generations: list[Generation]) -> Iterator[Outcome]:
    """Every rejection that counts, of planning and of committed shards; reads their footers."""
    superseded = read_superseded(storage, generations)
    for generation in generations:
        for rejection in latest(generation.place, read_rejections(storage, generation), superseded):
            yield Outcome(generation.place, rejection)
    for shard, summary in read_committed(storage, generations):
        for rejection in latest_summary(summary, superseded).rejections:
            yield Outcome(shard.shard_id, rejection)


def read_to_look_at_again(storage: Storage, generations: list[Generation]) -> list[OutcomeRef]:
    """Outcomes whose files somebody asked to look at again, and no run has yet."""
    asked = [ref for generation in generations for ref in read_outcomes(storage, generation.again_files)]
    superseded = read_superseded(storage, generations) if asked else frozenset()
    return [ref for ref in asked if ref not in superseded]


class Contents:
    """Files that a generation plans, and which content of each: 32 bytes a file."""

    def __init__(self) -> None:
        self._uris, self._keys = CompactSet(), CompactSet()

    def add(self, uri: str, key: str) -> None:
        """Args: key: as ``plan.file_key`` makes it; empty: not known."""
        if key:
            self._uris.add(uri)
            self._keys.add(key)

    def noting(self, planned: Iterable[Item | Rejection]) -> Iterator[Item | Rejection]:
        """Take note of what goes by."""
        for one in planned:
            for uri, key in ({one.uri: one.file_key} if isinstance(one, Rejection) else one.files).items():
                self.add(uri, key)
            yield one

    def has(self, uri: str) -> bool:
        return uri in self._uris

    def replace(self, rejection: Rejection) -> bool:
        """Whether what was rejected is another content of one of the files."""
        return bool(rejection.file_key) and self.has(rejection.uri) and rejection.file_key not in self._keys


def find_replaced(storage: Storage, generations: list[Generation], contents: Contents) -> Iterator[OutcomeRef]:
    """Rejections of files that have another content now: what is planned of that content is their latest outcome.

    Args:
        contents: what a further generation plans; looked at when the first outcome is asked for.
    """
    superseded = read_superseded(storage, generations)

    def replaced(place: str, rejections: Iterable[Rejection]) -> Iterator[OutcomeRef]:
        for rejection in latest(place, rejections, superseded):
            if contents.replace(rejection):
                yield OutcomeRef(place, rejection.sample_id, rejection.uri)

    for generation in generations:
        yield from replaced(generation.place, read_rejections(storage, generation))
    # Footers are read only where a file that gave clips before is planned anew.
    if any(contents.has(uri) for generation in generations for uri in read_column(storage, generation, "uri")):
        for shard, summary in read_committed(storage, generations):
            yield from replaced(shard.shard_id, summary.rejections)


def latest(place: str, rejections: Iterable[Rejection], superseded: Collection[OutcomeRef]) -> Iterator[Rejection]:
    """Those that no later generation has planned again.

    Args:
        place: where they stand, as in ``OutcomeRef``.
    """
    return (rejection for rejection in rejections if OutcomeRef(place, rejection.sample_id, rejection.uri) not in superseded)
