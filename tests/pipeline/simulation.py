"""A cluster that exists in a schedule's imagination only: it carries commands out, fails as it is told, and watches.

What it asserts on the way are the promises of ``pipeline.schedule``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.blame import STRIKES
from pipeline.messages import (
    ActorFailedToStart,
    ActorLost,
    ActorReady,
    Assign,
    AtWork,
    CapacityChanged,
    End,
    Event,
    Fault,
    GiveUp,
    Heartbeat,
    KillActor,
    Lease,
    Revoke,
    Settle,
    ShardCommitted,
    ShardFailed,
    StartActor,
    StopAsked,
    Tick,
)
from pipeline.schedule import LEASES_PER_ACTOR, MAX_UNCHARGED, Limits, Schedule
from pipeline.types import ShardSummary
from tests.pipeline.fakes import make_shard_ref

CLIPS_PER_SHARD = 3


@dataclass
class SimActor:
    is_ready: bool = False
    leases: list[Lease] = field(default_factory=list)
    revoked: set[str] = field(default_factory=set)
    plan: list[tuple[str, ...]] = field(default_factory=list)
    """What the first lease still has to run, step by step."""
    in_hand: tuple[str, ...] = ()
    is_stuck: bool = False
    step: int = 0
    killed_for: str | None = None


class SimCluster:
    """Shards of three clips on actors; some clips crash or hang whoever runs them."""

    def __init__(
        self,
        shards: int,
        *,
        culprits: dict[str, Fault] | None = None,
        batch_size: int = 1,
        limits: Limits | None = None,
    ) -> None:
        self.now = 0.0
        self.limits = limits or Limits()
        self.shards = [make_shard_ref(number) for number in range(shards)]
        self.culprits = culprits or {}
        self.batch_size = batch_size
        self.schedule = Schedule(iter(self.shards), self.limits, lambda: self.now)
        self.actors: dict[int, SimActor] = {}
        self.settled: dict[str, Lease] = {}
        self.given_up: dict[str, str] = {}
        self.charged: Counter[str] = Counter()
        """Failures that a shard is to blame for, by its own doing or by the engine's."""
        self.tries: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        """Clips that were in hand when somebody killed their actor."""
        self.end: End | None = None
        self.stopped_at: float | None = None
        self.starts = self.deaths = 0

    def tell(self, event: Event) -> None:
        if isinstance(event, StopAsked) and self.stopped_at is None:
            self.stopped_at = self.now
        for command in self.schedule.handle(event):
            assert self.end is None, "a command after the end"
            self._obey(command)

    def _obey(self, command: Any) -> None:
        match command:
            case StartActor(actor=number):
                assert number not in self.actors
                assert self.stopped_at is None
                self.starts += 1
                self.actors[number] = SimActor()
            case KillActor(actor=number, reason=reason):
                assert self.actors[number].killed_for is None
                self.actors[number].killed_for = reason
            case Assign(actor=number, lease=lease):
                self._begin(number, lease)
            case Revoke(actor=number, attempt_id=attempt_id):
                self.actors[number].revoked.add(attempt_id)
            case Settle(lease=lease):
                self._decide(lease.shard.shard_id)
                self.settled[lease.shard.shard_id] = lease
            case GiveUp(shard=shard, error=error):
                self._decide(shard.shard_id)
                self.given_up[shard.shard_id] = error
                tries = self.tries[shard.shard_id]
                assert self.charged[shard.shard_id] >= self.limits.max_attempts or tries >= MAX_UNCHARGED
            case End(error=error):
                self.end = command
                if error is not None and "starting" in error:
                    working = [actor for actor in self.actors.values() if actor.is_ready and not actor.killed_for]
                    assert not working, "a place that works keeps a run alive"

    def _decide(self, shard_id: str) -> None:
        assert shard_id not in self.settled.keys() | self.given_up.keys()

    def _begin(self, number: int, lease: Lease) -> None:
        actor, shard_id = self.actors[number], lease.shard.shard_id
        assert actor.is_ready
        assert actor.killed_for is None, "a lease to an actor that was told to die"
        assert self.stopped_at is None
        assert shard_id not in self.settled.keys() | self.given_up.keys()
        others = [other for other in self.leases() if other.shard.shard_id == shard_id]
        assert len(others) <= (1 if self.limits.has_twins else 0)
        assert len(actor.leases) < LEASES_PER_ACTOR
        if lease.caution.is_careful or any(other.caution.is_careful for other in actor.leases):
            assert not actor.leases, "a careful lease is alone"
        self.check_blame(lease)
        assert not (lease.is_again and not self.tries[shard_id]), "a first attempt finds nothing committed"
        self.tries[shard_id] += 1
        assert self.tries[shard_id] <= self.limits.max_attempts + 3 * MAX_UNCHARGED
        actor.leases.append(lease)
        if len(actor.leases) == 1:
            self._open(actor)

    def check_blame(self, lease: Lease) -> None:
        shard_id = lease.shard.shard_id
        assert lease.attempt == self.charged[shard_id] + 1, "a shard pays for what it did itself, and for nothing else"
        self.check_condemned(lease)

    def check_condemned(self, lease: Lease) -> None:
        for clip, fault in lease.caution.condemned.items():
            assert self.culprits.get(clip) == fault or self.kills[clip] >= STRIKES["killed"]

    def leases(self) -> list[Lease]:
        return [lease for actor in self.actors.values() for lease in actor.leases]

    def _open(self, actor: SimActor) -> None:
        """The first lease has the model now."""
        actor.plan, actor.in_hand = [], ()
        if not actor.leases:
            return
        caution = actor.leases[0].caution
        clips = [f"{actor.leases[0].shard.shard_id}/{number}" for number in range(CLIPS_PER_SHARD)]
        clips = [clip for clip in clips if clip not in caution.condemned]
        for start in range(0, len(clips), self.batch_size):
            batch = tuple(clips[start : start + self.batch_size])
            actor.plan += [(clip,) for clip in batch if clip in caution.suspects and len(batch) > 1]
            actor.plan.append(batch)

    # What may happen

    def start(self, number: int, *, ok: bool = True, charged: bool = True) -> None:
        actor = self.actors[number]
        if ok:
            actor.is_ready = True
            self.tell(ActorReady(actor=number))
        else:
            del self.actors[number]
            self.tell(ActorFailedToStart(actor=number, error="no weights", is_charged=charged))

    def work(self, number: int) -> None:
        """The actor's first lease goes one batch on, or is committed. An attempt may be revoked while it waits."""
        actor = self.actors[number]
        if actor.is_stuck or not actor.leases:
            return
        for lease in actor.leases[1:]:
            if lease.attempt_id in actor.revoked:
                actor.leases.remove(lease)
                self.tell(ShardFailed(actor=number, lease=lease, failure="revoked", error="revoked"))
                return
        actor.step += 1
        if not actor.plan:
            lease = actor.leases.pop(0)
            self._open(actor)
            self.tell(ShardCommitted(actor=number, lease=lease, summary=make_summary(lease)))
            return
        actor.in_hand = actor.plan.pop(0)
        faults = [self.culprits[clip] for clip in actor.in_hand if clip in self.culprits]
        if "crashed" in faults:
            self.lose(number, "crashed")
        elif faults:
            actor.is_stuck = True

    def fail(self, number: int, failure: Any) -> None:
        actor = self.actors[number]
        lease = actor.leases.pop(0)
        if failure in ("unexpected", "exhausted") and lease.shard.shard_id not in self.settled.keys() | self.given_up.keys():
            self.charged[lease.shard.shard_id] += 1
        self._open(actor)
        self.tell(ShardFailed(actor=number, lease=lease, failure=failure, error=failure))

    def lose(self, number: int, fault: Fault, *, box: bool = True) -> None:
        """The actor is gone."""
        actor = self.actors.pop(number)
        if not actor.is_ready:
            self.tell(ActorFailedToStart(actor=number, error="gone", is_charged=fault == "killed" and not actor.killed_for))
            return
        self.deaths += 1
        at_work = None
        if actor.leases and box and fault != "lost":
            at_work = AtWork(attempt_id=actor.leases[0].attempt_id, clips=actor.in_hand)
            self._book_death(actor, fault)
        self.tell(ActorLost(actor=number, fault=fault, error=fault, at_work=at_work))

    def _book_death(self, actor: SimActor, fault: Fault) -> None:
        lease = actor.leases[0]
        is_open = lease.shard.shard_id not in self.settled.keys() | self.given_up.keys()
        if fault == "killed" and actor.killed_for is None:
            self.kills.update(actor.in_hand)
        certain = fault == "crashed" or actor.killed_for == "hung"
        if certain and lease.caution.is_careful and not actor.in_hand and is_open and actor.killed_for in (None, "hung"):
            self.charged[lease.shard.shard_id] += 1

    def bury(self) -> None:
        """Those that were told to die are dead."""
        for number in [number for number, actor in self.actors.items() if actor.killed_for is not None]:
            self.lose(number, "killed")

    def beat(self) -> None:
        for number, actor in list(self.actors.items()):
            if actor.is_ready and actor.killed_for is None:
                self.tell(Heartbeat(actor=number, step=actor.step, is_at_work=bool(actor.in_hand) and bool(actor.leases)))

    def wait(self, seconds: float) -> None:
        """Time goes by in small steps, as the driver lives it; actors answer."""
        end = self.now + seconds
        while self.now < end and self.end is None:
            self.now = min(end, self.now + 20.0)
            self.beat()
            self.tell(Tick())

    def run_to_end(self, most_rounds: int = 5000) -> End:
        """No more faults but those of the culprits: everybody works until the schedule ends."""
        for _ in range(most_rounds):
            if self.end is not None:
                return self.end
            self.bury()
            for number in list(self.actors):
                if number in self.actors and self.end is None:
                    if self.actors[number].is_ready:
                        self.work(number)
                    else:
                        self.start(number)
            if self.end is None:
                self.wait(20.0 if any(actor.is_stuck for actor in self.actors.values()) else 1.0)
        raise AssertionError("it does not end")


def make_summary(lease: Lease) -> ShardSummary:
    shard = lease.shard
    return ShardSummary(
        shard_id=shard.shard_id,
        generation=0,
        index=shard.index,
        bucket_key=shard.bucket_key,
        attempt_id=lease.attempt_id,
        recipe="r",
        num_rows=CLIPS_PER_SHARD,
        size_bytes=1,
    )


def make_cluster(shards: int, actors: int = 1, **settings: Any) -> SimCluster:
    """A cluster with its actors ready."""
    cluster = SimCluster(shards, **settings)
    cluster.tell(CapacityChanged(actors=actors))
    for number in list(cluster.actors):
        cluster.start(number)
    return cluster
