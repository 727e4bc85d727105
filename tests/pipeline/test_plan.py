"""From probed videos to clips and shards: pure, so that the same input gives the same plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ClipConfig
from pipeline.errors import TerminalError
from pipeline.plan import PlannedClip, ProbedVideo, plan_clips, shard_id_of, shard_sizes
from pipeline.types import Bucket, Clip, Rejection
from tests.pipeline.fakes import make_video

WIDE, TALL, LONG = (Bucket.parse(key) for key in ("17x64x96@8", "17x96x64@8", "49x64x96@8"))


def plan(*videos: ProbedVideo, buckets: tuple[Bucket, ...] = (WIDE,), recipe: str = "recipe", **settings: Any) -> list[Any]:
    return list(plan_clips(videos, buckets, ClipConfig(**settings), recipe))


def plan_clip(video: ProbedVideo | None = None, **settings: Any) -> Clip:
    """The one clip of one video."""
    (planned,) = plan(video or make_video(), **settings)
    assert isinstance(planned, PlannedClip)
    return planned.clip


def plan_rejection(video: ProbedVideo, **settings: Any) -> Rejection:
    """The one rejection of one video."""
    (planned,) = plan(video, **settings)
    assert isinstance(planned, Rejection)
    return planned


# Clips


def test_clip_has_the_video_its_window_and_its_columns() -> None:
    (planned,) = plan(make_video(width=960, height=480))
    clip = planned.clip
    assert (clip.uri, clip.size_bytes, clip.version) == ("a.mp4", 1000, "v1")
    assert (clip.bucket, clip.frame_start, clip.frame_end) == (WIDE, 0, 17)
    assert (clip.crop.x, clip.crop.y, clip.crop.w, clip.crop.h) == (120, 0, 720, 480)
    assert (clip.source_fps, clip.source_width, clip.source_height) == (30.0, 960, 480)
    assert planned.columns == {"caption": "about a.mp4"}


def test_clip_takes_the_bucket_of_the_nearest_shape_that_it_is_long_enough_for() -> None:
    buckets = (WIDE, TALL, LONG)
    assert plan_clip(make_video(width=640, height=360), buckets=buckets).bucket == LONG
    assert plan_clip(make_video(width=640, height=360, duration_s=3.0), buckets=buckets).bucket == WIDE
    assert plan_clip(make_video(width=360, height=640), buckets=buckets).bucket == TALL


def test_all_windows_are_consecutive_and_full() -> None:
    clips = [planned.clip for planned in plan(make_video(duration_s=7.0), windows="all")]
    assert [(clip.frame_start, clip.frame_end) for clip in clips] == [(0, 17), (17, 34), (34, 51)]
    assert len({clip.sample_id for clip in clips}) == 3


def test_short_video_is_filtered_with_the_shortest_bucket_named() -> None:
    rejection = plan_rejection(make_video(duration_s=1.0), buckets=(LONG, WIDE))
    assert (rejection.status, rejection.stage, rejection.reason) == ("filtered", "plan", "too_short")
    assert rejection.detail == (
        "a.mp4: 1.00 s hold 8 frames at 8 fps, the shortest bucket 17x64x96@8 needs 17. "
        "A new dataset may have a shorter bucket, or clip.short: repeat_last"
    )


@pytest.mark.parametrize("windows", ["first", "all"])
def test_short_video_may_end_early_in_the_shortest_bucket(windows: str) -> None:
    clip = plan_clip(make_video(duration_s=1.0), buckets=(LONG, WIDE, TALL), short="repeat_last", windows=windows)
    assert (clip.bucket, clip.frame_start, clip.frame_end) == (WIDE, 0, 8)
    assert clip.num_source_frames == 8


def test_slow_source_is_filtered_unless_allowed() -> None:
    rejection = plan_rejection(make_video(fps=7.0))
    assert (rejection.status, rejection.reason) == ("filtered", "fps_too_low")
    assert "7 fps, below 0.9 of the bucket's 8" in rejection.detail
    assert plan_clip(make_video(fps=7.2)).bucket == WIDE
    assert plan_clip(make_video(fps=1.0), min_fps_share=0).bucket == WIDE


def test_small_source_is_filtered_only_where_a_limit_is_set() -> None:
    small = make_video(width=48, height=32)
    assert plan_clip(small).bucket == WIDE
    assert plan_clip(small, max_upscale=2.0).bucket == WIDE
    rejection = plan_rejection(small, max_upscale=1.9)
    assert (rejection.status, rejection.reason) == ("filtered", "too_small")
    assert "48x32 would be enlarged 2.00 times for 17x64x96@8; clip.max_upscale is 1.9" in rejection.detail


def test_video_that_could_not_be_probed_is_quarantined_with_its_reason() -> None:
    rejection = plan_rejection(make_video(error=TerminalError("probe", "not_a_video", "a.mp4: no stream")))
    assert (rejection.status, rejection.stage, rejection.reason) == ("quarantined", "probe", "not_a_video")
    assert rejection.detail == "a.mp4: no stream"


def test_rejected_video_is_known_by_its_key() -> None:
    video = make_video(duration_s=0.1)
    assert plan_rejection(video).sample_id == video.key


def test_duplicate_listing_is_filtered_and_the_first_kept() -> None:
    first, other, second = plan(make_video(), make_video("b.mp4"), make_video())
    assert isinstance(first, PlannedClip)
    assert isinstance(other, PlannedClip)
    assert (second.status, second.reason, second.uri) == ("filtered", "duplicate", "a.mp4")


def test_same_videos_give_the_same_plan_whatever_the_order_of_buckets() -> None:
    videos = [make_video(f"{n}.mp4", width=300 + 50 * n, duration_s=0.5 + n) for n in range(12)]
    assert plan(*videos, buckets=(WIDE, TALL, LONG)) == plan(*videos, buckets=(LONG, WIDE, TALL))


# Identity


def test_sample_id_changes_with_each_part_of_its_identity() -> None:
    video = make_video()
    ids = [
        plan_clip(video),
        plan_clip(replace(video, uri="b.mp4")),
        plan_clip(replace(video, version="v2")),
        plan_clip(replace(video, size_bytes=1001)),
        plan_clip(video, recipe="other"),
        plan_clip(make_video(width=960)),  # another crop
        plan_clip(video, buckets=(LONG,)),
        plan_clip(make_video(duration_s=1.0), short="repeat_last"),  # another window
        *(planned.clip for planned in plan(video, windows="all")[1:]),
    ]
    assert len({clip.sample_id for clip in ids}) == len(ids)


def test_sample_id_changes_with_nothing_else() -> None:
    video = make_video()
    others = [
        replace(video, columns={"caption": "another"}),
        make_video(fps=60.0, codec="vp9", container="webm", duration_s=21.0),
    ]
    assert {plan_clip(other).sample_id for other in others} == {plan_clip(video).sample_id}
    settings: list[dict[str, Any]] = [{"windows": "all"}, {"short": "repeat_last"}, {"min_fps_share": 0.1}, {"max_upscale": 9}]
    assert {plan(video, **changed)[0].clip.sample_id for changed in settings} == {plan_clip(video).sample_id}


# Shards


@given(
    shapes=st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 300), st.integers(1, 50)), min_size=1),
    shard_bytes=st.integers(1, 500),
)
def test_shards_hold_every_item_once_and_are_balanced(shapes: dict[str, tuple[int, int]], shard_bytes: int) -> None:
    shards = dict(shard_sizes(shapes, shard_bytes))
    assert list(shards) == sorted(shapes)
    assert {key: sum(sizes) for key, sizes in shards.items()} == {key: count for key, (count, _) in shapes.items()}
    assert sum(map(len, shards.values())) >= min(32, sum(count for count, _ in shapes.values()))
    for key, sizes in shards.items():
        item_bytes = shapes[key][1]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert max(sizes) == 1 or max(sizes) * item_bytes < shard_bytes + item_bytes


def test_large_input_makes_shards_of_about_the_size_asked_for() -> None:
    assert list(shard_sizes({"a": (10_000, 1)}, 100)) == [("a", [100] * 100)]


def test_no_items_make_no_shards() -> None:
    assert list(shard_sizes({}, 100)) == []


def test_shard_id_follows_from_generation_recipe_and_items() -> None:
    ids = [
        shard_id_of(0, "recipe", "abc"),
        shard_id_of(1, "recipe", "abc"),
        shard_id_of(0, "other", "abc"),
        shard_id_of(0, "recipe", "xbc"),
    ]
    assert len(set(ids)) == 4
    assert shard_id_of(0, "recipe", iter("abc")) == ids[0]
