"""Probing, and exact sampling of every window."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import TerminalError
from pipeline.geometry import available_frames, choose_bucket
from pipeline.types import Bucket, Crop
from pipeline.video import Window
from tests.pipeline import video_samples as samples
from tests.pipeline.video_cuts import (
    X265,
    cut,
    cut_first,
    look,
    probe_reason,
    read_numbers_of,
    reason_of,
    textured,
    window,
)
from tests.pipeline.video_samples import Sample, read_number, read_numbers, write_video

DEMO_CLIPS = Path(__file__).parents[2] / "configs/quickstart/clips"


# Sampling


@pytest.mark.parametrize(
    ("file_name", "changes"),
    [
        ("plain.mp4", {}),
        ("plain.mov", {}),
        ("plain.mkv", {}),
        ("plain.ts", {}),
        ("plain.flv", {}),
        ("sound.mkv", {"audio": True}),
        ("b_frames.mp4", {"options": {"preset": "fast"}}),
        ("b_frames.avi", {"options": {"preset": "fast"}}),
        ("part2.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
        ("lossless.mkv", {"codec": "ffv1", "options": {}}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("late_start.mp4", {"pts": [index + 16 for index in range(49)]}),
        ("late_start.mkv", {"pts": [index + 16 for index in range(49)]}),
        ("late_start.ts", {"pts": [index + 16 for index in range(49)]}),
    ],
)
def test_a_video_at_the_bucket_rate_gives_each_frame_once(tmp_path: Path, file_name: str, changes: dict[str, Any]) -> None:
    bucket = Bucket.parse("49x96x160@8")
    path = write_video(tmp_path / file_name, **changes)
    info = look(path)
    assert available_frames(info.duration_s, bucket) == 49
    assert info.fps == pytest.approx(8)
    assert read_numbers(cut_first(path, bucket)) == list(range(49))


def test_frames_before_an_edit_list_starts_do_not_count(tmp_path: Path) -> None:
    path = write_video(tmp_path / "edited.mp4", num_frames=54, pts=[index - 5 for index in range(54)])
    assert look(path).duration_s == pytest.approx(6.125)
    assert read_numbers(cut_first(path)) == list(range(5, 14))


def test_negative_presentation_times_count_from_the_first(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "negative.mp4",
        num_frames=54,
        pts=[index - 5 for index in range(54)],
        container_options={"use_editlist": "0"},
    )
    assert look(path).duration_s == pytest.approx(6.75)
    assert read_numbers(cut_first(path)) == list(range(9))


def nearest(times: Sequence[Fraction], end: Fraction, sample_times: Sequence[Fraction]) -> list[int | None]:
    """Brute force: the frame nearest to each sample time, the earlier of two; None from the end of the video on."""
    found: list[int | None] = []
    for time in sample_times:
        best = min(range(len(times)), key=lambda index: (abs(times[index] - time), index))
        found.append(None if time >= end else best)
    return found


@example(gaps=[1500, 3000, 3000, 3003, 3750, 9000, 30000, 1], first=3, fps="8", start=0)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.sampled_from([1, 100, 1500, 3000, 3003, 3750, 5625, 9000, 11250, 30000]), min_size=3, max_size=30),
    first=st.integers(0, 9000),
    fps=st.sampled_from(["8", "12.5", "29.97", "30"]),
    start=st.integers(0, 12),
)
def test_sampling_equals_brute_force_on_any_presentation_times(
    tmp_path: Path, gaps: list[int], first: int, fps: str, start: int
) -> None:
    tick = Fraction(1, 90000)
    pts = [first + sum(gaps[:index]) for index in range(len(gaps))]
    sample = Sample(num_frames=len(pts), pts=pts, time_base=tick, rate=Fraction(30), size=(160, 16), gop=100)
    path = write_video(tmp_path / "any.mp4", sample)
    bucket = Bucket.parse(f"9x16x160@{fps}")
    with av.open(str(path)) as container:  # the length of the last frame is up to the muxer
        end = (pts[-1] - pts[0] + list(container.decode(video=0))[-1].duration) * tick
    wanted = nearest(
        [(ticks - pts[0]) * tick for ticks in pts], end, [(start + k) / bucket.exact_fps for k in range(bucket.num_frames)]
    )
    result = cut(path, [Window(frame_start=start, frame_end=start + 9, bucket=bucket, crop=Crop(x=0, y=0, w=160, h=16))])[0]
    if None in wanted:
        assert reason_of(result) == "too_few_frames"
        assert f"decoded {wanted.index(None)} frames, need 9" in str(result)
    else:
        assert not isinstance(result, TerminalError)
        assert read_numbers(result) == wanted


def test_a_source_of_another_rate_is_sampled_by_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ntsc.mp4", num_frames=150, rate=Fraction(30000, 1001))
    times = [Fraction(1001 * k, 30000) for k in range(151)]
    expected = nearest(times[:-1], times[-1], [Fraction(k, 8) for k in range(33)])
    assert read_numbers(cut_first(path, Bucket.parse("33x96x160@8"))) == expected


def test_windows_may_overlap_and_come_in_any_order_and_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "many.mp4", num_frames=60)
    info = look(path)
    slow = Bucket.parse("9x48x80@4")
    windows = [window(info, start=20), window(info, start=0), window(info, start=24), window(info, slow, start=2)]
    numbers = [read_numbers(result) for result in cut(path, windows) if not isinstance(result, TerminalError)]
    assert numbers == [list(range(20, 29)), list(range(9)), list(range(24, 33)), list(range(4, 22, 2))]


@pytest.mark.parametrize(
    ("file_name", "changes"),
    [
        ("plain.mp4", {}),
        ("b_frames.mp4", {"options": {"preset": "fast"}, "gop": 100}),
        ("open_gop.mp4", {"options": {"preset": "fast", "x264-params": "open-gop=1"}}),
        ("hevc.mp4", {"codec": "libx265", "options": X265}),
        ("one_key_frame.mkv", {"gop": 1000}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("edited.mp4", {"pts": [index - 5 for index in range(300)], "num_frames": 300}),
        ("late_start.mkv", {"pts": [index + 40 for index in range(300)]}),
        ("plain.ts", {}),
        ("b_frames.avi", {"options": {"preset": "fast"}}),
    ],
)
def test_a_window_far_into_a_video_is_found_exactly(tmp_path: Path, file_name: str, changes: dict[str, Any]) -> None:
    path = write_video(tmp_path / file_name, **{"num_frames": 300, **changes})
    first = max(0, -changes.get("pts", [0])[0])
    for start in (80, 143, 250, 300 - first - 9):
        assert read_numbers(cut_first(path, start=start)) == list(range(first + start, first + start + 9))


def test_what_lies_long_before_the_first_window_is_not_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "seek.mp4", num_frames=300, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, range(12, 150))
    assert read_numbers_of(cut(path, [window(info, start=250)])[0]) == list(range(250, 259))


def test_a_planned_short_clip_repeats_its_last_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", num_frames=6)
    assert read_numbers(cut_first(path, end=6)) == [0, 1, 2, 3, 4, 5, 5, 5, 5]


def test_a_clip_with_fewer_frames_than_planned_is_refused_with_the_count(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=47)
    result = cut(path, [window(look(path), Bucket.parse("49x96x160@8"))])[0]
    assert reason_of(result) == "too_few_frames"
    assert "clip.mp4: decoded 47 frames, need 49" in str(result)


def test_frames_are_contiguous_rgb_bytes_of_the_bucket_shape(tmp_path: Path) -> None:
    frames = cut_first(write_video(tmp_path / "plain.mp4"))
    assert frames.shape == (9, 96, 160, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


def test_decoding_stops_after_the_last_window(tmp_path: Path) -> None:
    path = write_video(tmp_path / "tail.mp4", num_frames=60, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, range(24, 60))
    assert read_numbers_of(cut(path, [window(info)])[0]) == list(range(9))


# Probing


def test_a_header_without_a_length_is_measured(tmp_path: Path) -> None:
    for file_name in ("no_header.ts", "no_header.mpg"):
        changes: dict[str, Any] = {"codec": "mpeg2video", "options": {}, "rate": Fraction(25), "num_frames": 100}
        info = look(write_video(tmp_path / file_name, **changes))
        assert info.duration_s == pytest.approx(4.0, abs=0.05)
        assert info.fps == pytest.approx(25, rel=0.02)


def test_sound_longer_than_the_picture_does_not_lengthen_the_video(tmp_path: Path) -> None:
    assert look(write_video(tmp_path / "sound.mkv", num_frames=12, audio=True)).duration_s == pytest.approx(1.5, abs=0.002)


def demo_clips() -> list[Path]:
    suffixes = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif"}
    return [path for path in sorted(DEMO_CLIPS.iterdir()) if path.suffix in suffixes]


@pytest.mark.parametrize("path", demo_clips(), ids=lambda path: path.name)
def test_demo_clips_are_what_the_quick_start_needs(path: Path) -> None:
    if path.name == "broken.mp4":
        assert probe_reason(path) == "truncated"
        return
    info = look(path)
    bucket = choose_bucket(info, [Bucket.parse("17x128x128@8"), Bucket.parse("17x96x160@8")])
    assert bucket is not None
    assert info.duration_s >= 2.2
    assert info.fps >= 0.9 * bucket.fps
    assert cut_first(path, bucket).std() > 10
    assert path.name in (DEMO_CLIPS / "LICENSES.md").read_text()


def test_numbers_in_pictures_can_be_read_back() -> None:
    assert [read_number(samples.numbered(index)) for index in (0, 1, 513, 1023)] == [0, 1, 513, 1023]
