"""Planning the decode job: files of latents in, clips to decode out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.compact_set import CompactSet
from pipeline.decode_config import DecodeRunConfig
from pipeline.engine import ModelInfo
from pipeline.errors import ConfigError
from pipeline.latents import PlannedLatent, ProbedLatents, list_latents, plan_latents
from pipeline.latents.naming import Names
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

    def find(self, listed: Iterator[SourceItem], earlier: list[Generation]) -> Iterator[ProbedLatents]:
        """Every file: which of its clips are new depends on the selection, which may be another one now."""
        own = f"{self.storage.uri}/"  # an output inside the input is no input
        return self.probe_all(len(earlier), (item for item in listed if not item.uri.startswith(own)))

    def plan(self, found: Iterator[ProbedLatents], earlier: list[Generation]) -> Iterator[PlannedLatent | Rejection]:
        """Up to ``input.limit`` clips that are not planned yet."""
        known, names = self._read_known(earlier)
        selection = self.config.input.model_copy(update={"limit": None})
        limit, num_found, num_selected, num_planned = self.config.input.limit, 0, 0, 0

        def counted() -> Iterator[ProbedLatents]:
            nonlocal num_found
            for file in found:
                num_found += len(file.latents)
                yield file

        # To the end, whatever the limit: only there it is known whether the settings name what is nowhere.
        for item in plan_latents(counted(), selection, self.recipe.fingerprint, self.config.output.fps, names):
            num_selected += 1
            if item.sample_id not in known and (limit is None or num_planned < limit):
                num_planned += 1
                yield self._check_size(item)
        if num_found and not num_selected:
            uri = self.config.input.uri
            raise ConfigError(f"input.uri {uri}: of {num_found} latents none passes input.ids and input.filters")

    def plan_again(
        self, found: Iterator[ProbedLatents], earlier: list[Generation], again: frozenset[str]
    ) -> Iterator[PlannedLatent | Rejection]:
        known, names = self._read_known(earlier)
        selection, fps = self.config.input.model_copy(update={"limit": None}), self.config.output.fps
        for item in plan_latents(found, selection, self.recipe.fingerprint, fps, names, is_whole=False):
            if item.sample_id in again or item.sample_id not in known:
                yield self._check_size(item)

    def _read_known(self, earlier: list[Generation]) -> tuple[CompactSet, Names]:
        """Ids that are planned or left out, and names of videos."""
        known, names = CompactSet(), Names()
        for generation in earlier:
            for sample_id in read_column(self.storage, generation, "sample_id"):
                known.add(sample_id)
            for rejection in read_rejections(self.storage, generation):
                known.add(rejection.sample_id)
            for name in read_column(self.storage, generation, "name"):
                names.occupy(name)
        return known, names

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
