"""A small planned and committed dataset, made by the public functions, without Ray and without a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from pipeline.committed import ENCODED, commit_format, read_committed
from pipeline.dataset import Manifest, ShardWriter, build_row, publish_dataset, shard_path
from pipeline.outcomes import latest_of, read_left_out, read_superseded
from pipeline.plan import PlannedClip, PlannedShard, shard_id_of
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, ShardRef, read_generations, read_items, read_shards
from pipeline.plan_writer import publish_generation
from pipeline.recipe import LatentRecipe
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from tests.pipeline.dataset.builders import BUCKET, CAPTIONS, make_clip, make_encoded, make_info

RECIPE = LatentRecipe(weights="w", dtype="bfloat16", tiling="exact", stored_dtype="bfloat16", logvar=True, first_frame=False)


def make_planned(number: int) -> PlannedClip:
    return PlannedClip(clip=make_clip(number), columns={"caption": f"caption {number}"})


def reject(planned: PlannedClip, reason: str = "timeout", detail: str = "took too long") -> Rejection:
    return Rejection(
        sample_id=planned.sample_id,
        uri=planned.uri,
        frame_start=planned.clip.frame_start,
        frame_end=planned.clip.frame_end,
        status="quarantined",
        stage="decode",
        reason=reason,
        detail=detail,
        file_key=planned.file_key,
    )


def reject_file(name: str, status: str = "quarantined", reason: str = "not_a_video") -> Rejection:
    return Rejection(
        sample_id=f"key-of-{name}",
        uri=f"videos/{name}",
        frame_start=0,
        frame_end=0,
        status=status,  # type: ignore[arg-type]
        stage="probe",
        reason=reason,
        detail=f"{name}: no video",
        file_key=f"key-of-{name}",
    )


def plan_output(storage: Storage, count: int = 12, rejections: Collection[Rejection] = (), per_shard: int = 5) -> Generation:
    """Generation 0: so many clips in shards of ``per_shard``, and files that gave none."""
    clips = [make_planned(number) for number in range(count)]
    shards = []
    for index, first in enumerate(range(0, count, per_shard)):
        part = tuple(clips[first : first + per_shard])
        shard_id = shard_id_of(0, RECIPE.fingerprint, [item.sample_id for item in part])
        shards.append(PlannedShard(shard_id=shard_id, index=index, bucket_key=BUCKET.key, items=part))
    return publish_generation(storage, 0, shards, rejections, rows=CLIP_ROWS, recipe=RECIPE, settings={}, columns=CAPTIONS)


def commit_pending(storage: Storage, spool: Path, failing: Collection[str] = (), reason: str = "timeout") -> None:
    """Commit every shard that is planned and not there; clips whose URI is in ``failing`` are rejected."""
    spool.mkdir(exist_ok=True)
    generations = read_generations(storage)
    commits = commit_format(storage, generations)
    for generation in generations:
        for shard in read_shards(storage, generation):
            if not storage.exists(commits.path(shard)):
                _commit(storage, spool, shard, failing, reason)


def _commit(storage: Storage, spool: Path, shard: ShardRef, failing: Collection[str], reason: str) -> None:
    path = spool / f"{shard.shard_id}.parquet"
    rejections = []
    with ShardWriter(path, make_info().schema, row_group_bytes=300_000) as writer:
        for planned in read_items(storage, shard, CLIP_ROWS):
            if planned.uri in failing:
                rejections.append(reject(planned, reason))
            else:
                number = int(planned.uri.rpartition("/")[2].partition(".")[0])
                writer.write(build_row(planned.clip, make_encoded(number), planned.columns))
        summary = ShardSummary(
            shard_id=shard.shard_id,
            generation=shard.generation,
            index=shard.index,
            bucket_key=BUCKET.key,
            attempt_id="attempt-1",
            recipe=RECIPE.fingerprint,
            num_rows=writer.num_rows,
            size_bytes=writer.size_bytes,
            rejections=tuple(rejections),
        )
        writer.close(summary)
    assert storage.put_file_if_absent(shard_path(shard.bucket_key, shard.index, shard.shard_id), path)


def publish_output(storage: Storage) -> Manifest:
    """What the job does when nothing is pending."""
    generations = read_generations(storage)
    superseded = read_superseded(storage, generations)
    shards = [ENCODED.path(shard) for shard, _ in read_committed(storage, generations)]
    info = replace(make_info(), generations=len(generations))
    left_out = read_left_out(storage, generations, superseded)
    return publish_dataset(storage, shards, left_out, info, latest=latest_of(superseded), threads=2)


def make_output(storage: Storage, spool: Path, count: int = 12, failing: Collection[str] = ()) -> Manifest:
    """A finished dataset: twelve clips in three shards, one file that is no video, one that is too short."""
    plan_output(storage, count, [reject_file("bad.mp4"), reject_file("short.mp4", "filtered", "too_short")])
    commit_pending(storage, spool, failing)
    return publish_output(storage)
