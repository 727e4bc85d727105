"""The output of the decode job: every record against the plan, every video against its record, the manifest against all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from pipeline.compact_set import CompactSet
from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import DatasetError
from pipeline.plan_store import Generation, ShardRef
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from pipeline.validation.findings import Finding, damaged
from pipeline.validation.plan_view import PlanView
from pipeline.videos.publish import INDEX_FOLDER, MANIFEST_PATH
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
    _paths: CompactSet = field(default_factory=CompactSet)
    """Of videos that a record names."""
    _size_bytes: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)
    """Of every file among the videos."""
    _lines: Iterator[bytes] = field(default_factory=lambda: iter(()))
    """What the index says of each video; the next is that of the next record."""
    _piece: str = ""
    """Of the index, that is being read."""
    _is_index_whole: bool = True
    _num_other: int = 0
    """Videos of which the index says something else than their record."""

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found."""
        storage = self.plan.storage
        self._sizes = {found.uri: found.size_bytes for found in storage.walk(VIDEO_FOLDER)}
        yield from self._open_manifest()
        yield from self.plan.add_planning()
        for number, (generation, shard) in enumerate(self.plan.planned_shards()):
            if missing := self.plan.find_missing(shard):
                yield missing
                continue
            yield from self._check_record(number, generation, shard)
        for _ in self._lines:
            self._num_other += 1
        if not self._is_index_whole:
            yield Finding(self._piece, "index", "the lines whose hash the manifest names", "others, or none")
        if self._manifest is not None and not self.plan.unread and not self.plan.pending:
            yield from self._check_manifest(self._manifest)
        yield from self.plan.check_account()
        if self._manifest is not None:
            yield from self.plan.check_quarantine()

    def find_orphans(self) -> Iterator[Finding]:
        """Objects that neither plan nor record names."""
        yield from self.plan.find_orphans()
        if not self.plan.unread and not self.plan.pending:  # else a shard to come may be theirs
            for path in sorted(path for path in self._sizes if path not in self._paths):
                yield Finding(path, "orphan", "a video that a record names", "another")
        if self._manifest is not None:
            named = {piece["path"] for piece in self._manifest["index"]}
            for found in self.plan.storage.list(INDEX_FOLDER):
                if found.uri not in named:
                    yield Finding(found.uri, "orphan", "a piece of the index that the manifest names", "another")

    @property
    def manifest(self) -> dict[str, Any] | None:
        """None: there is none, or it cannot be trusted."""
        return self._manifest

    def _open_manifest(self) -> Iterator[Finding]:
        try:
            manifest = self.plan.storage.read_json(MANIFEST_PATH)
            if manifest["kind"] != "videos" or not all({"path", "xxh3"} <= piece.keys() for piece in manifest["index"]):
                raise DatasetError("another program's manifest")
        except FileNotFoundError:
            yield Finding(MANIFEST_PATH, "missing", "the manifest of finished videos", "nothing; run the job again to finish it")
        except Exception as error:  # whatever stands there
            yield damaged(MANIFEST_PATH, error)
        else:
            self._manifest = manifest
            self._lines = self._read_index(manifest["index"])

    def _read_index(self, pieces: list[dict[str, Any]]) -> Iterator[bytes]:
        """Its lines, as far as it can be read."""
        for piece in pieces:
            self._piece = piece["path"]
            try:
                data = self.plan.storage.read(self._piece)
                self._is_index_whole = xxhash.xxh3_128_hexdigest(data) == piece["xxh3"]
            except Exception:  # not there, or a path that is none
                self._is_index_whole = False
            if not self._is_index_whole:
                return
            yield from data.splitlines()

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
            if not self._paths.add(video.path):
                yield Finding(path, "duplicate", f"{video.path} in one record", "it is in another too")
            self._size_bytes += video.size_bytes
            self._num_other += not self._is_indexed(video)
        for findings in ordered_map(lambda video: self._check_video(video, is_deep), videos, self.threads):
            yield from findings

    def _is_indexed(self, video: VideoRecord) -> bool:
        """Whether the index says of the next video what the record says of this one."""
        line = next(self._lines, b"null")
        try:
            return bool(json.loads(line) == asdict(video))
        except ValueError:
            return False

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
        facts = {
            "num_videos": len(self._paths),
            "num_shards": self.plan.shards,
            "num_quarantined": self.plan.quarantined,
            "num_filtered": self.plan.filtered,
            "size_bytes": self._size_bytes,
        }
        for name, expected in facts.items():
            if manifest.get(name) != expected:
                yield Finding(MANIFEST_PATH, "count", f"{name} {expected}", str(manifest.get(name)))
        if self._num_other and self._is_index_whole:
            said = "what the records say of every video, in plan order"
            yield Finding(MANIFEST_PATH, "videos", said, f"{self._num_other} that differ")


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
