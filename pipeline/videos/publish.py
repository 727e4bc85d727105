"""The end of a decode run: the quarantine table and, last, the manifest of all videos."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import xxhash

from pipeline.compact_set import CompactSet
from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import DatasetError
from pipeline.quarantine import QUARANTINE_PATH, QuarantineTable
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.videos.record import FORMAT_VERSION, VIDEO_FOLDER, VideoRecord, read_record

logger = logging.getLogger(__name__)

MANIFEST_PATH = "manifest.json"
INDEX_FOLDER = "index"
MOST_FIRST = 60
"""Videos that are returned, for a page that shows some."""
_VIDEOS_PER_PIECE = 1 << 17


def publish_videos(
    storage: Storage,
    records: Iterable[str],
    rejections: Iterable[Rejection],
    info: dict[str, Any],
    *,
    latest: Callable[[ShardSummary], ShardSummary] = lambda summary: summary,
    num_videos: int | None = None,
    threads: int = 16,
) -> list[VideoRecord]:
    """Write what names all videos that are committed. Running it again with the same records writes the same.

    Args:
        records: paths of the committed shards' records; their order is the order of the videos.
        rejections: what the plan already left out; those of the shards are added.
        info: more for the manifest: how many generations the plan has, the recipe.
        latest: leaves out of a shard's account what a later generation has planned again.
        num_videos: how many there should be, where somebody has counted.

    Returns:
        The first videos.

    Raises:
        DatasetError: a record is damaged, or they name another number of videos. The manifest is not written.
    """
    index = _IndexPieces(storage)
    num_shards = 0
    with QuarantineTable() as quarantine:
        for summary, written in ordered_map(lambda path: read_record(storage, path), records, threads):
            num_shards += 1
            index.begin(summary.generation)
            for video in written:
                index.add(video)
            for rejection in latest(summary).rejections:
                quarantine.add(rejection)
        for rejection in rejections:
            quarantine.add(rejection)
    if num_videos not in (None, index.num_videos):
        raise DatasetError(f"{storage.uri}: the shards name {index.num_videos} videos, but {num_videos} were committed")
    storage.put(QUARANTINE_PATH, quarantine.data)
    storage.put_json(
        MANIFEST_PATH,
        {
            "format_version": FORMAT_VERSION,
            "kind": "videos",
            "num_videos": index.num_videos,
            "num_shards": num_shards,
            "num_quarantined": quarantine.counts["quarantined"],
            "num_filtered": quarantine.counts["filtered"],
            "num_unnamed": _count_unnamed(storage, index.paths),
            "size_bytes": index.size_bytes,
            **info,
            "index": index.finish(),
        },
    )
    return index.first


class _IndexPieces:
    """Files of JSON lines, one a video, of bounded size, each of one generation and named by what is in it."""

    def __init__(self, storage: Storage) -> None:
        self.first: list[VideoRecord] = []
        self.paths = CompactSet()
        self.num_videos = self.size_bytes = 0
        self._storage = storage
        self._lines: list[bytes] = []
        self._files: list[dict[str, Any]] = []
        self._generation = self._number = 0

    def begin(self, generation: int) -> None:
        """What follows is of this generation: the pieces of those before stay as they are when one is added."""
        if generation != self._generation:
            if self._lines:
                self._write()
            self._generation, self._number = generation, 0

    def add(self, video: VideoRecord) -> None:
        self.num_videos += 1
        self.size_bytes += video.size_bytes
        self.paths.add(video.path)
        if len(self.first) < MOST_FIRST:
            self.first.append(video)
        self._lines.append(json.dumps(asdict(video), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        if len(self._lines) >= _VIDEOS_PER_PIECE:
            self._write()

    def finish(self) -> list[dict[str, Any]]:
        if self._lines:
            self._write()
        return self._files

    def _write(self) -> None:
        data = b"".join(self._lines)
        digest = xxhash.xxh3_128_hexdigest(data)
        path = f"{INDEX_FOLDER}/{self._generation:04d}-{self._number:05d}-{digest[:16]}.jsonl"
        self._number += 1
        self._storage.put_if_absent(path, data)
        self._files.append({"path": path, "num_videos": len(self._lines), "size_bytes": len(data), "xxh3": digest})
        self._lines.clear()


def _count_unnamed(storage: Storage, named: CompactSet) -> int:
    """Videos left by an attempt that died, of a latent that was replaced since; whoever takes the folder as it is is told."""
    unnamed = [found.uri for found in storage.walk(VIDEO_FOLDER) if found.uri not in named]
    if unnamed:
        logger.warning("videos that the manifest does not name count=%d first=%s", len(unnamed), min(unnamed))
    return len(unnamed)


def read_videos(storage: Storage) -> Iterator[dict[str, Any]]:
    """Every finished video, in order, as ``VideoRecord`` has it. Raises: FileNotFoundError: there is no manifest."""
    for file in storage.read_json(MANIFEST_PATH)["index"]:
        yield from map(json.loads, storage.read(file["path"]).splitlines())


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
