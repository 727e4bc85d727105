"""Imports point one way: jobs -> pipeline -> cogvae -> torch. Read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cogvae", "pipeline", "training", "jobs")

MAY_IMPORT_RAY = {
    "pipeline.actors",
    "pipeline.client",
    "pipeline.cluster",
    "pipeline.decode_worker",
    "pipeline.driver",
    "pipeline.encode_worker",
    "pipeline.pool",
    "pipeline.service.deployment",
}
MAY_IMPORT_COGVAE = {"pipeline.engine"}
MAY_IMPORT_AV = {
    "pipeline.decoder_child",
    "pipeline.frame_reader",
    "pipeline.picture",
    "pipeline.video",
    "pipeline.video_file",
    "pipeline.video_writer",
}
NO_NAMES = {"utils", "util", "common", "helpers", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str) -> Iterator[str]:
    """Every module that a module names in an import statement, at any depth."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*above, *([node.module] if node.module else [])])


def importers(root: str, *, inside: str) -> set[str]:
    """Modules of a package that import something of ``root``."""
    return {
        module
        for module in FILES
        if module.partition(".")[0] == inside and any(name.partition(".")[0] == root for name in imported(module))
    }


@pytest.mark.parametrize("forbidden", ["pipeline", "training", "jobs", "ray", "pyarrow", "av"])
def test_model_knows_nothing_of_the_pipeline(forbidden: str) -> None:
    assert importers(forbidden, inside="cogvae") == set()


@pytest.mark.parametrize("forbidden", ["training", "jobs"])
def test_pipeline_knows_nothing_of_training_and_jobs(forbidden: str) -> None:
    assert importers(forbidden, inside="pipeline") == set()


@pytest.mark.parametrize("forbidden", ["jobs", "ray", "av", "diffusers"])
def test_training_needs_no_cluster_and_decodes_through_the_pipeline(forbidden: str) -> None:
    assert importers(forbidden, inside="training") == set()
    assert importers("pipeline", inside="training")
    assert importers("cogvae", inside="training")


def test_only_the_parts_that_run_on_the_cluster_import_ray() -> None:
    assert importers("ray", inside="pipeline") <= MAY_IMPORT_RAY


def test_only_the_engine_imports_the_model() -> None:
    assert importers("cogvae", inside="pipeline") <= MAY_IMPORT_COGVAE


def test_only_modules_that_read_or_write_videos_import_pyav() -> None:
    assert importers("av", inside="pipeline") <= MAY_IMPORT_AV


def test_no_module_is_named_after_nothing() -> None:
    assert [module for module in FILES if module.rpartition(".")[2] in NO_NAMES] == []


def test_rules_are_about_modules_that_exist() -> None:
    assert sorted((MAY_IMPORT_RAY | MAY_IMPORT_COGVAE | MAY_IMPORT_AV) - FILES.keys()) == []
    assert importers("ray", inside="pipeline")
    assert importers("cogvae", inside="pipeline") == MAY_IMPORT_COGVAE


def test_relative_imports_are_resolved() -> None:
    assert importers("torch", inside="cogvae")
    names = {name for module in FILES for name in imported(module)}
    assert not [name for name in names if name.startswith(".")]
