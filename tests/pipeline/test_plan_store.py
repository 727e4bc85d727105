"""The plan on disk: immutable generations, each with one author."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, DatasetError
from pipeline.plan import PlannedClip, PlannedShard
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import (
    Generation,
    ShardRef,
    read_generations,
    read_items,
    read_known_files,
    read_rejections,
    read_shards,
)
from pipeline.plan_writer import publish_generation
from pipeline.recipe import LatentRecipe, digest
from pipeline.storage import Storage
from pipeline.types import Rejection
from tests.pipeline.fakes import SMALL, make_clip

RECIPE = LatentRecipe(weights="w", dtype="float32", tiling="exact", stored_dtype="float32", logvar=True, first_frame=False)
CAPTION = pa.schema([("caption", pa.string())])


def make_shard(index: int, *clips: PlannedClip) -> PlannedShard[PlannedClip]:
    return PlannedShard(shard_id=f"{index:016x}", index=index, bucket_key=SMALL.key, items=clips)


def make_rejection(number: int, status: Any = "filtered") -> Rejection:
    return Rejection(
        sample_id=f"key-{number}",
        uri=f"bad/{number}.mp4",
        frame_start=0,
        frame_end=0,
        status=status,
        stage="plan",
        reason="too_short",
        detail="too short ü",
    )


def publish(
    storage: Storage,
    shards: list[PlannedShard[PlannedClip]],
    *,
    number: int = 0,
    rejections: list[Rejection] | None = None,
    columns: pa.Schema = CAPTION,
) -> Generation:
    return publish_generation(
        storage,
        number,
        shards,
        rejections or [],
        rows=CLIP_ROWS,
        recipe=RECIPE,
        settings={"input.uri": "videos"},
        columns=columns,
    )


def read_all_clips(storage: Storage, generation: Generation) -> list[list[PlannedClip]]:
    return [read_items(storage, shard, CLIP_ROWS) for shard in read_shards(storage, generation)]


# Round trip


def test_generation_is_read_as_it_was_published(output: Storage) -> None:
    clips = [make_clip(number, caption=f"caption {number}") for number in range(5)]
    shards = [make_shard(0, *clips[:2]), make_shard(1, *clips[2:])]
    rejections = [make_rejection(0), make_rejection(1), make_rejection(2, "quarantined")]
    published = publish(output, shards, rejections=rejections)
    (generation,) = read_generations(output)
    assert generation == published
    assert (generation.num_clips, generation.num_shards, generation.quarantined, generation.filtered) == (5, 2, 1, 2)
    assert generation.num_planned == 8
    assert generation.recipe_fingerprint == RECIPE.fingerprint
    assert RECIPE.differences(generation.recipe) == ""
    assert generation.columns == CAPTION
    assert read_all_clips(output, generation) == [clips[:2], clips[2:]]
    assert [ref.num_clips for ref in read_shards(output, generation)] == [2, 3]
    assert list(read_rejections(output, generation)) == rejections


def test_new_output_has_no_generations(output: Storage) -> None:
    assert read_generations(output) == []


def test_generation_may_have_no_clips_or_no_columns(output: Storage) -> None:
    empty = publish(output, [], rejections=[make_rejection(0)])
    assert list(read_shards(output, empty)) == []
    bare = publish(output, [make_shard(0, make_clip(0))], number=1, columns=pa.schema([]))
    assert read_all_clips(output, bare) == [[make_clip(0)]]
    assert read_generations(output) == [empty, bare]


def shards_of(output: Storage, sizes: list[int]) -> tuple[list[ShardRef], list[list[PlannedClip]], list[list[PlannedClip]]]:
    """Shards of so many clips, published: where they are, what was planned, what is read."""
    numbers = iter(range(sum(sizes)))
    planned = [[make_clip(next(numbers), caption=None) for _ in range(size)] for size in sizes]
    generation = publish(output, [make_shard(index, *clips) for index, clips in enumerate(planned)])
    return list(read_shards(output, generation)), planned, read_all_clips(output, generation)


def test_plan_is_written_in_files_of_bounded_size(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan_writer.PART_ROWS", 4)
    monkeypatch.setattr("pipeline.plan_writer.GROUP_ROWS", 1)
    monkeypatch.setattr("pipeline.plan_writer._BATCH_ROWS", 2)
    refs, planned, read = shards_of(output, [2, 1, 3, 3, 1])
    assert read == planned
    assert [(ref.file[-13:-8], ref.row_group, ref.first_row) for ref in refs] == [
        ("00000", 0, 0),
        ("00000", 1, 0),
        ("00000", 2, 0),
        ("00001", 0, 0),
        ("00001", 1, 0),
    ]
    rejections = [make_rejection(number) for number in range(9)]
    generation = publish(output, [], number=1, rejections=rejections)
    assert len(generation.rejected_files) == 3
    assert list(read_rejections(output, generation)) == rejections


def test_row_group_holds_whole_shards_and_a_shard_is_read_with_its_group_alone(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan_writer.GROUP_ROWS", 4)
    refs, planned, read = shards_of(output, [2, 1, 3, 9, 1])
    assert read == planned
    assert [(ref.row_group, ref.first_row) for ref in refs] == [(0, 0), (0, 2), (0, 3), (1, 0), (2, 0)]


VALUES: list[tuple[pa.DataType, Any]] = [
    (pa.string(), "text ü\n"),
    (pa.large_string(), "text"),
    (pa.bool_(), True),
    (pa.int8(), -3),
    (pa.int64(), 2**62),
    (pa.uint64(), 2**64 - 1),
    (pa.float32(), 0.5),
    (pa.float64(), 0.1),
    (pa.binary(), b"\0\xff"),
    (pa.large_binary(), b"x" * 1000),
    (pa.date32(), datetime.date(2025, 1, 2)),
    (pa.timestamp("us", tz="UTC"), datetime.datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)),
    (pa.duration("us"), datetime.timedelta(seconds=3)),
    (pa.decimal128(10, 2), Decimal("3.14")),
    (pa.list_(pa.string()), ["a", None, "b"]),
    (pa.list_(pa.float32(), 3), [1.0, 2.0, 3.0]),
    (pa.struct([("x", pa.int64()), ("y", pa.list_(pa.int64()))]), {"x": 1, "y": [2, 3]}),
    (pa.dictionary(pa.int32(), pa.string()), "cat"),
    (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=[str(kind) for kind, _ in VALUES])
def test_columns_of_every_type_survive(output: Storage, kind: pa.DataType, value: Any) -> None:
    clips = [make_clip(0, column=value), make_clip(1, column=None)]
    generation = publish(output, [make_shard(0, *clips)], columns=pa.schema([("column", kind)]))
    (stored,) = read_all_clips(output, generation)
    assert stored == clips
    assert read_generations(output)[0].columns.field("column").type == kind


def test_values_that_are_no_text_become_json_in_a_text_column(output: Storage) -> None:
    clips = [make_clip(0, caption={"de": "Käse"}), make_clip(1, caption=3), make_clip(2, caption=["a"]), make_clip(3)]
    generation = publish(output, [make_shard(0, *clips)])
    (stored,) = read_all_clips(output, generation)
    assert [clip.columns["caption"] for clip in stored] == ['{"de": "Käse"}', "3", '["a"]', None]


@pytest.mark.parametrize("value", ["three", 2**70, [1]])
def test_value_that_does_not_fit_its_column_is_an_error_that_names_the_column(output: Storage, value: Any) -> None:
    columns = pa.schema([("caption", pa.string()), ("views", pa.int64())])
    with pytest.raises(ConfigError, match="column 'views' is int64 in this dataset, but has another value"):
        publish(output, [make_shard(0, make_clip(0, views=3), make_clip(1, views=value))], columns=columns)


# Damage


def test_damaged_rows_are_never_read_as_others(output: Storage) -> None:
    clips = [make_clip(number, caption=f"caption {number}") for number in range(40)]
    generation = publish(output, [make_shard(0, *clips)], rejections=[make_rejection(number) for number in range(40)])
    (shard,) = read_shards(output, generation)
    rejections = list(read_rejections(output, generation))
    reads: list[tuple[str, Any, Any]] = [
        (shard.file, lambda: read_items(output, shard, CLIP_ROWS), clips),
        (generation.rejected_files[0], lambda: list(read_rejections(output, generation)), rejections),
    ]
    chance = random.Random(0)
    for file, read, expected in reads:
        whole = output.read(file)
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        messages = []
        for _ in range(150):
            damaged = bytearray(whole)
            damaged[chance.randrange(4, len(whole) - footer)] ^= 1 << chance.randrange(8)
            output.put(file, bytes(damaged))
            try:
                assert read() == expected  # the flip hit what is not read, such as statistics
            except DatasetError as error:
                messages.append(str(error))
        assert len(messages) > 100
        assert all(file in message for message in messages)
        output.put(file, whole)


# Authors


class LateStorage(Storage):
    """Just before it puts an index, somebody else publishes the same generation."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        publish(Storage(self.uri), [make_shard(0, make_clip(77, caption="the winner's"))], rejections=[make_rejection(0)])
        return super().put_if_absent(path, data)


def test_who_loses_the_race_adopts_the_winners_generation(output: Storage) -> None:
    adopted = publish(LateStorage(output.uri), [make_shard(0, make_clip(1, caption="the loser's"))])
    assert read_generations(output) == [adopted]
    assert read_all_clips(output, adopted) == [[make_clip(77, caption="the winner's")]]
    assert (adopted.filtered, len(list(read_rejections(output, adopted)))) == (1, 1)


def test_generation_that_was_not_published_does_not_exist(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Storage, path: str, data: bytes) -> bool:
        raise OSError("killed")

    monkeypatch.setattr(Storage, "put_if_absent", fail)
    with pytest.raises(OSError, match="killed"):
        publish(output, [make_shard(0, make_clip(0))])
    assert read_generations(output) == []


def test_other_format_is_refused_by_version(output: Storage) -> None:
    publish(output, [])
    index = output.read_json("plan/00000/index.json")
    output.put("plan/00000/index.json", json.dumps(index | {"format_version": 9}).encode())
    with pytest.raises(DatasetError, match=r"plan/00000/index\.json: format 9, this version reads 2"):
        read_generations(output)


# Known videos


def test_videos_of_earlier_generations_are_known_with_or_without_clips(output: Storage) -> None:
    clips = [make_clip(number) for number in range(3)]
    publish(output, [make_shard(0, *clips[:2])], rejections=[make_rejection(0)])
    publish(output, [make_shard(1, clips[2])], number=1)
    known = read_known_files(output, read_generations(output))
    keys = {digest(c.clip.uri, c.clip.size_bytes, c.clip.version) for c in clips}
    assert len(known) == 4
    assert all(key in known for key in keys | {"key-0"})
    assert len(read_known_files(output, [])) == 0


# Values of columns


def schema_of(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema(list(fields))


def test_whole_number_that_a_float_cannot_hold_exactly_is_rounded(output: Storage) -> None:
    columns = schema_of(("caption", pa.string()), ("score", pa.float64()))
    generation = publish(output, [make_shard(0, make_clip(0, score=2**60 + 1), make_clip(1, score=0.5))], columns=columns)
    assert [clip.columns["score"] for clip in read_all_clips(output, generation)[0]] == [2.0**60, 0.5]


@pytest.mark.parametrize("value", ["\ud83d", b"\xff"])
def test_text_that_cannot_be_stored_is_an_error_that_names_the_video(output: Storage, value: Any) -> None:
    good, bad = make_clip(0, caption="x"), make_clip(1, caption=value)
    schema = CAPTION if isinstance(value, str) else schema_of(("caption", pa.large_string()))
    with pytest.raises(ConfigError, match=f"column 'caption' is .*string.* for {bad.clip.uri}: "):
        publish(output, [make_shard(0, good, bad)], columns=schema)


def test_worker_reads_a_shard_in_two_requests_whatever_the_size_of_its_file(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan_writer.GROUP_ROWS", 2)
    monkeypatch.setattr("pipeline.dataset.shard_file.TAIL_BYTES", 64 << 10)
    captions = [random.Random(number).randbytes(20_000).hex() for number in range(12)]  # nothing that compresses well
    clips = [make_clip(number, caption=caption) for number, caption in enumerate(captions)]
    generation = publish(output, [make_shard(index, clip) for index, clip in enumerate(clips)])
    ref = list(read_shards(output, generation))[3]
    asked: list[int] = []

    def read_range(self: Storage, path: str, offset: int, length: int, _read: Any = Storage.read_range) -> Any:
        asked.append(length)
        return _read(self, path, offset, length)

    monkeypatch.setattr(Storage, "read_range", read_range)
    assert read_items(output, ref, CLIP_ROWS) == [clips[3]]
    assert len(asked) == 2
    assert asked[1] < output.size(ref.file) / 4
