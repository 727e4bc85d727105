"""What must hold before a run may start on an output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.admission import check_output, check_recipe, check_settings
from pipeline.config import RunConfig
from pipeline.errors import RunRefusedError
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation
from pipeline.plan_writer import publish_generation
from pipeline.recipe import LatentRecipe
from pipeline.storage import Storage

RECIPE = LatentRecipe(weights="w", dtype="float32", tiling="exact", stored_dtype="float32", logvar=True, first_frame=False)


def make_config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {"input": {"uri": "videos"}, "output": {"uri": "out"}, "vae": {"weights": "w"}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig(**values)  # type: ignore[arg-type]


@pytest.fixture
def planned(output: Storage) -> list[Generation]:
    settings = make_config().plan_settings()
    return [publish_generation(output, 0, [], [], rows=CLIP_ROWS, recipe=RECIPE, settings=settings, columns=pa.schema([]))]


def test_an_empty_or_absent_folder_is_an_output(tmp_path: Path) -> None:
    check_output(Storage(str(tmp_path)), [], "encode")
    check_output(Storage(str(tmp_path / "absent")), [], "encode")


def test_what_a_run_leaves_that_died_while_planning_is_an_output(output: Storage) -> None:
    for name in ("status.json", "run.yaml", "plan/00000/probed/a.json", ".tmp/x"):
        output.put(name, b"{}")
    check_output(output, [], "encode")


def test_a_folder_with_other_files_is_refused_and_not_touched(output: Storage) -> None:
    output.put("README.md", b"mine")
    with pytest.raises(RunRefusedError, match=r"holds other files \(README\.md\); choose an empty folder"):
        check_output(output, [], "encode")


def test_a_folder_that_ray_deletes_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "out"
    with pytest.raises(RunRefusedError, match="temporary copy of the working directory"):
        check_output(Storage(str(copy)), [], "encode")


def test_the_output_of_another_kind_of_job_is_refused(output: Storage, planned: list[Generation]) -> None:
    check_output(output, planned, "encode")
    with pytest.raises(RunRefusedError, match="is the output of a job that encodes, this one decodes"):
        check_output(output, planned, "decode")


def test_the_same_settings_resume(output: Storage, planned: list[Generation]) -> None:
    check_settings(output, planned, make_config(encode={"batch_size": 2}, input={"storage_options": {"key": "k"}}))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("clip", {"buckets": ["17x96x160@8"]}, r"clip\.buckets: 49x480x720@8 there, 17x96x160@8 here"),
        ("clip", {"short": "repeat_last"}, r"clip\.short: 'drop' there, 'repeat_last' here"),
        ("input", {"uri": "others"}, r"input\.uri: 'videos' there, 'others' here"),
        ("input", {"limit": 3}, r"input\.limit: None there, 3 here"),
    ],
)
def test_a_plan_stands_against_other_settings_unless_appended_to(
    output: Storage, planned: list[Generation], section: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunRefusedError, match=message):
        check_settings(output, planned, make_config(**{section: change}))
    check_settings(output, planned, make_config(**{section: change}, run={"append": True}))


def test_any_generation_s_settings_resume(output: Storage, planned: list[Generation]) -> None:
    settings = make_config(input={"uri": "more"}).plan_settings()
    planned.append(publish_generation(output, 1, [], [], rows=CLIP_ROWS, recipe=RECIPE, settings=settings, columns=pa.schema([])))
    check_settings(output, planned, make_config())
    check_settings(output, planned, make_config(input={"uri": "more"}))


def test_another_recipe_is_refused(output: Storage, planned: list[Generation]) -> None:
    other = LatentRecipe(weights="w", dtype="bfloat16", tiling="exact", stored_dtype="float32", logvar=True, first_frame=False)
    with pytest.raises(RunRefusedError, match="dtype: 'float32' there, 'bfloat16' here"):
        check_recipe(output, planned, other)
