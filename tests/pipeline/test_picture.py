"""Upright pictures in the right colours, at the bucket's size."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.errors import TerminalError
from pipeline.types import Bucket, Crop
from pipeline.video import Window
from tests.pipeline import video_samples as samples
from tests.pipeline.video_cuts import (
    BUCKET,
    X265,
    cut,
    cut_first,
    look,
)
from tests.pipeline.video_samples import read_numbers, write_video


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
