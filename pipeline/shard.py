"""Encoding one shard: decoded clips in plan order in, rows of a local spool file and rejections out. No Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline import failpoints
from pipeline.batching import BatchRunner, MemoryLadder, Outcome
from pipeline.config import EncodeConfig
from pipeline.dataset.schema import build_row
from pipeline.dataset.writer import ShardWriter
from pipeline.engine import Engine
from pipeline.errors import TerminalError
from pipeline.messages import Caution
from pipeline.plan import PlannedClip
from pipeline.types import Clip, DecodedClip, EncodedClip, Rejection

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ShardEncoder:
    """Runs the model over one shard's clips."""

    engine: Engine
    writer: ShardWriter
    config: EncodeConfig
    is_retry: bool
    """Whether this is a second attempt, on which a clip may be blamed."""
    caution: Caution
    memory: MemoryLadder
    at_work: Callable[[Sequence[str]], AbstractContextManager[None]]
    """Entered with the ids of clips while the model has them."""
    on_clips_done: Callable[[int, int], None]
    """Told after each batch: clips done, and pixel frames encoded."""
    rejections: list[Rejection] = field(default_factory=list)

    def run(self, clips: Iterable[tuple[PlannedClip, DecodedClip | TerminalError]]) -> None:
        """Encode every clip; afterwards each is a row of ``writer`` or one of ``rejections``."""
        runner: BatchRunner[PlannedClip, DecodedClip, EncodedClip] = BatchRunner(
            stage="encode",
            forward=lambda batch: self.engine.encode([decoded.frames for decoded in batch]),
            blank=lambda decoded: replace(decoded, frames=np.zeros_like(decoded.frames)),
            name=lambda planned: planned.clip.sample_id,
            at_work=self.at_work,
            memory=self.memory,
            batch_size=self.config.batch_size,
            is_retry=self.is_retry,
            caution=self.caution,
        )
        for outcomes in runner.run(clips):
            for outcome in outcomes:
                self._keep(outcome)
            frames = sum(outcome.item.clip.bucket.num_frames for outcome in outcomes if outcome.payload is not None)
            self.on_clips_done(len(outcomes), frames)

    def _keep(self, outcome: Outcome[PlannedClip, DecodedClip, EncodedClip]) -> None:
        planned, decoded, result = outcome.item, outcome.payload, outcome.result
        if decoded is None or isinstance(result, TerminalError):
            assert isinstance(result, TerminalError), "a result of nothing"
            self._reject(planned, result)
            return
        result = replace(result, source_hash=decoded.source_hash, degraded=outcome.degraded)
        if _is_sampled(planned.clip.sample_id, self.config.qa_share):
            result = replace(result, psnr=self._measure_psnr(planned.clip, decoded, result))
        self.writer.write(build_row(planned.clip, result, planned.columns))
        failpoints.reach("encode.after_clip")

    def _measure_psnr(self, clip: Clip, decoded: DecodedClip, encoded: EncodedClip) -> float | None:
        try:
            with self.at_work([clip.sample_id]):
                return self.engine.measure_psnr(decoded.frames, encoded)
        except Exception as error:
            if not (isinstance(error, TerminalError) or self.engine.is_out_of_memory(error)):
                raise
            # Decoding takes more memory and a wider range than encoding: a good latent that cannot be measured here.
            logger.warning("psnr not measured uri=%s error=%s", clip.uri, error)
            return None

    def _reject(self, planned: PlannedClip, error: TerminalError) -> None:
        clip = planned.clip
        logger.warning("quarantined uri=%s reason=%s detail=%s", clip.uri, error.reason, error.detail)
        self.rejections.append(
            Rejection(
                sample_id=clip.sample_id,
                uri=clip.uri,
                frame_start=clip.frame_start,
                frame_end=clip.frame_end,
                status="quarantined",
                stage=error.stage,
                reason=error.reason,
                detail=error.detail,
                file_key=planned.file_key,
            )
        )


def _is_sampled(sample_id: str, share: float) -> bool:
    """Whether quality is measured on this clip: decided by its id, so that a rerun decides the same."""
    return int(sample_id[:8], 16) < share * 2**32
