"""Every way in which a file can be bad, and what it is called."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from pipeline.types import Crop
from pipeline.video import Window, probe
from tests.pipeline import video_samples as samples
from tests.pipeline.video_cuts import (
    BUCKET,
    LIMITS,
    X265,
    cut,
    look,
    probe_reason,
    read_numbers_of,
    reason_of,
    textured,
    window,
)
from tests.pipeline.video_samples import read_numbers, write_video


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


def test_damage_costs_the_clips_that_it_touches_and_no_other(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", num_frames=60, gop=8, options={"preset": "fast"}, picture=textured)
    info = look(path)
    samples.flip_bytes(path, [20])
    results = cut(path, [window(info, start=start) for start in range(0, 45, 9)])
    assert [read_numbers_of(results[k]) for k in (0, 1, 3, 4)] == [list(range(9 * k, 9 * k + 9)) for k in (0, 1, 3, 4)]
    assert reason_of(results[2]) == "corrupt"


def test_damage_reported_late_by_codec_threads_never_slips_through(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", num_frames=60, gop=8, options={"preset": "fast"}, picture=textured)
    info = look(path)
    clean = path.read_bytes()
    for packet in (17, 20, 23, 30):
        path.write_bytes(clean)
        samples.flip_bytes(path, [packet])
        results = cut(path, [window(info, start=start) for start in range(0, 45, 9)], DecodeConfig(threads=4))
        assert any(isinstance(result, TerminalError) and result.reason == "corrupt" for result in results)
        for index, result in enumerate(results):
            if not isinstance(result, TerminalError):
                assert read_numbers(result) == list(range(9 * index, 9 * index + 9))


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


def test_damage_that_ffmpeg_calls_an_input_error_is_the_files_own(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mkv", num_frames=20, options={"preset": "fast"}, picture=textured)
    clean = path.read_bytes()
    generator = np.random.default_rng(3)
    for _ in range(60):
        data = bytearray(clean)
        start = int(generator.integers(400, len(data) - 400))
        del data[start : start + int(generator.integers(1, 400))]
        path.write_bytes(data)
        with contextlib.suppress(TerminalError):
            cut(path, [window(look(path))])
