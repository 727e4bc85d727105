"""The nouns of the pipeline: plain frozen values that cross process boundaries.

Nothing here does I/O, and nothing imports Ray, PyAV or a model.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""Decoded frames, RGB, ``[T, H, W, 3]``."""

_BUCKET_KEY = re.compile(r"(\d+)x(\d+)x(\d+)@(\d+(?:\.\d+)?)")


@functools.lru_cache(maxsize=256)
def exact_fps(fps: float) -> Fraction:
    """A rate as a fraction; 29.97 and 23.976 mean their NTSC rates."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(float(ntsc) - fps) < 5e-3 and fps % 1 else Fraction(str(fps))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bucket:
    """One shape that clips are brought to: frames, pixels and frame rate.

    Written ``49x480x720@8``: 49 frames of 480 rows by 720 columns, 8 a second.
    """

    num_frames: int
    """Frames of a clip; 8k+1, so that encoding and decoding give the same count back."""
    height: int
    """Rows in pixels, a multiple of 16."""
    width: int
    """Columns in pixels, a multiple of 16."""
    fps: float
    """Frames a second at which the source is sampled."""

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % 8 != 1:
            below = max(1, (self.num_frames - 1) // 8 * 8 + 1)
            raise ValueError(
                f"bucket {self.key}: {self.num_frames} frames do not survive encoding and decoding; "
                f"use 8k+1, here {below} or {below + 8}"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 16 or side % 16:
                raise ValueError(f"bucket {self.key}: {name} {side} is not a positive multiple of 16")
        if self.fps <= 0:
            raise ValueError(f"bucket {self.key}: fps must be above 0")

    @property
    def key(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}@{self.fps:g}"

    @classmethod
    def parse(cls, key: str) -> Bucket:
        """Read ``49x480x720@8``. Raises: ValueError: another form, or a shape that does not encode."""
        match = _BUCKET_KEY.fullmatch(key.strip())
        if match is None:
            raise ValueError(f"bucket {key!r} is not of the form FRAMESxHEIGHTxWIDTH@FPS, such as 49x480x720@8")
        frames, height, width, fps = match.groups()
        return cls(num_frames=int(frames), height=int(height), width=int(width), fps=float(fps))

    @property
    def exact_fps(self) -> Fraction:
        """The rate as a fraction; see ``exact_fps``."""
        return exact_fps(self.fps)

    @property
    def frame_bytes(self) -> int:
        """Size of one clip's decoded frames."""
        return self.num_frames * self.height * self.width * 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """The part of the upright source picture that is kept, in its pixels."""

    x: int
    y: int
    w: int
    h: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What probing found, after rotation and pixel aspect ratio: the picture as a person sees it."""

    width: int
    height: int
    fps: float
    duration_s: float
    container: str
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """Where one file lies inside a tar."""

    name: str
    """Its path in the tar, without a leading ``./``."""
    offset: int
    """Of its first byte, from the start of the tar."""
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes

    def uri(self, tar_uri: str) -> str:
        """The address of this member."""
        return member_uri(tar_uri, self.name)


def member_uri(tar_uri: str, name: str) -> str:
    """The address of a member of a tar, such as ``s3://bucket/shard-000003.tar#kitchen/0001.mp4``."""
    return f"{tar_uri}#{name}"


def tar_uri_of(uri: str, name: str) -> str:
    """The tar of a member's address; the name says where it ends, as both may have a ``#`` in them."""
    return uri.removesuffix(f"#{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One planned sample: a window of one video, brought to one bucket."""

    sample_id: str
    uri: str
    """Of the video; of a member of a tar, as ``TarMember.uri`` makes it."""
    size_bytes: int
    """Of the file at ``file_uri``: a tar's as a whole, for one of its members."""
    version: str
    """ETag, or modification time: with the size, tells whether the source is still what was planned."""
    bucket: Bucket
    frame_start: int
    """First frame of the window, counted at the bucket's rate from the first presentation time."""
    frame_end: int
    """One past the last frame that the source has; fewer than the bucket's frames repeat the last."""
    crop: Crop
    source_fps: float
    source_width: int
    source_height: int
    member: TarMember | None = None
    """Where the video lies, if it is in a tar."""

    @property
    def file_uri(self) -> str:
        """The file to read: the video, or the tar that it is in."""
        return self.uri if self.member is None else tar_uri_of(self.uri, self.member.name)

    @property
    def header_size(self) -> tuple[int, int] | None:
        """Width and height of the upright picture, where only the video's header was seen to say so."""
        return None if self.member is None else (self.source_width, self.source_height)

    @property
    def num_source_frames(self) -> int:
        return self.frame_end - self.frame_start


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedClip:
    """The frames of one clip, and the hash of the file that they came from."""

    frames: Frames
    source_hash: str
    """xxh3-128 of the source file's bytes, hexadecimal."""


Status = Literal["quarantined", "filtered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A clip that is not in the dataset, and why.

    ``quarantined`` is a failure that somebody may want to look at; ``filtered`` is a rule of the
    configuration at work (too short, a duplicate).
    """

    sample_id: str
    uri: str
    frame_start: int = 0
    frame_end: int = 0
    """0 where it is a file as a whole."""
    status: Status
    stage: str
    reason: str
    detail: str
    file_key: str = ""
    """Of the file as it was planned, ``plan.file_key``: tells what was said of another content of that path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBytes:
    """A tensor as its bytes (little-endian, C order), its shape and the name of its dtype."""

    data: bytes | memoryview
    shape: tuple[int, ...]
    dtype: str
    """``float16``, ``bfloat16`` or ``float32``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensors:
    """Which tensors are kept of a clip that is encoded, and how."""

    dtype: str
    logvar: bool = True
    """The log-variance too."""
    first_frame: bool = False
    """Frame 0 encoded alone, and its pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedClip:
    """What the model made of one clip; tensors as the dataset stores them."""

    latent: TensorBytes
    """Posterior mean, unscaled, ``[C, F, H, W]``."""
    logvar: TensorBytes | None = None
    """Unclamped log-variance of the posterior, shaped as ``latent``."""
    first_frame_latent: TensorBytes | None = None
    """Posterior mean of frame 0 encoded alone, ``[C, 1, H, W]``."""
    first_frame_logvar: TensorBytes | None = None
    first_frame_png: bytes | None = None
    """Frame 0, lossless."""
    source_hash: str = ""
    """xxh3-128 of the source file's bytes, hexadecimal."""
    degraded: str | None = None
    """The out-of-memory step it was made under, if any."""
    psnr: float | None = None
    """dB between the source frames and their reconstruction, where quality was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """What one committed shard holds; stands in the footer of its Parquet object."""

    shard_id: str
    generation: int
    index: int
    bucket_key: str
    attempt_id: str
    recipe: str
    num_rows: int
    size_bytes: int
    """Bytes of tensors; the object itself is a little larger."""
    rejections: tuple[Rejection, ...] = ()
