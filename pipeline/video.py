"""Probing a video, and cutting planned windows out of it, in this process.

Sampling: sample k of a video is the frame nearest in time to k/fps after the first presentation time, the earlier of
two equally near. Times are exact fractions. One pass with one frame of look-ahead serves all windows asked for, and only
frames that are sampled are converted.

Call this from a child process (``decoder_process``): a codec may crash, hang or eat the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError
from pipeline.frame_reader import FrameReader, TimedFrame
from pipeline.picture import FrameConverter, PictureShape, hdr_transfer
from pipeline.types import Bucket, Clip, Crop, Frames, VideoInfo
from pipeline.video_file import VideoFile, check_duration, check_size, fraction, open_video

_WORTH_SEEKING_S = 10
"""A job that begins later than this seeks, so that a long video cut in several jobs is not decoded from its start in each."""
_INSTANT_S = Fraction(1, 10**9)
"""What makes "until the end" mean "before the end"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What decoding needs to know of a clip; a ``Clip`` will do as well."""

    frame_start: int
    frame_end: int
    bucket: Bucket
    crop: Crop
    header_size: tuple[int, int] | None = None


def probe(path: str, limits: DecodeConfig, *, name: str) -> VideoInfo:
    """Find out what a video holds. The first frame is decoded, so what has no decoder is found here.

    Args:
        path: absolute path of a local file.
        name: what messages call the file, such as the base name of its URI.

    Raises:
        TerminalError: the file cannot become clips; the reason is one of ``video_file.REASONS``.
        TransientError: the file cannot be read at the moment.
    """
    with open_video(path, limits, name=name, stage="probe") as video:
        reader = FrameReader(video)
        _, shape = _first_look(video, reader)
        if video.missing_bytes:
            raise video.reject("truncated", f"the last {video.missing_bytes} bytes that its header lists are missing")
        duration_s, rate = video.header_duration_s, video.frame_rate
        if duration_s is None or duration_s <= 0 or rate is None:
            duration_s, rate = reader.measure()
        check_duration(video, duration_s)
        width, height = shape.upright_size
        return VideoInfo(
            width=width,
            height=height,
            fps=float(rate),
            duration_s=float(duration_s),
            container=video.container.format.name,
            codec=video.stream.codec_context.codec.canonical_name,
        )


def probe_header(path: str, limits: DecodeConfig, *, name: str, size_bytes: int) -> VideoInfo | None:
    """As ``probe``, from a video's header alone (``find_video_header``); None if that does not tell everything.

    What only a frame shows, such as HDR that the container does not mention, is found when the video is decoded.

    Args:
        size_bytes: of the whole video.

    Raises:
        TerminalError: the file cannot become clips.
    """
    with open_video(path, limits, name=name, stage="probe") as video:
        codec, rate, duration_s = video.stream.codec_context, video.frame_rate, video.header_duration_s
        is_one_track = len(video.container.streams) == 1 or not video.container.format.name.startswith("matroska")
        if not (is_one_track and rate and duration_s and duration_s > 0 and codec.width and codec.height):
            return None
        if video.bytes_beyond(size_bytes):
            return None
        _refuse_hdr(video, codec.color_trc)
        sar = fraction(video.stream.sample_aspect_ratio) or fraction(codec.sample_aspect_ratio)
        width, height = PictureShape.of_upright(codec.width, codec.height, sar).upright_size
        return VideoInfo(
            width=width,
            height=height,
            fps=float(rate),
            duration_s=float(duration_s),
            container=video.container.format.name,
            codec=codec.codec.canonical_name,
        )


def decode_windows(
    path: str, windows: Sequence[Window | Clip], limits: DecodeConfig, *, name: str
) -> Iterator[tuple[int, Frames | TerminalError]]:
    """Cut windows out of a video in one pass, from shortly before the first of them to the end of the last.

    Yields each window's index in ``windows`` with its frames (RGB, ``[T, H, W, 3]``, contiguous) or with the reason
    why this one window cannot be had, in the order in which they are settled. A window of fewer source frames than its
    bucket repeats the last.

    Raises:
        TerminalError: the file as a whole is refused; what was yielded before counts for nothing.
        TransientError: the file cannot be read at the moment.
    """
    with open_video(path, limits, name=name, stage="decode") as video:
        reader = FrameReader(video)
        frames, shape = _first_look(video, reader)
        cutters = [_Cutter(index, window, shape, video, reader) for index, window in enumerate(windows)]
        waiting = deque(sorted(cutters, key=lambda cutter: cutter.next_time_s))
        if waiting and waiting[0].next_time_s >= _WORTH_SEEKING_S and video.can_seek:
            frames = reader.skip_to(waiting[0].next_time_s)
        active: list[_Cutter] = []
        for current, reach_s in _reaches(frames):
            while waiting and waiting[0].next_time_s <= reach_s:
                active.append(waiting.popleft())
            for cutter in active:
                cutter.take_until(reach_s, current)
            for cutter in active:
                if cutter.result is not None:
                    yield cutter.index, cutter.result
            active = [cutter for cutter in active if cutter.result is None]
            if not active and not waiting:
                break
        reader.check()
        for cutter in chain(active, waiting):
            yield cutter.index, cutter.cut_short()


def _first_look(video: VideoFile, reader: FrameReader) -> tuple[Iterator[TimedFrame], PictureShape]:
    """All frames, the first of them looked at, and the shape of the picture."""
    frames = iter(reader)
    first = next(frames, None)
    if first is None:
        reader.check()
        raise AssertionError("a reader without frames passes no check")
    frame, stream = first.frame, video.stream
    check_size(video, frame.width, frame.height)
    _refuse_hdr(video, frame.color_trc, stream.codec_context.color_trc)
    sar = fraction(stream.sample_aspect_ratio) or fraction(stream.codec_context.sample_aspect_ratio)
    return chain([first], frames), PictureShape.of(frame, sar)


def _refuse_hdr(video: VideoFile, *characteristics: int) -> None:
    for transfer in map(hdr_transfer, characteristics):
        if transfer is not None:
            raise video.reject("hdr", f"its transfer characteristic is {transfer}; convert it to BT.709 first")


def _reaches(frames: Iterator[TimedFrame]) -> Iterator[tuple[TimedFrame, Fraction]]:
    """Each frame with the last moment that it is the nearest frame to; the last frame's is just before its end."""
    previous: TimedFrame | None = None
    for current in frames:
        if previous is not None:
            yield previous, (previous.time_s + current.time_s) / 2
        previous = current
    if previous is not None:
        yield previous, previous.time_s + previous.duration_s - _INSTANT_S


class _Cutter:
    """Collects the samples of one window."""

    def __init__(self, index: int, window: Window | Clip, shape: PictureShape, video: VideoFile, reader: FrameReader) -> None:
        bucket, crop = window.bucket, window.crop
        width, height = shape.upright_size
        if crop.x + crop.w > width or crop.y + crop.h > height:
            raise video.reject(
                "changed", f"the picture is {width}x{height}, but the plan crops {crop}; the file was replaced: plan it anew"
            )
        if window.header_size is not None and window.header_size != (width, height):
            claimed = f"{window.header_size[0]}x{window.header_size[1]}"
            raise video.reject("changed", f"the picture is {width}x{height}, but the file's header says {claimed}")
        if window.frame_end <= window.frame_start:
            raise ValueError(f"a window from frame {window.frame_start} to {window.frame_end} is empty")
        self.index = index
        self.result: Frames | TerminalError | None = None
        self._video, self._reader, self._shape, self._bucket = video, reader, shape, bucket
        self._converter = FrameConverter(shape, crop, bucket)
        self._first = window.frame_start
        self._wanted = min(window.frame_end - window.frame_start, bucket.num_frames)
        self._taken = 0
        self._last: TimedFrame | None = None
        self._frames: Frames | None = None

    @property
    def next_time_s(self) -> Fraction:
        """Time of the sample that is wanted next."""
        return self._time_s(self._taken)

    def take_until(self, reach_s: Fraction, timed: TimedFrame) -> None:
        """Fill the samples up to a moment with the frame that is nearest to them, and settle the result if it can be."""
        while self.result is None and self.next_time_s <= reach_s:
            self.result = self._problem_of(timed)
            if self.result is None:
                self._add(timed)
            if self._taken == self._wanted:
                self.result = self._complete()

    def cut_short(self) -> TerminalError:
        """Why the window is not full although the video is over."""
        if self._reader.is_damaged(self._time_s(0), self._time_s(self._wanted - 1)):
            return self._corrupt()
        promised_s, decoded_s = self._video.header_duration_s, self._reader.end_s
        if promised_s is not None and decoded_s < promised_s * Fraction(9, 10) - 1:
            problem = f"ends after {float(decoded_s):.2f} s, its header promises {float(promised_s):.2f} s"
            return self._video.reject("truncated", problem)
        return self._video.reject(
            "too_few_frames",
            f"decoded {self._taken} frames, need {self._wanted} at {self._bucket.fps:g} a second "
            f"from {float(self._time_s(0)):.2f} s; the video ends at {float(decoded_s):.2f} s",
        )

    def _time_s(self, sample: int) -> Fraction:
        return (self._first + sample) / self._bucket.exact_fps

    def _problem_of(self, timed: TimedFrame) -> TerminalError | None:
        size = (timed.frame.width, timed.frame.height)
        if size != (self._shape.coded_width, self._shape.coded_height):
            planned = f"{self._shape.coded_width}x{self._shape.coded_height}"
            problem = f"the picture changes from {planned} to {size[0]}x{size[1]} at {float(timed.time_s):.2f} s"
            return self._video.reject("resolution_changes", problem)
        return None if timed.is_intact else self._corrupt()

    def _add(self, timed: TimedFrame) -> None:
        if self._frames is None:
            self._frames = np.empty((self._bucket.num_frames, self._bucket.height, self._bucket.width, 3), np.uint8)
        if self._last is timed:
            self._frames[self._taken] = self._frames[self._taken - 1]
        else:
            self._converter.convert(timed.frame, self._frames[self._taken])
        self._last = timed
        self._taken += 1

    def _complete(self) -> Frames | TerminalError:
        assert self._frames is not None
        if self._reader.is_damaged(self._time_s(0), self._time_s(self._wanted - 1)):
            return self._corrupt()
        self._frames[self._wanted :] = self._frames[self._wanted - 1]
        return self._frames

    def _corrupt(self) -> TerminalError:
        start_s, end_s = float(self._time_s(0)), float(self._time_s(self._wanted - 1))
        return self._video.reject("corrupt", f"frames between {start_s:.2f} s and {end_s:.2f} s are damaged")
