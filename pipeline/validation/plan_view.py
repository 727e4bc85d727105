"""The plan of an output, and what is committed of it, as both kinds of validation need it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.committed import CommitFormat, commit_format
from pipeline.outcomes import count_planned, latest, latest_summary, read_superseded
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, list_plan_files, read_generations, read_rejections, read_shards
from pipeline.quarantine import QUARANTINE_PATH, read_quarantine_table
from pipeline.status import STATUS_PATH
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.validation.findings import Finding, damaged, first_findings


@dataclass(slots=True, kw_only=True)
class PlanView:
    """What should be there, and the sums over what is."""

    storage: Storage
    generations: list[Generation]
    commits: CommitFormat
    superseded: frozenset[OutcomeRef]
    present: dict[str, int]
    """Size of every object in the folder of commits."""
    written: int = 0
    size_bytes: int = 0
    shards: int = 0
    pending: int = 0
    """Clips of shards that are not committed."""
    unread: int = 0
    """Shards whose account cannot be read: no sums hold then."""
    rejections: Counter[Rejection] = field(default_factory=Counter)
    """Those that count."""
    _replaced: set[OutcomeRef] = field(default_factory=set)
    _paths: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, storage: Storage) -> PlanView:
        """Raises: DatasetError: there is no plan, or it cannot be read."""
        generations = read_generations(storage)
        commits = commit_format(storage, generations)
        return cls(
            storage=storage,
            generations=generations,
            commits=commits,
            superseded=read_superseded(storage, generations),
            present={found.uri: found.size_bytes for found in storage.walk(commits.folder)},
        )

    def planned_shards(self) -> Iterator[tuple[Generation, ShardRef]]:
        """Every shard of the plan, in its order."""
        for generation in self.generations:
            for shard in read_shards(self.storage, generation):
                yield generation, shard

    def find_missing(self, shard: ShardRef) -> Finding | None:
        """Note that a shard is planned; says so if it is not committed."""
        path = self.commits.path(shard)
        self._paths.add(path)
        if path in self.present:
            return None
        self.pending += shard.num_clips
        return Finding(path, "missing", f"a committed shard of {shard.num_clips} clips", "nothing; run the job again to make it")

    def add(self, shard: ShardRef, summary: ShardSummary | None) -> None:
        """Count a committed shard; None: its account cannot be read."""
        if summary is None:
            self.unread += 1
            return
        self.shards += 1
        self.written += summary.num_rows
        self.size_bytes += summary.size_bytes
        self._add_rejections(shard.shard_id, summary.rejections, latest_summary(summary, self.superseded).rejections)

    def add_planning(self) -> Iterator[Finding]:
        """Count what planning left out."""
        for generation in self.generations:
            try:
                said = tuple(read_rejections(self.storage, generation))
            except Exception as error:  # whatever the parser says of it
                self.unread += 1
                yield damaged(generation.place, error)
                continue
            self._add_rejections(generation.place, said, tuple(latest(generation.place, said, self.superseded)))

    def _add_rejections(self, place: str, said: tuple[Rejection, ...], counting: tuple[Rejection, ...]) -> None:
        refs = {OutcomeRef(place, rejection.sample_id, rejection.uri) for rejection in said}
        self._replaced |= refs & self.superseded
        self.rejections.update(counting)

    @property
    def quarantined(self) -> int:
        return self._count("quarantined")

    @property
    def filtered(self) -> int:
        return self._count("filtered")

    def _count(self, status: str) -> int:
        return sum(count for rejection, count in self.rejections.items() if rejection.status == status)

    def check_account(self) -> Iterator[Finding]:
        """The equation, and that superseded outcomes are there."""
        if self.unread:
            return
        for ref in sorted(self.superseded - self._replaced):
            yield Finding("plan", "superseded", "outcomes that are in the plan or in a shard", f"{ref.sample_id} in {ref.place}")
        planned = count_planned(self.generations)
        found = self.written + self.quarantined + self.filtered + self.pending
        if planned != found:
            sums = f"{self.written} written + {self.quarantined} quarantined + {self.filtered} filtered + {self.pending} pending"
            yield Finding("plan", "account", f"{planned} planned", f"{found}: {sums}")
        yield from self._check_status(planned)

    def _check_status(self, planned: int) -> Iterator[Finding]:
        try:
            status = self.storage.read_json(STATUS_PATH)
            if status.get("state") != "complete" or self.pending:
                return  # it speaks of another moment
            found = tuple(status.get(name) for name in ("planned", "written", "quarantined", "filtered"))
        except FileNotFoundError:
            return
        except Exception as error:  # whatever stands there
            yield damaged(STATUS_PATH, error)
            return
        expected = (planned, self.written, self.quarantined, self.filtered)
        if found != expected:
            yield Finding(STATUS_PATH, "account", f"planned, written, quarantined, filtered {expected}", str(found))

    def check_quarantine(self) -> Iterator[Finding]:
        """The quarantine table says what the plan and the footers say."""
        if self.unread or self.pending:
            return
        try:
            said = Counter(read_quarantine_table(self.storage))
        except Exception as error:  # not there, or whatever the parser says of it
            yield damaged(QUARANTINE_PATH, error)
            return
        yield from first_findings(
            Finding(QUARANTINE_PATH, "quarantine", expected, found)
            for expected, found in (
                *((f"{one.reason} of {one.sample_id}", "no such row") for one in self.rejections - said),
                *(("what plan and footers say", f"{one.reason} of {one.sample_id}") for one in said - self.rejections),
            )
        )

    def find_orphans(self) -> Iterator[Finding]:
        """Objects among the commits and in the plan that no generation names."""
        for path in sorted(self.present.keys() - self._paths):
            yield Finding(path, "orphan", "a shard that the plan names", "none that is so called")
        named = {path for generation in self.generations for path in list_plan_files(generation)}
        folders = {generation.place for generation in self.generations}
        strangers = []
        for found in self.storage.walk("plan"):
            folder, _, rest = found.uri.removeprefix("plan/").partition("/")
            # Of a generation that is not published, a driver may yet go on with what it probed.
            if f"plan/{folder}" in folders and found.uri not in named and not rest.startswith("probed/"):
                strangers.append(found.uri)
        for path in sorted(strangers):
            yield Finding(path, "orphan", "a file that the generation names", "one of another author")
