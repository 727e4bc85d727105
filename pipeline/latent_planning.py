"""Planning the decode job: files of latents in, clips to decode out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.decode_config import DecodeRunConfig
from pipeline.engine import ModelInfo
from pipeline.errors import ConfigError
from pipeline.latents import PlannedLatent, ProbedLatents, list_latents, plan_latents
from pipeline.latents.rows import LATENT_ROWS
from pipeline.plan_rows import RowFormat
from pipeline.plan_store import Generation, read_column, read_rejections
from pipeline.planning import Planner
from pipeline.sources import SourceItem, SourceListing
from pipeline.types import Rejection


@dataclass(slots=True, kw_only=True)
class LatentPlanner(Planner[ProbedLatents, PlannedLatent]):
    """Plans the clips that ``input`` selects and no earlier generation has."""

    config: DecodeRunConfig
    model: ModelInfo

    @property
    def rows(self) -> RowFormat[PlannedLatent]:
        return LATENT_ROWS

    def fixed_columns(self, earlier: list[Generation]) -> None:
        """None: columns end up in JSON, and each generation has its own."""

    @property
    def probe_settings(self) -> str:
        config = self.config.input
        return f"{config.layout} {config.key} {config.max_file_bytes} {self.model.latent_channels}"

    @property
    def shard_bytes(self) -> int:
        return self.config.output.shard_bytes

    def item_bytes(self, item: PlannedLatent) -> int:
        """Bytes of the decoded frames."""
        _, _, height, width = item.shape
        return item.num_frames * height * width * 3 * self.model.spatial_ratio**2

    def list_input(self) -> SourceListing:
        # The columns' own types do not count: what passes through is plain values, whatever file they come from.
        return SourceListing(items=list_latents(self.config.input).items)

    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> list[ProbedLatents]:
        """Every file: which of its clips are new depends on the selection, which may be another one now."""
        own = f"{self.storage.uri}/"  # an output inside the input is no input
        items = [item for item in listed if not item.uri.startswith(own)]
        return list(self.probe_all(len(earlier), items)) if items else []

    def plan(self, found: list[ProbedLatents], earlier: list[Generation]) -> Iterator[PlannedLatent | Rejection]:
        """Up to ``input.limit`` clips that are not planned yet."""
        known, names = self._read_known(earlier)
        return islice(self._select(found, known, names, is_whole=True), self.config.input.limit)

    def _read_known(self, earlier: list[Generation]) -> tuple[set[str], set[str]]:
        """Ids that are planned or left out, and names of videos."""
        known: set[str] = set()
        names: set[str] = set()
        for generation in earlier:
            known.update(read_column(self.storage, generation, "sample_id"))
            known.update(rejection.sample_id for rejection in read_rejections(self.storage, generation))
            names.update(read_column(self.storage, generation, "name"))
        return known, names

    def plan_again(
        self, found: list[ProbedLatents], earlier: list[Generation], again: set[str]
    ) -> Iterator[PlannedLatent | Rejection]:
        known, names = self._read_known(earlier)
        return self._select(found, known - again, names, is_whole=False)

    def _select(
        self, found: list[ProbedLatents], known: set[str], names: set[str], *, is_whole: bool
    ) -> Iterator[PlannedLatent | Rejection]:
        selection = self.config.input.model_copy(update={"limit": None})
        # To the end, whatever the limit: only there it is known whether the settings name what is nowhere.
        fps = self.config.output.fps
        planned = list(plan_latents(found, selection, self.recipe.fingerprint, fps, names, is_whole=is_whole))
        if is_whole and not planned and (count := sum(len(file.latents) for file in found)):
            raise ConfigError(f"input.uri {self.config.input.uri}: of {count} latents none passes input.ids and input.filters")
        return (self._check_size(item) for item in planned if item.sample_id not in known)

    def _check_size(self, item: PlannedLatent | Rejection) -> PlannedLatent | Rejection:
        """Shapes come from the input: one that no memory holds would be tried again and again."""
        if isinstance(item, Rejection):
            return item
        limits, side = self.config.decode, self.model.spatial_ratio
        height, width = item.shape[2] * side, item.shape[3] * side
        if item.num_frames <= limits.max_frames and height * width <= limits.max_pixels:
            return item
        return Rejection(
            sample_id=item.sample_id,
            uri=item.uri,
            frame_start=0,
            frame_end=item.num_frames,
            status="quarantined",
            stage="plan",
            reason="too_large",
            detail=f"{item.place}: a video of {item.num_frames} frames of {height}x{width}; decode.max_frames is "
            f"{limits.max_frames}, decode.max_pixels {limits.max_pixels}",
            file_key=item.file_key,
        )

    def to_json(self, found: ProbedLatents) -> dict[str, Any]:
        return found.dump()

    def from_json(self, common: dict[str, Any], row: dict[str, Any]) -> ProbedLatents:
        return ProbedLatents.load(row)
