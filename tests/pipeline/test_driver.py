"""What the driver makes sure of around planning, with a planner that answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.account import Account
from pipeline.driver import Run
from pipeline.errors import RunRefusedError, StoppedError
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation
from pipeline.plan_writer import publish_generation
from pipeline.recipe import LatentRecipe
from pipeline.storage import Storage
from tests.pipeline.test_admission import RECIPE, make_config


@dataclass
class FakeWork:
    """Its planner publishes an empty plan, or adopts what is there."""

    storage: Storage
    recipe: LatentRecipe = RECIPE
    before_publishing: Callable[[], None] = lambda: None
    name = "encode"
    config = make_config()
    commits = ("data", ".parquet")
    probe = None

    def planner(self, probe: Any, on_probed: Callable[[list[Any], int], None]) -> Any:
        def add_generation(earlier: list[Generation]) -> Generation:
            self.before_publishing()
            on_probed([], 0)
            settings = self.config.plan_settings()
            return publish_generation(
                self.storage, 0, [], [], rows=CLIP_ROWS, recipe=self.recipe, settings=settings, columns=pa.schema([])
            )

        return SimpleNamespace(add_generation=add_generation)


def plan(work: Any, stop: threading.Event) -> list[Generation]:
    run = Run(work, SimpleNamespace(), Account(), stop)  # type: ignore[arg-type]
    progress: Any = SimpleNamespace(probed=lambda count, total: None)
    return run._plan([], SimpleNamespace(), progress)  # type: ignore[arg-type]


def test_a_plan_of_another_recipe_that_was_published_first_is_refused(output: Storage) -> None:
    (ours,) = plan(FakeWork(output), threading.Event())
    assert plan(FakeWork(output), threading.Event()) == [ours]
    with pytest.raises(RunRefusedError, match="dtype: 'float32' there, 'bfloat16' here"):
        plan(FakeWork(output, replace(RECIPE, dtype="bfloat16")), threading.Event())


def test_a_plan_of_a_run_that_was_stopped_meanwhile_is_not_published(output: Storage) -> None:
    stop = threading.Event()
    with pytest.raises(StoppedError, match="stopped while planning"):
        plan(FakeWork(output, before_publishing=stop.set), stop)
    assert not output.exists("plan/00000/index.json")
