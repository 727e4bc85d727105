"""Planning the decode job again: a file of latents that could not be read is looked at once more."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.decode_config import DecodeRunConfig
from pipeline.engine import ModelInfo
from pipeline.latent_planning import LatentPlanner
from pipeline.latents import ProbedLatents, probe_latents
from pipeline.latents.rows import LATENT_ROWS
from pipeline.outcomes import count_planned, read_left_out, read_superseded, read_to_look_at_again
from pipeline.plan_store import Generation, read_generations, read_items, read_shards
from pipeline.planning import Batch
from pipeline.requeue import requeue
from pipeline.storage import Storage
from pipeline.videos.recipe import VideoRecipe

MODEL = ModelInfo(fingerprint="weights", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)


@dataclass
class Workplace:
    """An input folder of latents, an output, and a way to plan from one to the other."""

    input: Path
    output: Storage
    settings: dict[str, Any] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)

    def write(self, name: str) -> None:
        np.save(self.input / name, np.zeros((16, 3, 4, 6), np.float32))

    def planner(self) -> LatentPlanner:
        config = DecodeRunConfig(
            input={"uri": str(self.input), "scale": "none", **self.settings},  # type: ignore[arg-type]
            output={"uri": self.output.uri},  # type: ignore[arg-type]
            vae={"weights": "nowhere"},  # type: ignore[arg-type]
        )
        return LatentPlanner(
            config=config,
            storage=self.output,
            model=MODEL,
            recipe=VideoRecipe.from_config(config, MODEL.fingerprint),
            probe=functools.partial(self._probe, config),
            on_probed=lambda files, total: None,
        )

    def _probe(self, config: DecodeRunConfig, batches: list[Batch]) -> Iterator[tuple[int, list[ProbedLatents]]]:
        for position, batch in enumerate(batches):
            self.probed += [item.uri.rpartition("/")[2] for item in batch]
            yield position, probe_latents(batch, config=config.input, channels=16)

    def replan(self) -> Generation:
        """What the job does after a requeue."""
        self.probed.clear()
        generations = read_generations(self.output)
        return self.planner().replan(generations, read_to_look_at_again(self.output, generations))

    def names(self, generation: Generation) -> list[str]:
        shards = read_shards(self.output, generation)
        return [planned.name for shard in shards for planned in read_items(self.output, shard, LATENT_ROWS)]

    def account(self) -> tuple[int, list[str]]:
        generations = read_generations(self.output)
        superseded = read_superseded(self.output, generations)
        left_out = read_left_out(self.output, generations, superseded)
        return count_planned(generations), [Path(rejection.uri).name for rejection in left_out]


@pytest.fixture
def work(tmp_path: Path, output: Storage) -> Workplace:
    """Planned: two latents, and two files that are none."""
    (tmp_path / "input").mkdir()
    work = Workplace(tmp_path / "input", output)
    for name in ("a.npy", "b.npy"):
        work.write(name)
    for name in ("bad.npy", "worse.npy"):
        (work.input / name).write_bytes(b"no array")
    return work


def test_a_mended_file_is_planned_and_what_is_still_bad_stays_accounted_for(work: Workplace) -> None:
    work.planner().add_generation([])
    assert work.account() == (4, ["bad.npy", "worse.npy"])
    work.write("bad.npy")
    done = requeue(work.output, lambda rejection: True)
    assert (done.clips, done.files) == (0, 2)
    generation = work.replan()
    assert work.names(generation) == ["bad"]
    assert sorted(work.probed) == ["bad.npy", "worse.npy"]
    assert work.account() == (4, ["worse.npy"])


def test_a_selection_of_the_whole_input_does_not_fail_for_a_part_of_it(work: Workplace) -> None:
    work.settings = {"ids": ["a", "bad"], "limit": 2}
    work.planner().add_generation([])
    assert work.account() == (2, ["bad.npy"])
    work.write("bad.npy")
    requeue(work.output, lambda rejection: True)
    assert work.names(work.replan()) == ["bad"]
    assert work.account() == (2, [])


def test_append_after_mending_a_file_replaces_what_was_said_of_it(work: Workplace) -> None:
    work.planner().add_generation([])
    work.write("bad.npy")
    generation = work.planner().add_generation(read_generations(work.output))
    assert generation is not None
    assert work.names(generation) == ["bad"]
    assert work.account() == (4, ["worse.npy"])
