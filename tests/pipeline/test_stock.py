"""What is committed is what storage lists; checkpoints save requests and are believed in nothing else."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.account import Account
from pipeline.checkpoints import CHECKPOINT_FOLDER, Checkpoints
from pipeline.errors import TransientError
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, OutcomeRef, ShardRef, read_generations
from pipeline.plan_writer import publish_generation
from pipeline.stock import CHECKPOINT_S, Stock
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from pipeline.videos.record import commit_videos, done_path, read_record
from tests.pipeline.dataset.builders import make_rejection
from tests.pipeline.fakes import SMALL, make_clip
from tests.pipeline.test_plan_store import RECIPE, make_shard

SHARDS = 6


@dataclass
class FakeWork:
    """Shards whose commits are small records; counts the footers that are read."""

    storage: Storage
    generation: Generation = field(init=False)
    read: list[int] = field(default_factory=list)
    now: float = 0.0

    commits = ("done", ".json")

    def __post_init__(self) -> None:
        shards = [make_shard(index, make_clip(2 * index), make_clip(2 * index + 1)) for index in range(SHARDS)]
        options: dict[str, Any] = {"rows": CLIP_ROWS, "recipe": RECIPE, "settings": {}, "columns": pa.schema([])}
        self.generation = publish_generation(self.storage, 0, shards, [make_rejection(99, "filtered")], **options)

    def commit_path(self, shard: ShardRef) -> str:
        return done_path(shard.bucket_key, shard.index, shard.shard_id)

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        summary = read_record(self.storage, path)[0]
        assert size_bytes == self.storage.size(path)
        self.read.append(summary.index)
        return summary

    def commit(self, index: int, *, rejected: int = 1, generation: int = 0) -> ShardSummary:
        return commit_videos(self.storage, self.summary(index, rejected=rejected, generation=generation), [])

    def summary(self, index: int, *, rejected: int = 1, generation: int = 0) -> ShardSummary:
        return ShardSummary(
            shard_id=f"{index:016x}",
            generation=generation,
            index=0 if generation else index,
            bucket_key=SMALL.key,
            attempt_id="a",
            recipe="r",
            num_rows=2 - rejected,
            size_bytes=100,
            rejections=tuple(make_rejection(10 * index + number) for number in range(rejected)),
        )

    def take(self) -> tuple[Stock, list[int]]:
        """A driver's start: its stock, and what is still to do."""
        self.read.clear()
        stock = Stock(self, Account(), lambda: self.now)
        return stock, [shard.index for shard in stock.take(read_generations(self.storage))]


@pytest.fixture
def work(output: Storage) -> FakeWork:
    return FakeWork(output)


def counts(stock: Stock) -> tuple[int, int, int, int]:
    account = stock.account
    assert account.planned == 2 * SHARDS + 1
    return account.written, account.quarantined, account.filtered, account.pending


def test_first_start_has_everything_to_do(work: FakeWork) -> None:
    stock, pending = work.take()
    assert pending == list(range(SHARDS))
    assert counts(stock) == (0, 0, 1, 12)


def test_what_came_in_is_not_read_again_at_the_next_start(work: FakeWork) -> None:
    stock, _ = work.take()
    for index in (0, 2):
        stock.add(work.commit(index))
    stock.checkpoint()
    work.commit(4)  # the driver died before it heard of this one
    before = counts(stock)
    again, pending = work.take()
    assert pending == [1, 3, 5]
    assert work.read == [4]
    assert before == (2, 2, 1, 8)
    assert counts(again) == (3, 3, 1, 6)
    assert again.account.reasons == {"not_a_video": 4}
    assert again.account.size_bytes == 300
    third, _ = work.take()
    assert work.read == []  # what the second start read is written down too
    assert counts(third) == counts(again)


def test_checkpoint_is_written_after_so_many_shards_or_so_long(work: FakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stock.CHECKPOINT_SHARDS", 2)
    stock, _ = work.take()
    files = []
    for index in range(4):
        work.now += 400.0 if index == 3 else 1.0
        stock.add(work.commit(index))
        files.append(len(work.storage.list(CHECKPOINT_FOLDER)))
    assert files == [0, 1, 1, 2]
    stock.checkpoint()
    assert len(work.storage.list(CHECKPOINT_FOLDER)) == 2  # nothing new


def test_checkpointed_shard_that_is_gone_is_not_committed_and_what_replaces_it_counts(
    work: FakeWork, caplog: pytest.LogCaptureFixture
) -> None:
    stock, _ = work.take()
    for index in range(3):
        stock.add(work.commit(index))
    stock.checkpoint()
    gone = done_path(SMALL.key, 1, f"{1:016x}")
    work.storage._fs.rm(work.storage.local_path(gone))
    caplog.set_level(logging.WARNING)
    second, pending = work.take()
    assert pending == [1, 3, 4, 5]
    assert counts(second) == (2, 2, 1, 8)
    assert work.read == [0, 2] or work.read == [2, 0]
    assert "committed shards are gone count=1" in caplog.text
    work.commit(1, rejected=0)  # made again, otherwise; then the driver dies
    third, _ = work.take()
    assert counts(third) == (4, 2, 1, 6)
    assert work.read == [1]


def test_superseded_outcomes_count_no_more_whoever_has_them_written_down(work: FakeWork) -> None:
    stock, _ = work.take()
    for index in range(SHARDS):
        stock.add(work.commit(index))
    stock.checkpoint()
    assert counts(stock) == (6, 6, 1, 0)
    gone = [OutcomeRef(f"{index:016x}", f"rejected-{10 * index}", f"bad/{10 * index}.mp4") for index in (1, 4)]
    gone.append(OutcomeRef("plan/00000", "rejected-99", "bad/99.mp4"))
    options: dict[str, Any] = {"rows": CLIP_ROWS, "recipe": RECIPE, "settings": {}, "columns": pa.schema([])}
    again = make_shard(9, *(make_clip(number) for number in (90, 91, 92)))
    publish_generation(work.storage, 1, [again], [], superseded=gone, **options)
    for _ in range(2):
        stock, pending = work.take()
        assert counts(stock) == (6, 4, 0, 3)
        assert (pending, sorted(work.read)) == ([0], [1, 4])  # the other footers are not read
    work.commit(9, generation=1)
    stock, _ = work.take()
    assert counts(stock) == (7, 5, 0, 1)  # the record holds two of the three
    assert len(work.storage.list(CHECKPOINT_FOLDER)) == 2


def test_lost_shard_that_is_made_again_says_nothing_of_what_is_superseded(work: FakeWork) -> None:
    options: dict[str, Any] = {"rows": CLIP_ROWS, "recipe": RECIPE, "settings": {}, "columns": pa.schema([])}
    gone = [OutcomeRef(f"{0:016x}", "rejected-0", "bad/0.mp4")]
    publish_generation(work.storage, 1, [make_shard(9, make_clip(90))], [], superseded=gone, **options)
    stock, pending = work.take()
    assert pending == [*range(SHARDS), 0]
    stock.add(work.commit(0))
    assert counts(stock) == (1, 0, 1, 11)


def test_many_checkpoints_become_one(work: FakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.checkpoints.MAX_FILES", 2)
    stock, _ = work.take()
    for index in range(4):
        stock.add(work.commit(index))
        stock.checkpoint()
    second, _ = work.take()
    names = [found.uri.rpartition("/")[2][:10] for found in work.storage.list(CHECKPOINT_FOLDER)]
    assert names == ["000001-mor", "000002-mor", "000003-mor", "000004-mor", "000005-all"]
    read: list[str] = []
    monkeypatch.setattr(Storage, "read", lambda self, path, _read=Storage.read: (read.append(path), _read(self, path))[1])
    third, _ = work.take()
    assert [path.rpartition("/")[2][:10] for path in read if path.startswith(CHECKPOINT_FOLDER)] == ["000005-all"]
    assert counts(third) == counts(second) == counts(stock)


def test_store_that_takes_no_checkpoint_costs_the_next_start_a_footer(work: FakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, _ = work.take()
    stock.add(work.commit(0))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_if_absent", lambda *_: (_ for _ in ()).throw(TransientError("SlowDown")))
        stock.checkpoint()
    assert work.take()[1] == [1, 2, 3, 4, 5]
    assert work.read == [0]
    stock.checkpoint()  # it was not forgotten
    assert len(work.storage.list(CHECKPOINT_FOLDER)) == 2


def test_checkpoint_that_fails_is_not_tried_again_with_every_shard(work: FakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stock.CHECKPOINT_SHARDS", 2)
    stock, _ = work.take()
    tries: list[str] = []

    def refuse(_: Storage, path: str, __: bytes) -> bool:
        tries.append(path)
        raise TransientError("SlowDown")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_if_absent", refuse)
        for index in range(4):
            stock.add(work.summary(index))
        assert len(tries) == 1
        work.now += CHECKPOINT_S
        stock.add(work.summary(4))
        assert len(tries) == 2
    work.now += CHECKPOINT_S
    stock.add(work.summary(5))
    assert len(Checkpoints(work.storage).read()) == SHARDS


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "flipped"])
def test_damaged_checkpoint_costs_its_shards_footers(work: FakeWork, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    stock, _ = work.take()
    for index in range(2):
        stock.add(work.commit(index))
        stock.checkpoint()
    first = sorted(found.uri for found in work.storage.list(CHECKPOINT_FOLDER))[0]
    whole = work.storage.read(first)
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), sink)
    flipped = bytearray(whole)
    ids = pq.read_metadata(io.BytesIO(whole)).row_group(0).column(0)
    flipped[ids.data_page_offset - 1] ^= 1  # the last byte of its dictionary
    work.storage.put(first, {"empty": b"", "cut": whole[:-9], "foreign": sink.getvalue(), "flipped": bytes(flipped)}[damage])
    again, pending = work.take()
    assert pending == [2, 3, 4, 5]
    assert work.read == [0]
    assert counts(again) == counts(stock)
    assert f"{first}: damaged checkpoint: " in caplog.text


def test_files_of_others_beside_the_checkpoints_are_passed_over(work: FakeWork) -> None:
    stock, _ = work.take()
    stock.add(work.commit(0))
    stock.checkpoint()
    for name in ("notes.parquet", "copy-of-000009-all-0123abcd.parquet", "x-all.parquet"):
        work.storage.put(f"{CHECKPOINT_FOLDER}/{name}", b"not ours")
    again, _ = work.take()
    assert work.read == []
    assert counts(again) == counts(stock)
    again.add(work.commit(1))
    again.checkpoint()
    assert sum("/000002-more-" in found.uri for found in work.storage.list(CHECKPOINT_FOLDER)) == 1


def test_files_that_no_plan_names_are_told_and_not_counted(work: FakeWork, caplog: pytest.LogCaptureFixture) -> None:
    work.commit(0)
    record = work.storage.read(done_path(SMALL.key, 0, f"{0:016x}"))
    work.storage.put(f"done/other/part-000000-{0:016x}.json", record)  # a shard of the plan, at another place
    work.storage.put("done/x.json", record)
    stock, pending = work.take()
    assert pending == [1, 2, 3, 4, 5]
    assert "committed files that no plan names count=2" in caplog.text
    assert counts(stock)[0] == 1


def test_paths_are_those_of_the_committed_in_plan_order(work: FakeWork) -> None:
    stock, _ = work.take()
    for index in (3, 1):
        stock.add(work.commit(index))
    assert [path[-28:-22] for path in stock.paths([work.generation])] == ["000001", "000003"]
