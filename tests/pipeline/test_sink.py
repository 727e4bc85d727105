"""Frames on their way to a writer: in order, within a budget, written again when a writer is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from pipeline.errors import TerminalError, TransientError
from pipeline.sink import CRASHES, WRITE_ATTEMPTS, FrameSink, WriterCrashedError
from pipeline.types import Frames

CLIP_BYTES = 2 * 4 * 4 * 3


@dataclass
class Writers:
    """Tasks that are done when they are waited for; the ones named in ``lost`` are lost as often as it says."""

    lost: dict[int, int] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    def start(self, frames: Frames) -> int:
        number = int(frames[0, 0, 0, 0])
        self.begun.append(number)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return number

    def wait(self, task: int) -> str:
        self.under_way -= 1
        if self.lost.get(task, 0):
            self.lost[task] -= 1
            raise TransientError("the writer is lost")
        return f"video {task}"


def make_frames(number: int) -> Frames:
    return np.full((2, 4, 4, 3), number, np.uint8)


def write(writers: Writers, count: int, budget_bytes: int) -> list[tuple[str, str | TerminalError]]:
    sink: FrameSink[str, str] = FrameSink(
        put=lambda frames: frames, wait=writers.wait, cancel=lambda task: None, budget_bytes=budget_bytes
    )
    start: Callable[[Frames], int] = writers.start
    for number in range(count):
        sink.add(f"clip {number}", make_frames(number), start)
    return sink.finish()


@pytest.mark.parametrize(("clips_in_budget", "most"), [(3, 3), (1, 1), (0.5, 1), (100, 8)])
def test_results_come_in_order_and_no_more_is_under_way_than_the_budget_allows(clips_in_budget: float, most: int) -> None:
    writers = Writers()
    results = write(writers, 8, int(clips_in_budget * CLIP_BYTES))
    assert results == [(f"clip {number}", f"video {number}") for number in range(8)]
    assert writers.most == most


def test_a_lost_writer_is_replaced_with_the_same_frames() -> None:
    writers = Writers(lost={1: WRITE_ATTEMPTS - 1})
    assert write(writers, 3, 100 * CLIP_BYTES)[1] == ("clip 1", "video 1")
    assert sorted(writers.begun) == [0, 1, 1, 1, 2]


def test_writers_that_are_lost_again_and_again_end_the_attempt() -> None:
    with pytest.raises(TransientError, match="the writer is lost"):
        write(Writers(lost={1: WRITE_ATTEMPTS}), 3, 100 * CLIP_BYTES)


def test_a_clip_whose_writer_fails_each_time_is_to_blame() -> None:
    def wait(task: int) -> str:
        raise RuntimeError("the codec refuses")

    sink: FrameSink[str, str] = FrameSink(
        put=lambda frames: frames, wait=wait, cancel=lambda task: None, budget_bytes=100 * CLIP_BYTES
    )
    sink.add("clip", make_frames(0), Writers().start)
    ((item, blamed),) = sink.finish()
    assert isinstance(blamed, TerminalError)
    assert (item, blamed.stage, blamed.reason) == ("clip", "write", "unexpected")


@pytest.mark.parametrize(("crashes", "is_blamed"), [(CRASHES - 1, False), (CRASHES, True)])
def test_writers_that_die_over_a_clip_are_replaced_for_long_before_it_is_blamed(crashes: int, is_blamed: bool) -> None:
    writers, slept, left = Writers(), list[float](), [crashes]

    def wait(task: int) -> str:
        if left[0]:
            left[0] -= 1
            raise WriterCrashedError("SIGKILL, or a fault of its own")
        return writers.wait(task)

    sink: FrameSink[str, str] = FrameSink(
        put=lambda frames: frames, wait=wait, cancel=lambda task: None, budget_bytes=100 * CLIP_BYTES, sleep=slept.append
    )
    sink.add("clip", make_frames(0), writers.start)
    ((_, result),) = sink.finish()
    assert isinstance(result, TerminalError) == is_blamed
    assert slept == [1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_what_is_under_way_is_given_up_on_closing() -> None:
    writers, cancelled = Writers(), []
    sink: FrameSink[str, str] = FrameSink(
        put=lambda frames: frames, wait=writers.wait, cancel=cancelled.append, budget_bytes=100 * CLIP_BYTES
    )
    for number in range(3):
        sink.add(f"clip {number}", make_frames(number), writers.start)
    sink.close()
    assert cancelled == [0, 1, 2]
    assert sink.finish() == []


def test_a_shard_of_nothing_has_no_results() -> None:
    assert write(Writers(), 0, 1) == []
