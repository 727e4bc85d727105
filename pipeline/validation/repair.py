"""Tidying an output: what nothing needs goes to ``trash/``, and what follows from the shards is written anew.

Nothing is deleted, and no shard, video or plan is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.publish import INDEX_FOLDER, DatasetInfo, publish_dataset
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import stored_schema
from pipeline.errors import DatasetError
from pipeline.outcomes import latest_of, read_left_out
from pipeline.status import refuse_second_run
from pipeline.storage import Storage
from pipeline.validation.plan_view import PlanView
from pipeline.validation.run import Validation
from pipeline.videos.publish import publish_videos

TRASH_FOLDER = "trash"


def repair_output(validation: Validation) -> Iterator[str]:
    """Mend what can be made again, after ``findings`` has been run to its end. Yields a line for each thing done.

    Raises:
        RunRefusedError: a run is alive on this output.
        DatasetError: index and manifest cannot be made again; says what to do.
    """
    storage, checks = validation.storage, validation.checks
    if checks is None:
        raise DatasetError(f"{storage.uri}: the plan cannot be read, so nothing tells what belongs here; restore it from a copy")
    refuse_second_run(storage, takeover=False)
    folder = f"{TRASH_FOLDER}/{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    for path in validation.orphans:
        yield _move(storage, path, folder)
    if not validation.derived and not validation.lasting:
        return
    if validation.lasting:
        raise DatasetError(
            f"{storage.uri}: index and manifest were left as they are, since plan or shards are not as they should be: "
            f"{', '.join(sorted(validation.lasting))}"
        )
    manifest, plan = checks.manifest, checks.plan
    if manifest is None or not plan.shards:
        raise DatasetError(
            f"{storage.uri}: the manifest is missing or damaged, and only the job knows all that belongs into it. "
            "Move manifest.json away if it is there, then run the job's command again: nothing is made twice"
        )
    for path in sorted({path for path in validation.derived if path.startswith(f"{INDEX_FOLDER}/") and storage.exists(path)}):
        yield _move(storage, path, folder)  # a piece is named by what it should hold, and never written over
    if isinstance(manifest, Manifest):
        _publish_latents(plan, manifest)
    else:
        info = {"generations": len(plan.generations), "recipe": manifest.get("recipe")}
        publish_videos(
            storage,
            _shards(plan),
            read_left_out(storage, plan.generations, plan.superseded),
            info,
            latest=latest_of(plan.superseded),
            num_videos=plan.written,
        )
    yield "wrote index, quarantine table and manifest"


def _move(storage: Storage, path: str, folder: str) -> str:
    storage.move(path, f"{folder}/{path}")
    return f"moved {path} to {folder}/{path}"


def _publish_latents(plan: PlanView, manifest: Manifest) -> None:
    first = next(_shards(plan))
    info = DatasetInfo(
        schema=stored_schema(ShardFile(plan.storage, first).metadata()),
        scaling_factor=manifest.scaling_factor,
        dtype=manifest.dtype,
        model=manifest.model,
        generations=len(plan.generations),
    )
    publish_dataset(
        plan.storage,
        _shards(plan),
        read_left_out(plan.storage, plan.generations, plan.superseded),
        info,
        latest=latest_of(plan.superseded),
        num_samples=plan.written,
    )


def _shards(plan: PlanView) -> Iterator[str]:
    """All of them: repair goes on only where none is pending."""
    return (plan.commits.path(shard) for _, shard in plan.planned_shards())
