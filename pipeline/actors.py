"""The parts that run on the cluster's nodes: probe and decode tasks on CPUs, VAE actors on GPUs.

Everything that can be tested without Ray is elsewhere; here are process boundaries and what crosses them.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import xxhash
from ray import ObjectRef
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.commit import commit_shard
from pipeline.config import DecodeConfig, RunConfig
from pipeline.dataset.schema import build_schema
from pipeline.dataset.writer import ShardWriter
from pipeline.decoder_process import DecoderProcess
from pipeline.engine import Engine
from pipeline.errors import TerminalError, TransientError
from pipeline.feed import Decoded, DecodeFeed, DecodeOrder
from pipeline.inputs import fetch_input
from pipeline.plan import PlannedClip, ProbedVideo
from pipeline.plan_store import read_clips
from pipeline.probing import probe_items
from pipeline.schedule import Lease
from pipeline.shard import ShardEncoder
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import Clip, DecodedClip, ShardSummary

logger = logging.getLogger(__name__)

# The surroundings failed, not the video. A crash of the decoder is no such case: it happens in a child
# process of the task, whose exit status tells.
LOST_TASK = (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RaySystemError)

_HASH_BLOCK_BYTES = 4 << 20


@functools.lru_cache(maxsize=1)
def _decoder_process(limits: str) -> DecoderProcess:
    """The decoder of this worker process, kept from task to task. Takes the limits as JSON, to be hashable."""
    return DecoderProcess(DecodeConfig.model_validate_json(limits))


@ray.remote(num_cpus=1, max_retries=0)
def probe_videos(items: list[SourceItem], limits: DecodeConfig, options: dict[str, Any]) -> list[ProbedVideo]:
    """Probe a few videos, one after the other."""
    decoder = _decoder_process(limits.model_dump_json())
    return probe_items(items, decoder, options, tempfile.gettempdir())


@ray.remote(num_cpus=1, max_retries=0)
def decode_video(clips: list[Clip], limits: DecodeConfig, options: dict[str, Any]) -> Decoded | tuple[Decoded, ...]:
    """Decode clips of one video. Returns one result a clip; alone, if there is one clip, as Ray wants it."""
    try:
        results = _decode_clips(clips, limits, options)
    except TerminalError as error:
        results = tuple(error for _ in clips)
    return results if len(clips) > 1 else results[0]


def _decode_clips(clips: list[Clip], limits: DecodeConfig, options: dict[str, Any]) -> tuple[Decoded, ...]:
    first = clips[0]
    name = first.uri.rpartition("/")[2]
    with fetch_input(first.uri, options, tempfile.gettempdir()) as (path, found):
        if (found.size_bytes, found.version) != (first.size_bytes, first.version):
            raise TerminalError(
                "fetch",
                "changed",
                f"{first.uri}: changed since it was planned ({first.size_bytes} bytes then, {found.size_bytes} now); "
                "run again with --append to plan what it is now",
            )
        source_hash = _hash_file(path)
        decoded = _decoder_process(limits.model_dump_json()).decode(str(path), name, clips)
    return tuple(
        result if isinstance(result, TerminalError) else DecodedClip(frames=result, source_hash=source_hash) for result in decoded
    )


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """What an actor must know of the run."""

    config: RunConfig
    recipe: str
    columns: pa.Schema
    """Types of the columns that pass through."""
    frame_budget_bytes: int
    make_engine: Callable[[], Engine]


@dataclass(slots=True, kw_only=True)
class Progress:
    """What an actor has done since it started. Clips of failed attempts count too: this is work, not results."""

    clips: int = 0
    frames: int = 0
    busy_s: float = 0.0
    """Time the model was at work."""
    waited_s: float = 0.0
    """Time the model stood idle although a shard was there: videos were not decoded yet."""
    attempt_at_work: str | None = None


@dataclass(slots=True)
class _Meter:
    """Keeps an actor's ``Progress``; read by one thread while another works."""

    progress: Progress = field(default_factory=Progress)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, clips: int, frames: int) -> None:
        with self._lock:
            self.progress.clips += clips
            self.progress.frames += frames


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"encode": 2, "control": 1})
class VaeActor:
    """Holds one model. Encodes one shard at a time, while the next one's videos are decoded.

    Two ``encode_shard`` calls may be under way: one has the model, the other has its decoding ordered. The
    model passes on as soon as the last batch is done, so that the commit overlaps the next shard.
    """

    def __init__(self, spec: ActorSpec) -> None:
        config = spec.config
        logging.basicConfig(level=config.run.log_level.upper(), format="%(levelname)s %(name)s %(message)s")
        self._spec = spec
        self._storage = Storage(config.output.uri, config.output.storage_options)
        self._engine = spec.make_engine()
        self._model = threading.Lock()
        self._feed = DecodeFeed(self._start_decoding, fetch_decoded, spec.frame_budget_bytes)
        self._schema = build_schema(logvar=config.output.logvar, first_frame=config.output.first_frame, passthrough=spec.columns)
        self._spool = tempfile.TemporaryDirectory(prefix="latents-")
        self._meter = _Meter()

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """Answers once the model is loaded. Returns the process id."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return self._meter.progress

    @ray.method(concurrency_group="encode")
    def encode_shard(self, lease: Lease) -> ShardSummary:
        """Encode and commit one shard. Returns the account of the attempt that was committed."""
        spool = Path(self._spool.name) / f"{lease.attempt_id}.parquet"
        try:
            with self._feed.order(read_clips(self._storage, lease.shard)) as order, self._model:
                progress = self._meter.progress
                progress.attempt_at_work = lease.attempt_id
                start, waited_before = time.monotonic(), progress.waited_s
                summary = self._encode(lease, self._timed(order), spool)
                progress.busy_s += time.monotonic() - start - (progress.waited_s - waited_before)
            logger.debug(
                "shard encoded shard_id=%s attempt=%d rows=%d quarantined=%d",
                lease.shard.shard_id,
                lease.attempt,
                summary.num_rows,
                len(summary.rejections),
            )
            return commit_shard(self._storage, spool, summary)
        finally:
            spool.unlink(missing_ok=True)

    def _encode(self, lease: Lease, clips: Iterator[tuple[PlannedClip, Decoded]], spool: Path) -> ShardSummary:
        output = self._spec.config.output
        with ShardWriter(spool, self._schema, row_group_bytes=output.row_group_bytes, compression=output.compression) as writer:
            encoder = ShardEncoder(
                engine=self._engine,
                writer=writer,
                config=self._spec.config.encode,
                is_retry=lease.attempt > 1,
                on_clips_done=self._meter.add,
            )
            encoder.run(clips)
            shard = lease.shard
            summary = ShardSummary(
                shard_id=shard.shard_id,
                generation=shard.generation,
                index=shard.index,
                bucket_key=shard.bucket.key,
                attempt_id=lease.attempt_id,
                recipe=self._spec.recipe,
                num_rows=writer.num_rows,
                size_bytes=writer.size_bytes,
                rejections=tuple(encoder.rejections),
            )
            writer.close(summary)
        return summary

    def _timed(self, order: DecodeOrder) -> Iterator[tuple[PlannedClip, Decoded]]:
        """Pass the clips on and book the time that was waited for each."""
        mark = time.monotonic()
        for item in order:
            self._meter.progress.waited_s += time.monotonic() - mark
            yield item
            mark = time.monotonic()

    def _start_decoding(self, clips: list[Clip]) -> list[ObjectRef]:
        config = self._spec.config
        task = decode_video.options(num_returns=len(clips))
        refs = task.remote(clips, config.decode, config.input.storage_options)
        return refs if isinstance(refs, list) else [refs]


def fetch_decoded(ref: ObjectRef) -> Decoded:
    """Wait for one decoded clip. Raises: TransientError: it is lost with its worker or node."""
    try:
        decoded: Decoded = ray.get(ref)
        return decoded
    except LOST_TASK as error:
        raise TransientError(f"decoding was interrupted: {type(error).__name__}: {error}") from error
    except RayTaskError as error:
        if isinstance(error.cause, TransientError):
            raise error.cause from None
        raise
