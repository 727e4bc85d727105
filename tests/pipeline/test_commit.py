"""A shard becomes part of the dataset once, whoever tries and whatever is lost on the way."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.commit import commit_shard
from pipeline.dataset.writer import read_summary, shard_path
from pipeline.errors import ConfigError, TransientError
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from tests.conftest import ObjectStore
from tests.pipeline.dataset.builders import make_rejection, write_shard
from tests.pipeline.fakes import Fault, FlakyFileSystem


def write_attempt(folder: Path, attempt_id: str, samples: int = 3) -> tuple[Path, ShardSummary]:
    """One attempt at the same shard; attempts differ in what they could not encode."""
    spool = folder / f"{attempt_id}.parquet"
    rejections = tuple(make_rejection(number) for number in range(samples, 3))
    return spool, write_shard(spool, range(samples), attempt_id=attempt_id, rejections=rejections)


def path_of(summary: ShardSummary) -> str:
    return shard_path(summary.bucket_key, summary.index, summary.shard_id)


def test_committed_shard_stands_under_its_name_with_its_account(output: Storage, tmp_path: Path) -> None:
    spool, summary = write_attempt(tmp_path, "first")
    assert commit_shard(output, spool, summary) == summary
    assert output.read(path_of(summary)) == spool.read_bytes()
    assert read_summary(output, path_of(summary)) == summary


def test_second_attempt_returns_first_commit(output: Storage, tmp_path: Path) -> None:
    first_spool, first = write_attempt(tmp_path, "first", samples=2)
    second_spool, second = write_attempt(tmp_path, "second")
    commit_shard(output, first_spool, first)
    assert commit_shard(output, second_spool, second) == first
    assert output.read(path_of(first)) == first_spool.read_bytes()


def test_commit_made_twice_is_one_commit(output: Storage, tmp_path: Path) -> None:
    spool, summary = write_attempt(tmp_path, "first")
    assert commit_shard(output, spool, summary) == summary
    assert commit_shard(output, spool, summary) == summary


def test_lost_reply_is_settled_by_reading_back(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    storage = Storage("flaky://out")
    spool, summary = write_attempt(tmp_path, "first")
    flaky.faults += [Fault("pipe_file", TimeoutError("no reply"), after=True)]
    assert commit_shard(storage, spool, summary) == summary
    assert flaky.calls.count("pipe_file") == 2
    assert [file.uri for file in storage.list("data")] == [path_of(summary)]


def test_lost_reply_of_a_race_that_another_won_gives_the_winners_account(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    storage = Storage("flaky://out")
    winner_spool, winner = write_attempt(tmp_path, "winner", samples=1)
    commit_shard(storage, winner_spool, winner)
    spool, summary = write_attempt(tmp_path, "late")
    flaky.faults += [Fault("pipe_file", ConnectionResetError()), Fault("pipe_file", TimeoutError())]
    assert commit_shard(storage, spool, summary) == winner


def test_put_that_failed_is_made_again(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    spool, summary = write_attempt(tmp_path, "first")
    flaky.faults += [Fault("pipe_file", OSError("slow down"))] * 3
    assert commit_shard(Storage("flaky://out"), spool, summary) == summary


def test_put_that_never_succeeds_but_once_took_effect_is_a_commit(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    spool, summary = write_attempt(tmp_path, "first")
    flaky.faults += [Fault("pipe_file", TimeoutError(), after=True), *[Fault("pipe_file", TimeoutError())] * 7]
    assert commit_shard(Storage("flaky://out"), spool, summary) == summary


def test_store_that_does_not_answer_leaves_the_commit_unknown_and_the_next_attempt_settles_it(
    flaky: type[FlakyFileSystem], tmp_path: Path
) -> None:
    storage = Storage("flaky://out")
    spool, summary = write_attempt(tmp_path, "first")
    flaky.faults += [Fault("pipe_file", TimeoutError(), after=True), *[Fault("pipe_file", TimeoutError())] * 7]
    flaky.faults += [Fault("info", TimeoutError())] * 8
    with pytest.raises(TransientError, match=r"info .*part-000000-0123abcd\.parquet: failed 8 times, last by TimeoutError"):
        commit_shard(storage, spool, summary)
    second_spool, second = write_attempt(tmp_path, "second")
    assert commit_shard(storage, second_spool, second) == summary


def test_missing_bucket_is_explained(s3: ObjectStore, tmp_path: Path) -> None:
    spool, summary = write_attempt(tmp_path, "first")
    with pytest.raises(ConfigError, match="create the bucket first"):
        commit_shard(Storage("s3://no-such-bucket/x"), spool, summary)


def test_attempts_that_commit_at_once_agree_on_one_account(s3: ObjectStore, tmp_path: Path) -> None:
    storage = Storage(s3.uri(uuid.uuid4().hex))
    attempts = [write_attempt(tmp_path, f"attempt-{number}", samples=number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        accounts = list(pool.map(lambda attempt: commit_shard(storage, *attempt), attempts))
    assert len(set(accounts)) == 1
    assert accounts[0] in [summary for _, summary in attempts]
    assert read_summary(storage, path_of(accounts[0])) == accounts[0]
