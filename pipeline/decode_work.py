"""The decode job: latents in, videos and their manifest out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from pipeline.account import Account
from pipeline.actors import Meter
from pipeline.cluster import ActorResources
from pipeline.committed import DECODED
from pipeline.decode_config import DecodeRunConfig
from pipeline.decode_worker import DecodeSpec, DecodeWorker
from pipeline.engine import Engine, ModelInfo, check_memory_budget, describe_model, load_engine
from pipeline.latent_planning import LatentPlanner
from pipeline.latents import ProbedLatents, probe_latents
from pipeline.latents.rows import LATENT_ROWS
from pipeline.outcomes import latest_of, read_left_out, read_superseded
from pipeline.plan_store import Generation, ShardRef, read_shards
from pipeline.planning import ProbeBatches
from pipeline.report import REPORT_PATH, write_video_report
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import ShardSummary
from pipeline.videos.publish import publish_videos, read_counts
from pipeline.videos.recipe import VideoRecipe


@dataclass(slots=True)
class DecodeWork:
    """Implements ``Work``.

    Args:
        make_engine: what an actor calls to get its model; tests pass another.

    Raises:
        ConfigError: the weights are not usable.
    """

    config: DecodeRunConfig
    make_engine: Callable[..., Engine] = load_engine
    storage: Storage = field(init=False)
    model: ModelInfo = field(init=False)
    recipe: VideoRecipe = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.config.output.uri, self.config.output.storage_options)
        self.model = describe_model(self.config.vae)
        self.recipe = VideoRecipe.from_config(self.config, self.model.fingerprint)

    @property
    def name(self) -> str:
        return LATENT_ROWS.work

    @property
    def activity(self) -> str:
        return "decoding"

    @property
    def commits(self) -> tuple[str, str]:
        return DECODED.folder, DECODED.suffix

    @property
    def probe(self) -> Callable[[list[SourceItem]], list[ProbedLatents]]:
        return functools.partial(probe_latents, config=self.config.input, channels=self.model.latent_channels)

    def planner(self, probe: ProbeBatches[ProbedLatents], on_probed: Callable[[list[ProbedLatents], int], None]) -> LatentPlanner:
        return LatentPlanner(
            config=self.config, storage=self.storage, model=self.model, recipe=self.recipe, probe=probe, on_probed=on_probed
        )

    def worker(self, generations: list[Generation], resources: ActorResources) -> Callable[[Meter], DecodeWorker]:
        """As ``Work.worker``. Raises: ConfigError: a batch of what is planned does not fit the memory budget."""
        if self.config.vae.memory_budget_bytes is not None:
            shapes = {shard.bucket_key for generation in generations for shard in read_shards(self.storage, generation)}
            batches = [(self.config.decode.batch_size, *map(int, shape.split("x"))) for shape in sorted(shapes)]
            check_memory_budget(self.config.vae, decode=batches)
        spec = DecodeSpec(
            config=self.config,
            storage=self.storage,
            recipe=self.recipe.fingerprint,
            superseded=read_superseded(self.storage, generations),
            frame_budget_bytes=resources.frame_budget_bytes,
            make_engine=functools.partial(
                self.make_engine, self.config, self.model.fingerprint, resources.device, resources.threads
            ),
        )
        return functools.partial(DecodeWorker, spec)

    def commit_path(self, shard: ShardRef) -> str:
        return DECODED.path(shard)

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        return DECODED.read_summary(self.storage, path, size_bytes)

    def is_published(self, generations: list[Generation], account: Account) -> bool:
        counts = read_counts(self.storage)
        expected = (len(generations), account.written, account.quarantined, account.filtered)
        return counts == expected and self.storage.exists(REPORT_PATH)

    def publish(self, generations: list[Generation], shards: Iterable[str], account: Account) -> None:
        superseded = read_superseded(self.storage, generations)
        recipe = asdict(self.recipe)
        first = publish_videos(
            self.storage,
            shards,
            read_left_out(self.storage, generations, superseded),
            {"generations": len(generations), "recipe": recipe},
            latest=latest_of(superseded),
            num_videos=account.written,
        )
        write_video_report(self.storage, first, account, recipe)
