"""The output of the decode job: every record against the plan, every video against its record, the manifest against all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import DatasetError
from pipeline.plan_store import Generation, ShardRef
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from pipeline.validation.findings import Finding, damaged
from pipeline.validation.plan_view import PlanView
from pipeline.videos.publish import MANIFEST_PATH
from pipeline.videos.record import VIDEO_FOLDER, VideoRecord, read_record

_BLOCK_BYTES = 16 << 20
_HEAD_BYTES = 12
# How files of each container begin, and at which byte.
_SIGNATURES = {".mp4": (4, b"ftyp"), ".mkv": (0, b"\x1a\x45\xdf\xa3"), ".webp": (8, b"WEBP"), ".zip": (0, b"PK")}


@dataclass(slots=True, kw_only=True)
class VideoChecks:
    """Validates one folder of videos. ``findings`` is run once; the counts are right after it."""

    plan: PlanView
    threads: int
    deep: frozenset[int] | None
    """Numbers of the shards whose videos are read whole, of the others the first bytes; None: all."""
    read_whole: int = 0
    _manifest: dict[str, Any] | None = None
    _videos: dict[str, VideoRecord] = field(default_factory=dict)
    """By path."""
    _sizes: dict[str, int] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found."""
        storage = self.plan.storage
        self._sizes = {found.uri: found.size_bytes for found in storage.list(VIDEO_FOLDER)}
        yield from self._open_manifest()
        yield from self.plan.add_planning()
        for number, (generation, shard) in enumerate(self.plan.planned_shards()):
            if missing := self.plan.find_missing(shard):
                yield missing
                continue
            yield from self._check_record(number, generation, shard)
        if self._manifest is not None and not self.plan.unread and not self.plan.pending:
            yield from self._check_manifest(self._manifest)
        yield from self.plan.check_account()
        if self._manifest is not None:
            yield from self.plan.check_quarantine()

    def find_orphans(self) -> Iterator[Finding]:
        """Objects that neither plan nor record names."""
        yield from self.plan.find_orphans()
        if not self.plan.unread and not self.plan.pending:  # else a shard to come may be theirs
            for path in sorted(self._sizes.keys() - self._videos.keys()):
                yield Finding(path, "orphan", "a video that a record names", "another")

    @property
    def manifest(self) -> dict[str, Any] | None:
        """None: there is none, or it cannot be trusted."""
        return self._manifest

    def _open_manifest(self) -> Iterator[Finding]:
        try:
            manifest = self.plan.storage.read_json(MANIFEST_PATH)
            if manifest["kind"] != "videos" or not isinstance(manifest["videos"], list):
                raise DatasetError("another program's manifest")
        except FileNotFoundError:
            yield Finding(MANIFEST_PATH, "missing", "the manifest of finished videos", "nothing; run the job again to finish it")
        except Exception as error:  # whatever stands there
            yield damaged(MANIFEST_PATH, error)
        else:
            self._manifest = manifest

    def _check_record(self, number: int, generation: Generation, shard: ShardRef) -> Iterator[Finding]:
        path = self.plan.commits.path(shard)
        try:
            summary, videos = read_record(self.plan.storage, path)
        except Exception as error:  # whatever stands there
            self.plan.add(shard, None)
            yield damaged(path, error)
            return
        self.plan.add(shard, summary)
        yield from _check_summary(path, generation, shard, summary, videos)
        is_deep = self.deep is None or number in self.deep
        self.read_whole += is_deep
        for video in videos:
            if self._videos.setdefault(video.path, video) is not video:
                yield Finding(path, "duplicate", f"{video.path} in one record", "it is in another too")
        for findings in ordered_map(lambda video: self._check_video(video, is_deep), videos, self.threads):
            yield from findings

    def _check_video(self, video: VideoRecord, is_deep: bool) -> list[Finding]:
        """On a thread: look at one file."""
        storage, path = self.plan.storage, video.path
        if path not in self._sizes:
            return [Finding(path, "missing", f"the video of {video.sample_id}", "nothing")]
        if self._sizes[path] != video.size_bytes:
            return [Finding(path, "size", f"{video.size_bytes} bytes", f"{self._sizes[path]}")]
        try:
            head = storage.read_range(path, 0, min(_HEAD_BYTES, video.size_bytes))
            at, signature = _SIGNATURES.get("." + path.rpartition(".")[2], (0, b""))
            if head[at : at + len(signature)] != signature:
                return [Finding(path, "content", f"{signature!r} at byte {at}", repr(head))]
            if is_deep and (digest := _hash_object(storage, path, video.size_bytes)) != video.xxh3:
                return [Finding(path, "checksum", f"xxh3 {video.xxh3}", digest)]
        except Exception as error:  # gone meanwhile, or not readable
            return [damaged(path, error)]
        return []

    def _check_manifest(self, manifest: dict[str, Any]) -> Iterator[Finding]:
        videos = [asdict(video) for video in self._videos.values()]
        facts = {
            "num_videos": len(videos),
            "num_shards": self.plan.shards,
            "num_quarantined": self.plan.quarantined,
            "num_filtered": self.plan.filtered,
            "size_bytes": sum(video["size_bytes"] for video in videos),
        }
        for name, expected in facts.items():
            if manifest.get(name) != expected:
                yield Finding(MANIFEST_PATH, "count", f"{name} {expected}", str(manifest.get(name)))
        if manifest["videos"] != videos:
            differs = sum(ours != theirs for ours, theirs in zip(videos, manifest["videos"], strict=False))
            yield Finding(MANIFEST_PATH, "videos", "what the records say of every video, in plan order", f"{differs} that differ")


def _check_summary(
    path: str, generation: Generation, shard: ShardRef, summary: ShardSummary, videos: list[VideoRecord]
) -> Iterator[Finding]:
    facts: list[tuple[str, object, object]] = [
        ("shard id", shard.shard_id, summary.shard_id),
        ("generation", shard.generation, summary.generation),
        ("index", shard.index, summary.index),
        ("recipe", generation.recipe_fingerprint, summary.recipe),
        ("videos", summary.num_rows, len(videos)),
        ("bytes of videos", summary.size_bytes, sum(video.size_bytes for video in videos)),
        ("clips, written and rejected", shard.num_clips, summary.num_rows + len(summary.rejections)),
    ]
    for name, expected, found in facts:
        if expected != found:
            yield Finding(path, "account", f"{name} {expected}", str(found))


def _hash_object(storage: Storage, path: str, size_bytes: int) -> str:
    hasher = xxhash.xxh3_128()
    for offset in range(0, size_bytes, _BLOCK_BYTES):
        hasher.update(storage.read_range(path, offset, min(_BLOCK_BYTES, size_bytes - offset)))
    return hasher.hexdigest()
