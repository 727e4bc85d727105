"""Which shards are committed: listed when a run starts, kept up while shards come in.

Storage alone says it: a shard is committed if its object is listed. What a committed shard holds stands in its
footer, and for most of them in a checkpoint too, which saves a request each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.account import Account
from pipeline.checkpoints import Checkpoints, ShardAccount
from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import TransientError
from pipeline.outcomes import count_planned, latest_summary, read_left_out, read_superseded
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, read_shards
from pipeline.storage import Storage
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)

CHECKPOINT_SHARDS = 4096
CHECKPOINT_S = 300.0
"""A checkpoint is written at the first of these; what a driver that dies had not written is read from footers. After one
that could not be written only the time counts."""
_FOOTER_THREADS = 16


class Committing(Protocol):
    """The part of ``Work`` that says where commits are."""

    @property
    def storage(self) -> Storage: ...

    @property
    def commits(self) -> tuple[str, str]: ...

    def commit_path(self, shard: ShardRef) -> str: ...

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary: ...


@dataclass(slots=True)
class Stock:
    """The committed shards of one output, and the account that they make."""

    work: Committing
    account: Account
    clock: Callable[[], float] = time.monotonic
    committed: set[str] = field(default_factory=set, init=False)
    """Shard ids."""
    _superseded: frozenset[OutcomeRef] = field(default=frozenset(), init=False)
    _checkpoints: Checkpoints = field(init=False)
    _since: list[ShardAccount] = field(default_factory=list, init=False)
    """Accounts that no checkpoint has yet."""
    _tried_at: float = field(init=False)
    _has_failed: bool = field(default=False, init=False)
    """The last checkpoint was not written."""

    def __post_init__(self) -> None:
        self._checkpoints = Checkpoints(self.work.storage)
        self._tried_at = self.clock()

    def take(self, generations: list[Generation]) -> list[ShardRef]:
        """Add up what is planned and committed. Returns the shards that are still to do, in plan order.

        Raises:
            TransientError: storage does not answer.
            DatasetError: a committed shard is damaged.
        """
        storage = self.work.storage
        plan = {shard.shard_id: shard for generation in generations for shard in read_shards(storage, generation)}
        present = self._list(plan)
        self._superseded = read_superseded(storage, generations)
        self._count(plan, present)
        self.account.planned = count_planned(generations)
        self.account.add_rejections(read_left_out(storage, generations, self._superseded))
        self.committed = set(present)
        logger.info("shards planned=%d committed=%d", len(plan), len(present))
        return [shard for shard in plan.values() if shard.shard_id not in present]

    def add(self, summary: ShardSummary) -> None:
        """A shard was committed."""
        account = ShardAccount.of(latest_summary(summary, self._superseded))
        self.committed.add(account.shard_id)
        self.account.add_counts(account.num_rows, account.size_bytes, account.left_out)
        self._since.append(account)
        is_full = len(self._since) >= CHECKPOINT_SHARDS and not self._has_failed
        if is_full or self.clock() - self._tried_at >= CHECKPOINT_S:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write down what came since the last time. A store that does not answer costs the next start some requests."""
        self._tried_at = self.clock()
        if not self._since:
            return
        try:
            self._checkpoints.write(self._since)
        except TransientError as error:
            self._has_failed = True
            logger.warning("checkpoint not written shards=%d error=%s", len(self._since), error)
        else:
            self._has_failed = False
            self._since.clear()

    def paths(self, generations: list[Generation]) -> Iterator[str]:
        """The objects of all committed shards, in plan order."""
        for generation in generations:
            for shard in read_shards(self.work.storage, generation):
                if shard.shard_id in self.committed:
                    yield self.work.commit_path(shard)

    def _list(self, plan: dict[str, ShardRef]) -> dict[str, int]:
        """Size of every committed object of the plan, by shard id."""
        present: dict[str, int] = {}
        num_orphans, orphan = 0, ""
        for found in self.work.storage.walk(*self.work.commits):
            shard = plan.get(found.uri.rpartition("-")[2].partition(".")[0])  # …/part-000017-<shard id>.parquet
            if shard is not None and self.work.commit_path(shard) == found.uri:
                present[shard.shard_id] = found.size_bytes
            else:
                num_orphans, orphan = num_orphans + 1, orphan or found.uri
        if num_orphans:
            logger.warning("committed files that no plan names count=%d first=%s", num_orphans, orphan)
        return present

    def _count(self, plan: dict[str, ShardRef], present: dict[str, int]) -> None:
        """Add up the committed shards, from checkpoints as far as they go.

        A checkpoint has counts alone: where some of a shard's outcomes are superseded, its footer is read each time.
        """
        known = self._checkpoints.read()
        changed = {ref.place for ref in self._superseded}
        gone = [shard_id for shard_id in known if shard_id in plan and shard_id not in present]
        if gone:
            logger.warning("committed shards are gone count=%d first=%s: all accounts are read again", len(gone), gone[0])
            known = {}
        unseen = [shard_id for shard_id in present if shard_id not in known]
        read_again = [shard_id for shard_id in present if shard_id in known and shard_id in changed]

        def read(shard_id: str) -> ShardAccount:
            summary = self.work.read_summary(self.work.commit_path(plan[shard_id]), present[shard_id])
            return ShardAccount.of(latest_summary(summary, self._superseded))

        known.update((account.shard_id, account) for account in ordered_map(read, unseen + read_again, _FOOTER_THREADS))
        counted = [known[shard_id] for shard_id in present]
        for account in counted:
            self.account.add_counts(account.num_rows, account.size_bytes, account.left_out)
        if gone or self._checkpoints.are_many:
            self._checkpoints.write(counted, "all")  # before any work: a shard that is gone may be made again
        elif unseen:
            self._checkpoints.write([known[shard_id] for shard_id in unseen])
