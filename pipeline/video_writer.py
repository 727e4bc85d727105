"""Frames to a video file that every player shows in the right colours."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av

from pipeline.types import Frames

_BT709 = 1  # FFmpeg's number of the matrix, the primaries and the transfer curve alike
_LIMITED_RANGE = 1


def write_mp4(path: str | Path, frames: Frames, fps: float | Fraction, *, crf: int = 18) -> None:
    """Write H.264 in mp4, header in front; the file appears under its name when it is whole.

    Args:
        frames: uint8 RGB ``[T, H, W, 3]``; H and W even.
        crf: quality; 18 is visually lossless, larger is smaller.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(container, frames, Fraction(fps).limit_denominator(1001), crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(container: av.container.OutputContainer, frames: Frames, fps: Fraction, crf: int) -> None:
    stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "medium"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    # Without the tags players guess BT.601 for small pictures; without the conversion red turns orange.
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
    container.mux(stream.encode(None))
