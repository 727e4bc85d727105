"""Decoding ahead of the model: in order, within a budget, always moving, and nothing left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TerminalError, TransientError
from pipeline.feed import DECODE_ATTEMPTS, RETRY_PAUSES_S, Decoded, DecodeFeed, DecodeOrder
from pipeline.plan import PlannedClip
from pipeline.types import Clip, DecodedClip
from tests.pipeline.fakes import SMALL, make_clip

CLIP_BYTES = SMALL.frame_bytes


@dataclass(eq=False)
class Handle:
    """A clip that is decoded or being decoded: its frames take memory while somebody holds the handle."""

    clip: Clip
    job: int


@dataclass
class FakeDecoder:
    """Decodes at once, and watches what is held."""

    budget_bytes: int = 10 * CLIP_BYTES
    trouble: Callable[[str], Exception | None] = lambda uri: None
    """What fetching a clip of this video raises."""
    live: weakref.WeakSet[Handle] = field(default_factory=weakref.WeakSet)
    started: list[list[str]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    most_bytes: int = 0
    over_budget: bool = False

    def start(self, clips: list[Clip]) -> list[Handle]:
        handles = [Handle(clip, len(self.started)) for clip in clips]
        self.started.append([clip.sample_id for clip in clips])
        self.live.update(handles)
        jobs = {handle.job for handle in self.live}
        if self.held_bytes > self.budget_bytes and len(jobs) > 1:
            self.over_budget = True
        return handles

    def fetch(self, handle: Handle) -> Decoded:
        error = self.trouble(handle.clip.uri)
        if isinstance(error, TerminalError):
            return error
        if error is not None:
            raise error
        return DecodedClip(frames=np.empty((0, 0, 0, 3), np.uint8), source_hash=handle.clip.sample_id)

    @property
    def held_bytes(self) -> int:
        return sum(handle.clip.bucket.frame_bytes for handle in list(self.live))

    def feed(self) -> DecodeFeed:
        return DecodeFeed(self.start, self.fetch, self.budget_bytes, self.slept.append)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that pytest keeps hold their errors, and those the handles."""
    monkeypatch.setattr("pipeline.feed.logger.disabled", True)


def make_clips(*clips_of_videos: int, shard: str = "s") -> list[PlannedClip]:
    """Clips of consecutive videos, so many each."""
    return [
        make_clip(number, uri=f"{shard}/{video}.mp4") for video, count in enumerate(clips_of_videos) for number in range(count)
    ]


def take(order: DecodeOrder) -> list[str]:
    """Ids of what an order delivers; each delivery must be of the clip that it comes with."""
    taken = []
    with order:
        for planned, decoded in order:
            assert isinstance(decoded, DecodedClip)
            assert decoded.source_hash == planned.clip.sample_id
            taken.append(planned.clip.sample_id)
    return taken


def ids(clips: list[PlannedClip]) -> list[str]:
    return [planned.clip.sample_id for planned in clips]


def test_clips_come_in_plan_order_and_nothing_is_held_after() -> None:
    decoder = FakeDecoder()
    clips = make_clips(1, 3, 2)
    feed = decoder.feed()
    assert take(feed.order(clips)) == ids(clips)
    assert decoder.held_bytes == 0
    assert take(feed.order([])) == []


def test_consecutive_clips_of_one_video_are_decoded_together() -> None:
    decoder = FakeDecoder(budget_bytes=100 * CLIP_BYTES)
    clips = [*make_clips(3), make_clip(0, uri="other.mp4"), make_clip(9, uri="s/0.mp4")]
    take(decoder.feed().order(clips))
    assert [len(job) for job in decoder.started] == [3, 1, 1]


def test_long_video_is_decoded_in_parts_of_a_quarter_of_the_budget() -> None:
    decoder = FakeDecoder(budget_bytes=8 * CLIP_BYTES)
    take(decoder.feed().order(make_clips(5)))
    assert [len(job) for job in decoder.started] == [2, 2, 1]


def test_decoding_is_ahead_as_far_as_the_budget_allows() -> None:
    decoder = FakeDecoder(budget_bytes=3 * CLIP_BYTES)
    with decoder.feed().order(make_clips(1, 1, 1, 1, 1)) as order:
        deliveries = iter(order)
        assert len(decoder.started) == 3
        next(deliveries)
        assert len(decoder.started) == 3  # the first is held until the next is asked for
        next(deliveries)
        assert len(decoder.started) == 4


@given(
    first=st.lists(st.integers(1, 5), max_size=6),
    second=st.lists(st.integers(1, 5), max_size=6),
    budget=st.integers(1, 25),
)
def test_budget_is_kept_but_for_the_one_clip_that_is_always_admitted(first: list[int], second: list[int], budget: int) -> None:
    decoder = FakeDecoder(budget_bytes=budget * CLIP_BYTES // 2)
    feed = decoder.feed()
    orders = [feed.order(make_clips(*videos, shard=shard)) for shard, videos in (("a", first), ("b", second))]
    for shard, videos, order in zip("ab", (first, second), orders, strict=True):
        clips = make_clips(*videos, shard=shard)
        assert take(order) == ids(clips)
        gc.collect(0)
    assert not decoder.over_budget
    assert decoder.held_bytes == 0
    assert set(Counter(clip for job in decoder.started for clip in job).values()) <= {1}


def test_budget_below_one_clip_slows_down_but_never_stops() -> None:
    decoder = FakeDecoder(budget_bytes=1)
    clips = make_clips(2, 1, 3)
    order = decoder.feed().order(clips)
    assert len(decoder.started) == 1  # the first is decoded ahead all the same
    assert take(order) == ids(clips)
    assert [len(job) for job in decoder.started] == [1] * 6


@pytest.mark.parametrize("budget", [1, 3 * CLIP_BYTES, 1000 * CLIP_BYTES])
def test_two_orders_taken_by_two_threads_at_once_both_come_to_an_end(budget: int) -> None:
    decoder = FakeDecoder(budget_bytes=budget)
    feed = decoder.feed()
    shards = [make_clips(*([1, 2] * 20), shard=shard) for shard in "ab"]
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda clips: take(feed.order(clips)), shards, timeout=60))
    assert taken == [ids(clips) for clips in shards]
    assert decoder.held_bytes == 0


def test_second_order_taken_first_does_not_wait_for_the_first() -> None:
    decoder = FakeDecoder(budget_bytes=1)
    feed = decoder.feed()
    first, second = make_clips(1, 1, shard="a"), make_clips(1, 1, shard="b")
    waiting = feed.order(first)
    assert take(feed.order(second)) == ids(second)
    assert take(waiting) == ids(first)
    assert decoder.held_bytes == 0


def test_order_given_up_in_the_middle_leaves_nothing_and_makes_room() -> None:
    decoder = FakeDecoder(budget_bytes=2 * CLIP_BYTES)
    feed = decoder.feed()
    given_up = feed.order(make_clips(1, 1, 1, 1, 1, shard="a"))
    waiting = feed.order(make_clips(1, 1, shard="b"))
    with given_up as order:
        deliveries = iter(order)
        next(deliveries)
        next(deliveries)
    assert len(decoder.started) == 3 + 2  # none was started for the order that nobody takes
    assert take(waiting) == ids(make_clips(1, 1, shard="b"))
    assert decoder.held_bytes == 0


def test_order_that_is_never_taken_leaves_nothing() -> None:
    decoder = FakeDecoder(budget_bytes=2 * CLIP_BYTES)
    with decoder.feed().order(make_clips(1, 1, 1)):
        pass
    assert decoder.held_bytes == 0
    assert len(decoder.started) == 2


def test_clip_that_cannot_be_decoded_is_delivered_as_its_error() -> None:
    error = TerminalError("decode", "corrupt", "damaged")
    decoder = FakeDecoder(trouble=lambda uri: error if uri == "s/1.mp4" else None)
    with decoder.feed().order(make_clips(1, 1, 1)) as order:
        delivered = [decoded for _, decoded in order]
    assert delivered[1] is error
    assert isinstance(delivered[0], DecodedClip)
    assert isinstance(delivered[2], DecodedClip)


@pytest.mark.usefixtures("quiet")
def test_lost_decoding_is_started_again() -> None:
    losses = {"s/1.mp4": DECODE_ATTEMPTS - 1}

    def lose(uri: str) -> Exception | None:
        if losses.get(uri, 0):
            losses[uri] -= 1
            return TransientError("node died")
        return None

    decoder = FakeDecoder(trouble=lose)
    clips = make_clips(1, 2, 1)
    assert take(decoder.feed().order(clips)) == ids(clips)
    assert decoder.started.count(ids(clips)[1:3]) == DECODE_ATTEMPTS
    assert decoder.slept == list(RETRY_PAUSES_S)
    gc.collect()  # the fake's error and its frame hold each other
    assert decoder.held_bytes == 0


@pytest.mark.usefixtures("quiet")
def test_decoding_that_is_lost_every_time_is_raised_and_releases_everything() -> None:
    attempts: list[str] = []

    def lose(uri: str) -> Exception | None:
        attempts.append(uri)
        return TransientError("node died") if uri == "s/1.mp4" else None

    decoder = FakeDecoder(trouble=lose)
    with pytest.raises(TransientError, match="node died"):
        take(decoder.feed().order(make_clips(1, 1, 1)))
    assert attempts.count("s/1.mp4") == DECODE_ATTEMPTS
    gc.collect()
    assert decoder.held_bytes == 0


def test_unexpected_error_is_tried_again_and_then_blamed_on_its_clip_alone() -> None:
    decoder = FakeDecoder(trouble=lambda uri: RuntimeError("bug") if uri == "s/1.mp4" else None)
    with decoder.feed().order(make_clips(1, 1, 1)) as order:
        results = [decoded for _, decoded in order]
    assert [isinstance(decoded, DecodedClip) for decoded in results] == [True, False, True]
    assert isinstance(results[1], TerminalError)
    assert (results[1].reason, "RuntimeError: bug" in results[1].detail) == ("unexpected", True)
    assert len(decoder.started) == 2 + DECODE_ATTEMPTS
    assert decoder.slept == []


def test_orders_come_while_others_are_taken() -> None:
    decoder = FakeDecoder(budget_bytes=4 * CLIP_BYTES)
    feed = decoder.feed()
    model = threading.Lock()

    def encode_shard(shard: int) -> bool:
        clips = make_clips(1, 2, 1, shard=str(shard))
        with feed.order(clips) as order, model:
            return take(order) == ids(clips)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(encode_shard, range(50), timeout=60))
    assert decoder.held_bytes == 0
