"""Validation of decoded videos: records against the plan, files against records, the manifest against all."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import xxhash

from pipeline.latents import PlannedLatent
from pipeline.latents.rows import LATENT_ROWS
from pipeline.outcomes import latest_of, read_left_out, read_superseded
from pipeline.plan import PlannedShard
from pipeline.plan_store import read_generations, read_shards
from pipeline.plan_writer import publish_generation
from pipeline.requeue import requeue
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.validation import Validation, repair_output
from pipeline.videos.publish import publish_videos, read_videos
from pipeline.videos.recipe import VideoRecipe
from pipeline.videos.record import VideoRecord, commit_videos, done_path
from tests.pipeline.validation.conftest import find, kinds

RECIPE = VideoRecipe(weights="w", dtype="float32", tiling="exact", container="mp4", crf=18)
KEY = "16x3x4x6"


def make_latent(name: str) -> PlannedLatent:
    return PlannedLatent(
        sample_id=f"id-{name}",
        uri=f"in/{name}.npy",
        size_bytes=100,
        version="v",
        key="",
        row=None,
        member=None,
        layout="CFHW",
        shape=(16, 3, 4, 6),
        dtype="float32",
        multiplier=None,
        drop_frames=0,
        name=name,
        fps=8.0,
        columns={},
    )


def make_video(planned: PlannedLatent, data: bytes) -> VideoRecord:
    return VideoRecord(
        name=planned.name,
        path=f"videos/{planned.name}.mp4",
        sample_id=planned.sample_id,
        source_uri=planned.uri,
        source_key="",
        source_row=None,
        source_member=None,
        layout="CFHW",
        multiplier=None,
        dropped_frames=0,
        num_frames=9,
        height=32,
        width=48,
        fps=8.0,
        size_bytes=len(data),
        xxh3=xxhash.xxh3_128_hexdigest(data),
    )


def reject(planned: PlannedLatent) -> Rejection:
    return Rejection(
        sample_id=planned.sample_id,
        uri=planned.uri,
        frame_start=0,
        frame_end=9,
        status="quarantined",
        stage="read",
        reason="not_finite",
        detail="NaN",
        file_key=planned.file_key,
    )


def commit(storage: Storage, number: int, shard_id: str, latents: list[PlannedLatent], failing: str, generation: int = 0) -> None:
    videos = []
    for planned in latents:
        if planned.name != failing:
            data = b"\0\0\0\x20ftypisom" + planned.name.encode() * 100
            storage.put(f"videos/{planned.name}.mp4", data)
            videos.append(make_video(planned, data))
    summary = ShardSummary(
        shard_id=shard_id,
        generation=generation,
        index=number,
        bucket_key=KEY,
        attempt_id="a",
        recipe=RECIPE.fingerprint,
        num_rows=len(videos),
        size_bytes=sum(video.size_bytes for video in videos),
        rejections=tuple(reject(planned) for planned in latents if planned.name == failing),
    )
    commit_videos(storage, summary, videos)


def publish(storage: Storage, *paths: str) -> None:
    generations = read_generations(storage)
    superseded = read_superseded(storage, generations)
    info: dict[str, Any] = {"generations": len(generations), "recipe": {}}
    publish_videos(storage, paths, read_left_out(storage, generations, superseded), info, latest=latest_of(superseded))


SHARDS = {f"{number:016x}": [make_latent(name) for name in names] for number, names in enumerate(("ab", "cd"))}
PATHS = [done_path(KEY, number, shard_id) for number, shard_id in enumerate(SHARDS)]


@pytest.fixture
def videos(output: Storage) -> Storage:
    """Four latents in two shards; the third could not be read."""
    planned = [
        PlannedShard(shard_id=shard_id, index=number, bucket_key=KEY, items=tuple(latents))
        for number, (shard_id, latents) in enumerate(SHARDS.items())
    ]
    publish_generation(output, 0, planned, [], rows=LATENT_ROWS, recipe=RECIPE, settings={}, columns=pa.schema([]))
    for number, (shard_id, latents) in enumerate(SHARDS.items()):
        commit(output, number, shard_id, latents, failing="c")
    publish(output, *PATHS)
    return output


def test_finished_videos_are_clean(videos: Storage) -> None:
    validation = Validation(storage=videos, threads=2)
    assert list(validation.findings()) == []
    summary = validation.summary()
    assert (summary["planned"], summary["written"], summary["quarantined"], summary["shards_read_whole"]) == (4, 3, 1, 2)


def test_each_mistake_is_told_apart(videos: Storage) -> None:
    whole = videos.read("videos/a.mp4")

    def found(data: bytes) -> list[str]:
        videos.put("videos/a.mp4", data)
        return kinds(videos)

    assert found(whole[:-1] + b"?") == ["checksum"]
    assert found(whole[:-1]) == ["size"]
    assert found(b"?" * len(whole)) == ["content"]
    assert found(whole) == []
    videos.move("videos/a.mp4", "elsewhere.mp4")
    assert kinds(videos) == ["missing"]


def test_of_a_sample_only_the_heads_of_the_others_are_read(videos: Storage) -> None:
    whole = videos.read("videos/a.mp4")
    videos.put("videos/a.mp4", whole[:-1] + b"?")
    assert kinds(videos, sample=0) == []
    videos.put("videos/a.mp4", b"?" * len(whole))
    assert kinds(videos, sample=0) == ["content"]


def test_a_damaged_record_and_a_lost_one_are_found(videos: Storage) -> None:
    data = videos.read(PATHS[0])
    videos.put(PATHS[0], data[:-20])
    assert kinds(videos) == ["damaged"]
    videos.put(PATHS[0], data.replace(b'"index": 0', b'"index": 7'))
    assert kinds(videos) == ["account"]
    videos.put(PATHS[0], data)
    videos.move(PATHS[1], "elsewhere.json")
    assert kinds(videos) == ["missing"]


def test_what_no_record_names_is_moved_away_and_the_manifest_made_again(videos: Storage) -> None:
    videos.put("videos/stranger.mp4", b"x")
    manifest = videos.read_json("manifest.json")
    videos.put_json("manifest.json", manifest | {"num_videos": 9, "index": []})
    assert sorted(kinds(videos)) == ["count", "orphan", "orphan", "videos"]
    validation = Validation(storage=videos, threads=2)
    list(validation.findings())
    list(repair_output(validation))
    assert find(videos) == []
    assert videos.read_json("manifest.json")["num_videos"] == 3


def test_an_index_that_is_damaged_or_lost_is_made_again(videos: Storage) -> None:
    (piece,) = videos.read_json("manifest.json")["index"]
    whole = videos.read(piece["path"])
    for damage in (lambda: videos.put(piece["path"], whole[:-9]), lambda: videos.move(piece["path"], "lost")):
        damage()
        assert [(finding.path, finding.what) for finding in find(videos)] == [(piece["path"], "index")]
        validation = Validation(storage=videos, threads=2)
        list(validation.findings())
        list(repair_output(validation))
        assert (find(videos), videos.read(piece["path"])) == ([], whole)


def test_a_manifest_that_is_none_is_found(videos: Storage) -> None:
    for data in (b"", b"[]", b"{}", b'{"kind": "videos", "index": 3}', b'{"kind": "videos", "index": [{}]}'):
        videos.put("manifest.json", data)
        assert kinds(videos) == ["damaged"]


def test_a_requeued_latent_is_accounted_for_by_its_latest_shard(videos: Storage) -> None:
    done = requeue(videos, lambda rejection: True)
    assert (done.clips, kinds(videos)) == (1, ["missing"])
    assert done.generation is not None
    (shard,) = read_shards(videos, done.generation)
    commit(videos, shard.index, shard.shard_id, [make_latent("c")], failing="", generation=1)
    publish(videos, *PATHS, done_path(KEY, shard.index, shard.shard_id))
    assert find(videos) == []  # the index of what was there before is as it was
    assert [video["name"] for video in read_videos(videos)] == ["a", "b", "d", "c"]
    assert videos.read_json("manifest.json")["num_quarantined"] == 0
