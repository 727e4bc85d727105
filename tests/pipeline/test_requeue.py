"""The quarantine as work: a further generation tries it again, the latest outcome counts, each clip once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.account import Account
from pipeline.committed import ENCODED, read_committed
from pipeline.dataset import LatentDataset
from pipeline.errors import DatasetError, RunRefusedError
from pipeline.outcomes import (
    Contents,
    find_replaced,
    latest_summary,
    read_superseded,
    read_to_look_at_again,
    split_superseded,
)
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import OutcomeRef, ShardRef, read_generations, read_items, read_shards
from pipeline.plan_writer import publish_generation
from pipeline.quarantine_view import Choice, list_lines, requeue_lines, show_lines
from pipeline.requeue import Requested, choose_replanned, read_quarantine, requeue
from pipeline.stock import Stock
from pipeline.storage import Storage
from pipeline.types import Rejection, ShardSummary
from pipeline.validation import Validation
from tests.pipeline.outputs import (
    RECIPE,
    commit_pending,
    make_output,
    make_planned,
    plan_output,
    publish_output,
    reject_file,
)

FAILING = {"videos/3.mp4", "videos/7.mp4"}
ALL = Choice()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def dataset(output: Storage, spool: Path) -> Storage:
    """Twelve clips, of which two failed; one file that is no video, one that is too short."""
    make_output(output, spool, failing=FAILING)
    return output


@dataclass(frozen=True)
class EncodeCommits:
    """The part of the work that says where commits are."""

    storage: Storage
    commits = (ENCODED.folder, ENCODED.suffix)

    def commit_path(self, shard: ShardRef) -> str:
        return ENCODED.path(shard)

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        return ENCODED.read_summary(self.storage, path, size_bytes)


def counts(storage: Storage) -> tuple[int, int, int, int, int]:
    """As the driver takes stock: planned, written, quarantined, filtered, pending."""
    account = Account()
    Stock(EncodeCommits(storage), account).take(read_generations(storage))
    return account.planned, account.written, account.quarantined, account.filtered, account.pending


def contents_of(keys: dict[str, str]) -> Contents:
    contents = Contents()
    for uri, key in keys.items():
        contents.add(uri, key)
    return contents


def is_valid(storage: Storage) -> bool:
    return not list(Validation(storage=storage, threads=2).findings())


# Clips that failed in a shard


def test_requeued_clips_are_pending_then_written_and_each_counts_once(dataset: Storage, spool: Path) -> None:
    assert counts(dataset) == (14, 10, 3, 1, 0)
    done = requeue(dataset, Choice(reasons=frozenset({"timeout"})))
    assert (done.clips, done.files, done.waiting) == (2, 0, 0)
    assert counts(dataset) == (14, 10, 1, 1, 2)
    commit_pending(dataset, spool)
    assert counts(dataset) == (14, 12, 1, 1, 0)
    manifest = publish_output(dataset)
    assert (manifest.num_samples, manifest.num_quarantined, manifest.num_filtered) == (12, 1, 1)
    ids = LatentDataset(dataset.uri).sample_ids
    assert sorted(ids) == [f"sample-{number:04d}" for number in range(12)]
    assert is_valid(dataset)


def test_a_clip_that_fails_again_is_quarantined_by_its_latest_shard_alone(dataset: Storage, spool: Path) -> None:
    requeue(dataset, ALL)
    commit_pending(dataset, spool, failing={"videos/7.mp4"})
    publish_output(dataset)
    assert counts(dataset) == (14, 11, 2, 1, 0)
    rows = pq.ParquetFile(dataset.local_path("quarantine.parquet")).read().to_pylist()
    assert sorted(row["uri"] for row in rows) == ["videos/7.mp4", "videos/bad.mp4", "videos/short.mp4"]
    again = requeue(dataset, Choice(reasons=frozenset({"timeout"})))
    assert again.clips == 1
    commit_pending(dataset, spool)
    publish_output(dataset)
    assert counts(dataset) == (14, 12, 1, 1, 0)
    assert sorted(LatentDataset(dataset.uri).sample_ids) == [f"sample-{number:04d}" for number in range(12)]


def test_a_requeued_clip_is_planned_as_it_was(dataset: Storage) -> None:
    done = requeue(dataset, Choice(ids=frozenset({"sample-0003"})))
    assert done.generation is not None
    (shard,) = read_shards(dataset, done.generation)
    assert read_items(dataset, shard, CLIP_ROWS) == [make_planned(3)]
    assert done.generation.recipe_fingerprint == RECIPE.fingerprint
    assert done.generation.settings == read_generations(dataset)[0].settings


def test_requeueing_what_is_pending_already_does_nothing(dataset: Storage) -> None:
    requeue(dataset, Choice(reasons=frozenset({"timeout"})))
    done = requeue(dataset, Choice(reasons=frozenset({"timeout"})))
    assert (done.generation, done.clips) == (None, 0)
    assert len(read_generations(dataset)) == 2


def test_a_run_that_is_not_finished_can_be_requeued_from(output: Storage, spool: Path) -> None:
    plan_output(output)
    commit_pending(output, spool, failing=FAILING)
    missing = list(read_shards(output, read_generations(output)[0]))[2]
    output.move(f"data/bucket={missing.bucket_key}/part-{missing.index:06d}-{missing.shard_id}.parquet", "lost.parquet")
    requeue(output, ALL)
    assert counts(output) == (12, 8, 0, 0, 4)


def test_who_loses_the_race_for_a_generation_is_told(dataset: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Storage.put_if_absent

    def late(self: Storage, path: str, data: bytes) -> bool:
        monkeypatch.setattr(Storage, "put_if_absent", put)
        publish_generation(
            dataset, 1, [], [], rows=CLIP_ROWS, recipe=RECIPE, settings={}, columns=read_generations(dataset)[0].columns
        )
        return put(self, path, data)

    monkeypatch.setattr(Storage, "put_if_absent", late)
    with pytest.raises(RunRefusedError, match="another program published generation 1 meanwhile; look again, and repeat"):
        requeue(dataset, ALL)
    assert counts(dataset) == (14, 10, 3, 1, 0)


def test_a_lost_shard_that_is_made_again_leaves_requeued_clips_to_the_later_generation(dataset: Storage, spool: Path) -> None:
    generations = read_generations(dataset)
    first = next(read_shards(dataset, generations[0]))
    requeue(dataset, ALL)
    superseded = read_superseded(dataset, read_generations(dataset))
    own, others = split_superseded(first, read_items(dataset, first, CLIP_ROWS), superseded)
    assert [planned.uri for planned in own] == [f"videos/{number}.mp4" for number in (0, 1, 2, 4)]
    assert [(one.uri, one.status, one.reason) for one in others] == [("videos/3.mp4", "filtered", "superseded")]
    summary = latest_summary(next(read_committed(dataset, generations))[1], superseded)
    assert latest_summary(replace(summary, rejections=tuple(others)), superseded).rejections == ()


# Files that could not be looked at


def test_a_file_that_could_not_be_probed_waits_for_the_next_run_to_look_again(dataset: Storage) -> None:
    done = requeue(dataset, Choice(stages=frozenset({"probe"})))
    assert (done.clips, done.files) == (0, 1)  # what is filtered is left alone: the rule still stands
    assert counts(dataset) == (14, 10, 3, 1, 0)  # until then its outcome counts
    assert read_to_look_at_again(dataset, read_generations(dataset)) == [
        OutcomeRef("plan/00000", "key-of-bad.mp4", "videos/bad.mp4")
    ]
    assert requeue(dataset, Choice(stages=frozenset({"probe"}))).waiting == 1
    assert len(read_generations(dataset)) == 2


def test_what_a_file_gives_now_takes_the_place_of_its_outcome(dataset: Storage) -> None:
    generations = read_generations(dataset)
    asked = [OutcomeRef("plan/00000", "key-of-bad.mp4", "videos/12.mp4"), OutcomeRef("plan/00000", "gone", "videos/gone.mp4")]
    found = [make_planned(12), make_planned(5), reject_file("short.mp4")]
    chosen, left_out = choose_replanned(dataset, generations, Requested(asked), found)
    assert chosen == make_planned(12)  # the others are accounted for already
    assert isinstance(left_out, Rejection)
    assert (left_out.sample_id, left_out.status, left_out.reason) == ("gone", "filtered", "not_listed")


def test_a_clip_whose_file_changed_is_looked_at_again(output: Storage, spool: Path) -> None:
    plan_output(output)
    commit_pending(output, spool, failing={"videos/3.mp4"}, reason="changed")
    done = requeue(output, ALL)
    assert (done.clips, done.files) == (0, 1)


# Files that were mended


def test_rejections_of_another_content_of_a_file_are_replaced(dataset: Storage) -> None:
    generations = read_generations(dataset)
    keys = {
        "videos/3.mp4": "mended",
        "videos/7.mp4": make_planned(7).file_key,  # the same content, under other settings
        "videos/bad.mp4": "mended",
        "videos/9.mp4": "mended",  # was written: stays
    }
    shard_id = next(read_shards(dataset, generations[0])).shard_id
    assert set(find_replaced(dataset, generations, contents_of(keys))) == {
        (shard_id, "sample-0003", "videos/3.mp4"),
        ("plan/00000", "key-of-bad.mp4", "videos/bad.mp4"),
    }


# For a person


def test_the_list_counts_by_stage_and_reason_and_names_ids_if_asked(dataset: Storage) -> None:
    assert [line.split() for line in list_lines(dataset, ALL)] == [
        ["2", "quarantined", "decode", "timeout"],
        ["1", "quarantined", "probe", "not_a_video"],
        ["1", "filtered", "probe", "too_short"],
    ]
    lines = list(list_lines(dataset, Choice(reasons=frozenset({"timeout"})), with_ids=True))
    assert [line.split()[0] for line in lines] == ["sample-0003", "sample-0007"]


def test_one_of_them_is_shown_with_all_that_is_known(dataset: Storage) -> None:
    (text,) = show_lines(dataset, Choice(ids=frozenset({"sample-0003"})))
    for part in ("videos/3.mp4", "took too long", '"frame_end": 52', '"stands_in": "'):
        assert part in text


def test_a_requeue_says_what_will_be_done_and_is_refused_while_a_run_is_alive(
    dataset: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive(storage: Storage, *, takeover: bool) -> None:
        raise RunRefusedError("alive")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.quarantine_view.refuse_second_run", alive)
        with pytest.raises(RunRefusedError):
            list(requeue_lines(dataset, ALL))
    assert list(requeue_lines(dataset, ALL)) == [
        "generation 1: 2 clips to be tried again, 1 files to be looked at again; run the job's usual command"
    ]
    assert list(requeue_lines(dataset, ALL)) == ["1 were requeued before; run the job's usual command"]


def test_what_is_no_output_is_refused(output: Storage) -> None:
    with pytest.raises(DatasetError, match="there is no plan"):
        read_quarantine(output)


def test_a_file_without_a_key_is_never_taken_for_a_mended_one(output: Storage, spool: Path) -> None:
    old = replace(reject_file("bad.mp4"), file_key="")  # of a program that kept none
    plan_output(output, 2, [old])
    commit_pending(output, spool)
    assert list(find_replaced(output, read_generations(output), contents_of({"videos/bad.mp4": "mended"}))) == []
