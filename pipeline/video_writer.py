"""Frames to a video file that every player shows in the right colours.

Equal frames give equal bytes: one thread an encoder, because how many there are changes what x264 writes, and no random
ids or dates.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, cast

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from pipeline.types import Frames, exact_fps

Container = Literal["mp4", "mkv", "png", "webp"]
"""mp4: H.264 for every player. mkv: FFV1, the exact pixels. png: the exact pixels, a zip of numbered pictures.
webp: an animated picture for a first look; equal frames become one that stays longer."""

_SUFFIXES = {"mp4": ".mp4", "mkv": ".mkv", "png": ".zip", "webp": ".webp"}
_MEDIA_TYPES = {"mp4": "video/mp4", "mkv": "video/x-matroska", "png": "application/zip", "webp": "image/webp"}
MIN_FPS, MAX_FPS = 0.01, 1000.0

# FFmpeg's numbers. 1 is BT.709 as matrix, as primaries and as transfer curve; as matrix, 0 is RGB.
_BT709, _RGB = 1, 0
_LIMITED_RANGE, _FULL_RANGE = 1, 2
# SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP. Numbers, because PyAV 17 does not name them all.
_SCALE_FLAGS = 0x4 | 0x40000 | 0x2000 | 0x4000


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """What a video is written as."""

    container: Container = "mp4"
    crf: int = 18
    """Quality of mp4, 1 to 51: 18 is visually lossless, larger is smaller. The other containers do not use it."""

    def __post_init__(self) -> None:
        if self.container not in _SUFFIXES:
            raise ValueError(f"container {self.container!r}: expected {', '.join(_SUFFIXES)}")
        if not 1 <= self.crf <= 51:
            # 0 makes x264 write a profile that browsers do not play.
            raise ValueError(f"crf {self.crf}: expected 1 (best) to 51; for exact pixels use container mkv or png")

    @property
    def suffix(self) -> str:
        """Of a file's name, with the dot."""
        return _SUFFIXES[self.container]

    @property
    def media_type(self) -> str:
        return _MEDIA_TYPES[self.container]


class Sink(Protocol):
    """What a video is written to: any binary file open for writing. It is never sought, and not closed."""

    def write(self, data: bytes, /) -> object: ...


class VideoEncoder:
    """Writes one video, chunk by chunk.

    ``target`` gets everything when the encoder is closed; with ``fragmented`` (mp4 alone) each chunk as soon as it is
    encoded, but for its last frame. A fragmented file that is whole ends in an ``mfra`` box. As a context manager,
    an error inside leaves nothing in the target, or a fragmented file without that box.

    Args:
        target: a path is written in place, removed by an error, and cannot be fragmented; a sink is given what was
            written to a temporary file.
        fps: a float such as 29.97 means the NTSC rate.
        height, width: in pixels; even for mp4.

    Raises:
        ValueError: what is asked for cannot be written.
    """

    def __init__(
        self,
        target: Sink | Path,
        format: VideoFormat,
        fps: Fraction | float,
        height: int,
        width: int,
        *,
        fragmented: bool = False,
    ) -> None:
        if fragmented and format.container != "mp4":
            raise ValueError(f"container {format.container} cannot be fragmented: use mp4")
        if fragmented and isinstance(target, Path):
            raise ValueError(f"{target}: a fragmented video goes to a sink; open the file")
        if format.container == "mp4" and (height % 2 or width % 2):
            raise ValueError(f"frames of {height}x{width}: mp4 takes even sizes only; use mkv or png")
        if not MIN_FPS <= fps <= MAX_FPS:
            raise ValueError(f"{fps} frames a second: expected {MIN_FPS:g} to {MAX_FPS:g}")
        rate = (fps if isinstance(fps, Fraction) else exact_fps(fps)).limit_denominator(1001)
        self.num_frames = 0
        self._shape = (height, width, 3)
        self._sink = None if isinstance(target, Path) else _Valve(target)
        # Where the whole file is needed before its first byte is known: mp4's index goes in front.
        self._spool = None if fragmented or self._sink is None else tempfile.TemporaryDirectory(prefix="video-")
        self._path = Path(self._spool.name) / "video" if self._spool else target if isinstance(target, Path) else None
        self._is_whole = False
        self._writer: _Writer
        try:
            if format.container == "png" and self._path is not None:
                self._writer = _ZipWriter(self._path)
            else:
                self._writer = _StreamWriter(self._path or cast(_Valve, self._sink), format, rate, height, width)
        except BaseException:
            self._discard()
            raise
        self._closed = False

    def add(self, frames: Frames) -> None:
        """Append frames ``[t, H, W, 3]``, uint8 RGB. Raises: ValueError: other frames, or after the end."""
        if self._closed:
            raise ValueError("the video is closed; no frames can be added")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            expected = ", ".join(map(str, self._shape))
            raise ValueError(f"frames {frames.dtype} {list(frames.shape)}: expected uint8 [t, {expected}]")
        try:
            for pixels in frames:
                self._writer.write(self.num_frames, np.ascontiguousarray(pixels))
                self.num_frames += 1
        except BaseException:
            self.abort()
            raise

    def close(self) -> None:
        """Finish the video. Raises: ValueError: it has no frames."""
        if self._closed:
            return
        try:
            if self.num_frames == 0:
                raise ValueError("a video without frames: add at least one")
            self._writer.finish()
            if self._path is not None and self._sink is not None:
                with self._path.open("rb") as file:
                    shutil.copyfileobj(file, self._sink)
            self._is_whole = True
        finally:
            self.abort()

    def abort(self) -> None:
        """Give the video up: nothing more reaches the sink, and a file at a path is removed."""
        if not self._closed:
            self._closed = True
            if self._sink is not None:
                self._sink.shut = True
            # After an error, closing may fail too; the first error is the one to tell.
            with contextlib.suppress(Exception):
                self._writer.release()
            self._discard()

    def _discard(self) -> None:
        if self._spool is not None:
            self._spool.cleanup()
        elif self._path is not None and not self._is_whole:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def encode_video(frames: Frames | Iterable[Frames], fps: Fraction | float, format: VideoFormat | None = None) -> bytes:
    """A whole video of frames ``[T, H, W, 3]``, or of such chunks in turn.

    Raises:
        ValueError: as ``VideoEncoder``.
    """
    chunks = _chunks(frames)
    first = next(chunks, None)
    if first is None:
        raise ValueError("a video without frames: add at least one")
    sink = io.BytesIO()
    with VideoEncoder(sink, format or VideoFormat(), fps, *first.shape[1:3]) as encoder:
        for chunk in chain([first], chunks):
            encoder.add(chunk)
    return sink.getvalue()


def _chunks(frames: Frames | Iterable[Frames]) -> Iterator[Frames]:
    return iter([frames] if isinstance(frames, np.ndarray) else frames)


def _png_name(index: int) -> str:
    return f"{index:05}.png"


def _png(pixels: Frames) -> bytes:
    file = io.BytesIO()
    # Of the levels, 1 is three times as fast as the default for a few percent more.
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


class _Valve:
    """A sink that can only be written to, until it is shut: PyAV ends a file in order even where it must not look ended."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.shut = False

    def write(self, data: bytes, /) -> int:
        if not self.shut:
            self._sink.write(data)
        return len(data)


class _Writer(Protocol):
    """One file on its way."""

    def write(self, index: int, pixels: Frames) -> None: ...

    def finish(self) -> None:
        """Write what is still held back, and the end of the file."""
        ...

    def release(self) -> None:
        """Free what is held; safe after ``finish``, and where that failed."""
        ...


class _ZipWriter:
    """PNG files, stored: they are compressed already."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def write(self, index: int, pixels: Frames) -> None:
        # Without a date given, ZipInfo has the earliest there is.
        self._zip.writestr(zipfile.ZipInfo(_png_name(index)), _png(pixels))

    def finish(self) -> None:
        self._zip.close()

    def release(self) -> None:
        self._zip.close()


class _StreamWriter:
    """What FFmpeg writes: mp4, mkv and webp."""

    def __init__(self, target: Path | _Valve, format: VideoFormat, rate: Fraction, height: int, width: int) -> None:
        fragmented = not isinstance(target, Path)
        file = str(target) if isinstance(target, Path) else target
        muxer, muxer_options = _muxer(format.container, fragmented)
        self._container = av.open(file, "w", format=muxer, options={"fflags": "+bitexact", **muxer_options})
        codec, self._pixels, codec_options = _codec(format, fragmented)
        self._stream = cast(VideoStream, self._container.add_stream(codec, rate=rate, options=codec_options))
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = self._pixels
        self._time_base = 1 / rate
        self._reformatter = VideoReformatter()
        context = self._stream.codec_context
        context.thread_count = 1
        # Without the tags players guess BT.601 for small pictures; without the conversion red turns orange.
        is_yuv = self._pixels == "yuv420p"
        context.colorspace = _BT709 if is_yuv else _RGB
        context.color_primaries = context.color_trc = _BT709
        context.color_range = self._range = _LIMITED_RANGE if is_yuv else _FULL_RANGE

    def write(self, index: int, pixels: Frames) -> None:
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format=self._pixels,
            dst_colorspace=_BT709 if self._pixels == "yuv420p" else None,
            src_color_range=_FULL_RANGE,
            dst_color_range=self._range,
            interpolation=_SCALE_FLAGS,
            threads=1,
        )
        frame.pts, frame.time_base = index, self._time_base
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def release(self) -> None:
        self._container.close()


def _muxer(container: Container, fragmented: bool) -> tuple[str, dict[str, str]]:
    """FFmpeg's name of a container, and its options."""
    if container == "mkv":
        return "matroska", {}
    if container == "webp":
        return "webp", {"loop": "0"}
    if not fragmented:
        return "mp4", {"movflags": "+faststart"}
    # A fragment a frame, because one is only written when the next begins.
    return "mp4", {"movflags": "+empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}


def _codec(format: VideoFormat, fragmented: bool) -> tuple[str, str, dict[str, str]]:
    """FFmpeg's name of a codec, its pixel format, and its options."""
    if format.container == "mkv":
        # Every frame stands alone and has checksums; four slices, so that players decode in parallel.
        return "ffv1", "bgr0", {"level": "3", "g": "1", "slices": "4", "slicecrc": "1"}
    if format.container == "webp":
        return "libwebp_anim", "bgra", {"quality": "75", "compression_level": "1"}
    # x264's macroblock tree, on by default, is not deterministic in small pictures: of equal frames at 160x32 about one
    # encoding in a hundred came out different, none of 250 without it.
    options = {"crf": str(format.crf), "preset": "medium", "x264-params": "no-mbtree=1"}
    if fragmented:
        # Otherwise x264 looks fifty frames ahead before it gives the first. A sixth more bytes, 0.4 dB less.
        options["tune"] = "zerolatency"
    return "libx264", "yuv420p", options
