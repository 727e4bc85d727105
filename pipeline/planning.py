"""Making one generation of the plan: list, probe, cut into clips, group into shards, publish.

Probing runs on the cluster and is resumable: each batch's findings are kept under the generation, and stay
there when it is published. No Ray here: how batches are probed is given.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise

import pyarrow as pa

from pipeline.config import RunConfig
from pipeline.engine import ModelInfo
from pipeline.errors import TerminalError
from pipeline.plan import PlannedClip, ProbedVideo, group_into_shards, plan_clips
from pipeline.plan_store import Generation, column_schema, publish_generation, read_known_videos
from pipeline.recipe import Recipe, digest
from pipeline.sources import SourceItem, open_source
from pipeline.storage import Storage
from pipeline.types import Rejection, VideoInfo

logger = logging.getLogger(__name__)

PROBE_BATCH = 32

Batch = list[SourceItem]
ProbeBatches = Callable[[list[Batch]], Iterator[tuple[int, list[ProbedVideo]]]]
"""Probes batches, several at once, and yields each one's position and findings as they come."""


@dataclass(slots=True, kw_only=True)
class Planner:
    """Adds a generation to the plan of one output."""

    config: RunConfig
    storage: Storage
    model: ModelInfo
    recipe: Recipe
    probe: ProbeBatches
    on_probed: Callable[[list[ProbedVideo], int], None]
    """Told what was found since the last call, and how many videos there are to look at."""

    def add_generation(self, earlier: list[Generation]) -> Generation | None:
        """List the input and publish what is new in it; None if nothing is.

        Raises:
            ConfigError: the input cannot be listed, or its columns do not fit the dataset.
            TransientError: storage does not answer. What was probed so far is kept.
        """
        number = len(earlier)
        listing = open_source(self.config.input)
        known = read_known_videos(self.storage, earlier)
        videos = self._new_videos(number, listing.items, known)
        if not videos:
            return None
        fixed = earlier[0].columns if earlier else None
        columns = column_schema([video.columns for video in videos], listing.schema, fixed)
        return self._publish(number, videos, columns)

    def _new_videos(self, number: int, listed: Iterator[SourceItem], known: set[str]) -> list[ProbedVideo]:
        """Up to ``input.limit`` videos that no earlier generation has; a table's are told only when probed."""
        limit = self.config.input.limit
        unknown = (item for item in listed if not _is_known(item, known))
        videos: list[ProbedVideo] = []
        while items := list(islice(unknown, None if limit is None else limit - len(videos))):
            videos += [video for video in self._probe_all(number, items) if video.key not in known]
        return videos

    def _publish(self, number: int, videos: list[ProbedVideo], columns: pa.Schema) -> Generation:
        clips: list[PlannedClip] = []
        rejections: list[Rejection] = []
        for planned in plan_clips(videos, self.config.buckets, self.config.clip, self.recipe.fingerprint):
            if isinstance(planned, Rejection):
                rejections.append(planned)
            else:
                clips.append(planned)
        output = self.config.output
        shards = group_into_shards(
            clips,
            generation=number,
            recipe=self.recipe.fingerprint,
            clip_bytes=lambda bucket: self.model.clip_bytes(bucket, output, self.config.stored_dtype),
            shard_bytes=output.shard_bytes,
        )
        return publish_generation(
            self.storage, number, shards, rejections, recipe=self.recipe, settings=self.config.plan_settings(), columns=columns
        )

    def _probe_all(self, number: int, items: list[SourceItem]) -> Iterator[ProbedVideo]:
        """Findings in listing order: those of an interrupted run from storage, the rest from the cluster."""
        batches = _split(items)
        folder = f"plan/{number:05d}/probed"
        paths = [f"{folder}/{_batch_key(batch)}.json" for batch in batches]
        stored = {found.uri for found in self.storage.list(folder, ".json")}
        findings = [self._read_kept(path) if path in stored else None for path in paths]
        todo = [position for position, videos in enumerate(findings) if videos is None]
        # What the input says about a video stays here; probing needs its address only.
        lean = [[replace(item, columns={}) for item in batches[position]] for position in todo]
        for which, videos in self.probe(lean):
            position = todo[which]
            findings[position] = videos
            if all(item.version for item in batches[position]):  # else nothing tells whether they still hold later
                self.storage.put(paths[position], _dump(videos))
            self.on_probed(videos, sum(map(len, lean)))
        for batch, found in zip(batches, findings, strict=True):
            assert found is not None, "probing left a batch out"
            for item, video in zip(batch, found, strict=True):
                yield replace(video, columns={**item.columns, **video.columns})

    def _read_kept(self, path: str) -> list[ProbedVideo] | None:
        """Stored findings; None if there is an error among them, which may have been mended since."""
        videos = list(_load(self.storage.read(path)))
        return None if any(video.error for video in videos) else videos


def _split(items: list[SourceItem]) -> list[Batch]:
    """Batches of one size, give or take one: a video that fails alone in its batch looks like an outage."""
    count = math.ceil(len(items) / PROBE_BATCH)
    ends = [math.ceil(len(items) * index / count) for index in range(count + 1)]
    return [items[first:end] for first, end in pairwise(ends)]


def _is_known(item: SourceItem, known: set[str]) -> bool:
    """Whether an earlier generation has it; a table's videos have no version until they are probed."""
    return item.version is not None and digest(item.uri, item.size_bytes, item.version) in known


def _batch_key(batch: Batch) -> str:
    return digest(*((item.uri, item.size_bytes, item.version, item.sidecars, item.sidecar_versions) for item in batch))


def _dump(videos: list[ProbedVideo]) -> bytes:
    rows = []
    for video in videos:
        error = [video.error.stage, video.error.reason, video.error.detail] if video.error else None
        rows.append(
            {
                "uri": video.uri,
                "size_bytes": video.size_bytes,
                "version": video.version,
                "columns": video.columns,
                "info": asdict(video.info) if video.info else None,
                "error": error,
            }
        )
    return json.dumps(rows).encode()


def _load(data: bytes) -> Iterator[ProbedVideo]:
    for row in json.loads(data):
        info, error = row.pop("info"), row.pop("error")
        yield ProbedVideo(
            **row,
            info=VideoInfo(**info) if info else None,
            error=TerminalError(*error) if error else None,
        )
