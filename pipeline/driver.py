"""One run from start to end, whatever its work: plan, do what is pending, publish, account, exit code.

Durable truth is in storage alone: the plan's generations and the committed shards. What the driver holds
in memory can be lost at any moment, and the same command resumes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import yaml
from ray import ObjectRef

from pipeline.account import Account, ExitCode
from pipeline.actors import ActorSpec, probe_batch
from pipeline.admission import check_output, check_recipe, check_settings
from pipeline.cluster import ClusterSession, plan_actors, stop_on_signals
from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import ConfigError, RunRefusedError, StoppedError, TransientError
from pipeline.outcomes import count_planned, latest_summary, read_left_out, read_superseded, read_to_look_at_again
from pipeline.plan import ProbedFile
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, read_generations, read_shards
from pipeline.planning import Batch
from pipeline.pool import ActorPool, Committed, Failed
from pipeline.progress import ProgressReport
from pipeline.schedule import Schedule
from pipeline.status import RunStatus, refuse_second_run
from pipeline.types import ShardSummary
from pipeline.work import Work

logger = logging.getLogger(__name__)

STOP_GRACE_S = 20.0
MAX_UNEXPECTED = 10
"""Items quarantined as ``unexpected`` before the run stops: the code is broken, not the items."""
PROBE_TRIES = 3
_FOOTER_THREADS = 16
_POLL_S = 0.5
_ASK_EVERY_S = 1.0


def run_work(work: Work) -> ExitCode:
    """Do everything that the plan of the output has pending; plan first where there is no plan.

    Raises:
        ConfigError, RunRefusedError: the run did not start.
    """
    storage, control = work.storage, work.config.run
    generations = read_generations(storage)
    check_output(storage, generations, work.name)
    check_recipe(storage, generations, work.recipe)
    check_settings(storage, generations, work.config)
    refuse_second_run(storage, takeover=control.takeover)
    account = Account()
    stop = threading.Event()
    insist = 2 if control.takeover else 0
    with stop_on_signals(stop), RunStatus(storage, account.as_dict, stop, beats_to_insist=insist) as status:
        try:
            storage.put("run.yaml", yaml.safe_dump(work.config.to_public_dict(), sort_keys=False).encode())
            code = Run(work, status, account, stop).execute(generations)
        except StoppedError as error:
            status.finish("stopped", ExitCode.STOPPED, str(error))
            logger.info("%s", error)
            return ExitCode.STOPPED
        except BaseException as error:
            code = ExitCode.USAGE if isinstance(error, (ConfigError, RunRefusedError)) else ExitCode.FAILED
            status.finish("failed", code, f"{type(error).__name__}: {error}")
            raise
        state = "stopped" if code == ExitCode.STOPPED else "complete" if account.pending == 0 else "failed"
        status.finish(state, code, account.summary())
    if code == ExitCode.STOPPED:
        logger.info("stopped before the end; the same command resumes")
    if code == ExitCode.COMPLETE and not account.written:
        logger.warning("nothing was written; %s/quarantine.parquet says why", storage.uri)
    logger.info("run ended exit_code=%d output=%s: %s", code, storage.uri, account.summary())
    return code


@dataclass(slots=True)
class Run:
    """The state of one run."""

    work: Work
    status: RunStatus
    account: Account
    stop: threading.Event
    committed: dict[str, tuple[str, ShardSummary]] = field(default_factory=dict)
    """Shard id to path and account."""
    unexpected: int = 0
    """Items quarantined as such by this run; those of earlier ones are no reason to stop, the code may be mended."""

    def execute(self, generations: list[Generation]) -> ExitCode:
        run = self.work.config.run
        with ClusterSession(self.work.config, self.stop) as cluster, ProgressReport(run.progress, run.log_every_s) as progress:
            if run.append or not generations:
                generations += self._plan(generations, cluster, progress)
            if again := read_to_look_at_again(self.work.storage, generations):
                generations += self._plan(generations, cluster, progress, again)
            self.status.state = self.work.activity
            pending = self._take_stock(generations)
            failures: dict[str, str] = {}
            if pending and not self.stop.is_set():
                cluster.join()
                failures = self._do_pending(pending, generations, progress)
            return self._conclude(generations, failures, has_new=bool(pending))

    def _plan(
        self,
        generations: list[Generation],
        cluster: ClusterSession,
        progress: ProgressReport,
        again: Sequence[OutcomeRef] = (),
    ) -> list[Generation]:
        """Plan what is new in the input or, where there are outcomes to replace, their files."""
        self.status.state = "planning"
        probed = 0

        def on_probed(files: list[ProbedFile], total: int) -> None:
            nonlocal probed
            probed += len(files)
            progress.probed(probed, total)
            for error in (file.error for file in files if file.error is not None):
                logger.warning("quarantined stage=%s reason=%s detail=%s", error.stage, error.reason, error.detail)

        probe = functools.partial(_probe_batches, self.work.probe, self.stop, cluster)
        planner = self.work.planner(probe, on_probed)
        added = planner.replan(generations, again) if again else planner.add_generation(generations)
        if added is None:
            if not generations:
                raise ConfigError(f"input.uri {self.work.config.input.uri}: there is nothing to {self.work.name}")
            logger.info("nothing new in the input")
            return []
        logger.info(
            "planned generation=%d clips=%d shards=%d quarantined=%d filtered=%d",
            added.number,
            added.num_clips,
            added.num_shards,
            added.quarantined,
            added.filtered,
        )
        return [added]

    def _take_stock(self, generations: list[Generation]) -> list[ShardRef]:
        """Add up what is planned and committed. Returns the shards that are still to do."""
        storage = self.work.storage
        present = {found.uri: found.size_bytes for found in storage.list(*self.work.commits)}
        shards = [shard for generation in generations for shard in read_shards(storage, generation)]
        paths = {shard.shard_id: self.work.commit_path(shard) for shard in shards}
        done = [shard for shard in shards if paths[shard.shard_id] in present]
        superseded = read_superseded(storage, generations)

        def read(shard: ShardRef) -> ShardSummary:
            path = paths[shard.shard_id]
            return latest_summary(self.work.read_summary(path, present[path]), superseded)

        for shard, summary in zip(done, ordered_map(read, done, _FOOTER_THREADS), strict=True):
            self._add(shard, summary)
        self.account.planned = count_planned(generations, superseded)
        self.account.add_rejections(read_left_out(storage, generations, superseded))
        if orphans := present.keys() - set(paths.values()):
            logger.warning("committed files that no plan names count=%d first=%s", len(orphans), min(orphans))
        logger.info("shards planned=%d committed=%d", len(shards), len(done))
        return [shard for shard in shards if shard.shard_id not in self.committed]

    def _add(self, shard: ShardRef, summary: ShardSummary) -> None:
        self.committed[shard.shard_id] = (self.work.commit_path(shard), summary)
        self.account.add_shard(summary)

    def _do_pending(self, pending: list[ShardRef], generations: list[Generation], progress: ProgressReport) -> dict[str, str]:
        """Run the actors until all is committed or something ends the run. Returns the shards given up."""
        config = self.work.config
        resources = plan_actors(config)
        logger.info("actors=%d device=%s threads=%s", resources.actors, resources.device, resources.threads)
        spec = ActorSpec(make_worker=self.work.worker(generations, resources), log_level=config.run.log_level)
        schedule = Schedule(pending, config.work.max_attempts)
        pool = ActorPool(resources, spec)
        try:
            self._drive(schedule, pool, progress)
        finally:
            pool.close()
        done = pool.progress()
        logger.info("model busy_s=%.1f waited_s=%.1f frames=%d", done.busy_s, done.waited_s, done.frames)
        return schedule.given_up

    def _drive(self, schedule: Schedule, pool: ActorPool, progress: ProgressReport) -> None:
        stopping_since: float | None = None
        next_ask = 0.0
        while not schedule.is_done:
            if stopping_since is None and self._must_stop(schedule):
                stopping_since = time.monotonic()
                logger.info("stopping: no new shards; shards under way have %.0f s", STOP_GRACE_S)
            if stopping_since is None:
                pool.assign(schedule.lease, schedule.num_pending)
            elif not pool.num_leased or time.monotonic() - stopping_since > STOP_GRACE_S:
                return
            for event in pool.poll(_POLL_S):
                self._apply(event, schedule)
            if time.monotonic() >= next_ask:
                next_ask = time.monotonic() + _ASK_EVERY_S
                pool.ask_progress()
            done = pool.progress()
            progress.worked(self.status.state, self.account, done.clips, done.frames)

    def _apply(self, event: Committed | Failed, schedule: Schedule) -> None:
        lease = event.lease
        if isinstance(event, Committed):
            schedule.committed(lease)
            self.unexpected += sum(rejection.reason == "unexpected" for rejection in event.summary.rejections)
            self._add(lease.shard, event.summary)
            return
        schedule.failed(lease, event.error, charged=event.charged)
        logger.warning(
            "shard to be tried again shard_id=%s attempt=%d charged=%s error=%s"
            if lease.shard.shard_id not in schedule.given_up
            else "shard given up shard_id=%s attempt=%d charged=%s error=%s",
            lease.shard.shard_id,
            lease.attempt,
            event.charged,
            event.error,
        )

    def _must_stop(self, schedule: Schedule) -> bool:
        return (
            self.stop.is_set()
            or schedule.is_hopeless
            or self.account.is_over(self.work.config.run.max_quarantined)
            or self.unexpected > MAX_UNEXPECTED
        )

    def _conclude(self, generations: list[Generation], failures: dict[str, str], *, has_new: bool) -> ExitCode:
        """Publish what is complete and choose the exit code."""
        # A shard that was lost and made again may have other bytes under the same counts.
        if self.account.pending == 0 and (has_new or not self.work.is_published(generations, self.account)):
            self.status.state = "publishing"
            planned = (shard for g in generations for shard in read_shards(self.work.storage, g))
            self.work.publish(generations, [self.committed[shard.shard_id] for shard in planned], self.account)
        for shard_id, error in failures.items():
            logger.error("shard given up shard_id=%s error=%s", shard_id, error)
        if self.account.is_over(self.work.config.run.max_quarantined):
            return ExitCode.OVER_MAX_QUARANTINED
        if self.unexpected > MAX_UNEXPECTED or failures:
            return ExitCode.FAILED
        return ExitCode.COMPLETE if self.account.pending == 0 else ExitCode.STOPPED


def _probe_batches(
    probe: Callable[..., list[Any]], stop: threading.Event, cluster: ClusterSession, batches: list[Batch]
) -> Iterator[tuple[int, list[Any]]]:
    """Probe on every core of the cluster; a batch whose worker is lost is probed again.

    Raises:
        TransientError: a batch failed three times.
        StoppedError: the run was asked to stop.
    """
    cluster.join()
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(range(len(batches))))
    tries = [0] * len(batches)
    running: dict[ObjectRef, int] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            position = waiting.pop()
            task = probe_batch.remote(probe, batches[position])
            running[task] = position
        done, _ = ray.wait(list(running), timeout=_POLL_S)
        if stop.is_set():
            raise StoppedError("stopped while planning; the same command resumes")
        for task in done:
            position = running.pop(task)
            try:
                yield position, ray.get(task)
            except ray.exceptions.RayError as error:
                tries[position] += 1
                if tries[position] == PROBE_TRIES:
                    raise TransientError(
                        f"probing failed {PROBE_TRIES} times, first {batches[position][0].uri}: {error}"
                    ) from error
                waiting.append(position)
