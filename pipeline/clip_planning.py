"""Planning the encode job: videos in, clips out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from typing import Any, cast

from pipeline.compact_set import CompactSet
from pipeline.config import RunConfig
from pipeline.engine import ModelInfo
from pipeline.plan import PlannedClip, ProbedVideo, plan_clips
from pipeline.plan_rows import CLIP_ROWS, RowFormat
from pipeline.plan_store import Generation, read_columns, read_known_files, read_rejections
from pipeline.planning import Planner
from pipeline.recipe import digest
from pipeline.sources import SourceItem, SourceListing, open_source
from pipeline.storage import Storage
from pipeline.types import Rejection, TarMember, VideoInfo, tar_uri_of

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
    def probe_settings(self) -> str:
        return " ".join(self.config.input.extensions)  # which members of a tar are videos

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
        known_tars = _read_known_tars(self.storage, earlier, self.config.input.extensions)
        limit, count = self.config.input.limit, 0
        unknown = (item for item in listed if not _is_known(item, known_tars if item.is_tar else known))
        for first in unknown:
            # Of tars one at a time if there is a limit, as only probing tells how many videos are in it.
            others = None if limit is None else 0 if first.is_tar else limit - count - 1
            for video in self.probe_all(len(earlier), chain([first], islice(unknown, others))):
                if video.key not in known:
                    yield video
                    count += 1
                    if count == limit:
                        return

    def plan(self, found: Iterator[ProbedVideo], earlier: list[Generation]) -> Iterator[PlannedClip | Rejection]:
        return plan_clips(found, self.config.buckets, self.config.clip, self.recipe.fingerprint)

    def to_json(self, found: ProbedVideo) -> dict[str, Any]:
        info = {name: getattr(found.info, name) for name in _INFO_FIELDS} if found.info else None
        return {"info": info, "member": asdict(found.member) if found.member else None}

    def from_json(self, common: dict[str, Any], row: dict[str, Any]) -> ProbedVideo:
        info, member = row["info"], row.get("member")
        return ProbedVideo(**common, info=VideoInfo(**info) if info else None, member=TarMember(**member) if member else None)


def _read_known_tars(storage: Storage, generations: list[Generation], extensions: tuple[str, ...]) -> CompactSet:
    """The tars of which earlier generations have all videos.

    With other ``input.extensions`` a generation may have left some out, ``input.limit`` may have cut a tar short, and of
    one that is looked at again only some are planned.
    """
    known = CompactSet()
    for generation in generations:
        if not set(extensions) <= set(cast(list[str], generation.settings.get("input.extensions", []))):
            continue
        for rejection in read_rejections(storage, generation):
            known.add(rejection.sample_id)  # a tar without a video is one
        if generation.settings.get("input.limit") is None and not generation.num_superseded:
            last = ""
            for row in read_columns(storage, generation, ["uri", "size_bytes", "version", "member"]):
                if row.get("member") is not None:
                    uri = tar_uri_of(row["uri"], row["member"])
                    if uri != last:  # the members of one tar mostly follow each other
                        known.add(digest(uri, row["size_bytes"], row["version"]))
                    last = uri
    return known


def _is_known(item: SourceItem, known: CompactSet) -> bool:
    """Whether an earlier generation has it; a table's videos have no version until they are probed."""
    return len(known) > 0 and item.version is not None and digest(item.uri, item.size_bytes, item.version) in known
