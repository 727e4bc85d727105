"""Which part of a picture is kept, which bucket it goes to, and how many samples a video holds.

Pure arithmetic on sizes and times; no frame is touched here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from fractions import Fraction

from pipeline.types import Bucket, Crop, VideoInfo

_CLOCK_HZ = 1000
"""Of the coarsest container clock (Matroska, FLV): a header's duration may be so much too long."""


@functools.lru_cache(maxsize=1 << 12)
def cover_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """The largest centred part of a picture that has the bucket's aspect ratio.

    The crop is what is scaled to the bucket, so nothing is padded. A cropped side and both offsets are even,
    so that the crop never splits a chroma sample of 4:2:0 material; the centre is off by one pixel at most.

    Args:
        width, height: the upright picture in pixels, after rotation and pixel aspect ratio.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} has no pixels to crop")
    if width * bucket.height >= height * bucket.width:
        crop_w, crop_h = _even_side(Fraction(height * bucket.width, bucket.height), width), height
    else:
        crop_w, crop_h = width, _even_side(Fraction(width * bucket.height, bucket.width), height)
    return Crop(x=2 * round((width - crop_w) / 4), y=2 * round((height - crop_h) / 4), w=crop_w, h=crop_h)


def _even_side(exact: Fraction, whole: int) -> int:
    """The even length nearest to ``exact``; the whole side where that is as near."""
    even = max(2, 2 * round(exact / 2))
    return whole if even >= whole or whole - exact < 1 else even


def upscale_factor(crop: Crop, bucket: Bucket) -> float:
    """How much a crop is enlarged to fill its bucket; below 1 it is reduced."""
    return max(bucket.width / crop.w, bucket.height / crop.h)


def available_frames(duration_s: float, bucket: Bucket) -> int:
    """How many samples at the bucket's rate a video of this length holds: those k with k/fps before its end.

    A sample must begin at least a millisecond before the end, because containers round durations to their
    clock: 50 frames at 7 a second read as 7.143 s in Matroska, and sample 50 (7.14286 s) does not exist. The
    other direction needs no allowance: the last sample lies a whole frame before the end, so 49 frames at 8 a
    second count 49 whether the header says 6.125, 6.124 or, without the last frame's length, 6.002 s. A video
    of any positive length holds one sample.
    """
    if not math.isfinite(duration_s) or duration_s <= 0:
        return 0
    # (duration - clock) * fps, rounded up, in whole numbers: fractions take twenty times as long, and this is asked often.
    length, parts = duration_s.as_integer_ratio()
    fps = bucket.exact_fps
    return max(1, -(-(length * _CLOCK_HZ - parts) * fps.numerator // (parts * _CLOCK_HZ * fps.denominator)))


def choose_bucket(info: VideoInfo, buckets: Iterable[Bucket]) -> Bucket | None:
    """The bucket that distorts a video least among those that it is long enough for; None if there is none.

    Nearest aspect ratio first (by ``|log ratio|``, so that twice as wide is as far as twice as high), then most
    frames, then the largest picture that needs no enlarging, or else the one that needs least. The order of
    ``buckets`` has no influence.
    """

    def preference(bucket: Bucket) -> tuple[float, int, bool, int, str]:
        distance = abs(math.log(info.width * bucket.height / (info.height * bucket.width)))
        area = bucket.width * bucket.height
        enlarges = upscale_factor(cover_crop(info.width, info.height, bucket), bucket) > 1
        return (round(distance, 9), -bucket.num_frames, enlarges, area if enlarges else -area, bucket.key)

    fitting = [bucket for bucket in buckets if bucket.num_frames <= available_frames(info.duration_s, bucket)]
    return min(fitting, key=preference, default=None)
