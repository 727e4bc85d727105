"""One run from start to end: plan, encode what is pending, publish, account, exit code.

Durable truth is in storage alone: the plan's generations and the committed shards. What the driver holds
in memory can be lost at any moment, and the same command resumes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ray
import yaml
from ray import ObjectRef

from pipeline.account import Account, ExitCode
from pipeline.actors import ActorSpec, probe_videos
from pipeline.admission import check_output, check_recipe, check_settings
from pipeline.cluster import ClusterSession, plan_actors, stop_on_signals
from pipeline.config import RunConfig
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.ordered_map import ordered_map
from pipeline.dataset.publish import DatasetInfo, publish_dataset
from pipeline.dataset.schema import build_schema
from pipeline.dataset.writer import DATA_FOLDER, read_summary, shard_path
from pipeline.engine import Engine, ModelInfo, describe_model, load_engine
from pipeline.errors import ConfigError, RunRefusedError, StoppedError, TransientError
from pipeline.plan import ProbedVideo
from pipeline.plan_store import Generation, ShardRef, read_generations, read_rejections, read_shards
from pipeline.planning import Batch, Planner
from pipeline.pool import ActorPool, Committed, Failed
from pipeline.progress import ProgressReport
from pipeline.recipe import Recipe
from pipeline.report import REPORT_PATH, write_report
from pipeline.schedule import Schedule
from pipeline.status import RunStatus, refuse_second_run
from pipeline.storage import Storage
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)

STOP_GRACE_S = 20.0
MAX_UNEXPECTED = 10
"""Clips quarantined as ``unexpected`` before the run stops: the code is broken, not the clips."""
PROBE_TRIES = 3
_FOOTER_THREADS = 16
_POLL_S = 0.5
_ASK_EVERY_S = 1.0


def run_encode(config: RunConfig, make_engine: Callable[..., Engine] = load_engine) -> ExitCode:
    """Encode everything that the plan of ``output.uri`` has pending; plan first where there is no plan.

    Args:
        make_engine: what an actor calls to get its model; tests pass a fake.

    Raises:
        ConfigError, RunRefusedError: the run did not start.
    """
    storage = Storage(config.output.uri, config.output.storage_options)
    model = describe_model(config.vae)
    recipe = Recipe.from_config(config, model.fingerprint)
    generations = read_generations(storage)
    check_output(storage, generations)
    check_recipe(storage, generations, recipe)
    check_settings(storage, generations, config)
    refuse_second_run(storage, takeover=config.run.takeover)
    account = Account()
    stop = threading.Event()
    insist = 2 if config.run.takeover else 0
    with stop_on_signals(stop), RunStatus(storage, account.as_dict, stop, beats_to_insist=insist) as status:
        try:
            storage.put("run.yaml", yaml.safe_dump(config.to_public_dict(), sort_keys=False).encode())
            run = EncodeRun(config, storage, model, recipe, status, account, make_engine, stop)
            code = run.execute(generations)
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
        logger.warning("not one clip was written; %s/quarantine.parquet says why", storage.uri)
    logger.info("run ended exit_code=%d output=%s: %s", code, storage.uri, account.summary())
    return code


@dataclass(slots=True)
class EncodeRun:
    """The state of one run of the encode job."""

    config: RunConfig
    storage: Storage
    model: ModelInfo
    recipe: Recipe
    status: RunStatus
    account: Account
    make_engine: Callable[..., Engine]
    stop: threading.Event
    committed: dict[str, tuple[str, ShardSummary]] = field(default_factory=dict)
    """Shard id to path and account."""
    unexpected: int = 0
    """Clips quarantined as such by this run; those of earlier ones are no reason to stop, the code may be mended."""

    def execute(self, generations: list[Generation]) -> ExitCode:
        run = self.config.run
        with ClusterSession(self.config, self.stop) as cluster, ProgressReport(run.progress, run.log_every_s) as progress:
            if run.append or not generations:
                generations += self._plan(generations, cluster, progress)
            self.status.state = "encoding"
            pending = self._take_stock(generations)
            failures: dict[str, str] = {}
            if pending and not self.stop.is_set():
                cluster.join()
                failures = self._encode_pending(pending, generations, progress)
            return self._conclude(generations, failures)

    def _plan(self, generations: list[Generation], cluster: ClusterSession, progress: ProgressReport) -> list[Generation]:
        self.status.state = "planning"
        probed = 0

        def on_probed(videos: list[ProbedVideo], total: int) -> None:
            nonlocal probed
            probed += len(videos)
            progress.probed(probed, total)
            for error in (video.error for video in videos if video.error is not None):
                logger.warning("quarantined stage=%s reason=%s detail=%s", error.stage, error.reason, error.detail)

        planner = Planner(
            config=self.config,
            storage=self.storage,
            model=self.model,
            recipe=self.recipe,
            probe=functools.partial(_probe_batches, self.config, self.stop, cluster),
            on_probed=on_probed,
        )
        added = planner.add_generation(generations)
        if added is None:
            if not generations:
                raise ConfigError(f"input.uri {self.config.input.uri}: lists no videos")
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
        present = {found.uri: found.size_bytes for found in self.storage.list(DATA_FOLDER, ".parquet")}
        shards = [shard for generation in generations for shard in read_shards(self.storage, generation)]
        paths = {shard.shard_id: shard_path(shard.bucket.key, shard.index, shard.shard_id) for shard in shards}
        done = [shard for shard in shards if paths[shard.shard_id] in present]

        def read(shard: ShardRef) -> ShardSummary:
            path = paths[shard.shard_id]
            return read_summary(self.storage, path, present[path])

        for shard, summary in zip(done, ordered_map(read, done, _FOOTER_THREADS), strict=True):
            self._add(shard, summary)
        self.account.planned = sum(generation.num_planned for generation in generations)
        for generation in generations:
            self.account.add_rejections(read_rejections(self.storage, generation))
        if orphans := present.keys() - set(paths.values()):
            logger.warning("files in data/ that no plan names count=%d first=%s", len(orphans), min(orphans))
        logger.info("shards planned=%d committed=%d", len(shards), len(done))
        return [shard for shard in shards if shard.shard_id not in self.committed]

    def _add(self, shard: ShardRef, summary: ShardSummary) -> None:
        path = shard_path(shard.bucket.key, shard.index, shard.shard_id)
        self.committed[shard.shard_id] = (path, summary)
        self.account.add_shard(summary)

    def _encode_pending(self, pending: list[ShardRef], generations: list[Generation], progress: ProgressReport) -> dict[str, str]:
        """Run the actors until all is committed or something ends the run. Returns the shards given up."""
        resources = plan_actors(self.config)
        logger.info("actors=%d device=%s threads=%s", resources.actors, resources.device, resources.threads)
        make_engine = functools.partial(
            self.make_engine, self.config, self.model.fingerprint, resources.device, resources.threads
        )
        spec = ActorSpec(
            config=self.config,
            recipe=self.recipe.fingerprint,
            columns=generations[0].columns,
            frame_budget_bytes=resources.frame_budget_bytes,
            make_engine=make_engine,
        )
        schedule = Schedule(pending, self.config.encode.max_attempts)
        pool = ActorPool(resources, spec)
        try:
            self._drive(schedule, pool, progress)
        finally:
            pool.close()
        work = pool.progress()
        logger.info("model busy_s=%.1f waited_for_videos_s=%.1f frames=%d", work.busy_s, work.waited_s, work.frames)
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
            work = pool.progress()
            progress.encoded(self.account, work.clips, work.frames)

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
            or self.account.is_over(self.config.run.max_quarantined)
            or self.unexpected > MAX_UNEXPECTED
        )

    def _conclude(self, generations: list[Generation], failures: dict[str, str]) -> ExitCode:
        """Publish what is complete and choose the exit code."""
        if self.account.pending == 0 and not self._is_published():
            self.status.state = "publishing"
            self._publish(generations)
        for shard_id, error in failures.items():
            logger.error("shard given up shard_id=%s error=%s", shard_id, error)
        if self.account.is_over(self.config.run.max_quarantined):
            return ExitCode.OVER_MAX_QUARANTINED
        if self.unexpected > MAX_UNEXPECTED or failures:
            return ExitCode.FAILED
        return ExitCode.COMPLETE if self.account.pending == 0 else ExitCode.STOPPED

    def _is_published(self) -> bool:
        """Whether the manifest already speaks of all that is committed, as after running a finished job again."""
        manifest = read_manifest(self.storage)
        if manifest is None or not self.storage.exists(REPORT_PATH):
            return False
        found = (manifest.num_shards, manifest.num_samples, manifest.num_quarantined, manifest.num_filtered)
        account = self.account
        return found == (len(self.committed), account.written, account.quarantined, account.filtered)

    def _publish(self, generations: list[Generation]) -> None:
        shards = [self.committed[shard.shard_id] for g in generations for shard in read_shards(self.storage, g)]
        rejections = (rejection for g in generations for rejection in read_rejections(self.storage, g))
        output = self.config.output
        schema = build_schema(logvar=output.logvar, first_frame=output.first_frame, passthrough=generations[0].columns)
        info = DatasetInfo(
            schema=schema,
            scaling_factor=self.model.scaling_factor,
            dtype=self.config.stored_dtype,
            model=self.config.vae.model,
        )
        manifest = publish_dataset(self.storage, shards, rejections, info)
        write_report(self.storage, manifest, self.account)


def _probe_batches(
    config: RunConfig, stop: threading.Event, cluster: ClusterSession, batches: list[Batch]
) -> Iterator[tuple[int, list[ProbedVideo]]]:
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
            task = probe_videos.remote(batches[position], config.decode, config.input.storage_options)
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
