"""Probing and cutting in this process, as short as the tests want it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError
from pipeline.geometry import cover_crop
from pipeline.types import Bucket, Frames, VideoInfo
from pipeline.video import Window, decode_windows, probe
from pipeline.video_file import REASONS
from tests.pipeline import video_samples as samples
from tests.pipeline.video_samples import read_numbers

LIMITS = DecodeConfig()
BUCKET = Bucket.parse("9x96x160@8")
X265 = {"preset": "ultrafast", "x265-params": "log-level=error"}


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


def textured(index: int, size: tuple[int, int]) -> samples.Picture:
    noise = np.random.default_rng(index).integers(0, 60, (size[1], size[0], 3), np.uint8)
    picture: samples.Picture = np.maximum(samples.numbered(index, size), noise)
    return picture


def read_numbers_of(result: Frames | TerminalError) -> list[int]:
    assert not isinstance(result, TerminalError), result
    return read_numbers(result)
