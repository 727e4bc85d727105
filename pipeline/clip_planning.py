"""Planning the encode job: videos in, clips out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from pipeline.config import RunConfig
from pipeline.engine import ModelInfo
from pipeline.plan import PlannedClip, ProbedVideo, plan_clips
from pipeline.plan_rows import CLIP_ROWS, RowFormat
from pipeline.plan_store import Generation, read_columns, read_known_files
from pipeline.planning import Planner
from pipeline.recipe import digest
from pipeline.sources import SourceItem, SourceListing, open_source
from pipeline.storage import Storage
from pipeline.types import Rejection, TarMember, VideoInfo


@dataclass(slots=True, kw_only=True)
class ClipPlanner(Planner[ProbedVideo, PlannedClip]):
    """Plans the clips of the videos that no earlier generation has."""

    config: RunConfig
    model: ModelInfo

    @property
    def rows(self) -> RowFormat[PlannedClip]:
        return CLIP_ROWS

    @property
    def probe_settings(self) -> str:
        return " ".join(self.config.input.extensions)  # which members of a tar are videos

    @property
    def shard_bytes(self) -> int:
        return self.config.output.shard_bytes

    def item_bytes(self, item: PlannedClip) -> int:
        return self.model.clip_bytes(item.clip.bucket, self.config.stored)

    def list_input(self) -> SourceListing:
        return open_source(self.config.input)

    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> list[ProbedVideo]:
        """Up to ``input.limit`` videos that no earlier generation has; a table's are told only when probed."""
        known = read_known_files(self.storage, earlier) | _read_known_tars(self.storage, earlier)
        limit = self.config.input.limit
        unknown = (item for item in listed if not _is_known(item, known))
        videos: list[ProbedVideo] = []
        while items := _take(unknown, None if limit is None else limit - len(videos)):
            videos += [video for video in self.probe_all(len(earlier), items) if video.key not in known]
        return videos[:limit]

    def plan(self, found: list[ProbedVideo], earlier: list[Generation]) -> Iterator[PlannedClip | Rejection]:
        return plan_clips(found, self.config.buckets, self.config.clip, self.recipe.fingerprint)

    def to_json(self, found: ProbedVideo) -> dict[str, Any]:
        member = asdict(found.member) if found.member else None
        return {"info": asdict(found.info) if found.info else None, "member": member}

    def from_json(self, common: dict[str, Any], row: dict[str, Any]) -> ProbedVideo:
        info, member = row["info"], row.get("member")
        return ProbedVideo(**common, info=VideoInfo(**info) if info else None, member=TarMember(**member) if member else None)


def _take(items: Iterator[SourceItem], count: int | None) -> list[SourceItem]:
    """The next few files; of tars one at a time if there is a limit, as only probing tells how many videos are in it."""
    if count is None:
        return list(items)
    first = list(islice(items, min(1, max(0, count))))
    return first if not first or first[0].is_tar else first + list(islice(items, count - 1))


def _read_known_tars(storage: Storage, generations: list[Generation]) -> set[str]:
    """Keys of the tars whose members earlier generations have, all of them: ``input.limit`` may have cut one short."""
    known: set[str] = set()
    for generation in generations:
        if generation.settings.get("input.limit") is None:
            known.update(
                digest(row["uri"].removesuffix(f"#{row['member']}"), row["size_bytes"], row["version"])
                for row in read_columns(storage, generation, ["uri", "size_bytes", "version", "member"])
                if row.get("member") is not None
            )
    return known


def _is_known(item: SourceItem, known: set[str]) -> bool:
    """Whether an earlier generation has it; a table's videos have no version until they are probed."""
    return item.version is not None and digest(item.uri, item.size_bytes, item.version) in known
