"""Crops, buckets and sample counts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geometry import available_frames, choose_bucket, cover_crop, upscale_factor
from pipeline.types import Bucket, Crop, VideoInfo

SIDES = st.integers(1, 5000)
BUCKETS = st.builds(
    Bucket,
    num_frames=st.integers(0, 12).map(lambda k: 8 * k + 1),
    height=st.integers(1, 60).map(lambda k: 16 * k),
    width=st.integers(1, 60).map(lambda k: 16 * k),
    fps=st.sampled_from([7.0, 8.0, 12.5, 16.0, 23.976, 24.0, 29.97, 30.0]),
)


def info(width: int, height: int, duration_s: float) -> VideoInfo:
    return VideoInfo(width=width, height=height, fps=30.0, duration_s=duration_s, container="mp4", codec="h264")


@pytest.mark.parametrize(
    ("size", "bucket", "crop"),
    [
        ((1920, 1080), "49x480x720@8", Crop(x=150, y=0, w=1620, h=1080)),
        ((1080, 1920), "49x480x720@8", Crop(x=0, y=600, w=1080, h=720)),
        ((640, 480), "9x480x640@8", Crop(x=0, y=0, w=640, h=480)),
        ((641, 481), "9x480x640@8", Crop(x=0, y=0, w=641, h=481)),
        ((854, 480), "9x720x1280@8", Crop(x=0, y=0, w=854, h=480)),
        ((1, 1), "9x16x16@8", Crop(x=0, y=0, w=1, h=1)),
    ],
)
def test_crop_is_the_centre_of_the_bucket_aspect(size: tuple[int, int], bucket: str, crop: Crop) -> None:
    assert cover_crop(*size, Bucket.parse(bucket)) == crop


@given(SIDES, SIDES, BUCKETS)
def test_crop_lies_inside_touches_two_sides_and_keeps_chroma_aligned(width: int, height: int, bucket: Bucket) -> None:
    crop = cover_crop(width, height, bucket)
    assert crop.x >= 0
    assert crop.y >= 0
    assert crop.x + crop.w <= width
    assert crop.y + crop.h <= height
    assert crop.w == width or crop.h == height
    assert crop.x % 2 == 0
    assert crop.y % 2 == 0
    assert abs(2 * crop.x + crop.w - width) <= 2, "within a pixel of the centre"
    assert abs(2 * crop.y + crop.h - height) <= 2, "within a pixel of the centre"


@given(st.integers(64, 5000), st.integers(64, 5000), BUCKETS)
def test_crop_has_the_bucket_aspect_to_a_pixel(width: int, height: int, bucket: Bucket) -> None:
    crop = cover_crop(width, height, bucket)
    if crop.h == height:
        assert abs(crop.w - height * bucket.width / bucket.height) <= max(1, 2 - height * bucket.width / bucket.height)
    else:
        assert abs(crop.h - width * bucket.height / bucket.width) <= max(1, 2 - width * bucket.height / bucket.width)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0x480"):
        cover_crop(0, 480, Bucket.parse("9x480x720@8"))


def test_upscale_factor_is_above_one_where_the_crop_is_enlarged() -> None:
    bucket = Bucket.parse("9x480x720@8")
    assert upscale_factor(Crop(x=0, y=0, w=360, h=240), bucket) == 2
    assert upscale_factor(Crop(x=0, y=0, w=1440, h=960), bucket) == 0.5


@pytest.mark.parametrize(
    ("duration_s", "bucket", "count"),
    [
        (6.125, "49x480x720@8", 49),  # 49 frames at 8 a second
        (6.124, "49x480x720@8", 49),  # the same, rounded down to milliseconds
        (6.1, "49x480x720@8", 49),
        (6.0, "49x480x720@8", 48),  # 48 frames at 8 a second
        (6.0005, "49x480x720@8", 48),  # the same, rounded up by a container's clock
        (7.143, "49x480x720@7", 50),  # 50 frames at 7 a second, rounded up
        (49 * 1001 / 30000, "49x480x720@29.97", 49),
        (1.634, "49x480x720@29.97", 49),
        (0.04, "9x96x160@8", 1),
        (0.0005, "9x96x160@8", 1),
        (0.0, "9x96x160@8", 0),
        (-1.0, "9x96x160@8", 0),
        (math.inf, "9x96x160@8", 0),
        (math.nan, "9x96x160@8", 0),
    ],
)
def test_samples_are_counted_strictly_before_the_end(duration_s: float, bucket: str, count: int) -> None:
    assert available_frames(duration_s, Bucket.parse(bucket)) == count


@given(st.integers(1, 5000), st.sampled_from(["7", "8", "12.5", "24", "29.97", "23.976", "60"]), st.sampled_from([10**9, 1000]))
def test_a_video_at_the_bucket_rate_holds_as_many_samples_as_frames(count: int, fps: str, clock: int) -> None:
    bucket = Bucket.parse(f"9x96x160@{fps}")
    exact = count / bucket.exact_fps
    assert available_frames(float(exact), bucket) == count
    for rounded in (Fraction(math.floor(exact * clock), clock), Fraction(math.ceil(exact * clock), clock)):
        assert available_frames(float(rounded), bucket) == count


def test_nearest_aspect_ratio_wins_over_more_frames() -> None:
    buckets = [Bucket.parse(key) for key in ("9x480x720@8", "49x720x480@8")]
    assert choose_bucket(info(1920, 1080, 60), buckets) == buckets[0]
    assert choose_bucket(info(1080, 1920, 60), buckets) == buckets[1]


def test_a_bucket_that_needs_more_frames_than_there_are_is_no_choice() -> None:
    buckets = [Bucket.parse(key) for key in ("49x480x720@8", "17x720x480@8")]
    assert choose_bucket(info(1920, 1080, 3), buckets) == buckets[1]
    assert choose_bucket(info(1920, 1080, 1), buckets) is None
    assert choose_bucket(info(1920, 1080, 1), []) is None


def test_most_frames_win_among_equal_aspects_and_then_the_largest_that_is_not_enlarged() -> None:
    small, fitting, huge, short = (Bucket.parse(k) for k in ("49x240x320@8", "49x480x640@8", "49x960x1280@8", "17x480x640@8"))
    assert choose_bucket(info(800, 600, 60), [small, fitting, huge, short]) == fitting
    assert choose_bucket(info(800, 600, 3), [small, fitting, huge, short]) == short
    assert choose_bucket(info(160, 120, 60), [huge, fitting, small]) == small, "all enlarge: the one that enlarges least"


def test_aspect_distance_is_by_ratio() -> None:
    wide, high = Bucket.parse("9x480x960@8"), Bucket.parse("9x960x480@8")
    assert choose_bucket(info(1001, 1000, 60), [high, wide]) == wide
    assert choose_bucket(info(1000, 1001, 60), [high, wide]) == high


@given(st.lists(BUCKETS, min_size=1, max_size=6), SIDES, SIDES, st.floats(0.1, 20), st.randoms())
def test_the_order_of_the_buckets_has_no_influence(
    buckets: list[Bucket], width: int, height: int, duration_s: float, random: object
) -> None:
    shuffled = list(buckets)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_bucket(info(width, height, duration_s), shuffled) == choose_bucket(info(width, height, duration_s), buckets)
