"""What the driver does next. Pure: events in, commands out; the clock is given; no Ray, no threads, no I/O.

Durable truth is in storage alone. This is the only place that decides on retries, on blame and on the end:

    a lease ends in …            the shard                          the actor
    commit                       is settled; a twin is revoked      takes the next
    transient failure            waits, longer each time            takes the next
    unexpected failure           is charged an attempt              is replaced after two in a row
    exhausted memory             is charged an attempt              is replaced
    crash, hang, kill            goes on with care                  is replaced
    lost node, preemption        goes on                            is replaced where there is room

Care: the shard has an actor to itself, clips that were at work when an actor died are run alone first, and one that
was alone in hand at another death gets a strike. So only the culprit is quarantined.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.blame import Trouble
from pipeline.messages import (
    ActorFailedToStart,
    ActorLost,
    ActorReady,
    Assign,
    CapacityChanged,
    Command,
    End,
    Event,
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
from pipeline.plan_store import ShardRef

LEASES_PER_ACTOR = 2
"""One at work, one whose videos are decoded meanwhile."""
MAX_UNCHARGED = 50
"""Times that one shard may fall to faults of the surroundings, or to clips that are not found yet."""
MAX_GIVEN_UP = 10
"""Shards given up before the run stops: something is wrong with all of them."""
MAX_START_FAILURES = 3
"""Actors that may die while loading the model, one after another and with none beside them, before the run ends."""
MAX_LOST_STARTS = 50
"""Times in a row that all actors may go away with their nodes before one is ready."""
LONGEST_BACKOFF_S = 60.0
LONGEST_START_BACKOFF_S = 600.0
"""Between tries of a place where no actor gets ready, while others work: a GPU that is broken, or another job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how often."""

    max_attempts: int = 3
    """Charged failures of one shard."""
    batch_s: float = 1800.0
    """The model may take so long for one batch; waiting for input or storage may take four times as long."""
    answer_s: float = 120.0
    """An actor that does not answer for so long is hung. It answers beside its work, in milliseconds."""
    start_s: float = 3600.0
    """Loading the model may take so long."""
    no_actors_s: float = 600.0
    """The run ends when the cluster has had no place for an actor for so long."""
    stop_grace_s: float = 20.0
    twin_s: float = 30.0
    """No twin of a shard that is younger than this, or than twice the usual."""
    has_twins: bool = True
    """Whether a shard may be on two actors at once: only where storage decides who is first."""


@dataclass(slots=True)
class _Actor:
    number: int
    since: float
    is_ready: bool = False
    leases: dict[str, Lease] = field(default_factory=dict)
    """By attempt, in the order in which they are worked on."""
    answered_at: float = 0.0
    moved_at: float = 0.0
    step: int = -1
    is_at_work: bool = False
    failures: int = 0
    """Unexpected ones in a row."""
    doom: str | None = None
    """Why it was told to die."""

    @property
    def is_exclusive(self) -> bool:
        return any(lease.caution.is_careful for lease in self.leases.values())


@dataclass(frozen=True, slots=True)
class _Run:
    lease: Lease
    actor: int
    since: float


class Schedule:
    """The shards still to do, the actors, and who has what.

    Args:
        shards: in plan order; read as far as is needed.
        clock: seconds, monotonic.
    """

    def __init__(self, shards: Iterable[ShardRef], limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._planned = iter(shards)
        self._pending: deque[ShardRef] = deque()
        self._careful: deque[ShardRef] = deque()
        self._waiting: list[tuple[float, int, ShardRef]] = []
        """Shards that wait after a transient failure, as a heap: until when, order, shard."""
        self._running: dict[str, dict[str, _Run]] = {}
        """By shard and attempt; a shard that is decided is in none of these four, even if a loser still works on it."""
        self._trouble: dict[str, Trouble] = {}
        self._actors: dict[int, _Actor] = {}
        self._capacity = 0
        self._numbers = itertools.count()
        self._start_failures = self._lost_starts = 0
        self._start_after = 0.0
        self._given_up = 0
        self._settled, self._settled_s = 0, 0.0
        self._had_room_at = self._last_tick = clock()
        self._stopping_since: float | None = None
        self._fatal: str | None = None
        self._has_ended = False
        self._commands: list[Command] = []

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def handle(self, event: Event) -> list[Command]:
        """Take note of what happened. Returns what to do, in this order."""
        if self._has_ended:
            return []
        self._commands = []
        served = None
        match event:
            case Heartbeat():
                self._note_heartbeat(event)
                return []
            case ShardCommitted():
                served = self._commit(event)
            case ShardFailed():
                self._fail(event)
            case ActorReady(actor=number):
                self._start_failures = self._lost_starts = 0
                served = actor = self._actors[number]
                actor.is_ready, actor.answered_at = True, self._clock()
            case ActorFailedToStart():
                self._fail_to_start(event)
            case ActorLost():
                self._lose(event)
            case CapacityChanged(actors=actors):
                if actors > self._capacity:
                    self._start_after = self._clock()  # the new places are not to blame for the old ones
                self._capacity = actors
            case StopAsked():
                self._stop()
            case Tick():
                self._check_deadlines()
        if self._stopping_since is None:
            self._staff()
            self._assign([served] if served is not None else list(self._actors.values()))
        self._conclude()
        return self._commands

    # What happened

    def _note_heartbeat(self, event: Heartbeat) -> None:
        actor = self._actors[event.actor]
        actor.answered_at = self._clock()
        actor.is_at_work = event.is_at_work
        if actor.step != event.step:
            actor.step, actor.moved_at = event.step, self._clock()

    def _commit(self, event: ShardCommitted) -> _Actor:
        actor, shard_id = self._actors[event.actor], event.lease.shard.shard_id
        actor.failures = 0
        run = self._return(actor, event.lease)
        if run is not None:  # else a twin was first
            for other in self._running.pop(shard_id).values():
                self._commands.append(Revoke(actor=other.actor, attempt_id=other.lease.attempt_id))
            self._trouble.pop(shard_id, None)
            self._settled += 1
            self._settled_s += self._clock() - run.since
            self._commands.append(Settle(lease=event.lease, summary=event.summary))
        return actor

    def _fail(self, event: ShardFailed) -> None:
        actor = self._actors[event.actor]
        backoff_s = 0.0
        if self._return(actor, event.lease) is not None:
            match event.failure:
                case "unexpected" | "exhausted":
                    self._trouble_of(event.lease).charged += 1
                case "transient":
                    trouble = self._trouble_of(event.lease)
                    trouble.uncharged += 1
                    backoff_s = min(LONGEST_BACKOFF_S, 2.0 ** (trouble.uncharged - 1))
            self._try_again(event.lease.shard, event.error, backoff_s)
        actor.failures += event.failure == "unexpected"
        if event.failure == "exhausted" or actor.failures >= 2:
            self._kill(actor, f"a fresh one after: {event.error}")

    def _fail_to_start(self, event: ActorFailedToStart) -> None:
        """An actor beside it that works, or may yet, shows that the place is bad and the run is not."""
        doom, now = self._actors.pop(event.actor).doom, self._clock()
        is_slow = doom == "slow start"  # its successor is on the way already, and proves nothing yet
        is_alone = not any(actor.doom is None and (actor.is_ready or not is_slow) for actor in self._actors.values())
        if event.is_charged if doom is None else is_slow:
            self._start_failures += 1
            self._start_after = now + min(LONGEST_START_BACKOFF_S, 2.0 ** min(self._start_failures, 20))
            if is_alone and self._start_failures >= MAX_START_FAILURES:
                self._fatal = f"{self._start_failures} VAE actors in a row died while starting, the last by: {event.error}"
        elif doom is None:
            if now >= self._start_after:  # else it is the same storm, which may take many
                self._start_after = now + min(LONGEST_BACKOFF_S, 2.0 ** min(self._lost_starts, 20))
                self._lost_starts += 1
            if is_alone and self._lost_starts >= MAX_LOST_STARTS:
                self._fatal = f"all VAE actors were lost while starting, {self._lost_starts} times in a row: {event.error}"

    def _lose(self, event: ActorLost) -> None:
        actor = self._actors.pop(event.actor)
        self._start_failures, self._start_after = 0, min(self._start_after, self._clock())  # its place was a good one
        fault = event.fault
        if fault != "lost" and actor.doom is not None:
            fault = "hung" if actor.doom == "hung" else "lost"
        for lease in list(actor.leases.values()):
            if self._return(actor, lease) is None:
                continue
            if fault != "lost":
                known = event.at_work is not None and event.at_work.attempt_id == lease.attempt_id
                clips = event.at_work.clips if event.at_work and known else None
                self._trouble_of(lease).accuse(clips, fault, was_careful=lease.caution.is_careful)
            elif actor.doom in (None, "hung", "stalled"):  # else it is this schedule's own doing
                self._trouble_of(lease).uncharged += 1
            self._try_again(lease.shard, f"actor {fault}: {event.error}")

    def _stop(self) -> None:
        if self._stopping_since is None:
            self._stopping_since = self._clock()
            for actor in self._actors.values():
                for attempt_id in list(actor.leases)[1:]:
                    self._commands.append(Revoke(actor=actor.number, attempt_id=attempt_id))

    def _check_deadlines(self) -> None:
        now, limits = self._clock(), self._limits
        away_s = now - self._last_tick
        self._last_tick = now
        for actor in self._actors.values():
            if away_s > limits.answer_s / 4:  # it was the driver that did not listen
                actor.since, actor.answered_at, actor.moved_at = (
                    at + away_s for at in (actor.since, actor.answered_at, actor.moved_at)
                )
            still_s = now - actor.moved_at if actor.leases else 0.0
            if not actor.is_ready:
                if now - actor.since > limits.start_s:
                    self._kill(actor, "slow start")
            elif now - actor.answered_at > limits.answer_s or (actor.is_at_work and still_s > limits.batch_s):
                self._kill(actor, "hung")
            elif still_s > 4 * limits.batch_s:
                self._kill(actor, "stalled")
        if self._capacity or self._actors:
            self._had_room_at = now

    # What follows

    def _return(self, actor: _Actor, lease: Lease) -> _Run | None:
        """An attempt is over. Returns it, or None if its shard is decided already."""
        del actor.leases[lease.attempt_id]
        actor.moved_at = self._clock()
        return self._running.get(lease.shard.shard_id, {}).pop(lease.attempt_id, None)

    def _trouble_of(self, lease: Lease) -> Trouble:
        return self._trouble.setdefault(lease.shard.shard_id, Trouble())

    def _try_again(self, shard: ShardRef, error: str, backoff_s: float = 0.0) -> None:
        """The shard's attempt failed; unless a twin is still at it, queue it or give it up."""
        if self._running[shard.shard_id]:
            return
        del self._running[shard.shard_id]
        trouble = self._trouble.get(shard.shard_id)
        if trouble and (trouble.charged >= self._limits.max_attempts or trouble.uncharged >= MAX_UNCHARGED):
            del self._trouble[shard.shard_id]
            self._given_up += 1
            self._commands.append(GiveUp(shard=shard, error=error))
            if self._given_up >= MAX_GIVEN_UP:
                self._stop()
        elif backoff_s:
            heapq.heappush(self._waiting, (self._clock() + backoff_s, next(self._numbers), shard))
        else:
            self._queue(shard)

    def _queue(self, shard: ShardRef) -> None:
        trouble = self._trouble.get(shard.shard_id)
        (self._careful if trouble and trouble.is_careful else self._pending).appendleft(shard)

    def _look_ahead(self, count: int) -> int:
        """Read the plan until so many shards are pending. Returns how many are."""
        self._pending.extend(itertools.islice(self._planned, max(0, count - len(self._pending))))
        return len(self._pending)

    def _kill(self, actor: _Actor, reason: str) -> None:
        if actor.doom is None:
            actor.doom = reason
            self._commands.append(KillActor(actor=actor.number, reason=reason))

    def _staff(self) -> None:
        """As many actors as fit and have something to do."""
        staff = [actor for actor in self._actors.values() if actor.doom is None]
        if len(staff) < self._capacity:
            if self._clock() >= self._start_after and self._fatal is None:
                queued = self._look_ahead(self._capacity) + len(self._careful) + len(self._waiting)
                for _ in range(min(self._capacity, queued + len(self._running)) - len(staff)):
                    actor = _Actor(next(self._numbers), self._clock())
                    self._actors[actor.number] = actor
                    self._commands.append(StartActor(actor=actor.number))
            return
        # Those that wait for a place that is gone would wait for ever; a place that is in use stays so.
        starting = [actor for actor in staff if not actor.is_ready]
        for actor in starting[: len(staff) - self._capacity]:
            self._kill(actor, "no place for it")

    def _assign(self, actors: list[_Actor]) -> None:
        """One lease to each actor first, a second only while there is more work than actors.

        A second lease near the end would make one actor do what another could.
        """
        while self._waiting and self._waiting[0][0] <= self._clock():
            self._queue(heapq.heappop(self._waiting)[2])
        for rank in range(LEASES_PER_ACTOR):
            for actor in actors:
                if actor.doom is None and actor.is_ready and len(actor.leases) == rank:
                    self._assign_one(actor, rank)

    def _assign_one(self, actor: _Actor, rank: int) -> None:
        if rank and (self._careful or actor.is_exclusive):
            return  # a shard that wants an actor to itself has one, or waits for one
        if self._careful:
            shard = self._careful.popleft()
        elif self._look_ahead(len(self._actors) + 1) > (len(self._actors) if rank else 0):
            shard = self._pending.popleft()
        elif rank == 0 and self._limits.has_twins and (straggler := self._find_straggler()) is not None:
            shard = straggler
        else:
            return
        is_again = shard.shard_id in self._trouble
        trouble = self._trouble.get(shard.shard_id, Trouble())
        lease = Lease(shard=shard, attempt=trouble.charged + 1, caution=trouble.caution(), is_again=is_again)
        if not actor.leases:
            actor.moved_at = self._clock()
        actor.leases[lease.attempt_id] = lease
        run = _Run(lease, actor.number, self._clock())
        self._running.setdefault(shard.shard_id, {})[lease.attempt_id] = run
        self._commands.append(Assign(actor=actor.number, lease=lease))

    def _find_straggler(self) -> ShardRef | None:
        """A shard for an actor that has nothing to do: one that nobody has begun, else one that takes unusually long."""
        usual_s = self._settled_s / self._settled if self._settled else 0.0
        oldest: _Run | None = None
        for shard_id, runs in self._running.items():
            if len(runs) != 1 or shard_id in self._trouble:
                continue
            (run,) = runs.values()
            if next(iter(self._actors[run.actor].leases)) != run.lease.attempt_id:
                self._commands.append(Revoke(actor=run.actor, attempt_id=run.lease.attempt_id))
                return run.lease.shard
            if oldest is None or run.since < oldest.since:
                oldest = run
        if oldest is None or self._clock() - oldest.since < max(self._limits.twin_s, 2 * usual_s):
            return None
        return oldest.lease.shard

    def _conclude(self) -> None:
        """End when nothing is left, when the grace period is over, or when it cannot go on."""
        now = self._clock()
        error = self._fatal
        if not self._capacity and now - self._had_room_at > self._limits.no_actors_s:
            error = f"the cluster has had no place for a VAE actor for {self._limits.no_actors_s:.0f} s"
        if self._stopping_since is not None:
            is_over = not self._running or now - self._stopping_since > self._limits.stop_grace_s
        else:
            is_over = not (self._running or self._careful or self._waiting or self._look_ahead(1))
        if is_over or error is not None:
            self._has_ended = True
            self._commands.append(End(error=error))
