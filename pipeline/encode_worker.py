"""Encoding on the cluster's nodes: decode tasks on CPUs, and what a VAE actor does with a shard of clips."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import xxhash
from ray import ObjectRef

from pipeline import failpoints
from pipeline.actors import CommittedJob, Meter, get_result
from pipeline.batching import MemoryLadder
from pipeline.black_box import scratch_path
from pipeline.cluster import missing_paths
from pipeline.commit import commit_shard
from pipeline.config import DecodeConfig, InputConfig, RunConfig
from pipeline.dataset.schema import build_schema
from pipeline.dataset.writer import ShardWriter, read_summary, shard_path
from pipeline.decoder_process import DecoderProcess
from pipeline.engine import Engine
from pipeline.errors import TerminalError, TransientError
from pipeline.feed import Decoded, DecodeFeed, DecodeOrder
from pipeline.fetching import fetch_videos
from pipeline.messages import Lease
from pipeline.outcomes import split_superseded
from pipeline.plan import ProbedVideo
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import OutcomeRef, read_items
from pipeline.probing import probe_items
from pipeline.shard import ShardEncoder
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.tars.probing import probe_tar
from pipeline.types import Clip, DecodedClip, Rejection, ShardSummary

logger = logging.getLogger(__name__)

_HASH_BLOCK_BYTES = 4 << 20
_BLIND_NODE_S = 10.0
"""A node without the shared disk keeps a task for so long: one that fails at once would draw all others to itself."""


@functools.lru_cache(maxsize=1)
def _decoder_process(limits: str) -> DecoderProcess:
    """The decoder of this worker process, kept from task to task. Takes the limits as JSON, to be hashable."""
    return DecoderProcess(DecodeConfig.model_validate_json(limits))


def probe_videos(limits: DecodeConfig, source: InputConfig, items: list[SourceItem]) -> list[ProbedVideo]:
    """Probe a few videos, or the members of one tar, one after the other."""
    decoder, options = _decoder_process(limits.model_dump_json()), source.storage_options
    if items[0].is_tar:
        return probe_tar(items[0], source.extensions, decoder, options, tempfile.gettempdir())
    return probe_items(items, decoder, options, tempfile.gettempdir())


@ray.remote(num_cpus=1, max_retries=0)
def decode_videos(
    clips: list[Clip], limits: DecodeConfig, options: dict[str, Any], shared: tuple[str, ...]
) -> Decoded | tuple[Decoded, ...]:
    """Decode clips of one video, or of neighbours in a tar. Returns one result a clip; alone, if there is but one clip.

    Args:
        shared: paths that this node must see to know whether a file is there.

    Raises:
        TransientError: the store does not deliver, or this node does not see what it should.
    """
    results: list[Decoded] = []
    try:
        with fetch_videos(clips, options, tempfile.gettempdir()) as videos:
            for path, its_clips in videos:
                results += _decode_video(path, its_clips, limits)
    except TerminalError as error:
        if error.reason == "not_found" and (missing := missing_paths(shared)):
            time.sleep(_BLIND_NODE_S)
            raise TransientError(
                f"{error.detail}, and this node does not see {', '.join(missing)}, which all nodes must share"
            ) from error
        results = [error for _ in clips]
    return tuple(results) if len(clips) > 1 else results[0]


def _decode_video(path: Path, clips: list[Clip], limits: DecodeConfig) -> list[Decoded]:
    name = clips[0].uri.rpartition("/")[2]
    try:
        decoded = _decoder_process(limits.model_dump_json()).decode(str(path), name, clips)
    except TerminalError as error:
        return [error for _ in clips]
    source_hash = _hash_file(path)
    return [
        result if isinstance(result, TerminalError) else DecodedClip(frames=result, source_hash=source_hash) for result in decoded
    ]


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSpec:
    """What encoding must know of the run."""

    config: RunConfig
    storage: Storage
    """The driver's: it knows what the store guarantees, for all alike."""
    recipe: str
    columns: pa.Schema
    """Types of the columns that pass through."""
    superseded: frozenset[OutcomeRef]
    frame_budget_bytes: int
    shared: tuple[str, ...]
    """Paths that every node must see."""
    make_engine: Callable[[], Engine]


class EncodeWorker:
    """Encodes shards of clips into Parquet objects. Implements ``actors.Worker``."""

    def __init__(self, spec: EncodeSpec, meter: Meter) -> None:
        output = spec.config.output
        self.spec = spec
        self.meter = meter
        self.storage = spec.storage
        self.engine = spec.make_engine()
        self.memory = MemoryLadder(self.engine.tighten, self.engine.is_out_of_memory)
        self.schema = build_schema(logvar=output.logvar, first_frame=output.first_frame, passthrough=spec.columns)
        self._feed = DecodeFeed(self._start_decoding, get_result, spec.frame_budget_bytes)

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[EncodeJob | CommittedJob]:
        """As ``Worker.open``: the decoding of the shard's videos begins."""
        shard = lease.shard
        path = shard_path(shard.bucket_key, shard.index, shard.shard_id)
        if lease.is_again and self.storage.exists(path):
            yield CommittedJob(read_summary(self.storage, path))
            return
        # An actor may end by being killed: then whoever opens its box removes this.
        spool = scratch_path(self.meter.box, f"{lease.attempt_id}.parquet")
        try:
            clips = read_items(self.storage, lease.shard, CLIP_ROWS)
            own, others = split_superseded(lease.shard, clips, self.spec.superseded)
            with self._feed.order(own) as order:
                failpoints.reach("encode.after_claim")
                yield EncodeJob(self, lease, order, others, spool)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TransientError(f"{spool}: no room on this machine for a shard's spool file: {error}") from error
        finally:
            spool.unlink(missing_ok=True)

    def _start_decoding(self, clips: list[Clip]) -> list[ObjectRef]:
        config = self.spec.config
        task = decode_videos.options(num_returns=len(clips))
        refs = task.remote(clips, config.decode, config.input.storage_options, self.spec.shared)
        return refs if isinstance(refs, list) else [refs]


@dataclass(slots=True)
class EncodeJob:
    """One attempt at one shard of clips."""

    worker: EncodeWorker
    lease: Lease
    order: DecodeOrder
    others: list[Rejection]
    """Of clips that are another generation's."""
    spool: Path
    _summary: ShardSummary | None = field(default=None, init=False)

    def run(self) -> None:
        spec, output = self.worker.spec, self.worker.spec.config.output
        with ShardWriter(
            self.spool, self.worker.schema, row_group_bytes=output.row_group_bytes, compression=output.compression
        ) as writer:
            encoder = ShardEncoder(
                engine=self.worker.engine,
                writer=writer,
                config=spec.config.encode,
                is_retry=self.lease.attempt > 1,
                caution=self.lease.caution,
                memory=self.worker.memory,
                at_work=self.worker.meter.at_work,
                on_clips_done=self.worker.meter.add,
            )
            encoder.run(self.worker.meter.timed(self.order))
            shard = self.lease.shard
            self._summary = ShardSummary(
                shard_id=shard.shard_id,
                generation=shard.generation,
                index=shard.index,
                bucket_key=shard.bucket_key,
                attempt_id=self.lease.attempt_id,
                recipe=spec.recipe,
                num_rows=writer.num_rows,
                size_bytes=writer.size_bytes,
                rejections=(*self.others, *encoder.rejections),
            )
            writer.close(self._summary)

    def commit(self) -> ShardSummary:
        assert self._summary is not None, "commit before run"
        return commit_shard(self.worker.storage, self.spool, self._summary)
