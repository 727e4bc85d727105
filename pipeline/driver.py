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

from pipeline import failpoints
from pipeline.account import Account, ExitCode
from pipeline.actors import ActorSpec, probe_batch
from pipeline.admission import check_guarantees, check_output, check_recipe, check_settings
from pipeline.cluster import ClusterSession, count_actors, plan_actors, shared_paths, stop_grace_s, stop_on_signals
from pipeline.errors import ENDS_THE_RUN, ConfigError, PipelineError, RunRefusedError, StoppedError, TransientError
from pipeline.messages import CapacityChanged, End, Event, GiveUp, Settle, StopAsked, Tick
from pipeline.outcomes import read_to_look_at_again
from pipeline.plan import ProbedFile
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, read_generations
from pipeline.planning import Batch
from pipeline.pool import ActorPool
from pipeline.progress import ProgressReport
from pipeline.schedule import Limits, Schedule
from pipeline.status import RunStatus, refuse_second_run
from pipeline.stock import Stock
from pipeline.work import Work

logger = logging.getLogger(__name__)

MAX_UNEXPECTED = 10
"""Items quarantined for ``UNEXPECTED`` reasons before the run stops: the code is broken, not the items."""
UNEXPECTED = {"unexpected", "crashed_actor", "hung_actor"}
PROBE_TRIES = 3
STOPPED_PLANNING = "stopped while planning; the same command resumes"
_POLL_S = 0.5
_COUNT_EVERY_S = 5.0
"""How often the cluster is asked for new places."""


def check_generations(work: Work, generations: list[Generation]) -> None:
    """Make sure that a plan is this work's own. Raises: RunRefusedError: it was made for another work, recipe or settings."""
    check_output(work.storage, generations, work.name)
    check_recipe(work.storage, generations, work.recipe)
    check_settings(work.storage, generations, work.config)


def run_work(work: Work) -> ExitCode:
    """Do everything that the plan of the output has pending; plan first where there is no plan.

    Raises:
        ConfigError, RunRefusedError: the run did not start.
    """
    storage, control = work.storage, work.config.run
    generations = read_generations(storage)
    check_generations(work, generations)
    refuse_second_run(storage, takeover=control.takeover)
    check_guarantees(storage)
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
    stock: Stock = field(init=False)
    unexpected: int = 0
    """Items quarantined as such by this run; those of earlier ones are no reason to stop, the code may be mended."""

    def __post_init__(self) -> None:
        self.stock = Stock(self.work, self.account)

    def execute(self, generations: list[Generation]) -> ExitCode:
        run = self.work.config.run
        with ClusterSession(self.work.config, self.stop) as cluster, ProgressReport(run.progress, run.log_every_s) as progress:
            if run.append or not generations:
                generations += self._plan(generations, cluster, progress)
            if again := read_to_look_at_again(self.work.storage, generations):
                generations += self._plan(generations, cluster, progress, again)
            self.status.state = self.work.activity
            pending = self.stock.take(generations)
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
            if self.stop.is_set():
                raise StoppedError(STOPPED_PLANNING)
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
        check_generations(self.work, [added])  # it may be another driver's, which was first
        logger.info(
            "planned generation=%d clips=%d shards=%d quarantined=%d filtered=%d",
            added.number,
            added.num_clips,
            added.num_shards,
            added.quarantined,
            added.filtered,
        )
        return [added]

    def _do_pending(self, pending: list[ShardRef], generations: list[Generation], progress: ProgressReport) -> dict[str, str]:
        """Run the actors until all is committed or something ends the run. Returns the shards given up."""
        config = self.work.config
        resources = plan_actors(config)
        logger.info("actors=%d device=%s threads=%s", resources.actors, resources.device, resources.threads)
        make_worker = self.work.worker(generations, resources)
        spec = ActorSpec(make_worker=make_worker, log_level=config.run.log_level, shared=shared_paths(config))
        limits = Limits(
            max_attempts=config.work.max_attempts,
            batch_s=config.work.batch_timeout_s,
            stop_grace_s=stop_grace_s(config),
            has_twins=self.work.storage.has_conditional_put,
        )
        schedule = Schedule(pending, limits, time.monotonic)
        pool = ActorPool(resources, spec)
        failures: dict[str, str] = {}

        def look_around() -> bool:
            done = pool.progress()
            progress.worked(self.status.state, self.account, done.clips, done.frames)
            return self._must_stop()

        try:
            for outcome in drive(schedule, pool, functools.partial(count_actors, config, resources.device), look_around):
                if isinstance(outcome, GiveUp):
                    failures[outcome.shard.shard_id] = outcome.error
                else:
                    failpoints.reach("driver.before_acknowledge")
                    self.unexpected += sum(rejection.reason in UNEXPECTED for rejection in outcome.summary.rejections)
                    self.stock.add(outcome.summary)
        finally:
            pool.close()
        done = pool.progress()
        logger.info("model busy_s=%.1f waited_s=%.1f frames=%d", done.busy_s, done.waited_s, done.frames)
        return failures

    def _must_stop(self) -> bool:
        return (
            self.stop.is_set() or self.account.is_over(self.work.config.run.max_quarantined) or self.unexpected > MAX_UNEXPECTED
        )

    def _conclude(self, generations: list[Generation], failures: dict[str, str], *, has_new: bool) -> ExitCode:
        """Publish what is complete and choose the exit code."""
        self.stock.checkpoint()
        # A shard that was lost and made again may have other bytes under the same counts.
        if self.account.pending == 0 and (has_new or not self.work.is_published(generations, self.account)):
            self.status.state = "publishing"
            failpoints.reach("publish.before_index")
            self.work.publish(generations, self.stock.paths(generations), self.account)
        for shard_id, error in failures.items():
            logger.error("shard given up shard_id=%s error=%s", shard_id, error)
        limit = self.work.config.run.max_quarantined
        if self.account.is_over(limit):
            reasons = self.account.commonest_reasons()
            logger.error(
                "too many quarantined: %d of %d planned, run.max_quarantined is %s; reasons: %s",
                self.account.quarantined,
                self.account.planned,
                limit,
                reasons,
            )
            return ExitCode.OVER_MAX_QUARANTINED
        if self.unexpected > MAX_UNEXPECTED:
            logger.error(
                "%d items failed in ways that nobody foresaw: the code is broken, not they; the quarantine has the details",
                self.unexpected,
            )
        if self.unexpected > MAX_UNEXPECTED or failures:
            return ExitCode.FAILED
        return ExitCode.COMPLETE if self.account.pending == 0 else ExitCode.STOPPED


def drive(
    schedule: Schedule, pool: ActorPool, count_places: Callable[[], int], look_around: Callable[[], bool]
) -> Iterator[Settle | GiveUp]:
    """Go between schedule and pool until the schedule ends; yields what became of each shard.

    Args:
        count_places: how many actors fit the cluster.
        look_around: called about every half second; returns whether to stop.

    Raises:
        PipelineError: there are no actors to go on with.
    """
    next_tick = next_count = 0.0
    is_stopping = False
    while True:
        events: list[Event] = pool.poll(_POLL_S)
        now = time.monotonic()
        if now >= next_tick:
            events.append(Tick())
            next_tick = now + _POLL_S
            if not is_stopping and look_around():
                logger.info("stopping: no new shards")
                is_stopping = True
                events.append(StopAsked())
        if now >= next_count:
            events.append(CapacityChanged(actors=count_places()))
            next_count = now + _COUNT_EVERY_S
        for event in events:
            for command in schedule.handle(event):
                match command:
                    case Settle() | GiveUp():
                        yield command
                    case End(error=None):
                        return
                    case End(error=error):
                        raise PipelineError(error)
                    case _:
                        pool.do(command)


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
            raise StoppedError(STOPPED_PLANNING)
        for task in done:
            position = running.pop(task)
            try:
                yield position, ray.get(task)
            except ray.exceptions.RayError as error:
                if isinstance(getattr(error, "cause", None), ENDS_THE_RUN):
                    raise error.cause from None
                tries[position] += 1
                if tries[position] == PROBE_TRIES:
                    raise TransientError(
                        f"probing failed {PROBE_TRIES} times, first {batches[position][0].uri}: {error}"
                    ) from error
                waiting.append(position)
