"""The record of a shard of videos is its commit; the manifest adds the records up."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.errors import DatasetError
from pipeline.quarantine import QUARANTINE_PATH
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.videos.publish import publish_videos, read_counts, read_videos
from pipeline.videos.record import VideoRecord, commit_videos, done_path, read_record

REJECTION = Rejection(
    sample_id="s9",
    uri="in/bad.npy",
    frame_start=0,
    frame_end=9,
    status="quarantined",
    stage="read",
    reason="not_finite",
    detail="NaN ü",
)


def make_video(name: str) -> VideoRecord:
    return VideoRecord(
        name=name,
        path=f"videos/{name}.mp4",
        sample_id=f"id-{name}",
        source_uri="in/a.npz",
        source_key="latent",
        source_row=None,
        source_member=1,
        layout="BCFHW",
        multiplier=0.7,
        dropped_frames=0,
        num_frames=9,
        height=32,
        width=48,
        fps=8.0,
        size_bytes=100,
        xxh3="0" * 32,
        columns={"caption": "ein Hase ü", "score": 0.5},
    )


def make_summary(index: int, attempt: str = "a", **changes: object) -> ShardSummary:
    summary = ShardSummary(
        shard_id=f"shard{index}",
        generation=0,
        index=index,
        bucket_key="16x3x4x6",
        attempt_id=attempt,
        recipe="r",
        num_rows=2,
        size_bytes=200,
        rejections=(REJECTION,),
    )
    return replace(summary, **changes)  # type: ignore[arg-type]


def path_of(summary: ShardSummary) -> str:
    return done_path(summary.bucket_key, summary.index, summary.shard_id)


def test_a_record_is_read_as_it_was_committed(output: Storage) -> None:
    summary, videos = make_summary(0), [make_video("a"), make_video("b")]
    assert commit_videos(output, summary, videos) == summary
    assert read_record(output, "done/16x3x4x6/part-000000-shard0.json") == (summary, videos)


def test_the_first_commit_stands_and_the_second_is_told_of_it(output: Storage) -> None:
    first, second = make_summary(0, "first"), make_summary(0, "second", num_rows=1, size_bytes=100)
    commit_videos(output, first, [make_video("a"), make_video("b")])
    assert commit_videos(output, second, [make_video("a")]) == first
    assert read_record(output, path_of(first))[0].attempt_id == "first"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "shard": {}, "videos": []}'])
def test_a_damaged_record_is_an_error_that_names_it(output: Storage, data: bytes) -> None:
    output.put("done/x/part.json", data)
    with pytest.raises(DatasetError, match=r"done/x/part\.json: damaged record"):
        read_record(output, "done/x/part.json")


def test_a_record_of_a_later_version_is_refused(output: Storage) -> None:
    output.put("done/x/part.json", b'{"format_version": 99}')
    with pytest.raises(DatasetError, match="format version 99"):
        read_record(output, "done/x/part.json")


def test_the_manifest_names_every_video_in_order_and_the_quarantine_every_reason(output: Storage) -> None:
    summaries = [make_summary(0), make_summary(1, rejections=())]
    commit_videos(output, summaries[0], [make_video("b"), make_video("a")])
    commit_videos(output, summaries[1], [make_video("d"), make_video("c")])
    planned = replace(REJECTION, uri="in/cut.npy", status="filtered")
    assert read_counts(output) is None
    videos = publish_videos(output, [path_of(summary) for summary in summaries], [planned], {"container": "mp4"})
    manifest = json.loads(output.read("manifest.json"))
    listed = list(read_videos(output))
    assert [video["name"] for video in listed] == [video.name for video in videos] == ["b", "a", "d", "c"]
    assert manifest["container"] == "mp4"
    assert listed[0]["columns"] == {"caption": "ein Hase ü", "score": 0.5}
    assert read_counts(output) == (0, 4, 1, 1)
    rows = pq.read_table(output.local_path(QUARANTINE_PATH)).to_pylist()
    assert [row["uri"] for row in rows] == ["in/bad.npy", "in/cut.npy"]


def test_another_program_s_manifest_is_not_taken_for_ours(output: Storage) -> None:
    output.put("manifest.json", b'{"version": 3}')
    with pytest.raises(DatasetError, match="not a manifest of videos"):
        read_counts(output)


def test_videos_are_listed_in_files_of_bounded_size_that_are_named_by_their_content(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.videos.publish._VIDEOS_PER_PIECE", 2)
    names = [make_video(name) for name in "abcde"]
    commit_videos(output, make_summary(0), names)
    publish_videos(output, [path_of(make_summary(0))], [], {})
    before = output.read("manifest.json")
    publish_videos(output, [path_of(make_summary(0))], [], {}, num_videos=5)
    assert output.read("manifest.json") == before
    assert [file["num_videos"] for file in output.read_json("manifest.json")["index"]] == [2, 2, 1]
    assert [video["name"] for video in read_videos(output)] == list("abcde")


def test_records_that_name_another_number_of_videos_than_were_committed_are_refused(output: Storage) -> None:
    commit_videos(output, make_summary(0), [make_video("a")])
    with pytest.raises(DatasetError, match="the shards name 1 videos, but 2 were committed"):
        publish_videos(output, [path_of(make_summary(0))], [], {}, num_videos=2)
    assert read_counts(output) is None
