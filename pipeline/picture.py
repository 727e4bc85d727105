"""From a decoded frame to RGB pixels of a bucket: orientation, pixel shape, colour, crop, resize.

Two systems of coordinates: *coded* pixels as the codec stores them, and *upright* pixels as a person sees them,
after the pixel aspect ratio and the display matrix. Crops are upright; conversion works on coded frames and turns
only the small result.

The crop comes before the resize. FFmpeg's crop filter moves pointers and copies nothing, so the resize reads no
pixel that is thrown away (6.6 ms against 8.0 ms for 1080p to 480x720), and the crop's edges fall exactly on the
bucket's edges, which cropping a resized picture cannot give. The resize is one swscale pass from the source's own
format to RGB: antialiased bicubic, accurate rounding, chroma interpolated at full resolution.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import av
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from pipeline.types import Bucket, Crop, Frames

# SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT. Numbers, because PyAV 17 does not name the last two.
_RESIZE_FLAGS = 0x4 | 0x40000 | 0x2000

_LIMITED_RANGE, _FULL_RANGE = 1, 2
_BT709, _BT601 = 1, 5
# AVColorSpace of a frame -> the matrix that swscale knows. What is missing here counts as untagged.
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}

_SAR_LIMITS = (Fraction(1, 4), Fraction(4))


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways to turn a coded picture upright: transposed first, then flipped."""

    transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """Read the display matrix, mirrors included; an angle between right angles goes to the nearest."""
        side_data = cast(Any, frame.side_data)
        try:
            matrix = bytes(side_data["DISPLAYMATRIX"])
        except KeyError:
            return cls()
        a, b, _, c, d = struct.unpack_from("=5i", matrix)  # shown x = a*x + c*y, shown y = b*x + d*y
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(transposed=False, flips_rows=d < 0, flips_columns=a < 0)
        return cls(transposed=True, flips_rows=b < 0, flips_columns=c < 0)

    def apply(self, image: Frames) -> Frames:
        """Turn ``[H, W, 3]`` upright, as a view."""
        if self.transposed:
            image = image.transpose(1, 0, 2)
        return image[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1]


@dataclass(frozen=True, slots=True)
class PictureShape:
    """How the coded pixels of a video become the picture that a person sees."""

    coded_width: int
    coded_height: int
    sar: Fraction
    """Width of a coded pixel divided by its height."""
    orientation: Orientation

    @classmethod
    def of(cls, frame: av.VideoFrame, sar: Fraction | None) -> PictureShape:
        """From a frame and the stream's pixel aspect ratio; a ratio beyond 1/4 to 4 is nonsense and ignored."""
        upright = cls.of_upright(frame.width, frame.height, sar)
        return replace(upright, orientation=Orientation.of(frame))

    @classmethod
    def of_upright(cls, width: int, height: int, sar: Fraction | None) -> PictureShape:
        """Of a picture that is known to need no turning."""
        usable = sar is not None and _SAR_LIMITS[0] <= sar <= _SAR_LIMITS[1]
        return cls(width, height, sar if sar is not None and usable else Fraction(1), Orientation())

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height, square pixels, the right way up."""
        width, height = max(1, round(self.coded_width * self.sar)), self.coded_height
        return (height, width) if self.orientation.transposed else (width, height)

    def coded_crop(self, crop: Crop) -> Crop:
        """The coded pixels behind an upright crop; offsets are rounded to even, so that chroma stays in place."""
        width, height = self.upright_size
        x = width - crop.x - crop.w if self.orientation.flips_columns else crop.x
        y = height - crop.y - crop.h if self.orientation.flips_rows else crop.y
        w, h = crop.w, crop.h
        if self.orientation.transposed:
            x, y, w, h = y, x, h, w
        left = min(round(x / self.sar / 2) * 2, self.coded_width - 1)
        top = min(round(y / 2) * 2, self.coded_height - 1)
        return Crop(
            x=left,
            y=top,
            w=max(1, min(round(w / self.sar), self.coded_width - left)),
            h=max(1, min(h, self.coded_height - top)),
        )


def hdr_transfer(transfer: int) -> str | None:
    """``PQ`` or ``HLG`` if the transfer characteristic is one that RGB for training cannot be made from."""
    return _HDR_TRANSFERS.get(transfer)


def source_colour(frame: av.VideoFrame) -> tuple[int, int]:
    """Matrix and range of a frame's pixels, in swscale's numbers.

    Tags are honoured. Untagged material is BT.709 from 1280 wide or above 576 high and BT.601 below, as players
    assume, and limited range unless its format is RGB, grey or ``yuvj``.
    """
    untagged = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
    matrix = _MATRICES.get(frame.colorspace, untagged)
    name = frame.format.name
    if frame.format.is_rgb or name.startswith("yuvj") or name == "pal8":
        return matrix, _FULL_RANGE
    if frame.color_range in (_LIMITED_RANGE, _FULL_RANGE):
        return matrix, frame.color_range
    return matrix, _FULL_RANGE if name.startswith("gray") else _LIMITED_RANGE


class FrameConverter:
    """Brings one crop of a video's frames to the pixels of one bucket."""

    def __init__(self, shape: PictureShape, crop: Crop, bucket: Bucket) -> None:
        self._orientation = shape.orientation
        self._crop = shape.coded_crop(crop)
        self._is_whole = (self._crop.w, self._crop.h) == (shape.coded_width, shape.coded_height)
        size = (bucket.width, bucket.height)
        self._width, self._height = size[::-1] if self._orientation.transposed else size
        self._reformatter = VideoReformatter()
        self._graph: Graph | None = None
        self._graph_format = ""

    def convert(self, frame: av.VideoFrame, out: Frames) -> None:
        """Write the frame as RGB ``[H, W, 3]`` into ``out``."""
        matrix, colour_range = source_colour(frame)
        rgb = self._reformatter.reformat(
            frame if self._is_whole else self._cropped(frame),
            self._width,
            self._height,
            "rgb24",
            src_colorspace=matrix,
            src_color_range=colour_range,
            dst_color_range=_FULL_RANGE,
            interpolation=_RESIZE_FLAGS,
            threads=1,
        )
        out[...] = self._orientation.apply(cast(Frames, rgb.to_ndarray()))

    def _cropped(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._graph is None or self._graph_format != frame.format.name:
            crop = self._crop
            self._graph = filter_graph(frame, "crop", f"{crop.w}:{crop.h}:{crop.x}:{crop.y}:exact=1")
            self._graph_format = frame.format.name
        self._graph.vpush(frame)
        return self._graph.vpull()


def filter_graph(like: av.VideoFrame, name: str, arguments: str) -> Graph:
    """A graph of one FFmpeg filter, for frames of the size and format of ``like``."""
    graph = Graph()
    source = graph.add_buffer(width=like.width, height=like.height, format=like.format, time_base=like.time_base)
    filter_ = graph.add(name, arguments)
    source.link_to(filter_)
    filter_.link_to(graph.add("buffersink"))
    graph.configure()
    return graph
