"""A video's header alone says what the whole file says, or nothing."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError
from pipeline.types import Bucket, Crop, VideoInfo
from pipeline.video import Window, decode_windows, probe, probe_header
from pipeline.video_header import find_video_header
from tests.pipeline.video_samples import write_video

LIMITS = DecodeConfig()
CLIPS = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "clips"
MOST_HEADER_BYTES = 4 << 20


def reader(data: bytes) -> Any:
    """Reads of ``data`` that refuse what does not exist."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        assert length <= MOST_HEADER_BYTES
        return data[offset : offset + length]

    return read


def look(data: bytes, folder: Path, limits: DecodeConfig = LIMITS, *, size_bytes: int | None = None) -> VideoInfo | None:
    header = find_video_header(reader(data), len(data))
    if header is None:
        return None
    (folder / "header").write_bytes(header)
    return probe_header(str(folder / "header"), limits, name="v", size_bytes=size_bytes or len(data))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain.mp4", {}),
        ("sound.mp4", {"audio": True}),
        ("first.mp4", {"container_options": {"movflags": "+faststart"}}),
        ("anamorphic.mov", {"sar": Fraction(16, 15)}),
        ("ntsc.mp4", {"rate": Fraction(30000, 1001)}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("plain.mkv", {}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {}}),
        ("av1.webm", {"codec": "libsvtav1", "options": {}}),
    ],
)
def test_header_says_what_the_whole_file_says(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    path = write_video(tmp_path / name, size=(256, 144), **settings)
    whole = probe(str(path), LIMITS, name=name)
    assert look(path.read_bytes(), tmp_path) == whole


@pytest.mark.parametrize("name", ["bunny_variable_rate.mp4", "bunny_wakes_up.mp4", "cockatoo_anamorphic.mov"])
def test_header_of_a_real_clip_says_what_the_whole_file_says(tmp_path: Path, name: str) -> None:
    assert look((CLIPS / name).read_bytes(), tmp_path) == probe(str(CLIPS / name), LIMITS, name=name)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("turned.mp4", {"display": (90.0, False, False)}),
        ("mirrored.mp4", {"display": (0.0, True, False)}),
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("sound.mkv", {"audio": True}),  # its length is that of the longest track
        ("plain.avi", {}),
        ("stream.ts", {}),
    ],
)
def test_what_the_header_does_not_tell_is_left_to_the_whole_file(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    assert look(write_video(tmp_path / name, **settings).read_bytes(), tmp_path) is None


def test_index_that_reaches_beyond_the_end_is_left_to_the_whole_file(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", container_options={"movflags": "+faststart"}).read_bytes()
    assert look(data, tmp_path, size_bytes=len(data)) is not None
    assert look(data, tmp_path, size_bytes=len(data) - 100) is None


def test_limits_hold_for_headers_too(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4").read_bytes()
    for setting, reason in (({"max_side": 100}, "too_large"), ({"max_duration_s": 2}, "too_long")):
        with pytest.raises(TerminalError) as caught:
            look(data, tmp_path, LIMITS.model_copy(update=setting))
        assert caught.value.reason == reason


def test_picture_that_is_not_as_the_header_said_is_refused_when_it_is_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=9)
    bucket, crop = Bucket.parse("9x32x48@8"), Crop(x=0, y=0, w=144, h=96)
    right, wrong = (Window(frame_start=0, frame_end=9, bucket=bucket, crop=crop, header_size=(w, 96)) for w in (160, 168))
    [(_, frames)] = decode_windows(str(path), [right], LIMITS, name="a.mp4")
    assert isinstance(frames, np.ndarray)
    with pytest.raises(TerminalError, match="the picture is 160x96, but the file's header says 168x96"):
        list(decode_windows(str(path), [wrong], LIMITS, name="a.mp4"))


def test_only_the_header_is_read(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4").read_bytes()
    start = data.index(b"mdat") + 12
    payload = range(start, data.index(b"moov") - 4)

    def read(offset: int, length: int) -> bytes:
        assert not set(range(offset, offset + length)) & set(payload)
        return data[offset : offset + length]

    assert find_video_header(read, len(data)) is not None


@given(st.binary(max_size=300))
def test_no_bytes_are_too_odd(data: bytes) -> None:
    for start in (b"", struct.pack(">I4s", 16, b"ftyp"), b"\x1a\x45\xdf\xa3\x81", b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff"):
        find_video_header(reader(start + data), len(start + data))


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=20), cut=st.floats(0, 1))
def test_no_mutation_is_too_odd(samples: list[bytes], flips: list[tuple[float, int]], cut: float) -> None:
    for sample in samples:
        data = bytearray(sample)
        for place, value in flips:
            data[int(place * len(data))] = value
        data = data[: int(cut * len(data))]
        find_video_header(reader(bytes(data)), len(data))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    return [write_video(folder / name, num_frames=5).read_bytes() for name in ("a.mp4", "a.mkv")]
