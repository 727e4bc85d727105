"""The end of a decode run: the quarantine table and, last, the manifest of all videos."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import DatasetError
from pipeline.quarantine import QUARANTINE_PATH, QuarantineTable
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.videos.record import FORMAT_VERSION, VIDEO_FOLDER, VideoRecord, read_record

logger = logging.getLogger(__name__)

MANIFEST_PATH = "manifest.json"


def publish_videos(
    storage: Storage,
    shards: Iterable[tuple[str, ShardSummary]],
    rejections: Iterable[Rejection],
    info: dict[str, Any],
    *,
    threads: int = 16,
) -> list[VideoRecord]:
    """Write what names all videos that are committed. Running it again with the same records writes the same.

    Args:
        shards: path and account of every committed shard; their order is the order of the videos.
        rejections: what the plan already left out; those of the shards are added.
        info: more for the manifest: how many generations the plan has, the recipe.

    Returns:
        Every video.

    Raises:
        DatasetError: a record is damaged.
    """
    videos: list[VideoRecord] = []
    num_shards = 0
    with QuarantineTable() as quarantine:
        for summary, written in ordered_map(lambda shard: (shard[1], read_record(storage, shard[0])[1]), shards, threads):
            num_shards += 1
            videos += written
            for rejection in summary.rejections:
                quarantine.add(rejection)
        for rejection in rejections:
            quarantine.add(rejection)
    storage.put(QUARANTINE_PATH, quarantine.data)
    # Left by an attempt that died, of a latent that was replaced since: whoever takes the folder for the output is told.
    unnamed = {found.uri for found in storage.list(VIDEO_FOLDER)} - {video.path for video in videos}
    if unnamed:
        logger.warning("videos that the manifest does not name count=%d first=%s", len(unnamed), min(unnamed))
    storage.put_json(
        MANIFEST_PATH,
        {
            "format_version": FORMAT_VERSION,
            "kind": "videos",
            "num_videos": len(videos),
            "num_shards": num_shards,
            "num_quarantined": quarantine.counts["quarantined"],
            "num_filtered": quarantine.counts["filtered"],
            "num_unnamed": len(unnamed),
            "size_bytes": sum(video.size_bytes for video in videos),
            **info,
            "videos": [asdict(video) for video in videos],
        },
    )
    return videos


def read_counts(storage: Storage) -> tuple[int, int, int, int] | None:
    """Generations, videos, quarantined and filtered as the manifest has them; None where there is none.

    Raises:
        DatasetError: the manifest is damaged, or another program's.
    """
    try:
        manifest = json.loads(storage.read(MANIFEST_PATH))
        names = ("num_videos", "num_quarantined", "num_filtered")
        return (manifest.get("generations", 0), *(manifest[name] for name in names))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f"{storage.uri}/{MANIFEST_PATH}: damaged, or not a manifest of videos: {error}") from error
