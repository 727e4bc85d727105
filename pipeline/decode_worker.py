"""Decoding on the cluster's nodes: what a VAE actor does with a shard of latents, and write tasks on CPUs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

import ray
import torch
import xxhash
from ray import ObjectRef
from ray.exceptions import RayTaskError, WorkerCrashedError

from pipeline.actors import LOST_TASK, CommittedJob, Meter, as_own_error
from pipeline.batching import BatchRunner, MemoryLadder, Outcome
from pipeline.dataset.ordered_map import ordered_map
from pipeline.decode_config import DecodeRunConfig
from pipeline.engine import Engine
from pipeline.errors import TerminalError, TransientError
from pipeline.latents import LatentReader, PlannedLatent
from pipeline.latents.rows import LATENT_ROWS
from pipeline.messages import Lease
from pipeline.outcomes import split_superseded
from pipeline.plan_store import OutcomeRef, read_items
from pipeline.sink import FrameSink, WriterCrashedError
from pipeline.storage import Storage
from pipeline.types import Frames, Rejection, ShardSummary
from pipeline.video_writer import VideoFormat, encode_video
from pipeline.videos.record import VIDEO_FOLDER, VideoRecord, commit_videos, done_path, read_record

logger = logging.getLogger(__name__)

_READ_THREADS = 8

Read = torch.Tensor | TerminalError


@ray.remote(num_cpus=1, max_retries=0)
def write_video(
    frames: Frames, planned: PlannedLatent, degraded: str | None, format: VideoFormat, storage: Storage
) -> VideoRecord | TerminalError:
    """Encode one video and put it under its name, unless it stands there."""
    try:
        data = encode_video(frames, planned.fps, format)
    except ValueError as error:
        return TerminalError("write", "cannot_be_written", str(error))
    path = f"{VIDEO_FOLDER}/{planned.name}{format.suffix}"
    if not storage.put_if_absent(path, data):
        data = storage.read(path)  # another attempt's, which may differ in its last bits
    return VideoRecord(
        name=planned.name,
        path=path,
        sample_id=planned.sample_id,
        source_uri=planned.uri,
        source_key=planned.key,
        source_row=planned.row,
        source_member=planned.member,
        layout=planned.layout,
        multiplier=planned.multiplier,
        dropped_frames=planned.drop_frames,
        num_frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        fps=planned.fps,
        size_bytes=len(data),
        xxh3=xxhash.xxh3_128_hexdigest(data),
        degraded=degraded,
        columns=planned.columns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpec:
    """What decoding must know of the run."""

    config: DecodeRunConfig
    storage: Storage
    """The driver's: it knows what the store guarantees, for all alike."""
    recipe: str
    superseded: frozenset[OutcomeRef]
    frame_budget_bytes: int
    make_engine: Callable[[], Engine]


class DecodeWorker:
    """Decodes shards of latents to videos. Implements ``actors.Worker``."""

    def __init__(self, spec: DecodeSpec, meter: Meter) -> None:
        self.spec = spec
        self.meter = meter
        self.storage = spec.storage
        self.engine = spec.make_engine()
        self.memory = MemoryLadder(self.engine.tighten, self.engine.is_out_of_memory)

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[DecodeJob | CommittedJob]:
        """As ``Worker.open``: the shard's latents are read ahead."""
        shard = lease.shard
        path = done_path(shard.bucket_key, shard.index, shard.shard_id)
        if lease.is_again and self.storage.exists(path):
            yield CommittedJob(read_record(self.storage, path)[0])
            return
        source = self.spec.config.input
        items = read_items(self.storage, lease.shard, LATENT_ROWS)
        own, others = split_superseded(lease.shard, items, self.spec.superseded)
        # A reader of its own: two shards that share one would take each other's open file away.
        reader = LatentReader(source.storage_options, source.max_file_bytes)
        read = partial(_read, reader, lease)
        with contextlib.ExitStack() as held:
            if lease.caution.is_careful:
                latents = self._read_carefully(read, own)
            else:
                ahead = ordered_map(read, own, _READ_THREADS)
                held.callback(ahead.close)  # type: ignore[attr-defined]  # a generator, whose reads end with it
                latents = chain(list(islice(ahead, 1)), ahead)  # reading begins here, before the model is free
            job = DecodeJob(self, lease, latents, others)
            held.callback(job.close)
            yield job

    def _read_carefully(
        self, read: Callable[[PlannedLatent], tuple[PlannedLatent, Read]], items: Iterable[PlannedLatent]
    ) -> Iterator[tuple[PlannedLatent, Read]]:
        """One by one, each when the model is free for it: a file that crashes its reader is found like that."""
        for planned in items:
            with self.meter.at_work([planned.sample_id]):
                result = read(planned)
            yield result

    def start_writing(self, planned: PlannedLatent, degraded: str | None, frames: ObjectRef) -> ObjectRef:
        return write_video.remote(frames, planned, degraded, self.spec.config.video_format, self.storage)


def _read(reader: LatentReader, lease: Lease, planned: PlannedLatent) -> tuple[PlannedLatent, Read]:
    verdict = lease.caution.verdict(planned.sample_id, "read")
    if verdict is not None:
        return planned, verdict
    try:
        return planned, reader.read(planned)
    except TerminalError as error:
        return planned, error
    except TransientError:
        raise
    except Exception as error:
        if lease.attempt == 1:
            raise
        return planned, TerminalError.unexpected("read", error)


@dataclass(slots=True)
class DecodeJob:
    """One attempt at one shard of latents."""

    worker: DecodeWorker
    lease: Lease
    latents: Iterator[tuple[PlannedLatent, Read]]
    rejections: list[Rejection]
    """Of clips that are another generation's; those that fail are added."""
    _sink: FrameSink[PlannedLatent, VideoRecord] = field(init=False)

    def __post_init__(self) -> None:
        # Two attempts may be at work, one decoding and one finishing its videos: half of the budget each.
        budget = self.worker.spec.frame_budget_bytes // 2
        self._sink = FrameSink(put=ray.put, wait=_wait_written, cancel=ray.cancel, budget_bytes=budget)

    def run(self) -> None:
        engine, work = self.worker.engine, self.worker.spec.config.work
        runner: BatchRunner[PlannedLatent, torch.Tensor, Frames] = BatchRunner(
            stage="decode",
            forward=engine.decode,
            blank=torch.zeros_like,
            name=lambda planned: planned.sample_id,
            at_work=self.worker.meter.at_work,
            memory=self.worker.memory,
            batch_size=work.batch_size,
            is_retry=self.lease.attempt > 1,
            caution=self.lease.caution,
            # Shapes come from the input, one by one: what does not fit must not keep the rest from being finished.
            blame_memory=self.lease.attempt == work.max_attempts,
        )
        for outcomes in runner.run(self.worker.meter.timed(self.latents)):
            for outcome in outcomes:
                self._keep(outcome)

    def commit(self) -> ShardSummary:
        videos: list[VideoRecord] = []
        for planned, written in self._sink.finish():
            if isinstance(written, TerminalError):
                self._reject(planned, written)
            else:
                videos.append(written)
        shard = self.lease.shard
        summary = ShardSummary(
            shard_id=shard.shard_id,
            generation=shard.generation,
            index=shard.index,
            bucket_key=shard.bucket_key,
            attempt_id=self.lease.attempt_id,
            recipe=self.worker.spec.recipe,
            num_rows=len(videos),
            size_bytes=sum(video.size_bytes for video in videos),
            rejections=tuple(self.rejections),
        )
        return commit_videos(self.worker.storage, summary, videos)

    def _keep(self, outcome: Outcome[PlannedLatent, torch.Tensor, Frames]) -> None:
        planned, result = outcome.item, outcome.result
        if isinstance(result, TerminalError):
            self._reject(planned, result)
            self.worker.meter.add(1, 0)
            return
        with self.worker.meter.waiting():
            self._sink.add(planned, result, partial(self.worker.start_writing, planned, outcome.degraded))
        self.worker.meter.add(1, len(result))

    def close(self) -> None:
        """Give up the videos that are still being written."""
        self._sink.close()

    def _reject(self, planned: PlannedLatent, error: TerminalError) -> None:
        detail = error.detail.removeprefix(f"{planned.uri}: ")
        logger.warning("quarantined uri=%s reason=%s detail=%s", planned.uri, error.reason, detail)
        self.rejections.append(
            Rejection(
                sample_id=planned.sample_id,
                uri=planned.uri,
                frame_end=planned.num_frames,
                status="quarantined",
                stage=error.stage,
                reason=error.reason,
                detail=f"{planned.place}: {detail}",
                file_key=planned.file_key,
            )
        )


def _wait_written(task: ObjectRef) -> VideoRecord | TerminalError:
    """Raises: WriterCrashedError: the writer died, of the clip or by a kill from outside, which Ray does not tell."""
    try:
        written: VideoRecord | TerminalError = ray.get(task)
        return written
    except WorkerCrashedError as error:
        raise WriterCrashedError(str(error)) from None
    except (*LOST_TASK, RayTaskError) as error:
        raise as_own_error(error) from None
