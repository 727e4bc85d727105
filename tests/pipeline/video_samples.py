"""Small videos written on the spot: every frame shows its own number, so that exact sampling can be asserted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

Picture = npt.NDArray[np.uint8]
SIZE = (160, 96)
NUMBER_BITS = 10
FAST = {"preset": "ultrafast", "crf": "18"}


def numbered(index: int, size: tuple[int, int] = SIZE) -> Picture:
    """A picture ``[H, W, 3]`` of ten vertical bars, white for the bits of ``index`` that are set."""
    width, height = size
    bits = [(index >> bit) & 1 for bit in range(NUMBER_BITS)]
    columns = np.array([bits[x * NUMBER_BITS // width] for x in range(width)], np.uint8) * 200 + 30
    return np.ascontiguousarray(np.broadcast_to(columns[None, :, None], (height, width, 3)))


def read_number(picture: Picture) -> int:
    """The number that ``numbered`` wrote, after any resize of the whole picture."""
    width = picture.shape[1]
    centres = [(2 * bit + 1) * width // (2 * NUMBER_BITS) for bit in range(NUMBER_BITS)]
    return sum(int(picture[:, centre].mean() > 130) << bit for bit, centre in enumerate(centres))


def read_numbers(frames: npt.NDArray[np.uint8]) -> list[int]:
    return [read_number(frame) for frame in frames]


def quadrants(_: int, size: tuple[int, int] = SIZE) -> Picture:
    """Red, green / blue, white: tells every orientation from every other."""
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (200, 20, 20)
    picture[: height // 2, width // 2 :] = (20, 200, 20)
    picture[height // 2 :, : width // 2] = (20, 20, 200)
    picture[height // 2 :, width // 2 :] = (200, 200, 200)
    return picture


def read_quadrants(picture: Picture) -> str:
    """The quadrants' colours by letter, row by row, such as ``RG/BW``."""
    height, width = picture.shape[:2]

    def letter(y: int, x: int) -> str:
        red, green, blue = (int(value) > 110 for value in picture[y * height // 4, x * width // 4])
        return {(True, False, False): "R", (False, True, False): "G", (False, False, True): "B"}.get((red, green, blue), "W")

    return f"{letter(1, 1)}{letter(1, 3)}/{letter(3, 1)}{letter(3, 3)}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How to write one video."""

    num_frames: int = 49
    rate: Fraction = Fraction(8)
    size: tuple[int, int] = SIZE
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=lambda: dict(FAST))
    container_options: dict[str, str] = field(default_factory=dict)
    picture: Callable[[int, tuple[int, int]], Picture] = numbered
    pts: Sequence[int] | None = None
    """Presentation times in ticks of ``time_base``; None: one frame after the other."""
    time_base: Fraction | None = None
    gop: int = 12
    display: tuple[float, bool, bool] | None = None
    """Rotation in degrees, horizontal flip, vertical flip."""
    sar: Fraction | None = None
    codec_attributes: dict[str, Any] = field(default_factory=dict)
    dst_range: int = 1
    dst_matrix: int = 5
    audio: bool = False


def write_video(path: Path, sample: Sample | None = None, **changes: Any) -> Path:
    """Write a video as ``sample`` says, or as its fields by keyword."""
    sample = sample or Sample(**changes)
    with av.open(str(path), "w", container_options=sample.container_options) as container:
        stream = cast(VideoStream, container.add_stream(sample.codec, rate=sample.rate, options=sample.options))
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = *sample.size, sample.pix_fmt
        if sample.codec != "gif":
            context.gop_size = sample.gop
        if sample.time_base is not None:
            context.time_base = sample.time_base
        for name, value in sample.codec_attributes.items():
            setattr(context, name, value)
        if sample.sar is not None:
            context.sample_aspect_ratio = sample.sar
        if sample.display is not None:
            degrees, hflip, vflip = sample.display
            stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        sound = container.add_stream("aac", rate=16000, layout="mono") if sample.audio else None
        for index in range(sample.num_frames):
            frame = _frame(sample, index)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if sound is not None:
            _write_sound(container, sound, float(sample.num_frames / sample.rate))
    return path


def _frame(sample: Sample, index: int) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(sample.picture(index, sample.size), "rgb24")
    frame = rgb.reformat(
        format=sample.pix_fmt, src_color_range=2, dst_color_range=sample.dst_range, dst_colorspace=sample.dst_matrix
    )
    frame.pts = index if sample.pts is None else sample.pts[index]
    frame.time_base = sample.time_base or 1 / sample.rate
    return frame


def _write_sound(container: Any, stream: Any, seconds: float) -> None:
    for index in range(int(seconds * 16000) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, index * 1024
        for packet in stream.encode(frame):
            container.mux(packet)
    for packet in stream.encode():
        container.mux(packet)


def write_sound(path: Path, *, cover: bool = False) -> Path:
    """A file without a video stream, with a cover picture if asked for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(quadrants(0, (64, 64)), "rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            for packet in [*picture.encode(frame), *picture.encode()]:
                container.mux(packet)
        _write_sound(container, stream, 1.0)
    return path


def write_size_change(path: Path, first: tuple[int, int], then: tuple[int, int], num_frames: int) -> Path:
    """An MPEG-TS whose picture changes its size after ``num_frames`` frames, at 8 a second."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=8, options=FAST)
        stream.width, stream.height, stream.pix_fmt = *first, "yuv420p"
        for part, size in enumerate((first, then)):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 8), Fraction(8), {**FAST, "tune": "zerolatency"}
            for index in range(part * num_frames, (part + 1) * num_frames):
                frame = av.VideoFrame.from_ndarray(numbered(index, size), "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 8)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
            for packet in encoder.encode():
                packet.stream = stream
                container.mux(packet)
    return path


def flip_bytes(path: Path, packets: Sequence[int], seed: int = 0) -> Path:
    """Overwrite the bodies of some packets of an MP4 (by position in decoding order) with random bytes."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    for number in packets:
        position, size = places[number]
        assert position is not None
        data[position : position + size] = generator.bytes(size)
    path.write_bytes(data)
    return path
