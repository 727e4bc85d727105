"""Getting members out of a tar: the right bytes, by few requests, and never those of another tar."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TerminalError, TransientError
from pipeline.feed import Decoded, DecodeFeed
from pipeline.fetching import fetch_videos
from pipeline.inputs import stat_input
from pipeline.plan import PlannedClip
from pipeline.plan_rows import CLIP_ROWS
from pipeline.tars.members import fetch_members, lie_together
from pipeline.types import Clip, DecodedClip, TarMember
from tests.pipeline.fakes import SMALL, FlakyFileSystem, make_clip

LARGE = 100_000


def in_tar(number: int, offset: int, size_bytes: int, *, tar: str = "s.tar") -> PlannedClip:
    member = TarMember(name=f"{number}.mp4", offset=offset, size_bytes=size_bytes)
    planned = make_clip(number, uri=member.uri(tar))
    return replace(planned, clip=replace(planned.clip, member=member))


def neighbours(*sizes: int, gap: int = 2048) -> list[PlannedClip]:
    offset, clips = 512, []
    for number, size_bytes in enumerate(sizes):
        clips.append(in_tar(number, offset, size_bytes))
        offset += size_bytes + gap
    return clips


def test_clip_of_a_member_is_read_from_the_plan_as_it_was() -> None:
    planned = in_tar(3, 512, 1000)
    assert CLIP_ROWS.from_row(CLIP_ROWS.to_row(planned)) == planned
    assert planned.clip.file_uri == "s.tar"
    row = CLIP_ROWS.to_row(make_clip(1))
    assert row["member"] is None
    assert CLIP_ROWS.from_row(row) == make_clip(1)


def joins(*clips: PlannedClip) -> bool:
    return lie_together([planned.clip for planned in clips[:-1]], clips[-1].clip)


def test_near_neighbours_come_together_and_others_do_not() -> None:
    assert joins(*neighbours(LARGE, LARGE, LARGE))
    assert not joins(*neighbours(LARGE, LARGE, gap=7000))  # more would be read twice than is worth a request
    assert not joins(*neighbours(20_000, 20_000))
    assert not joins(*neighbours(3 << 20, 3 << 20))
    assert not joins(*reversed(neighbours(LARGE, LARGE)))
    assert not joins(in_tar(0, 512, LARGE), in_tar(1, LARGE + 1024, LARGE, tar="t.tar"))
    assert not joins(make_clip(0), make_clip(1))
    assert not joins(make_clip(0, uri="a#1.tar"), in_tar(1, 512, LARGE, tar="a"))


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 10_000)), min_size=2, max_size=30))
def test_what_is_read_together_is_a_tenth_more_at_most(members: list[tuple[int, int]]) -> None:
    offset, clips = 0, []
    for number, (size_bytes, gap) in enumerate(members):
        offset += gap
        clips.append(in_tar(number, offset, size_bytes))
        offset += size_bytes
    jobs: list[list[Clip]] = []
    take(clips, jobs)
    for job in jobs:
        together = [clip.member for clip in job if clip.member is not None]
        wanted = sum(member.size_bytes for member in together)
        assert len(job) == 1 or together[-1].end - together[0].offset <= min(1.08 * wanted, 4 << 20)
    assert [clip.sample_id for job in jobs for clip in job] == [planned.sample_id for planned in clips]


def take(clips: Sequence[PlannedClip], jobs: list[list[Clip]], *, budget_bytes: int = 1000 * SMALL.frame_bytes) -> list[Decoded]:
    def start(clips: list[Clip]) -> list[Clip]:
        jobs.append(clips)
        return clips

    feed = DecodeFeed(start, lambda clip: DecodedClip(frames=np.empty(0, np.uint8), source_hash=clip.uri), budget_bytes)
    with feed.order(clips) as order:
        return [decoded for _, decoded in order]


def test_neighbours_take_a_sixteenth_of_the_budget_at_most() -> None:
    jobs: list[list[Clip]] = []
    take(neighbours(*[LARGE] * 8), jobs, budget_bytes=48 * SMALL.frame_bytes)
    assert [len(job) for job in jobs] == [3, 3, 2]


@pytest.mark.usefixtures("quiet")
def test_neighbour_of_a_clip_that_fails_is_charged_with_nothing() -> None:
    clips, jobs = neighbours(*[LARGE] * 3), list[list[str]]()

    def start(started: list[Clip]) -> list[list[str]]:
        jobs.append([clip.uri for clip in started])
        return [jobs[-1] for _ in started]

    def fetch(job: list[str]) -> Decoded:
        if "s.tar#1.mp4" in job:
            raise ValueError("a defect")
        return DecodedClip(frames=np.empty(0, np.uint8), source_hash="")

    with DecodeFeed(start, fetch, 1000 * SMALL.frame_bytes).order(clips) as order:
        results = [result for _, result in order]
    assert [isinstance(result, TerminalError) for result in results] == [False, True, False]
    assert [len(job) for job in jobs] == [3, 1, 1, 1, 1]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that pytest keeps hold their errors, and those the handles."""
    monkeypatch.setattr("pipeline.feed.logger.disabled", True)


@pytest.fixture
def stored(flaky: type[FlakyFileSystem]) -> list[Clip]:
    """Two clips of one member and one of the next, of a tar in a store."""
    data = np.random.default_rng(0).bytes(3 * LARGE)
    flaky().pipe_file("/in/s.tar", data)
    tar = stat_input("flaky://in/s.tar")
    a, b = (planned.clip for planned in neighbours(LARGE, LARGE))
    facts: dict[str, Any] = {"size_bytes": tar.size_bytes, "version": tar.version}
    a, b = (replace(clip, uri=f"flaky:///in/{clip.uri}", **facts) for clip in (a, b))
    flaky.calls.clear()
    return [a, replace(a, sample_id="again", frame_start=9), b]


def test_members_come_by_one_request_and_are_gone_after(flaky: type[FlakyFileSystem], stored: list[Clip], tmp_path: Path) -> None:
    data = flaky.store["/in/s.tar"].getvalue()
    with fetch_videos(stored, {}, tmp_path) as videos:
        assert [clips for _, clips in videos] == [stored[:2], stored[2:]]
        for path, (clip, *_) in videos:
            assert clip.member is not None
            assert path.read_bytes() == data[clip.member.offset : clip.member.end]
    assert flaky.calls == ["info", "cat_file"]
    assert flaky.delivered == [2 * LARGE + 2048]
    assert list(tmp_path.iterdir()) == []


def test_large_member_comes_in_pieces(flaky: type[FlakyFileSystem], stored: list[Clip], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.tars.members._MOST_RANGE_BYTES", 30_000)
    with fetch_videos(stored[2:], {}, tmp_path) as [(path, _)]:
        content = path.read_bytes()
    member = stored[2].member
    assert member is not None
    assert content == flaky.store["/in/s.tar"].getvalue()[member.offset : member.end]
    assert flaky.delivered == [30_000, 30_000, 30_000, 10_000]


def test_tar_that_changed_gives_none_of_its_members(flaky: type[FlakyFileSystem], stored: list[Clip], tmp_path: Path) -> None:
    flaky().pipe_file("/in/s.tar", bytes(2 * LARGE))
    with pytest.raises(TerminalError, match=r"s\.tar: changed since it was planned \(300000 bytes then, 200000 now\)") as caught:
        fetch_videos(stored, {}, tmp_path).__enter__()
    assert (caught.value.stage, caught.value.reason) == ("fetch", "changed")
    assert flaky.delivered == []


def test_tar_that_is_replaced_after_it_was_looked_at_gives_none_of_its_members(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(LARGE))
    tar = stat_input(str(path))
    members = [TarMember(name="a.mp4", offset=512, size_bytes=100)]
    with fetch_members(tar.uri, tar.version, members, None, tmp_path) as paths:
        assert paths[0].read_bytes() == bytes(100)
    os.utime(path, (1, 1))
    with pytest.raises(TerminalError, match=r"s\.tar: was replaced") as caught:
        fetch_members(tar.uri, tar.version, members, None, tmp_path).__enter__()
    assert caught.value.reason == "changed"


def test_full_disk_blames_no_video(flaky: type[FlakyFileSystem], stored: list[Clip], tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="cannot be written"):
        fetch_videos(stored, {}, tmp_path / "gone").__enter__()
