"""From probed videos to clips, and from clips to shards. Pure: no I/O, the same input gives the same plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from pipeline.compact_set import CompactSet
from pipeline.config import ClipConfig
from pipeline.errors import TerminalError
from pipeline.geometry import available_frames, choose_bucket, cover_crop, upscale_factor
from pipeline.recipe import digest
from pipeline.types import Bucket, Clip, Rejection, Status, TarMember, VideoInfo

MIN_SHARDS = 32


def file_key(uri: str, size_bytes: int, version: str) -> str:
    """Tells this content of this path from every other."""
    return digest(uri, size_bytes, version)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedFile:
    """A listed file after probing: which it is, what the input says about it, or why it cannot be used."""

    uri: str
    size_bytes: int
    version: str
    columns: dict[str, Any] = field(default_factory=dict)
    error: TerminalError | None = None

    @property
    def key(self) -> str:
        return file_key(self.uri, self.size_bytes, self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedVideo(ProbedFile):
    """A listed video, and what it is. One in a tar has the tar's size and version."""

    info: VideoInfo | None = None
    member: TarMember | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedClip:
    """A clip with what passes through beside it."""

    clip: Clip
    columns: dict[str, Any]

    @property
    def sample_id(self) -> str:
        return self.clip.sample_id

    @property
    def bucket_key(self) -> str:
        return self.clip.bucket.key

    @property
    def uri(self) -> str:
        return self.clip.uri

    @property
    def file_key(self) -> str:
        return file_key(self.clip.uri, self.clip.size_bytes, self.clip.version)

    @property
    def files(self) -> dict[str, str]:
        clip = self.clip
        return {uri: file_key(uri, clip.size_bytes, clip.version) for uri in (clip.uri, clip.file_uri)}


class PlannedItem(Protocol):
    """What any kind of work plans: a clip to encode, a latent to decode."""

    @property
    def sample_id(self) -> str: ...

    @property
    def bucket_key(self) -> str:
        """Names the shape; items of one shape are batched together."""
        ...

    @property
    def uri(self) -> str:
        """Of the file that it is read from."""
        ...

    @property
    def file_key(self) -> str:
        """Of that file as it was planned."""
        ...

    @property
    def files(self) -> dict[str, str]:
        """URI and key of that file and, if it lies in a tar, of the tar."""
        ...

    @property
    def columns(self) -> dict[str, Any]:
        """What passes through beside it."""
        ...


Item = TypeVar("Item", bound=PlannedItem)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard(Generic[Item]):
    """Items of one shape that are worked on, committed and retried together."""

    shard_id: str
    index: int
    bucket_key: str
    items: tuple[Item, ...]


def plan_clips(
    videos: Iterable[ProbedVideo], buckets: tuple[Bucket, ...], config: ClipConfig, recipe: str
) -> Iterator[PlannedClip | Rejection]:
    """Cut every video into clips, in order; what yields no clip yields one rejection."""
    seen = CompactSet()
    for video in videos:
        for planned in _plan_video(video, buckets, config, recipe):
            if isinstance(planned, Rejection) or seen.add(planned.clip.sample_id):
                yield planned
            else:
                detail = f"{video.uri}: listed twice; the first listing is kept"
                yield _rejection(video, "filtered", "plan", "duplicate", detail)


def _plan_video(
    video: ProbedVideo, buckets: tuple[Bucket, ...], config: ClipConfig, recipe: str
) -> Iterator[PlannedClip | Rejection]:
    if video.info is None:
        error = video.error or TerminalError("probe", "unexpected", f"{video.uri}: probing said nothing")
        yield _rejection(video, "quarantined", error.stage, error.reason, error.detail)
        return
    info = video.info
    bucket = choose_bucket(info, buckets)
    if bucket is None and config.short == "repeat_last":
        fewest = min(bucket.num_frames for bucket in buckets)
        endless = replace(info, duration_s=max(bucket.num_frames / bucket.fps for bucket in buckets) + 1)
        bucket = choose_bucket(endless, tuple(bucket for bucket in buckets if bucket.num_frames == fewest))
    refusal = _refusal(video.uri, info, bucket, buckets, config)
    if bucket is None or refusal is not None:
        yield _rejection(video, "filtered", "plan", *(refusal or ("too_short", "")))
        return
    for start, end in _windows(available_frames(info.duration_s, bucket), bucket.num_frames, config.windows):
        yield _planned_clip(video, info, bucket, start, end, recipe)


def _refusal(
    uri: str, info: VideoInfo, bucket: Bucket | None, buckets: tuple[Bucket, ...], config: ClipConfig
) -> tuple[str, str] | None:
    """Why a rule of the configuration leaves this video out: reason and detail."""
    if bucket is None:
        shortest = min(buckets, key=lambda bucket: bucket.num_frames / bucket.fps)
        frames = available_frames(info.duration_s, shortest)
        return "too_short", (
            f"{uri}: {info.duration_s:.2f} s hold {frames} frames at {shortest.fps:g} fps, the shortest bucket "
            f"{shortest.key} needs {shortest.num_frames}. A new dataset may have a shorter bucket, or clip.short: repeat_last"
        )
    if info.fps < config.min_fps_share * bucket.fps:
        return "fps_too_low", (
            f"{uri}: {info.fps:.3g} fps, below {config.min_fps_share:g} of the bucket's {bucket.fps:g}: frames would "
            "repeat. A new dataset may have a lower clip.min_fps_share"
        )
    factor = upscale_factor(cover_crop(info.width, info.height, bucket), bucket)
    if config.max_upscale is not None and factor > config.max_upscale:
        return "too_small", (
            f"{uri}: {info.width}x{info.height} would be enlarged {factor:.2f} times for {bucket.key}; "
            f"clip.max_upscale is {config.max_upscale:g}"
        )
    return None


def _windows(available: int, wanted: int, policy: str) -> list[tuple[int, int]]:
    """Start and end of each clip in frames; the only window of a short video ends early."""
    if available <= wanted or policy == "first":
        return [(0, min(available, wanted))]
    return [(start, start + wanted) for start in range(0, available - wanted + 1, wanted)]


def _planned_clip(video: ProbedVideo, info: VideoInfo, bucket: Bucket, start: int, end: int, recipe: str) -> PlannedClip:
    crop = cover_crop(info.width, info.height, bucket)
    clip = Clip(
        sample_id=digest(video.key, bucket.key, start, end, crop.x, crop.y, crop.w, crop.h, recipe),
        uri=video.uri,
        size_bytes=video.size_bytes,
        version=video.version,
        bucket=bucket,
        frame_start=start,
        frame_end=end,
        crop=crop,
        source_fps=info.fps,
        source_width=info.width,
        source_height=info.height,
        member=video.member,
    )
    return PlannedClip(clip=clip, columns=video.columns)


def _rejection(video: ProbedVideo, status: Status, stage: str, reason: str, detail: str) -> Rejection:
    return Rejection(
        sample_id=video.key,  # by which a later generation knows it
        uri=video.uri,
        status=status,
        stage=stage,
        reason=reason,
        detail=detail,
        file_key=video.key,
    )


def shard_sizes(shapes: Mapping[str, tuple[int, int]], shard_bytes: int) -> Iterator[tuple[str, list[int]]]:
    """How many items each shard gets: those of each shape, in order, in shards of about ``shard_bytes``.

    A small input still makes 32 shards where it has the items, so that many actors share the work and a
    lost shard costs little. Items of one shape cost the same, so equal counts balance the work.

    Args:
        shapes: number of items, and bytes of output of one, by shape.
    """
    total = sum(count for count, _ in shapes.values())
    for key, (count, item_bytes) in sorted(shapes.items()):
        by_size = math.ceil(count * item_bytes / shard_bytes)
        by_share = math.ceil(MIN_SHARDS * count / total)
        parts = min(count, max(by_size, by_share))
        bounds = [part * count // parts for part in range(parts + 1)]
        yield key, [end - start for start, end in pairwise(bounds)]


def shard_id_of(generation: int, recipe: str, sample_ids: Iterable[str]) -> str:
    """Names a shard by what is in it."""
    return digest(generation, recipe, *sample_ids)[:16]
