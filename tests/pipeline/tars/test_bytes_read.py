"""A tar is read once and little more: what planning reads is not what decoding reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.feed import DecodeFeed
from pipeline.fetching import fetch_videos
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, read_items, read_shards
from pipeline.storage import Storage
from pipeline.types import Clip, DecodedClip
from tests.pipeline.fakes import FlakyFileSystem
from tests.pipeline.tars.making import make_samples, make_tar, plan_tars
from tests.pipeline.video_samples import Picture, write_video

MOST_TIMES = 1.1


@pytest.fixture(scope="module", params=[("46", ""), ("46", "+faststart"), ("38", "")], ids=["18 KB", "18 KB faststart", "85 KB"])
def videos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Small clips of several lengths, with their index at the end, where FFmpeg writes it, or moved to the start."""
    crf, flags = request.param
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 60, (192, 400, 3), dtype=np.uint8)

    def moving(index: int, size: tuple[int, int]) -> Picture:
        return np.roll(noise, index * 3, 1)[: size[1], : size[0]]

    def write(number: int) -> bytes:
        path = write_video(
            folder / f"{number}.mp4",
            picture=moving,
            size=(320, 192),
            num_frames=30 + 4 * number,
            options={"preset": "ultrafast", "crf": crf},
            container_options={"movflags": flags} if flags else {},
        )
        return path.read_bytes()

    return [write(number) for number in range(6)]


def read_as_workers_do(output: Storage, generation: Generation, folder: Path) -> dict[str, bytes]:
    """Every member's bytes by its URI, read shard by shard in the jobs that an actor orders."""
    found: dict[str, bytes] = {}

    def start(clips: list[Clip]) -> Sequence[Any]:
        with fetch_videos(clips, {}, folder) as files:
            found.update((its_clips[0].uri, path.read_bytes()) for path, its_clips in files)
        return clips

    feed = DecodeFeed(start, lambda clip: DecodedClip(frames=np.empty(0, np.uint8), source_hash=""), 1 << 30)
    for shard in read_shards(output, generation):
        with feed.order(read_items(output, shard, CLIP_ROWS)) as order:
            assert len(list(order)) == shard.num_clips
    return found


@pytest.mark.parametrize(("tars", "clips"), [(4, 50), pytest.param(20, 500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_tars_are_read_once_and_little_more_with_planning_included(
    flaky: type[FlakyFileSystem], output: Storage, videos: list[bytes], tmp_path: Path, tars: int, clips: int
) -> None:
    chosen = random.Random(0).choices(videos, k=tars * clips)
    for number in range(tars):
        first = number * clips
        members = make_samples(chosen[first : first + clips], first=first)
        flaky().pipe_file(f"/in/shard-{number:03d}.tar", make_tar(members))
    stored = sum(len(flaky.store[path].getvalue()) for path in flaky.store)
    generation, _ = plan_tars(f"flaky://in/shard-{{000..{tars - 1:03d}}}.tar", output)
    assert generation is not None
    planning, requests = sum(flaky.delivered), len(flaky.delivered)
    assert (generation.num_clips, generation.quarantined, generation.filtered) == (tars * clips, 0, 0)
    found = read_as_workers_do(output, generation, tmp_path)
    assert [found[uri] for uri in sorted(found)] == chosen
    reading = sum(flaky.delivered) - planning
    print(f"tars {stored}, planning {planning} in {requests}, reading {reading} in {len(flaky.delivered) - requests}")
    assert planning + reading <= MOST_TIMES * stored
    assert requests <= 1.5 * tars * clips
    # Neighbours come together where what lies between them is little beside them.
    assert (len(flaky.delivered) - requests < tars * clips / 2) == (len(videos[0]) > 50_000)
    assert not list(tmp_path.glob("[0-9a-f]*"))
