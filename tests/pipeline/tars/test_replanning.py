"""Tars of which something was left out, looked at again: each member is accounted for once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.outcomes import count_planned, read_left_out, read_superseded, read_to_look_at_again
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, read_generations, read_items, read_shards
from pipeline.requeue import requeue
from pipeline.storage import Storage
from tests.pipeline.tars.making import make_tar, plan_tars
from tests.pipeline.video_samples import write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=17).read_bytes()


@pytest.fixture
def tar(tmp_path: Path, video: bytes) -> Path:
    """Two good videos, and two that are none."""
    path = tmp_path / "s.tar"
    path.write_bytes(make_tar([("a.mp4", video), ("bad.mp4", b"no video"), ("b.mp4", video), ("worse.mp4", b"none")]))
    return path


def members(output: Storage, generation: Generation | None) -> list[str]:
    assert generation is not None
    items = [item for shard in read_shards(output, generation) for item in read_items(output, shard, CLIP_ROWS)]
    return [item.uri.rpartition("/")[2] for item in items]


def account(output: Storage) -> tuple[int, list[str]]:
    """How much is planned, each once, and what of it planning left out."""
    generations = read_generations(output)
    left_out = read_left_out(output, generations, read_superseded(output, generations))
    return count_planned(generations), sorted(rejection.uri.rpartition("/")[2] for rejection in left_out)


def test_members_that_are_as_bad_as_before_replace_what_was_said_of_them_alone(tar: Path, output: Storage) -> None:
    plan_tars(str(tar), output)
    before = account(output)
    assert before == (4, ["s.tar#bad.mp4", "s.tar#worse.mp4"])
    assert requeue(output, lambda rejection: rejection.uri.endswith("#bad.mp4")).files == 1
    generation, probed = plan_tars(str(tar), output, requeued=True)
    assert (members(output, generation), probed) == ([], [str(tar)])
    assert account(output) == before
    assert read_to_look_at_again(output, read_generations(output)) == []


def test_of_a_tar_that_was_mended_the_member_is_planned_and_an_append_plans_the_others(
    tar: Path, output: Storage, video: bytes
) -> None:
    plan_tars(str(tar), output)
    tar.write_bytes(make_tar([("a.mp4", video), ("bad.mp4", video), ("new.mp4", video)]))
    requeue(output, lambda rejection: True)
    generation, _ = plan_tars(str(tar), output, requeued=True)
    assert members(output, generation) == ["s.tar#bad.mp4"]
    assert account(output) == (4, ["s.tar#worse.mp4"])  # which is not there any more
    added, _ = plan_tars(str(tar), output)
    assert sorted(members(output, added)) == ["s.tar#a.mp4", "s.tar#new.mp4"]
    assert account(output) == (6, ["s.tar#worse.mp4"])


@pytest.mark.parametrize("requeued", [True, False])
def test_tar_that_was_none_is_replaced_by_its_members(tar: Path, output: Storage, requeued: bool) -> None:
    whole = tar.read_bytes()
    tar.write_bytes(b"not a tar" * 1000)
    plan_tars(str(tar), output)
    assert account(output) == (1, ["s.tar"])
    tar.write_bytes(whole)
    if requeued:
        requeue(output, lambda rejection: True)
    generation, _ = plan_tars(str(tar), output, requeued=requeued)
    assert members(output, generation) == ["s.tar#a.mp4", "s.tar#b.mp4"]
    assert account(output) == (4, ["s.tar#bad.mp4", "s.tar#worse.mp4"])


def test_tar_that_breaks_off_is_looked_at_whole_and_its_first_members_are_not_planned_twice(tar: Path, output: Storage) -> None:
    tar.write_bytes(tar.read_bytes()[:-9000] + b"?" * 700)
    plan_tars(str(tar), output)
    before = account(output)
    requeue(output, lambda rejection: True)
    generation, _ = plan_tars(str(tar), output, requeued=True)
    assert members(output, generation) == []
    assert account(output) == before
