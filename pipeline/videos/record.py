"""What was written of one shard: an object of its own, whose existence is the commit.

videos/<name>.mp4                            put if absent, before its shard is committed
done/<shape>/part-000017-<shard id>.json     the account of the shard and what is known of its videos
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import failpoints
from pipeline.errors import DatasetError
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary

FORMAT_VERSION = 1
VIDEO_FOLDER = "videos"
DONE_FOLDER = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRecord:
    """One video that was written."""

    name: str
    path: str
    """Of the file, inside the output."""
    sample_id: str
    source_uri: str
    """The file of the latent."""
    source_key: str
    """The tensor in that file."""
    source_row: int | None
    source_member: int | None
    layout: str
    """Of that tensor."""
    multiplier: float | None
    """What the latent had been multiplied by, and was divided by; None: nothing."""
    dropped_frames: int
    """Latent frames in front that were padding."""
    num_frames: int
    height: int
    width: int
    fps: float
    size_bytes: int
    xxh3: str
    """xxh3-128 of the file's bytes, hexadecimal."""
    degraded: str | None = None
    """The out-of-memory step it was made under, if any."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the input says about it."""


def done_path(bucket_key: str, index: int, shard_id: str) -> str:
    """``done/16x13x60x90/part-000017-<shard id>.json``."""
    return f"{DONE_FOLDER}/{bucket_key}/part-{index:06d}-{shard_id}.json"


def commit_videos(storage: Storage, summary: ShardSummary, videos: list[VideoRecord]) -> ShardSummary:
    """Put a shard's record unless one stands there. Losing that race is success: the winner's account is returned.

    Raises:
        TransientError: storage does not answer; whether the shard is committed is not known.
    """
    path = done_path(summary.bucket_key, summary.index, summary.shard_id)
    record = {"format_version": FORMAT_VERSION, "shard": asdict(summary), "videos": [asdict(video) for video in videos]}
    failpoints.reach("commit.before_put")
    if storage.put_if_absent(path, json.dumps(record, ensure_ascii=False, allow_nan=False).encode()):
        return summary
    return read_record(storage, path)[0]


def read_record(storage: Storage, path: str) -> tuple[ShardSummary, list[VideoRecord]]:
    """The account of a committed shard, and its videos. Raises: DatasetError: it is damaged, or of an unknown version."""
    try:
        record = storage.read_json(path)
        if record["format_version"] != FORMAT_VERSION:
            raise DatasetError(f"{path}: format version {record['format_version']}, but this program reads {FORMAT_VERSION}")
        shard = record["shard"]
        shard["rejections"] = tuple(Rejection(**rejection) for rejection in shard["rejections"])
        return ShardSummary(**shard), [VideoRecord(**video) for video in record["videos"]]
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: damaged record of a shard: {error}") from error
