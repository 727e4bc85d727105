"""Encoding one shard: decoded clips in plan order in, rows of a local spool file and rejections out. No Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.dataset.schema import build_row
from pipeline.dataset.writer import ShardWriter
from pipeline.engine import Engine
from pipeline.errors import TerminalError
from pipeline.plan import PlannedClip
from pipeline.types import Clip, DecodedClip, EncodedClip, Rejection

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ShardEncoder:
    """Runs the model over one shard's clips.

    Batches form in plan order from what could be decoded, never from what has arrived, so that the same
    settings give the same batches and the same bytes.
    """

    engine: Engine
    writer: ShardWriter
    config: EncodeConfig
    is_retry: bool
    """On a second attempt a clip that raises is found by running its batch one by one, and quarantined."""
    on_clips_done: Callable[[int, int], None]
    """Told after each batch: clips done, and pixel frames encoded."""
    rejections: list[Rejection] = field(default_factory=list)
    _batch: list[tuple[PlannedClip, DecodedClip]] = field(default_factory=list)

    def run(self, clips: Iterable[tuple[PlannedClip, DecodedClip | TerminalError]]) -> None:
        """Encode every clip; afterwards each is a row of ``writer`` or one of ``rejections``."""
        for planned, decoded in clips:
            if isinstance(decoded, TerminalError):
                self._reject(planned.clip, decoded)
                self.on_clips_done(1, 0)
                continue
            self._batch.append((planned, decoded))
            if len(self._batch) == self.config.batch_size:
                self._encode_batch()
        if self._batch:
            self._encode_batch()

    def _encode_batch(self) -> None:
        batch, self._batch = self._batch, []
        failure: Exception | None = None
        try:
            results = self.engine.encode([decoded.frames for _, decoded in batch])
        except Exception as error:
            # A traceback keeps the tensors of the failed pass alive, and their memory is what a retry needs.
            failure = error.with_traceback(None) if self.engine.is_out_of_memory(error) else error
        if failure is not None:
            results = self._encode_one_by_one(batch, failure)
        for (planned, decoded), result in zip(batch, results, strict=True):
            self._keep(planned, decoded, result)
        frames = sum(planned.clip.bucket.num_frames for planned, _ in batch)
        self.on_clips_done(len(batch), frames)

    def _encode_one_by_one(
        self, batch: list[tuple[PlannedClip, DecodedClip]], error: Exception
    ) -> list[EncodedClip | TerminalError]:
        """What a failed batch still gives: a smaller batch when memory ran out, blame on a second attempt."""
        no_memory = self.engine.is_out_of_memory(error)
        if not self.is_retry and (len(batch) == 1 or not no_memory):
            raise error
        logger.warning("batch failed size=%d error=%s; encoding one by one", len(batch), error)
        results: list[EncodedClip | TerminalError] = []
        for _, decoded in batch:
            try:
                (result,) = self.engine.encode([decoded.frames])
            except Exception as alone:
                # A lack of memory is never the clip's: others of its shape need as much.
                if not self.is_retry or self.engine.is_out_of_memory(alone) or not self._engine_works(decoded):
                    raise
                results.append(TerminalError.unexpected("encode", alone))
                continue
            if isinstance(result, EncodedClip) and no_memory and len(batch) > 1:
                result = replace(result, degraded="batch_size=1")
            results.append(result)
        return results

    def _engine_works(self, decoded: DecodedClip) -> bool:
        """Whether a blank clip of the same shape encodes. If not, the actor is ill and no clip is to blame."""
        try:
            self.engine.encode([np.zeros_like(decoded.frames)])
        except Exception:
            logger.exception("engine fails on a blank clip too")
            return False
        return True

    def _keep(self, planned: PlannedClip, decoded: DecodedClip, result: EncodedClip | TerminalError) -> None:
        if isinstance(result, TerminalError):
            self._reject(planned.clip, result)
            return
        result = replace(result, source_hash=decoded.source_hash)
        if _is_sampled(planned.clip.sample_id, self.config.qa_share):
            result = replace(result, psnr=self._measure_psnr(planned.clip, decoded, result))
        self.writer.write(build_row(planned.clip, result, planned.columns))

    def _measure_psnr(self, clip: Clip, decoded: DecodedClip, encoded: EncodedClip) -> float | None:
        try:
            return self.engine.measure_psnr(decoded.frames, encoded)
        except Exception as error:
            if not (isinstance(error, TerminalError) or self.engine.is_out_of_memory(error)):
                raise
            # Decoding takes more memory and a wider range than encoding: a good latent that cannot be measured here.
            logger.warning("psnr not measured uri=%s error=%s", clip.uri, error)
            return None

    def _reject(self, clip: Clip, error: TerminalError) -> None:
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
            )
        )


def _is_sampled(sample_id: str, share: float) -> bool:
    """Whether quality is measured on this clip: decided by its id, so that a rerun decides the same."""
    return int(sample_id[:8], 16) < share * 2**32
