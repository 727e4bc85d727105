"""Which shard is tried where, and when one is given up. Pure: events in, leases out; no clock, no Ray."""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.plan_store import ShardRef

LEASES_PER_ACTOR = 2
"""One at work, one whose videos are decoded meanwhile."""
MAX_UNCHARGED = 20
"""Times that one shard may fall to faults of the surroundings."""
MAX_GIVEN_UP = 10
"""Shards given up before the run stops: something is wrong with all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One attempt at one shard."""

    shard: ShardRef
    attempt: int
    """1 for the first try; counts only failures that the shard is charged for."""
    attempt_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(slots=True)
class Schedule:
    """The shards still to do, those leased out and those given up."""

    shards: Iterable[ShardRef]
    max_attempts: int
    given_up: dict[str, str] = field(default_factory=dict)
    """Shard id and the error that ended its last attempt."""
    _pending: deque[ShardRef] = field(default_factory=deque)
    _leased: dict[str, Lease] = field(default_factory=dict)
    _charged: Counter[str] = field(default_factory=Counter)
    _uncharged: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._pending.extend(self.shards)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def is_done(self) -> bool:
        """Nothing is left that could still be committed."""
        return not self._pending and not self._leased

    @property
    def is_hopeless(self) -> bool:
        return len(self.given_up) >= MAX_GIVEN_UP

    def lease(self) -> Lease | None:
        """The next shard to try, in plan order; None when all are leased or done."""
        if not self._pending:
            return None
        shard = self._pending.popleft()
        lease = Lease(shard=shard, attempt=self._charged[shard.shard_id] + 1)
        self._leased[lease.attempt_id] = lease
        return lease

    def committed(self, lease: Lease) -> None:
        del self._leased[lease.attempt_id]

    def failed(self, lease: Lease, error: str, *, charged: bool) -> None:
        """The attempt ended without a commit.

        Args:
            charged: whether the shard may be to blame. A lost node or a store that does not answer is not.
        """
        del self._leased[lease.attempt_id]
        shard_id = lease.shard.shard_id
        counter, limit = (self._charged, self.max_attempts) if charged else (self._uncharged, MAX_UNCHARGED)
        counter[shard_id] += 1
        if counter[shard_id] >= limit:
            self.given_up[shard_id] = error
        else:
            self._pending.appendleft(lease.shard)
