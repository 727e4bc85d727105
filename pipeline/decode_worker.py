"""Decoding on the cluster's nodes: what a VAE actor does with a shard of latents, and write tasks on CPUs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import ray
import torch
import xxhash
from ray import ObjectRef

from pipeline.actors import Meter, get_result
from pipeline.batching import BatchRunner, Outcome
from pipeline.dataset.ordered_map import ordered_map
from pipeline.decode_config import DecodeRunConfig
from pipeline.engine import Engine
from pipeline.errors import TerminalError, TransientError
from pipeline.latents import LatentReader, PlannedLatent
from pipeline.latents.rows import LATENT_ROWS
from pipeline.plan_store import read_items
from pipeline.schedule import Lease
from pipeline.sink import FrameSink
from pipeline.storage import Storage
from pipeline.types import Frames, Rejection, ShardSummary
from pipeline.video_writer import VideoFormat, encode_video, png_frames
from pipeline.videos.record import VIDEO_FOLDER, VideoRecord, commit_videos

logger = logging.getLogger(__name__)

_READ_THREADS = 8

Latent = TerminalError | torch.Tensor
Written = VideoRecord | TerminalError


@ray.remote(num_cpus=1, max_retries=0)
def write_video(frames: Frames, planned: PlannedLatent, degraded: str | None, format: VideoFormat, storage: Storage) -> Written:
    """Encode one video and put it under its name, unless it stands there."""
    try:
        if format.container == "png":
            files = [(f"{VIDEO_FOLDER}/{planned.name}/{name}", data) for name, data in png_frames(frames)]
            path = f"{VIDEO_FOLDER}/{planned.name}"
        else:
            path = f"{VIDEO_FOLDER}/{planned.name}{format.suffix}"
            files = [(path, encode_video(frames, planned.fps, format))]
    except ValueError as error:
        return TerminalError("write", "cannot_be_written", f"{planned.name}: {error}")
    hasher, size_bytes = xxhash.xxh3_128(), 0
    for name, data in files:
        standing = data if storage.put_if_absent(name, data) else storage.read(name)
        hasher.update(standing)
        size_bytes += len(standing)
    return VideoRecord(
        name=planned.name,
        path=path,
        sample_id=planned.sample_id,
        source_uri=planned.uri,
        source_key=planned.key,
        source_row=planned.row,
        source_member=planned.member,
        num_frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        fps=planned.fps,
        size_bytes=size_bytes,
        xxh3=hasher.hexdigest(),
        degraded=degraded,
        columns=planned.columns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpec:
    """What decoding must know of the run."""

    config: DecodeRunConfig
    recipe: str
    frame_budget_bytes: int
    make_engine: Callable[[], Engine]


class DecodeWorker:
    """Decodes shards of latents to videos. Implements ``actors.Worker``."""

    def __init__(self, spec: DecodeSpec, meter: Meter) -> None:
        source, output = spec.config.input, spec.config.output
        self.spec = spec
        self.meter = meter
        self.storage = Storage(output.uri, output.storage_options)
        self.engine = spec.make_engine()
        self._reader = LatentReader(source.storage_options, source.max_file_bytes)

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[DecodeJob]:
        """As ``Worker.open``: the shard's latents are read ahead."""
        items = read_items(self.storage, lease.shard, LATENT_ROWS)
        read = partial(self._read, is_retry=lease.attempt > 1)
        latents = ordered_map(read, items, _READ_THREADS)
        with contextlib.closing(latents):  # type: ignore[type-var]  # a generator, whose reads end with it
            first = next(latents)  # reading begins here, before the model is free
            yield DecodeJob(self, lease, chain([first], latents))

    def start_writing(self, planned: PlannedLatent, degraded: str | None, frames: ObjectRef) -> ObjectRef:
        return write_video.remote(frames, planned, degraded, self.spec.config.video_format, self.storage)

    def _read(self, planned: PlannedLatent, *, is_retry: bool) -> tuple[PlannedLatent, Latent]:
        try:
            return planned, self._reader.read(planned)
        except TerminalError as error:
            return planned, error
        except TransientError:
            raise
        except Exception as error:
            if not is_retry:
                raise
            return planned, TerminalError.unexpected("read", error)


@dataclass(slots=True)
class DecodeJob:
    """One attempt at one shard of latents."""

    worker: DecodeWorker
    lease: Lease
    latents: Iterator[tuple[PlannedLatent, Latent]]
    _sink: FrameSink[PlannedLatent, Written] = field(init=False)
    _rejections: list[Rejection] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        # Two attempts may be at work, one decoding and one finishing its videos: half of the budget each.
        budget = self.worker.spec.frame_budget_bytes // 2
        self._sink = FrameSink(put=ray.put, wait=get_result, budget_bytes=budget)

    def run(self) -> None:
        engine, work = self.worker.engine, self.worker.spec.config.work
        runner: BatchRunner[PlannedLatent, torch.Tensor, Frames] = BatchRunner(
            stage="decode",
            forward=engine.decode,
            blank=torch.zeros_like,
            is_out_of_memory=engine.is_out_of_memory,
            batch_size=work.batch_size,
            is_retry=self.lease.attempt > 1,
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
            rejections=tuple(self._rejections),
        )
        return commit_videos(self.worker.storage, summary, videos)

    def _keep(self, outcome: Outcome[PlannedLatent, torch.Tensor, Frames]) -> None:
        planned, result = outcome.item, outcome.result
        if isinstance(result, TerminalError):
            self._reject(planned, result)
            self.worker.meter.add(1, 0)
            return
        self._sink.add(planned, result, partial(self.worker.start_writing, planned, outcome.degraded))
        self.worker.meter.add(1, len(result))

    def _reject(self, planned: PlannedLatent, error: TerminalError) -> None:
        logger.warning("quarantined uri=%s reason=%s detail=%s", planned.uri, error.reason, error.detail)
        self._rejections.append(
            Rejection(
                sample_id=planned.sample_id,
                uri=planned.uri,
                frame_start=0,
                frame_end=planned.num_frames,
                status="quarantined",
                stage=error.stage,
                reason=error.reason,
                detail=error.detail,
            )
        )
