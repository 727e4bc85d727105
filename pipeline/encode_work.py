"""The encode job: videos in, a Parquet dataset of latents out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.account import Account
from pipeline.actors import Meter
from pipeline.clip_planning import ClipPlanner
from pipeline.cluster import ActorResources, shared_paths
from pipeline.committed import ENCODED
from pipeline.config import RunConfig
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.publish import DatasetInfo, publish_dataset
from pipeline.dataset.schema import build_schema
from pipeline.encode_worker import EncodeSpec, EncodeWorker, probe_videos
from pipeline.engine import Engine, ModelInfo, check_memory_budget, describe_model, load_engine
from pipeline.outcomes import latest_of, read_left_out, read_superseded
from pipeline.plan import ProbedVideo
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, ShardRef
from pipeline.planning import ProbeBatches
from pipeline.recipe import LatentRecipe
from pipeline.report import REPORT_PATH, write_report
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import ShardSummary


@dataclass(slots=True)
class EncodeWork:
    """Implements ``Work``.

    Args:
        make_engine: what an actor calls to get its model; tests pass another.

    Raises:
        ConfigError: the weights are not usable, or a batch does not fit the memory budget.
    """

    config: RunConfig
    make_engine: Callable[..., Engine] = load_engine
    storage: Storage = field(init=False)
    model: ModelInfo = field(init=False)
    recipe: LatentRecipe = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.config.output.uri, self.config.output.storage_options)
        self.model = describe_model(self.config.vae)
        self.recipe = LatentRecipe.from_config(self.config, self.model.fingerprint)
        batch, buckets = self.config.encode.batch_size, self.config.buckets
        latents = [(1, *self.model.latent_shape(bucket)) for bucket in buckets if self.config.encode.qa_share]
        check_memory_budget(
            self.config.vae,
            encode=[(batch, 3, bucket.num_frames, bucket.height, bucket.width) for bucket in buckets],
            decode=latents,
        )

    @property
    def name(self) -> str:
        return CLIP_ROWS.work

    @property
    def activity(self) -> str:
        return "encoding"

    @property
    def commits(self) -> tuple[str, str]:
        return ENCODED.folder, ENCODED.suffix

    @property
    def probe(self) -> Callable[[list[SourceItem]], list[ProbedVideo]]:
        return functools.partial(probe_videos, self.config.decode, self.config.input)

    def planner(self, probe: ProbeBatches[ProbedVideo], on_probed: Callable[[list[ProbedVideo], int], None]) -> ClipPlanner:
        return ClipPlanner(
            config=self.config, storage=self.storage, model=self.model, recipe=self.recipe, probe=probe, on_probed=on_probed
        )

    def worker(self, generations: list[Generation], resources: ActorResources) -> Callable[[Meter], EncodeWorker]:
        spec = EncodeSpec(
            config=self.config,
            storage=self.storage,
            recipe=self.recipe.fingerprint,
            columns=generations[0].columns,
            superseded=read_superseded(self.storage, generations),
            frame_budget_bytes=resources.frame_budget_bytes,
            shared=shared_paths(self.config),
            make_engine=functools.partial(
                self.make_engine, self.config, self.model.fingerprint, resources.device, resources.threads
            ),
        )
        return functools.partial(EncodeWorker, spec)

    def commit_path(self, shard: ShardRef) -> str:
        return ENCODED.path(shard)

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        return ENCODED.read_summary(self.storage, path, size_bytes)

    def is_published(self, generations: list[Generation], account: Account) -> bool:
        manifest = read_manifest(self.storage)
        if manifest is None or not self.storage.exists(REPORT_PATH):
            return False
        found = (manifest.generations, manifest.num_samples, manifest.num_quarantined, manifest.num_filtered)
        return found == (len(generations), account.written, account.quarantined, account.filtered)

    def publish(self, generations: list[Generation], shards: Iterable[str], account: Account) -> None:
        output = self.config.output
        info = DatasetInfo(
            schema=build_schema(logvar=output.logvar, first_frame=output.first_frame, passthrough=generations[0].columns),
            scaling_factor=self.model.scaling_factor,
            dtype=self.config.stored.dtype,
            model=self.config.vae.model,
            generations=len(generations),
        )
        superseded = read_superseded(self.storage, generations)
        manifest = publish_dataset(
            self.storage,
            shards,
            read_left_out(self.storage, generations, superseded),
            info,
            latest=latest_of(superseded),
            num_samples=account.written,
        )
        write_report(self.storage, manifest, account)
