"""Validating an output of either kind of work. Runs on this machine, on threads, without Ray."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.checkpoints import CHECKPOINT_FOLDER, list_checkpoints, read_checkpoint
from pipeline.committed import DECODED
from pipeline.dataset.manifest import MANIFEST_PATH
from pipeline.dataset.publish import INDEX_FOLDER
from pipeline.errors import DatasetError
from pipeline.outcomes import count_planned
from pipeline.plan_store import index_path
from pipeline.quarantine import QUARANTINE_PATH
from pipeline.status import STATUS_PATH, is_alive
from pipeline.storage import PROBE_PREFIX, TEMPORARY_FOLDER, Storage
from pipeline.validation.findings import Finding, damaged
from pipeline.validation.latents import LatentChecks
from pipeline.validation.plan_view import PlanView
from pipeline.validation.videos import VideoChecks

_UNNEEDED = ("orphan", "stale")
_DERIVED = (MANIFEST_PATH, QUARANTINE_PATH)


@dataclass(slots=True, kw_only=True)
class Validation:
    """One look at an output. ``findings`` is run once; the rest is right after it.

    Args:
        sample: how many shards are read whole, drawn at random; of the others the footer alone. None: all.
    """

    storage: Storage
    threads: int = 8
    sample: int | None = None
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Findings, by what they say."""
    orphans: list[str] = field(default_factory=list)
    """Paths of what nothing needs."""
    derived: list[str] = field(default_factory=list)
    """Paths of what follows from plan and shards and is not as it should be."""
    lasting: Counter[str] = field(default_factory=Counter)
    """Findings that no rewriting of index and manifest does away with."""
    checks: LatentChecks | VideoChecks | None = None
    """None: the plan cannot be read."""
    _started: float = field(default_factory=time.monotonic)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found.

        Raises:
            DatasetError: there is nothing that could be validated.
            ConfigError, TransientError: it cannot be read.
        """
        for finding in self._look():
            self.counts[finding.what] += 1
            if finding.what in _UNNEEDED or finding.path.startswith(f"{CHECKPOINT_FOLDER}/"):
                self.orphans.append(finding.path)
            elif finding.what == "index" or finding.path in _DERIVED or finding.path.startswith(f"{INDEX_FOLDER}/"):
                self.derived.append(finding.path)
            elif finding.path != STATUS_PATH:  # which the next run writes
                self.lasting[finding.what] += 1
            yield finding

    def _look(self) -> Iterator[Finding]:
        if not self.storage.names():
            raise DatasetError(f"{self.storage.uri}: there is nothing there")
        if not self.storage.exists(index_path(0)):
            raise DatasetError(f"{self.storage.uri}: there is no plan; expected the output of an encode or decode job")
        try:
            plan = PlanView.open(self.storage)
            numbers = range(sum(1 for _ in plan.planned_shards()))
        except Exception as error:  # a damaged plan; without it nothing tells what should be there
            yield damaged("plan", error)
            return
        deep = (
            None if self.sample is None else frozenset(random.Random(self.seed).sample(numbers, min(self.sample, len(numbers))))
        )
        kind = VideoChecks if plan.commits is DECODED else LatentChecks
        self.checks = kind(plan=plan, threads=self.threads, deep=deep)
        yield from self.checks.findings()
        yield from self.checks.find_orphans()
        yield from self._check_checkpoints()
        if not is_alive(self.storage):  # what a live run is writing stands there too
            temporary = [found.uri for found in self.storage.list(TEMPORARY_FOLDER)]
            probes = [name for name in self.storage.names() if name.startswith(PROBE_PREFIX)]
            for path in temporary + probes:
                yield Finding(path, "stale", "no temporary files while no run is alive", "one")

    def _check_checkpoints(self) -> Iterator[Finding]:
        """Copies of the shards' accounts: one that cannot be read is not needed, but keeps the job from starting."""
        for path in list_checkpoints(self.storage):
            try:
                read_checkpoint(self.storage, path)
            except DatasetError as error:
                yield damaged(path, error)

    def summary(self) -> dict[str, object]:
        """What was looked at, and how much was found."""
        found: dict[str, object] = {"findings": sum(self.counts.values()), "by_kind": dict(self.counts.most_common())}
        if self.checks is not None:
            plan = self.checks.plan
            found |= {
                "planned": count_planned(plan.generations),
                "written": plan.written,
                "quarantined": plan.quarantined,
                "filtered": plan.filtered,
                "pending": plan.pending,
                "superseded": len(plan.superseded),
                "shards": plan.shards,
                "shards_read_whole": self.checks.read_whole,
            }
        if isinstance(self.checks, LatentChecks):
            found["shards_compared_byte_by_byte"] = self.checks.compared
        return found | {"seconds": round(time.monotonic() - self._started, 1)}
