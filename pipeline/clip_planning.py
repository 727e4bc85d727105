"""Planning the encode job: videos in, clips out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from pipeline.compact_set import CompactSet
from pipeline.config import RunConfig
from pipeline.engine import ModelInfo
from pipeline.plan import PlannedClip, ProbedVideo, plan_clips
from pipeline.plan_rows import CLIP_ROWS, RowFormat
from pipeline.plan_store import Generation, read_known_files
from pipeline.planning import Planner
from pipeline.recipe import digest
from pipeline.sources import SourceItem, SourceListing, open_source
from pipeline.types import Rejection, VideoInfo

_INFO_FIELDS = tuple(field.name for field in fields(VideoInfo))


@dataclass(slots=True, kw_only=True)
class ClipPlanner(Planner[ProbedVideo, PlannedClip]):
    """Plans the clips of the videos that no earlier generation has."""

    config: RunConfig
    model: ModelInfo

    @property
    def rows(self) -> RowFormat[PlannedClip]:
        return CLIP_ROWS

    @property
    def shard_bytes(self) -> int:
        return self.config.output.shard_bytes

    def item_bytes(self, item: PlannedClip) -> int:
        return self.model.clip_bytes(item.clip.bucket, self.config.stored)

    def list_input(self) -> SourceListing:
        return open_source(self.config.input)

    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> Iterator[ProbedVideo]:
        """Up to ``input.limit`` videos that no earlier generation has; a table's are told only when probed."""
        known = read_known_files(self.storage, earlier)
        limit = self.config.input.limit
        unknown = (item for item in listed if not _is_known(item, known))
        count, probed_any = 0, True
        while probed_any and (limit is None or count < limit):
            probed_any = False
            for video in self.probe_all(len(earlier), islice(unknown, None if limit is None else limit - count)):
                probed_any = True
                if video.key not in known:
                    count += 1
                    yield video

    def plan(self, found: Iterator[ProbedVideo], earlier: list[Generation]) -> Iterator[PlannedClip | Rejection]:
        return plan_clips(found, self.config.buckets, self.config.clip, self.recipe.fingerprint)

    def to_json(self, found: ProbedVideo) -> dict[str, Any]:
        return {"info": {name: getattr(found.info, name) for name in _INFO_FIELDS} if found.info else None}

    def from_json(self, common: dict[str, Any], row: dict[str, Any]) -> ProbedVideo:
        return ProbedVideo(**common, info=VideoInfo(**row["info"]) if row["info"] else None)


def _is_known(item: SourceItem, known: CompactSet) -> bool:
    """Whether an earlier generation has it; a table's videos have no version until they are probed."""
    return len(known) > 0 and item.version is not None and digest(item.uri, item.size_bytes, item.version) in known
