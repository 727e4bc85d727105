"""Probing and cutting: exact sampling, upright pictures, right colours, and every way in which a file can be bad."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from pipeline.geometry import available_frames, choose_bucket, cover_crop
from pipeline.types import Bucket, Crop, Frames, VideoInfo
from pipeline.video import Window, decode_windows, probe
from pipeline.video_file import REASONS
from tests.pipeline import video_samples as samples
from tests.pipeline.video_samples import Sample, read_number, read_numbers, write_video

LIMITS = DecodeConfig()
BUCKET = Bucket.parse("9x96x160@8")
X265 = {"preset": "ultrafast", "x265-params": "log-level=error"}
DEMO_CLIPS = Path(__file__).parents[2] / "configs/quickstart/clips"


def look(path: Path, limits: DecodeConfig = LIMITS) -> VideoInfo:
    return probe(str(path), limits, name=path.name)


def window(info: VideoInfo, bucket: Bucket = BUCKET, start: int = 0, end: int | None = None) -> Window:
    crop = cover_crop(info.width, info.height, bucket)
    return Window(frame_start=start, frame_end=start + bucket.num_frames if end is None else end, bucket=bucket, crop=crop)


def cut(path: Path, windows: Sequence[Window], limits: DecodeConfig = LIMITS) -> list[Frames | TerminalError]:
    results = dict(decode_windows(str(path), windows, limits, name=path.name))
    return [results[index] for index in range(len(windows))]


def cut_first(path: Path, bucket: Bucket = BUCKET, start: int = 0, end: int | None = None) -> Frames:
    result = cut(path, [window(look(path), bucket, start, end)])[0]
    assert not isinstance(result, TerminalError), result
    return result


def probe_reason(path: Path, limits: DecodeConfig = LIMITS) -> str:
    with pytest.raises(TerminalError) as caught:
        look(path, limits)
    assert caught.value.stage == "probe"
    assert caught.value.reason in REASONS
    assert path.name in caught.value.detail
    assert str(path.parent) not in caught.value.detail
    return caught.value.reason


def reason_of(result: Frames | TerminalError) -> str:
    assert isinstance(result, TerminalError)
    assert result.stage == "decode"
    assert result.reason in REASONS
    return result.reason


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


# The picture


@pytest.mark.parametrize(
    ("display", "seen"),
    [
        ((0, False, False), "RG/BW"),
        ((90, False, False), "GW/RB"),
        ((180, False, False), "WB/GR"),
        ((270, False, False), "BR/WG"),
        ((0, True, False), "GR/WB"),
        ((0, False, True), "BW/RG"),
        ((90, True, False), "WG/BR"),
        ((90, False, True), "RB/GW"),
    ],
)
def test_pictures_come_out_upright(tmp_path: Path, display: tuple[float, bool, bool], seen: str) -> None:
    path = write_video(tmp_path / "turned.mp4", num_frames=10, picture=samples.quadrants, display=display)
    info = look(path)
    turned = display[0] in (90, 270)
    assert (info.width, info.height) == ((96, 160) if turned else (160, 96))
    frames = cut_first(path, Bucket.parse("9x160x96@8") if turned else BUCKET)
    assert {samples.read_quadrants(frame) for frame in frames} == {seen}


def test_a_crop_of_a_turned_picture_is_the_upright_part(tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", num_frames=10, picture=samples.quadrants, display=(90, False, False))
    bucket = Bucket.parse("9x48x48@8")
    top_right = Window(frame_start=0, frame_end=9, bucket=bucket, crop=Crop(x=48, y=0, w=48, h=48))
    result = cut(path, [top_right])[0]
    assert not isinstance(result, TerminalError)
    assert samples.read_quadrants(result[0]) == "WW/WW"


def test_pixel_aspect_ratio_is_undone_by_scaling(tmp_path: Path) -> None:
    path = write_video(tmp_path / "anamorphic.mp4", num_frames=10, size=(120, 96), sar=Fraction(4, 3))
    assert (look(path).width, look(path).height) == (160, 96)
    assert read_numbers(cut_first(path)) == list(range(9))


def test_pixel_aspect_ratio_belongs_to_the_stored_width_of_a_turned_picture(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "both.mp4",
        num_frames=10,
        size=(120, 96),
        sar=Fraction(4, 3),
        display=(90, False, False),
        picture=samples.quadrants,
    )
    assert (look(path).width, look(path).height) == (96, 160)
    assert samples.read_quadrants(cut_first(path, Bucket.parse("9x160x96@8"))[0]) == "GW/RB"


def test_an_absurd_pixel_aspect_ratio_is_ignored(tmp_path: Path) -> None:
    path = write_video(tmp_path / "absurd.mkv", num_frames=10, sar=Fraction(1, 100))
    assert (look(path).width, look(path).height) == (160, 96)


def test_odd_sizes_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mkv", num_frames=10, codec="ffv1", options={}, size=(161, 97))
    assert (look(path).width, look(path).height) == (161, 97)
    assert read_numbers(cut_first(path)) == list(range(9))


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"dst_matrix": 1, "codec_attributes": {"colorspace": 1}}, (160, 96)),
        ({"dst_matrix": 5, "codec_attributes": {"colorspace": 6}}, (160, 96)),
        ({"dst_matrix": 5}, (160, 96)),
        ({"dst_matrix": 1}, (1280, 96)),
        ({"dst_matrix": 5, "codec_attributes": {"colorspace": 6}}, (1280, 96)),
        ({"dst_matrix": 5, "dst_range": 2, "pix_fmt": "yuvj420p"}, (160, 96)),
        ({"dst_matrix": 5, "dst_range": 2, "codec_attributes": {"color_range": 2}}, (160, 96)),
        ({"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265}, (160, 96)),
        ({"codec": "ffv1", "pix_fmt": "bgr0", "options": {}, "dst_range": 2}, (160, 96)),
    ],
    ids=["709", "601", "untagged small", "untagged wide", "601 wide", "yuvj", "full range", "10 bit", "rgb"],
)
def test_colours_are_read_by_tag_or_else_by_size(tmp_path: Path, changes: dict[str, Any], size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "colour.mkv", num_frames=10, size=size, picture=samples.quadrants, **changes)
    for width in (size[0], size[0] - 32):  # whole, and cropped
        picture = cut_first(path, Bucket.parse(f"9x96x{width}@8"))[4].astype(int)
        error = np.abs(picture - samples.quadrants(0, (width, 96)))
        assert error[10:38, 10 : width // 2 - 10].max() <= 5, "red"
        assert error[10:38, width // 2 + 10 : -10].max() <= 5, "green"
        assert error[58:-10, 10 : width // 2 - 10].max() <= 5, "blue"


def test_reducing_does_not_alias(tmp_path: Path) -> None:
    def stripes(_: int, size: tuple[int, int]) -> samples.Picture:
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[:, ::2] = 255
        return picture

    path = write_video(tmp_path / "stripes.mkv", num_frames=10, codec="ffv1", options={}, size=(640, 384), picture=stripes)
    picture = cut_first(path)[4].astype(int)
    assert abs(picture - 128).max() < 24, "columns finer than the bucket's pixels become grey, not moire"


def test_interlaced_video_is_deinterlaced_without_losing_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "interlaced.mp4", options={**samples.FAST, "x264-params": "tff=1"}, picture=combed)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    frames = cut_first(path)
    assert read_numbers(frames[:, :24]) == list(range(9))

    def comb(picture: samples.Picture) -> float:
        rows = picture[32:58, 100:].astype(int)
        return float(np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean())

    assert comb(frames[4]) < comb(combed(4, samples.SIZE)) / 4


def combed(index: int, size: tuple[int, int]) -> samples.Picture:
    """A numbered picture with a bright box that moves from field to field, across bars that stay black."""
    picture = samples.numbered(index, size)
    for field in (0, 1):
        left = 100 + 4 * index + 2 * field
        picture[30 + field : 60 : 2, left : left + 20] = 230
    return picture


# Files that cannot be used


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "empty.mp4").touch()
    assert probe_reason(path) == "empty_file"


@pytest.mark.parametrize("content", [b"hello world\n" * 99, b"<html><body>404</body></html>", bytes(range(256)) * 40])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "renamed.mp4").write_bytes(content)
    assert probe_reason(path) == "not_a_video"


def test_a_playlist_cannot_make_us_open_another_file(tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.ts")
    concat, hls = tmp_path / "concat.mp4", tmp_path / "hls.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile '{other.name}'\n")
    hls.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:7\n#EXTINF:7,\n{other.name}\n#EXT-X-ENDLIST\n")
    assert probe_reason(concat) == "not_a_video"
    assert probe_reason(hls) == "not_a_video"


def test_a_relative_name_is_never_taken_for_a_protocol() -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        probe("http:x.mp4", LIMITS, name="x.mp4")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe.mp4")
    assert probe_reason(path) == "not_a_video"


def test_a_file_that_is_gone_is_nobodys_fault(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"gone\.mp4"):
        look(tmp_path / "gone.mp4")


def test_sound_alone_and_a_cover_picture_are_no_video(tmp_path: Path) -> None:
    assert probe_reason(samples.write_sound(tmp_path / "sound.m4a")) == "no_video_stream"
    assert probe_reason(samples.write_sound(tmp_path / "cover.mp4", cover=True)) == "no_video_stream"


def test_a_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    def black(_: int, size: tuple[int, int]) -> samples.Picture:
        return np.zeros((size[1], size[0], 3), np.uint8)

    path = write_video(tmp_path / "bomb.mp4", num_frames=2, size=(8200, 64), picture=black)
    assert probe_reason(path) == "too_large"


@pytest.mark.parametrize("file_name", ["large.mp4", "large.ts", "large.mkv"])
def test_pixels_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path: Path, file_name: str) -> None:
    path = write_video(tmp_path / file_name, num_frames=10)
    assert probe_reason(path, DecodeConfig(max_pixels=160 * 96 - 1)) == "too_large"
    assert look(path, DecodeConfig(max_pixels=160 * 96)).width == 160


def test_a_size_that_only_decoding_tells_is_limited_too(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mkv", num_frames=2, codec="ffv1", options={}, size=(640, 480))
    assert probe_reason(path, DecodeConfig(max_pixels=10_000, max_side=640)) == "too_large"


def test_a_long_video_is_refused(tmp_path: Path) -> None:
    assert probe_reason(write_video(tmp_path / "long.mp4"), DecodeConfig(max_duration_s=6)) == "too_long"
    assert probe_reason(write_video(tmp_path / "long.ts"), DecodeConfig(max_duration_s=6)) == "too_long"


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_refused(tmp_path: Path, transfer: int) -> None:
    path = write_video(
        tmp_path / "hdr.mp4",
        num_frames=9,
        codec="libx265",
        pix_fmt="yuv420p10le",
        options=X265,
        codec_attributes={"color_trc": transfer, "color_primaries": 9, "colorspace": 9},
    )
    assert probe_reason(path) == "hdr"


def test_encrypted_samples_are_refused(tmp_path: Path) -> None:
    encryption = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb"}
    path = write_video(
        tmp_path / "drm.mp4", container_options={**encryption, "encryption_kid": "a7e61c373e219033c21091fa607bf3b8"}
    )
    assert probe_reason(path) == "encrypted"


def test_an_mp4_cut_short_is_refused_by_its_own_table(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", container_options={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[:-100])
    assert probe_reason(path) == "truncated"


def test_a_file_cut_short_gives_the_clips_before_the_cut_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mkv", num_frames=80)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    info = look(path)
    first, last = cut(path, [window(info), window(info, start=60)])
    assert read_numbers_of(first) == list(range(9))
    assert reason_of(last) == "truncated"
    assert "promises 10.00 s" in str(last)


def textured(index: int, size: tuple[int, int]) -> samples.Picture:
    noise = np.random.default_rng(index).integers(0, 60, (size[1], size[0], 3), np.uint8)
    picture: samples.Picture = np.maximum(samples.numbered(index, size), noise)
    return picture


def read_numbers_of(result: Frames | TerminalError) -> list[int]:
    assert not isinstance(result, TerminalError), result
    return read_numbers(result)


@pytest.mark.parametrize("threads", [1, 4])
def test_damage_costs_the_clips_that_it_touches_and_no_other(tmp_path: Path, threads: int) -> None:
    path = write_video(tmp_path / "damaged.mp4", num_frames=60, gop=8, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, [20])
    results = cut(path, [window(info, start=start) for start in range(0, 45, 9)], DecodeConfig(threads=threads))
    assert [read_numbers_of(results[k]) for k in (0, 1, 3, 4)] == [list(range(9 * k, 9 * k + 9)) for k in (0, 1, 3, 4)]
    assert reason_of(results[2]) == "corrupt"


def test_damage_at_the_very_beginning_is_found(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", num_frames=60, gop=8, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, [0, 1])
    results = cut(path, [window(info), window(info, start=30)])
    assert reason_of(results[0]) == "corrupt"
    assert not isinstance(results[1], TerminalError)


def test_a_file_with_much_damage_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ruin.mp4", num_frames=60, gop=8, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, range(8, 60, 3))
    with pytest.raises(TerminalError, match=r"of \d+ packets cannot be decoded") as caught:
        cut(path, [window(info, start=40)])
    assert caught.value.reason == "corrupt"


def test_a_file_of_which_nothing_decodes_is_refused_at_probe(tmp_path: Path) -> None:
    path = write_video(tmp_path / "noise.mp4", num_frames=12, options={"preset": "fast"}, picture=textured)
    samples.flip_bytes(path, range(12))
    assert probe_reason(path) == "undecodable"


def test_a_change_of_resolution_costs_the_clips_from_there_on(tmp_path: Path) -> None:
    path = samples.write_size_change(tmp_path / "change.ts", (160, 96), (320, 192), 30)
    info = look(path)
    results = cut(path, [window(info), window(info, start=25), window(info, start=40)])
    assert read_numbers_of(results[0]) == list(range(9))
    assert [reason_of(result) for result in results[1:]] == ["resolution_changes", "resolution_changes"]
    assert "160x96 to 320x192 at 3.75 s" in str(results[1])


def test_a_file_that_was_replaced_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "replaced.mp4")
    planned = Window(frame_start=0, frame_end=9, bucket=BUCKET, crop=Crop(x=150, y=0, w=1620, h=1080))
    with pytest.raises(TerminalError, match="the picture is 160x96") as caught:
        cut(path, [planned])
    assert caught.value.reason == "changed"


def test_damaged_files_never_raise_anything_but_our_own_errors(tmp_path: Path) -> None:
    path = write_video(tmp_path / "fuzz.mp4", num_frames=20, options={"preset": "fast"}, picture=textured)
    clean = path.read_bytes()
    generator = np.random.default_rng(7)
    for _ in range(40):
        data = bytearray(clean)
        for place in generator.integers(0, len(data), 30):
            data[place] = generator.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(TerminalError):
            cut(path, [window(look(path))])


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
