"""What must hold before a run may start on an output. Each refusal says what to do instead."""

from __future__ import annotations

import logging
import os
from typing import Any

from pipeline.config import JobConfig
from pipeline.dataset.manifest import read_manifest
from pipeline.errors import RunRefusedError
from pipeline.plan_store import Generation
from pipeline.recipe import Recipe
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

_OF_A_RUN_THAT_DIED_EARLY = {"plan", "status.json", "run.yaml"}
_RAY_COPY = "/runtime_resources/working_dir_files/"


def check_output(storage: Storage, generations: list[Generation], work: str) -> None:
    """An output has a plan of the same kind of work, or is a folder with nothing in it.

    Raises:
        RunRefusedError: it holds other files, a dataset without a plan, what another kind of job makes, or is in a
            folder that Ray deletes.
    """
    if storage.is_local and _RAY_COPY in os.path.abspath(storage.uri) + "/":
        raise RunRefusedError(
            f"{storage.uri} is in Ray's temporary copy of the working directory and would be deleted with it; "
            "give output.uri as an absolute path or in object storage"
        )
    for generation in generations:
        if generation.work != work:
            raise RunRefusedError(
                f"{storage.uri} is the output of a job that {generation.work}s, this one {work}s; choose another output.uri"
            )
    if generations:
        return
    if work == "encode" and read_manifest(storage) is not None:
        raise RunRefusedError(
            f"{storage.uri} holds a finished dataset without a plan, such as a merged one; choose another output.uri"
        )
    others = [name for name in storage.names() if not name.startswith(".") and name not in _OF_A_RUN_THAT_DIED_EARLY]
    if others:
        raise RunRefusedError(f"{storage.uri} holds other files ({', '.join(others[:3])}); choose an empty folder as output.uri")


def check_guarantees(storage: Storage) -> None:
    """Say once what the output's store cannot promise. Raises: ConfigError: it cannot be written."""
    if not storage.has_conditional_put:
        logger.warning(
            "no conditional put at %s: a shard that two actors finish at the same time is written twice, and the later one "
            "stands; so may one whose actor was killed in the middle of its put. No work is given out twice otherwise, and no "
            "second run may be started here",
            storage.uri,
        )


def check_recipe(storage: Storage, generations: list[Generation], recipe: Recipe) -> None:
    """All latents of a dataset are made alike. Raises: RunRefusedError: these would be made otherwise."""
    for generation in generations:
        if generation.recipe_fingerprint != recipe.fingerprint:
            raise RunRefusedError(
                f"{storage.uri} was begun with recipe {generation.recipe_fingerprint}, this run has {recipe.fingerprint} "
                f"({recipe.differences(generation.recipe)}). Results of two recipes do not mix: choose another output.uri"
            )


def check_settings(storage: Storage, generations: list[Generation], config: JobConfig) -> None:
    """A plan stands once it is made. Raises: RunRefusedError: this run asks for another one, without ``--append``."""
    ours = config.plan_settings()
    if not generations or config.run.append or any(generation.settings == ours for generation in generations):
        return
    planned = generations[-1].settings
    differences = ", ".join(
        f"{name}: {_shown(planned.get(name))} there, {_shown(value)} here"
        for name, value in ours.items()
        if planned.get(name) != value
    )
    raise RunRefusedError(
        f"{storage.uri} was planned with other settings ({differences}), and its plan stands. To plan what is new in the "
        "input with the new settings add --append; to plan the same anew choose another output.uri"
    )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else repr(value)
