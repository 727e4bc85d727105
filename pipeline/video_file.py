"""Opening a video that nobody vouches for: what may be opened, how large it may be, what its header promises."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError

REASONS = {
    "bad_timestamps": "More than a tenth of the frames go back in time.",
    "changed": "The content contradicts the plan: the file was replaced after it was planned, or its header is wrong.",
    "corrupt": "Frames of the clip, or over a tenth of the file's packets, cannot be decoded.",
    "decoder_crashed": "The decoding process died by its own doing, twice.",
    "empty_file": "The file has no bytes.",
    "encrypted": "The samples are encrypted (DRM).",
    "hdr": "PQ, HLG or Dolby Vision; making RGB of it needs a tone mapping that nobody chose.",
    "no_video_stream": "There are only audio, subtitles, data or a cover picture.",
    "not_a_video": "No demuxer that we allow recognises the file.",
    "out_of_memory": "Decoding needs more than decode.memory_bytes.",
    "resolution_changes": "The picture size changes inside the clip, or before it.",
    "timed_out": "Decoding took longer than decode.timeout_s, twice.",
    "too_few_frames": "The stream ends before the clip that was planned from its header.",
    "too_large": "The picture is larger than decode.max_side or decode.max_pixels.",
    "too_long": "The video is longer than decode.max_duration_s.",
    "truncated": "The file ends far before the end that its header promises.",
    "undecodable": "There is no decoder, or not one frame comes out of it.",
    "unexpected": "A fault of our own; the detail holds the traceback.",
}
"""Every reason for which reading a video can be refused, with its meaning."""

# Faults that say something about this machine at this moment, nothing about the file.
_SURROUNDINGS = (errno.ENOENT, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ESTALE)
# Demuxers that open other files (concat, hls, dash, image2 with patterns) are left out: a text file named .mp4
# would make them read anything on this machine.
_CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpegts,mpeg,gif,asf,flv,ogg",
    "protocol_whitelist": "file",
}
# PyAV 19 dropped the argument and always replaces.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
# A millisecond clock passes for the frame rate where a header names none.
_NONSENSE_RATE = 1000
# Profiles of Dolby Vision whose pixels are no YCbCr that anyone else can read.
_DOLBY_TAGS = ("dvh1", "dvhe", "dav1", "dva1", "dvav")


def rejection(stage: str, reason: str, detail: str) -> TerminalError:
    """A TerminalError with one of ``REASONS``."""
    assert reason in REASONS, reason
    return TerminalError(stage, reason, detail)


def fraction(ratio: Any) -> Fraction | None:
    """PyAV's rational (Fraction up to 18, AVRational from 19) as a Fraction; None for zero or undefined."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


def fraction_of(ratio: Any) -> Fraction:
    """As ``fraction``, where the value is known to be there."""
    return Fraction(ratio.numerator, ratio.denominator)


@dataclass(frozen=True, slots=True)
class VideoFile:
    """One open video and its video stream."""

    path: str
    name: str
    """What messages call the file."""
    stage: str
    """``probe`` or ``decode``: the stage that errors carry."""
    limits: DecodeConfig
    container: InputContainer
    stream: VideoStream

    def reject(self, reason: str, problem: str) -> TerminalError:
        return rejection(self.stage, reason, f"{self.name}: {problem}")

    @property
    def frame_rate(self) -> Fraction | None:
        """Frames a second as the header or FFmpeg's first look says; None where neither makes sense."""
        rate = fraction(self.stream.average_rate) or fraction(self.stream.guessed_rate)
        return rate if rate is not None and 0 < rate < _NONSENSE_RATE else None

    @property
    def has_decoding_times_only(self) -> bool:
        """Whether the container stores no presentation times: AVI, and AVI's way of storing a stream in Matroska.

        Frames leave the decoder in order of presentation, so that there decoding times, moved by a constant, are right.
        FFmpeg's presentation times are guesses and go backward where there are B-frames.
        """
        is_matroska = self.container.format.name.startswith("matroska")
        return self.container.format.name == "avi" or (is_matroska and self.stream.codec_context.codec_tag.strip("\0") != "")

    @property
    def can_seek(self) -> bool:
        """Whether the container has an index by presentation time; elsewhere seeking lands anywhere."""
        return self.container.format.name.startswith(("mov", "matroska")) and not self.has_decoding_times_only

    @property
    def header_duration_s(self) -> Fraction | None:
        """Length of the video stream as the header says; None if it says nothing, or only for all streams together."""
        if self.container.format.name.startswith("mpeg"):
            return None  # program and transport streams have no header; FFmpeg guesses, and was 0.7 s short
        if self.stream.duration and self.stream.time_base:
            return self.stream.duration * fraction_of(self.stream.time_base)
        if self.container.duration and len(self.container.streams) == 1:
            return Fraction(self.container.duration, 1_000_000) - self._lead_s
        return None

    @property
    def _lead_s(self) -> Fraction:
        """Time before the first frame that a Matroska duration includes."""
        if not self.container.format.name.startswith("matroska") or not self.stream.time_base:
            return Fraction(0)
        return max(Fraction(0), (self.stream.start_time or 0) * fraction_of(self.stream.time_base))

    @property
    def missing_bytes(self) -> int:
        """How far the sample table of an MP4 reaches beyond the end of the file."""
        return self.bytes_beyond(self.container.size)

    def bytes_beyond(self, size_bytes: int) -> int:
        """How far the sample table of an MP4 reaches beyond a size."""
        if not self.container.format.name.startswith("mov"):
            return 0
        latest = self.stream.index_entries[-32:]
        reach = max((entry.pos + entry.size for entry in latest), default=0)
        return max(0, reach - size_bytes)


@contextmanager
def open_video(path: str, limits: DecodeConfig, *, name: str, stage: str) -> Iterator[VideoFile]:
    """Open a local file by its absolute path and check it against the limits.

    Raises:
        TerminalError: the file is not a video, or not one that the limits allow.
        TransientError: the file cannot be read at the moment.
    """
    _check_regular_file(path, name=name, stage=stage)
    try:
        container = av.open(
            path,
            mode="r",
            # FFmpeg decodes a frame or two to find the format, before anybody can look at the size.
            options={"max_pixels": _codec_max_pixels(limits)},
            container_options=_CONTAINER_OPTIONS,
            **_METADATA,
        )
    except MemoryError:
        raise
    except (FFmpegError, ValueError, OSError) as error:
        raise_if_transient(error, path, name)
        raise rejection(stage, "not_a_video", f"{name}: no demuxer recognises it ({describe(error)})") from error
    with container:
        yield _checked(container, path, limits, name, stage)


def _check_regular_file(path: str, *, name: str, stage: str) -> None:
    # A relative name such as "http:x.mp4" would be taken for a protocol.
    if not os.path.isabs(path):
        raise ValueError(f"{path!r} is not an absolute path")
    try:
        status = os.stat(path)
    except OSError as error:
        raise TransientError(f"{name}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise rejection(stage, "not_a_video", f"{name}: not a regular file")
    if status.st_size == 0:
        raise rejection(stage, "empty_file", f"{name}: the file has no bytes")


def _checked(container: InputContainer, path: str, limits: DecodeConfig, name: str, stage: str) -> VideoFile:
    covers = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
    streams = [s for s in container.streams.video if s not in covers]
    if not streams:
        found = sorted({"cover picture" if s in covers else s.type for s in container.streams})
        raise rejection(stage, "no_video_stream", f"{name}: holds {' and '.join(found) or 'nothing'}, but no video stream")
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
    video = VideoFile(path, name, stage, limits, container, stream)
    if getattr(stream, "codec_context", None) is None:
        raise video.reject("undecodable", "no decoder for its codec")
    check_size(video, stream.codec_context.width, stream.codec_context.height)
    if stream.codec_context.codec_tag in _DOLBY_TAGS:
        raise video.reject("hdr", "Dolby Vision without a standard base layer; convert it to BT.709 first")
    duration = video.header_duration_s
    if duration is not None:
        check_duration(video, duration)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    codec = stream.codec_context
    codec.options = {**codec.options, "max_pixels": _codec_max_pixels(limits)}
    codec.thread_type = "AUTO" if limits.threads > 1 else "NONE"
    codec.thread_count = limits.threads
    return video


def _codec_max_pixels(limits: DecodeConfig) -> str:
    """The limit for codecs, which count their buffers' padding too; ``check_size`` is exact."""
    return str(limits.max_pixels + 128 * limits.max_side)


def check_size(video: VideoFile, width: int, height: int) -> None:
    """Raises: TerminalError: the picture is beyond the limits."""
    limits = video.limits
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise video.reject(
            "too_large",
            f"{width}x{height} pixels; decode.max_side is {limits.max_side}, decode.max_pixels {limits.max_pixels}",
        )


def check_duration(video: VideoFile, duration_s: Fraction) -> None:
    """Raises: TerminalError: the video is longer than the limit."""
    allowed_s = video.limits.max_duration_s
    if duration_s > allowed_s:
        raise video.reject("too_long", f"{float(duration_s):.1f} s long; decode.max_duration_s is {allowed_s:g}")


def raise_if_transient(error: BaseException, path: str, name: str) -> None:
    """Turn a failing disk into a TransientError, so that no video is blamed for it."""
    number = getattr(error, "errno", None)
    if number in _SURROUNDINGS or (number == errno.EIO and not _can_be_read(path)):
        raise TransientError(f"{name}: cannot be read: {describe(error)}") from error


def _can_be_read(path: str) -> bool:
    """Whether an I/O error was FFmpeg's: its Matroska demuxer calls damaged data so."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def describe(error: BaseException) -> str:
    """An FFmpeg error in its own words, without our temporary path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
