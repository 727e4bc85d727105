"""Making a generation: what was probed once is never probed again, what is known is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.clip_planning import ClipPlanner
from pipeline.engine import ModelInfo
from pipeline.errors import ConfigError, TerminalError, TransientError
from pipeline.inputs import stat_input
from pipeline.outcomes import count_planned, read_left_out, read_superseded, read_to_look_at_again
from pipeline.plan import ProbedVideo
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, read_generations, read_items, read_rejections, read_shards
from pipeline.planning import Batch, _split
from pipeline.recipe import LatentRecipe
from pipeline.requeue import requeue
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import VideoInfo
from tests.pipeline.test_config import make_config

MODEL = ModelInfo(fingerprint="weights", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)
INFO = VideoInfo(width=64, height=64, fps=30.0, duration_s=2.0, container="mp4", codec="h264")


@dataclass
class FakeProbe:
    """Looks at files; one named ``bad`` is no video unless it says that it is mended."""

    probed: list[str] = field(default_factory=list)
    columns_seen: list[dict[str, Any]] = field(default_factory=list)
    fails_after: int | None = None
    """Batches until storage goes away."""
    num_batches: int = 0

    def __call__(self, batches: list[Batch]) -> Iterator[tuple[int, list[ProbedVideo]]]:
        for position, batch in reversed(list(enumerate(batches))):
            if self.num_batches == self.fails_after:
                raise TransientError("storage does not answer")
            self.num_batches += 1
            yield position, [self._probe(item) for item in batch]

    def _probe(self, item: SourceItem) -> ProbedVideo:
        name = item.uri.rpartition("/")[2]
        self.probed.append(name)
        self.columns_seen.append(item.columns)
        found = stat_input(item.uri)
        is_bad = name.startswith("bad") and "mended" not in Path(item.uri).read_text()
        return ProbedVideo(
            uri=found.uri,
            size_bytes=found.size_bytes,
            version=found.version,
            columns={"caption": f"beside {name}"} if item.sidecars else {},
            info=None if is_bad else INFO,
            error=TerminalError("probe", "not_a_video", f"{name}: no video") if is_bad else None,
        )


@dataclass
class Workplace:
    """An input folder, an output, and a way to plan from one to the other."""

    input: Path
    output: Storage

    def write(self, *names: str) -> None:
        for name in names:
            (self.input / name).write_text(name)

    def planner(self, probe: FakeProbe | None = None, *, uri: Path | None = None, **settings: Any) -> ClipPlanner:
        config = make_config(
            input={"uri": str(uri or self.input), **settings},
            output={"uri": self.output.uri},
            clip={"buckets": ["9x64x64@8"]},
        )
        return ClipPlanner(
            config=config,
            storage=self.output,
            model=MODEL,
            recipe=LatentRecipe.from_config(config, MODEL.fingerprint),
            probe=probe or FakeProbe(),
            on_probed=lambda videos, total: None,
        )

    def plan(self, probe: FakeProbe | None = None, *, uri: Path | None = None, **settings: Any) -> Generation | None:
        return self.planner(probe, uri=uri, **settings).add_generation(read_generations(self.output))

    def replan(self, probe: FakeProbe | None = None, *, uri: Path | None = None, **settings: Any) -> Generation:
        """What the job does after a requeue."""
        generations = read_generations(self.output)
        outcomes = read_to_look_at_again(self.output, generations)
        return self.planner(probe, uri=uri, **settings).replan(generations, outcomes)

    def account(self) -> tuple[int, list[str]]:
        """How much is planned, each once, and the reasons of what planning left out."""
        generations = read_generations(self.output)
        superseded = read_superseded(self.output, generations)
        reasons = [rejection.reason for rejection in read_left_out(self.output, generations, superseded)]
        return count_planned(generations), reasons

    def clips(self, generation: Generation | None) -> list[str]:
        """File names of a generation's clips, in plan order."""
        assert generation is not None
        shards = read_shards(self.output, generation)
        return [planned.clip.uri.rpartition("/")[2] for shard in shards for planned in read_items(self.output, shard, CLIP_ROWS)]


@pytest.fixture
def work(tmp_path: Path, output: Storage, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setattr("pipeline.planning.PROBE_BATCH", 2)
    (tmp_path / "input").mkdir()
    return Workplace(tmp_path / "input", output)


def test_clips_stand_in_listing_order_whatever_order_they_were_probed_in(work: Workplace) -> None:
    work.write("c.mp4", "a.mp4", "e.mp4", "b.mp4", "d.mp4", "a.txt")
    generation = work.plan()
    assert work.clips(generation) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert generation is not None
    assert (generation.number, generation.num_clips, generation.num_planned) == (0, 5, 5)
    (first, *_) = read_items(work.output, next(read_shards(work.output, generation)), CLIP_ROWS)
    assert first.columns == {"caption": "beside a.mp4"}


def test_planning_that_was_cut_off_probes_only_the_rest(work: Workplace) -> None:
    names = [f"{number}.mp4" for number in range(7)]
    work.write(*names)
    first, second = FakeProbe(fails_after=2), FakeProbe()
    with pytest.raises(TransientError):
        work.plan(first)
    assert read_generations(work.output) == []
    assert work.clips(work.plan(second)) == names
    assert len(first.probed) == 3
    assert sorted(first.probed + second.probed) == names


def test_file_that_changed_meanwhile_is_probed_again(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "c.mp4")
    with pytest.raises(TransientError):
        work.plan(FakeProbe(fails_after=1))  # had c, which stands alone in the last batch
    (work.input / "c.mp4").write_text("longer than before")
    probe = FakeProbe()
    work.plan(probe)
    assert sorted(probe.probed) == ["a.mp4", "b.mp4", "c.mp4"]


def test_findings_survive_being_stored(work: Workplace) -> None:
    work.write("a.mp4", "bad.mp4")
    generation = work.plan()
    assert generation is not None
    (rejection,) = read_rejections(work.output, generation)
    assert (rejection.status, rejection.stage, rejection.reason) == ("quarantined", "probe", "not_a_video")
    assert rejection.detail == "bad.mp4: no video"


def test_append_plans_only_what_is_new(work: Workplace) -> None:
    work.write("a.mp4", "c.mp4")
    work.plan()
    work.write("b.mp4", "d.mp4")
    probe = FakeProbe()
    generation = work.plan(probe)
    assert generation is not None
    assert generation.number == 1
    assert work.clips(generation) == ["b.mp4", "d.mp4"]
    assert sorted(probe.probed) == ["b.mp4", "d.mp4"]


def test_append_plans_a_file_that_changed(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4")
    work.plan()
    (work.input / "a.mp4").write_text("another content")
    assert work.clips(work.plan()) == ["a.mp4"]


def test_append_of_nothing_new_makes_no_generation(work: Workplace) -> None:
    work.write("a.mp4", "bad.mp4")
    work.plan()
    probe = FakeProbe()
    assert work.plan(probe) is None
    assert probe.probed == []  # the one that gave no clip is known as well
    assert len(read_generations(work.output)) == 1


def test_limit_counts_new_videos(work: Workplace) -> None:
    work.write(*(f"{number}.mp4" for number in range(5)))
    assert work.clips(work.plan(limit=2)) == ["0.mp4", "1.mp4"]
    assert work.clips(work.plan(limit=2)) == ["2.mp4", "3.mp4"]
    assert work.clips(work.plan(limit=2)) == ["4.mp4"]
    assert work.plan(limit=2) is None


def test_limit_probes_no_more_than_it_needs(work: Workplace) -> None:
    work.write(*(f"{number}.mp4" for number in range(9)))
    probe = FakeProbe()
    work.plan(probe, limit=3)
    assert sorted(probe.probed) == ["0.mp4", "1.mp4", "2.mp4"]


def write_table(work: Workplace, rows: list[dict[str, Any]]) -> Path:
    path = work.input / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_limit_counts_new_videos_of_a_table_too(work: Workplace) -> None:
    work.write(*(f"{number}.mp4" for number in range(5)))
    table = write_table(work, [{"video": f"{number}.mp4"} for number in range(5)])
    assert work.clips(work.plan(uri=table, limit=2)) == ["0.mp4", "1.mp4"]
    assert work.clips(work.plan(uri=table, limit=2)) == ["2.mp4", "3.mp4"]
    assert work.clips(work.plan(uri=table)) == ["4.mp4"]
    assert work.plan(uri=table) is None


def test_tables_columns_stay_with_their_video_and_are_not_sent_to_probing(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "c.mp4")
    table = write_table(work, [{"video": f"{name}.mp4", "caption": name, "views": n} for n, name in enumerate("cab")])
    probe = FakeProbe()
    generation = work.plan(probe, uri=table)
    assert generation is not None
    planned = [clip for shard in read_shards(work.output, generation) for clip in read_items(work.output, shard, CLIP_ROWS)]
    assert [(clip.clip.uri.rpartition("/")[2], clip.columns) for clip in planned] == [
        ("c.mp4", {"caption": "c", "views": 0}),
        ("a.mp4", {"caption": "a", "views": 1}),
        ("b.mp4", {"caption": "b", "views": 2}),
    ]
    assert probe.columns_seen == [{}, {}, {}]


def test_row_that_stands_twice_is_filtered(work: Workplace) -> None:
    work.write("a.mp4")
    generation = work.plan(uri=write_table(work, [{"video": "a.mp4"}, {"video": "./a.mp4"}]))
    assert generation is not None
    assert (generation.num_clips, generation.filtered) == (1, 1)


def test_input_without_videos_is_an_error(work: Workplace) -> None:
    with pytest.raises(ConfigError, match="there is nothing there"):
        work.plan()


def test_append_of_a_column_that_the_dataset_has_not_is_an_error(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4")
    work.plan(uri=write_table(work, [{"video": "a.mp4", "caption": "x"}]))
    with pytest.raises(ConfigError, match="column 'views' is not in this dataset"):
        work.plan(uri=write_table(work, [{"video": "b.mp4", "views": 1}]))


def test_progress_is_told_as_videos_are_probed(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "c.mp4")
    told: list[tuple[int, int]] = []
    config = make_config(input={"uri": str(work.input)}, clip={"buckets": ["9x64x64@8"]})
    ClipPlanner(
        config=config,
        storage=work.output,
        model=MODEL,
        recipe=LatentRecipe.from_config(config, "w"),
        probe=FakeProbe(),
        on_probed=lambda videos, total: told.append((len(videos), total)),
    ).add_generation([])
    assert sorted(told[:-1]) == [(1, 3), (2, 3)]
    assert told[-1] == (0, 3)  # the last word before the plan is published


def test_errors_of_a_run_that_was_cut_off_are_probed_again(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "bad.mp4", "c.mp4")
    with pytest.raises(TransientError):
        work.plan(FakeProbe(fails_after=1))  # had bad and c
    probe = FakeProbe()
    work.plan(probe)
    assert sorted(probe.probed) == ["a.mp4", "b.mp4", "bad.mp4", "c.mp4"]


def test_videos_of_a_table_are_probed_again_since_nothing_tells_whether_they_changed(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "c.mp4")
    table = write_table(work, [{"video": f"{name}.mp4"} for name in "abc"])
    with pytest.raises(TransientError):
        work.plan(FakeProbe(fails_after=1), uri=table)
    probe = FakeProbe()
    work.plan(probe, uri=table)
    assert sorted(probe.probed) == ["a.mp4", "b.mp4", "c.mp4"]


def test_captions_that_changed_meanwhile_are_read_again(work: Workplace) -> None:
    work.write("a.mp4", "b.mp4", "c.mp4", "d.mp4", "d.json")
    with pytest.raises(TransientError):
        work.plan(FakeProbe(fails_after=1))  # had c and d
    (work.input / "d.json").write_text("longer than before")
    probe = FakeProbe()
    work.plan(probe)
    assert sorted(probe.probed) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 65, 1025])
def test_batches_have_one_size_give_or_take_one(count: int) -> None:
    items = [SourceItem(uri=str(number)) for number in range(count)]
    batches = _split(items)
    assert [item for batch in batches for item in batch] == items
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= 32
    assert max(sizes) - min(sizes) <= 1


# Large inputs


def test_input_larger_than_memory_goes_by_in_windows_and_makes_the_same_plan(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:02d}.mp4" for number in range(23)]
    work.write(*names, "bad.mp4")
    whole = work.plan()
    monkeypatch.setattr("pipeline.planning.WINDOW_ITEMS", 5)
    other = Workplace(work.input, Storage(f"{work.output.uri}-2"))
    windowed = other.plan()
    assert whole is not None
    assert windowed is not None
    assert other.clips(windowed) == work.clips(whole) == names
    assert windowed.shard_files != whole.shard_files
    shards = [
        [ref.shard_id for ref in read_shards(work.output, whole)],
        [ref.shard_id for ref in read_shards(other.output, windowed)],
    ]
    assert shards[0] == shards[1]


def test_last_window_is_never_so_small_that_one_video_is_probed_alone(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.WINDOW_ITEMS", 4)
    work.write(*(f"{number}.mp4" for number in range(9)))
    sizes: list[list[int]] = []

    class SizeProbe(FakeProbe):
        def __call__(self, batches: list[Batch]) -> Iterator[tuple[int, list[ProbedVideo]]]:
            sizes.append([len(batch) for batch in batches])
            return super().__call__(batches)

    assert len(work.clips(work.plan(SizeProbe()))) == 9
    assert sizes == [[2, 2], [2, 2, 1]]


def test_tars_go_by_in_small_windows_as_each_has_many_findings(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.WINDOW_ITEMS", 8)
    monkeypatch.setattr("pipeline.planning.TAR_ITEMS", 4)
    names = [f"{number}.tar" for number in range(5)]
    work.write(*names)
    windows: list[list[str]] = []

    class TarProbe(FakeProbe):
        def __call__(self, batches: list[Batch]) -> Iterator[tuple[int, list[ProbedVideo]]]:
            windows.append([item.uri.rpartition("/")[2] for batch in batches for item in batch])
            for position, found in super().__call__(batches):
                yield position, [replace(file, uri=f"{file.uri}#{name}.mp4") for file in found for name in "abc"]

    assert len(work.clips(work.plan(TarProbe()))) == 15
    assert windows == [names[:2], names[2:4], names[4:]]


def test_findings_are_kept_in_a_few_objects_and_batches_with_errors_alone_are_probed_again(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.WINDOW_ITEMS", 8)
    monkeypatch.setattr("pipeline.planning.WINDOW_PARTS", 2)
    work.write(*(f"{number:02d}.mp4" for number in range(7)), "bad.mp4", *(f"{number}.mp4" for number in "xyz"))
    with pytest.raises(TransientError):
        work.plan(FakeProbe(fails_after=4))  # the first window whole: two objects of two batches
    assert len(work.output.list("plan/00000/probed")) == 2
    probe = FakeProbe()
    work.plan(probe)
    assert sorted(probe.probed) == ["06.mp4", "bad.mp4", "x.mp4", "y.mp4", "z.mp4"]


# What was left out, tried again


def test_append_after_mending_a_file_replaces_what_was_said_of_it(work: Workplace) -> None:
    work.write("a.mp4", "bad.mp4", "bad2.mp4")
    work.plan()
    assert work.account() == (3, ["not_a_video", "not_a_video"])
    (work.input / "bad.mp4").write_text("mended")
    assert work.clips(work.plan()) == ["bad.mp4"]
    assert work.account() == (3, ["not_a_video"])


def test_append_of_a_file_that_is_bad_in_another_way_keeps_the_latest_reason_alone(work: Workplace) -> None:
    work.write("a.mp4", "bad.mp4")
    work.plan()
    (work.input / "bad.mp4").write_text("worse than before")
    work.plan()
    assert work.account() == (2, ["not_a_video"])


def test_requeued_files_are_looked_at_again_and_nothing_else(work: Workplace) -> None:
    work.write("a.mp4", "bad1.mp4", "bad2.mp4", "bad3.mp4")
    work.plan()
    work.write("not-planned-yet.mp4")
    (work.input / "bad1.mp4").write_text("mended")
    (work.input / "bad3.mp4").unlink()
    requeue(work.output, lambda rejection: True)
    probe = FakeProbe()
    assert work.clips(work.replan(probe, limit=1)) == ["bad1.mp4"]
    assert sorted(probe.probed) == ["bad1.mp4", "bad2.mp4"]
    assert work.account() == (4, ["not_a_video", "not_listed"])
    assert read_to_look_at_again(work.output, read_generations(work.output)) == []


def test_requeued_file_of_a_table_keeps_its_columns(work: Workplace) -> None:
    work.write("a.mp4", "bad.mp4")
    table = write_table(work, [{"video": "a.mp4", "views": 1}, {"video": "bad.mp4", "views": 2}])
    work.plan(uri=table)
    (work.input / "bad.mp4").write_text("mended")
    requeue(work.output, lambda rejection: True)
    generation = work.replan(uri=table)
    (planned,) = read_items(work.output, next(read_shards(work.output, generation)), CLIP_ROWS)
    assert planned.columns == {"views": 2}


def test_bad_file_that_is_listed_twice_is_replaced_as_often(work: Workplace) -> None:
    work.write("bad.mp4")
    table = write_table(work, [{"video": "bad.mp4"}, {"video": "./bad.mp4"}])
    work.plan(uri=table)
    assert work.account() == (2, ["not_a_video", "not_a_video"])
    (work.input / "bad.mp4").write_text("mended")
    requeue(work.output, lambda rejection: True)
    assert work.clips(work.replan(uri=table)) == ["bad.mp4"]
    assert work.account() == (2, ["duplicate"])


def test_a_file_that_is_mended_twice_over_is_planned_once(work: Workplace) -> None:
    work.write("bad.mp4")
    work.plan()
    requeue(work.output, lambda rejection: True)
    (work.input / "bad.mp4").write_text("mended")
    work.plan()  # --append came first
    assert read_to_look_at_again(work.output, read_generations(work.output)) == []
    assert work.account() == (1, [])
