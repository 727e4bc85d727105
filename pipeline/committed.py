"""What is committed in an output, of either kind of work, read without the settings of the run that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.ordered_map import ordered_map
from pipeline.dataset.writer import DATA_FOLDER, read_summary, shard_path
from pipeline.errors import DatasetError
from pipeline.latents.rows import LATENT_ROWS
from pipeline.plan_rows import CLIP_ROWS, RowFormat
from pipeline.plan_store import Generation, ShardRef, read_shards
from pipeline.recipe import LatentRecipe, Recipe
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from pipeline.videos.recipe import VideoRecipe
from pipeline.videos.record import DONE_FOLDER, done_path, read_record

_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFormat:
    """How one kind of work commits its shards."""

    rows: RowFormat[Any]
    recipe: type[Recipe]
    folder: str
    """Of the objects whose existence is the commit of a shard."""
    suffix: str
    name: Callable[[str, int, str], str]
    """Their paths, by bucket key, index and shard id."""
    read_summary: Callable[[Storage, str, int | None], ShardSummary]
    """The account in such an object, whose size may be known. Raises: DatasetError: it is damaged."""

    def path(self, shard: ShardRef) -> str:
        """The object whose existence is the commit of a shard."""
        return self.name(shard.bucket_key, shard.index, shard.shard_id)


def _read_record_summary(storage: Storage, path: str, size_bytes: int | None) -> ShardSummary:
    return read_record(storage, path)[0]


ENCODED = CommitFormat(
    rows=CLIP_ROWS, recipe=LatentRecipe, folder=DATA_FOLDER, suffix=".parquet", name=shard_path, read_summary=read_summary
)
DECODED = CommitFormat(
    rows=LATENT_ROWS,
    recipe=VideoRecipe,
    folder=DONE_FOLDER,
    suffix=".json",
    name=done_path,
    read_summary=_read_record_summary,
)
_FORMATS = {ENCODED.rows.work: ENCODED, DECODED.rows.work: DECODED}


def commit_format(storage: Storage, generations: list[Generation]) -> CommitFormat:
    """The format of an output with this plan. Raises: DatasetError: it has no plan, or an unknown kind of work made it."""
    works = {generation.work for generation in generations}
    if len(works) != 1 or not works <= _FORMATS.keys():
        found = ", ".join(sorted(works)) or "no plan"
        raise DatasetError(f"{storage.uri}: not the output of one job: found {found}, expected a plan of {' or '.join(_FORMATS)}")
    return _FORMATS[works.pop()]


def read_committed(storage: Storage, generations: Iterable[Generation]) -> Iterator[tuple[ShardRef, ShardSummary]]:
    """The committed shards of a plan with their accounts, in plan order; what a footer says, nothing left out."""
    generations = list(generations)
    if not generations:
        return
    commits = commit_format(storage, generations)
    present = {found.uri: found.size_bytes for found in storage.walk(commits.folder, commits.suffix)}
    shards = (shard for generation in generations for shard in read_shards(storage, generation))
    done = (shard for shard in shards if commits.path(shard) in present)

    def read(shard: ShardRef) -> tuple[ShardRef, ShardSummary]:
        path = commits.path(shard)
        return shard, commits.read_summary(storage, path, present[path])

    yield from ordered_map(read, done, _THREADS)
