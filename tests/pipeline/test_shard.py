"""Encoding one shard: every clip becomes a row or a rejection, and only the culprit pays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import errors
from pipeline.batching import MemoryLadder
from pipeline.config import EncodeConfig
from pipeline.dataset.schema import build_schema
from pipeline.dataset.writer import ShardWriter
from pipeline.errors import TerminalError
from pipeline.messages import Caution, Fault
from pipeline.plan import PlannedClip
from pipeline.shard import ShardEncoder
from pipeline.types import DecodedClip, Rejection, ShardSummary
from tests.pipeline.fakes import SMALL, ExhaustedError, FakeEngine, make_clip, make_frames

Decoded = DecodedClip | TerminalError
CORRUPT = TerminalError("decode", "corrupt", "frames are damaged")


def decoded_clips(*results: int | TerminalError) -> list[tuple[PlannedClip, Decoded]]:
    """Clips in plan order: decoded to a brightness, or not decoded."""
    return [
        (make_clip(number, caption=f"caption {number}"), make_frames(result) if isinstance(result, int) else result)
        for number, result in enumerate(results)
    ]


@dataclass
class Outcome:
    """What became of a shard."""

    rows: list[dict[str, Any]]
    rejections: list[Rejection]
    done: list[tuple[int, int]] = field(default_factory=list)
    in_hand: list[list[int]] = field(default_factory=list)
    """The numbers of the clips that were named before each forward pass."""

    @property
    def captions(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    @property
    def reasons(self) -> dict[str, str]:
        return {rejection.uri: rejection.reason for rejection in self.rejections}


Encode = Callable[..., Outcome]


@pytest.fixture
def encode(tmp_path: Path) -> Encode:
    def run(
        engine: FakeEngine,
        clips: list[tuple[PlannedClip, Decoded]],
        *,
        is_retry: bool = False,
        caution: Caution | None = None,
        **config: Any,
    ) -> Outcome:
        names = {planned.clip.sample_id: number for number, (planned, _) in enumerate(clips)}
        in_hand: list[list[int]] = []

        @contextlib.contextmanager
        def at_work(ids: Sequence[str]) -> Iterator[None]:
            in_hand.append([names[sample_id] for sample_id in ids])
            yield

        schema = build_schema(logvar=False, first_frame=False, passthrough=pa.schema([("caption", pa.string())]))
        done: list[tuple[int, int]] = []
        with ShardWriter(tmp_path / "shard.parquet", schema) as writer:
            encoder = ShardEncoder(
                engine=engine,
                writer=writer,
                config=EncodeConfig(**({"batch_size": 2} | config)),
                is_retry=is_retry,
                caution=caution or Caution(),
                memory=MemoryLadder(engine.tighten, engine.is_out_of_memory),
                at_work=at_work,
                on_clips_done=lambda clips, frames: done.append((clips, frames)),
            )
            encoder.run(iter(clips))
            writer.close(
                ShardSummary(
                    shard_id="s",
                    generation=0,
                    index=0,
                    bucket_key=SMALL.key,
                    attempt_id="a",
                    recipe="r",
                    num_rows=writer.num_rows,
                    size_bytes=writer.size_bytes,
                )
            )
        return Outcome(pq.ParquetFile(tmp_path / "shard.parquet").read().to_pylist(), encoder.rejections, done, in_hand)

    return run


def fails_on(value: int, error: Exception) -> Callable[[list[int]], Exception | None]:
    return lambda batch: error if value in batch else None


def fails_above(size: int) -> Callable[[list[int]], Exception | None]:
    return lambda batch: ExhaustedError("no memory") if len(batch) > size else None


def test_every_clip_is_a_row_in_plan_order_with_its_own_latent(encode: Encode) -> None:
    engine = FakeEngine()
    outcome = encode(engine, decoded_clips(1, 2, 3, 4, 5))
    assert engine.batches == [[1, 2], [3, 4], [5]]
    assert outcome.captions == [f"caption {number}" for number in range(5)]
    assert [row["source_hash"] for row in outcome.rows] == [f"{value:032x}" for value in (1, 2, 3, 4, 5)]
    first = memoryview(outcome.rows[2]["vae_latent_bytes"]).cast("f")
    assert first.tolist() == [3.0] * 9
    assert outcome.rejections == []
    assert {row["degraded"] for row in outcome.rows} == {None}


def test_clip_that_was_not_decoded_shifts_no_other(encode: Encode) -> None:
    engine = FakeEngine()
    outcome = encode(engine, decoded_clips(1, CORRUPT, 3, 4, CORRUPT))
    assert engine.batches == [[1, 3], [4]]
    assert outcome.captions == ["caption 0", "caption 2", "caption 3"]
    assert [memoryview(row["vae_latent_bytes"]).cast("f")[0] for row in outcome.rows] == [1.0, 3.0, 4.0]
    assert outcome.reasons == {"videos/1.mp4": "corrupt", "videos/4.mp4": "corrupt"}


def test_rejection_names_clip_window_stage_and_reason(encode: Encode) -> None:
    (rejection,) = encode(FakeEngine(), decoded_clips(CORRUPT)).rejections
    clip = make_clip(0).clip
    assert rejection == Rejection(
        sample_id=clip.sample_id,
        uri=clip.uri,
        frame_start=clip.frame_start,
        frame_end=clip.frame_end,
        status="quarantined",
        stage="decode",
        reason="corrupt",
        detail="frames are damaged",
        file_key=make_clip(0).file_key,
    )


def test_clip_whose_latent_is_not_finite_is_quarantined_alone(encode: Encode) -> None:
    outcome = encode(FakeEngine(not_finite=frozenset({2})), decoded_clips(1, 2, 3))
    assert outcome.captions == ["caption 0", "caption 2"]
    assert outcome.reasons == {"videos/1.mp4": "not_finite"}


def test_shard_may_hold_no_clips_or_rejected_ones_only(encode: Encode) -> None:
    assert encode(FakeEngine(), []).rows == []
    outcome = encode(FakeEngine(), decoded_clips(CORRUPT, CORRUPT))
    assert (outcome.rows, len(outcome.rejections)) == ([], 2)


def test_progress_counts_clips_and_frames(encode: Encode) -> None:
    assert encode(FakeEngine(), decoded_clips(1, CORRUPT, 2, 3)).done == [(1, 0), (2, 18), (1, 9)]


# Memory


def test_batch_that_does_not_fit_is_encoded_one_by_one_and_marked(encode: Encode) -> None:
    engine = FakeEngine(fails=fails_above(1))
    outcome = encode(engine, decoded_clips(1, 2, 3))
    assert engine.batches == [[1, 2], [1], [2], [3]]
    assert outcome.captions == ["caption 0", "caption 1", "caption 2"]
    assert [row["degraded"] for row in outcome.rows] == ["batch_size=1", "batch_size=1", None]


@pytest.mark.parametrize("is_retry", [False, True])
def test_single_clip_that_does_not_fit_is_nobodys_fault(encode: Encode, is_retry: bool) -> None:
    with pytest.raises(errors.ExhaustedError, match="alone it needs more memory than there is: no memory"):
        encode(FakeEngine(fails=fails_above(0)), decoded_clips(1, 2), is_retry=is_retry)


def test_lack_of_memory_for_one_clip_alone_is_not_that_clips_fault(encode: Encode) -> None:
    with pytest.raises(errors.ExhaustedError):
        encode(FakeEngine(fails=fails_on(2, ExhaustedError())), decoded_clips(1, 2), is_retry=True)


def test_clip_that_does_not_fit_alone_is_tried_leaner_and_all_that_follow_are_marked(encode: Encode) -> None:
    def fails(batch: list[int]) -> Exception | None:
        return ExhaustedError("no memory") if 2 in batch and engine.tighter else None

    engine = FakeEngine(fails=fails, tighter=["budget=8", "budget=4"])
    outcome = encode(engine, decoded_clips(1, 2, 3, 4))
    assert engine.batches == [[1, 2], [1], [2], [2], [2], [3, 4]]
    assert [row["degraded"] for row in outcome.rows] == ["batch_size=1, budget=4"] * 2 + ["budget=4"] * 2


# Clips that crash or hang their actor


def test_every_forward_pass_is_announced_with_its_clips(encode: Encode) -> None:
    assert encode(FakeEngine(), decoded_clips(1, CORRUPT, 3, 4), qa_share=1).in_hand == [[0, 2], [0], [2], [3], [3]]


def test_suspects_run_alone_before_their_batch_and_give_the_same_rows(encode: Encode) -> None:
    clips = decoded_clips(1, 2, 3, 4)
    suspects = frozenset(clips[number][0].clip.sample_id for number in (2, 3))
    outcome = encode(FakeEngine(), clips, caution=Caution(is_careful=True, suspects=suspects))
    assert outcome.in_hand == [[0, 1], [2], [3], [2, 3]]
    assert outcome.rows == encode(FakeEngine(), clips).rows


def test_condemned_clip_is_quarantined_untouched_and_says_what_it_did(encode: Encode) -> None:
    clips = decoded_clips(1, 2, 3, 4)
    condemned: dict[str, Fault] = {clips[1][0].clip.sample_id: "crashed", clips[2][0].clip.sample_id: "hung"}
    outcome = encode(FakeEngine(), clips, caution=Caution(is_careful=True, condemned=condemned))
    assert outcome.in_hand == [[0, 3]]
    assert outcome.captions == ["caption 0", "caption 3"]
    assert outcome.reasons == {"videos/1.mp4": "crashed_actor", "videos/2.mp4": "hung_actor"}


# Unexpected errors


def test_first_attempt_raises_what_it_does_not_expect(encode: Encode) -> None:
    engine = FakeEngine(fails=fails_on(2, RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        encode(engine, decoded_clips(1, 2, 3))
    assert engine.batches == [[1, 2]]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_second_attempt_quarantines_the_culprit_only(encode: Encode, batch_size: int) -> None:
    engine = FakeEngine(fails=fails_on(2, RuntimeError("bug")))
    outcome = encode(engine, decoded_clips(1, 2, 3, 4), is_retry=True, batch_size=batch_size)
    assert outcome.captions == ["caption 0", "caption 2", "caption 3"]
    (rejection,) = outcome.rejections
    assert (rejection.uri, rejection.stage, rejection.reason) == ("videos/1.mp4", "encode", "unexpected")
    assert rejection.detail.startswith("RuntimeError: bug\n")
    assert "in encode" in rejection.detail  # the traceback
    assert {row["degraded"] for row in outcome.rows} == {None}


def test_second_attempt_whose_batch_fails_but_whose_clips_do_not_blames_nobody(encode: Encode) -> None:
    errors = iter([RuntimeError("once")])
    outcome = encode(FakeEngine(fails=lambda batch: next(errors, None)), decoded_clips(1, 2), is_retry=True)
    assert outcome.captions == ["caption 0", "caption 1"]
    assert outcome.rejections == []


def test_engine_that_fails_on_a_blank_clip_is_ill_and_no_clip_is_blamed(encode: Encode) -> None:
    engine = FakeEngine(fails=lambda batch: RuntimeError("device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        encode(engine, decoded_clips(1, 2), is_retry=True)
    assert engine.batches == [[1, 2], [1], [0]]


def test_exception_leaves_no_file(encode: Encode, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        encode(FakeEngine(fails=fails_on(3, RuntimeError("bug"))), decoded_clips(1, 2, 3))
    assert list(tmp_path.iterdir()) == []


# Quality


def test_quality_is_measured_on_a_stable_share_of_the_clips(encode: Encode) -> None:
    clips = decoded_clips(*([1] * 200))

    def sampled(share: float) -> set[str]:
        return {row["sample_id"] for row in encode(FakeEngine(), clips, qa_share=share).rows if row["psnr"] is not None}

    assert sampled(0.0) == set()
    assert len(sampled(1.0)) == 200
    third = sampled(0.3)
    assert 30 < len(third) < 90
    assert sampled(0.3) == third
    assert third < sampled(0.6)


def test_quality_that_does_not_fit_into_memory_is_not_measured_and_the_latent_kept(encode: Encode) -> None:
    outcome = encode(FakeEngine(psnr_error=ExhaustedError()), decoded_clips(1, 2), qa_share=1)
    assert [row["psnr"] for row in outcome.rows] == [None, None]


def test_a_latent_that_does_not_decode_to_finite_frames_is_kept_without_quality(encode: Encode) -> None:
    error = TerminalError("decode", "not_finite", "the decoded frames have NaN")
    outcome = encode(FakeEngine(psnr_error=error), decoded_clips(1, 2), qa_share=1)
    assert [row["psnr"] for row in outcome.rows] == [None, None]


def test_quality_that_fails_otherwise_fails_the_attempt(encode: Encode) -> None:
    with pytest.raises(RuntimeError, match="bug"):
        encode(FakeEngine(psnr_error=RuntimeError("bug")), decoded_clips(1), qa_share=1)


def test_same_clips_and_settings_give_the_same_bytes(encode: Encode, tmp_path: Path) -> None:
    clips = decoded_clips(1, CORRUPT, 2, 3)
    encode(FakeEngine(), clips)
    first = (tmp_path / "shard.parquet").read_bytes()
    encode(
        FakeEngine(), [(planned, replace(decoded) if isinstance(decoded, DecodedClip) else decoded) for planned, decoded in clips]
    )
    assert (tmp_path / "shard.parquet").read_bytes() == first
