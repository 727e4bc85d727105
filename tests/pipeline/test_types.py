"""The nouns: buckets and what they refuse."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pipeline.types import Bucket, member_uri, tar_uri_of


@pytest.mark.parametrize("key", ["49x480x720@8", "1x16x16@1", "81x768x1360@16", "9x32x48@29.97", "17x64x64@0.5"])
def test_bucket_key_is_read_and_written_alike(key: str) -> None:
    assert Bucket.parse(key).key == key
    assert Bucket.parse(f" {key} ") == Bucket.parse(key)


@pytest.mark.parametrize("key", ["", "49x480x720", "49x480@8", "-1x16x16@8", "49x480x720@8fps", "49x480x720@", "axbxc@d"])
def test_other_forms_are_refused_with_an_example(key: str) -> None:
    with pytest.raises(ValueError, match="not of the form FRAMESxHEIGHTxWIDTH@FPS, such as 49x480x720@8"):
        Bucket.parse(key)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("50x480x720@8", "50 frames do not survive encoding and decoding; use 8k.1, here 49 or 57"),
        ("48x480x720@8", "here 41 or 49"),
        ("0x480x720@8", "here 1 or 9"),
        ("49x481x720@8", "height 481 is not a positive multiple of 16"),
        ("49x480x8@8", "width 8 is not a positive multiple of 16"),
        ("49x480x720@0", "fps must be above 0"),
    ],
)
def test_shape_that_does_not_encode_is_refused_with_the_nearest_that_does(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket.parse(key)


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (8, Fraction(8)),
        (0.5, Fraction(1, 2)),
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_ntsc_rates_are_exact_fractions(fps: float, exact: Fraction) -> None:
    assert Bucket(num_frames=9, height=16, width=16, fps=fps).exact_fps == exact


def test_frame_bytes_are_those_of_rgb() -> None:
    assert Bucket.parse("49x480x720@8").frame_bytes == 49 * 480 * 720 * 3


def test_address_of_a_member_gives_its_tar_again() -> None:
    for tar, name in (("s3://b/a.tar", "x/0.mp4"), ("s3://b/a#1.tar", "0#1.mp4")):
        assert tar_uri_of(member_uri(tar, name), name) == tar
