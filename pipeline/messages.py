"""What the driver's schedule, the actor pool and the actors say to one another: leases, events and commands."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import TerminalError
from pipeline.plan_store import ShardRef
from pipeline.types import ShardSummary

Fault = Literal["crashed", "hung", "killed", "lost"]
"""How an actor ended: by a fatal signal of its own making, by doing nothing for too long, by SIGKILL from outside
(or an exit without a trace), or with its node. Only of the first three the clip at work may be the cause."""
Failure = Literal["transient", "unexpected", "exhausted", "revoked"]
"""Why an attempt ended on an actor that lives: the surroundings failed, something that nobody foresaw, no memory
left for the model, or it was told not to begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """What the deaths of earlier actors taught about a shard's clips."""

    is_careful: bool = False
    """Do one thing at a time, with no other shard beside it, so that one more death names its cause."""
    suspects: frozenset[str] = frozenset()
    """Clips that were at work with others: each is run alone before its batch."""
    condemned: Mapping[str, Fault] = field(default_factory=dict)
    """Clips that were at work alone as often as is needed: quarantined without another try."""

    def verdict(self, sample_id: str, stage: str) -> TerminalError | None:
        """Why a clip must not be touched again."""
        match self.condemned.get(sample_id):
            case None:
                return None
            case "hung":
                return TerminalError(stage, "hung_actor", "the model did not come back from it, alone and more than once")
            case fault:
                how = "killed" if fault == "killed" else "crashed"
                return TerminalError(stage, "crashed_actor", f"the process {how} each time that it was at work alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One attempt at one shard."""

    shard: ShardRef
    attempt: int
    """1 for the first try; counts only failures that the shard is charged for."""
    caution: Caution = field(default_factory=Caution)
    is_again: bool = False
    """An earlier attempt failed or was lost; it may have committed the shard all the same."""
    attempt_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """What an actor had in hand; none, while it waits for input or for storage."""

    attempt_id: str
    clips: tuple[str, ...]


# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityChanged:
    """So many actors fit the cluster now."""

    actors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """No new shards; those under way have the grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorReady:
    actor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorFailedToStart:
    actor: int
    error: str
    is_charged: bool
    """False where its node went away or was preempted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLost:
    """An actor that was ready is no more, and its leases with it. Answers every ``KillActor``, too."""

    actor: int
    fault: Fault
    error: str
    at_work: AtWork | None = None
    """As its black box says; None where that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """An actor answers."""

    actor: int
    step: int
    """Changes whenever the actor begins or ends something."""
    is_at_work: bool
    """The model runs; otherwise the actor waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCommitted:
    actor: int
    lease: Lease
    summary: ShardSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFailed:
    actor: int
    lease: Lease
    failure: Failure
    error: str


Event = (
    Tick | CapacityChanged | StopAsked | ActorReady | ActorFailedToStart | ActorLost | Heartbeat | ShardCommitted | ShardFailed
)

# Commands


@dataclass(frozen=True, slots=True, kw_only=True)
class StartActor:
    actor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KillActor:
    actor: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    actor: int
    lease: Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Do not begin this attempt; one that has begun goes on."""

    actor: int
    attempt_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """A shard is committed: into the account with it. Comes once a shard."""

    lease: Lease
    summary: ShardSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """A shard is not tried again. Comes once a shard, and never after ``Settle``."""

    shard: ShardRef
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Nothing more will be commanded."""

    error: str | None = None
    """Why the run cannot go on, if that is so."""


Command = StartActor | KillActor | Assign | Revoke | Settle | GiveUp | End
