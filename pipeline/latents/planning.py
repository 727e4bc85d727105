"""Which of the clips found are decoded, under which names and at which rates."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.compact_set import CompactSet
from pipeline.errors import ConfigError, TerminalError
from pipeline.latents.config import DEFAULT_NAME_COLUMN, LatentInputConfig
from pipeline.latents.listing import check_scale
from pipeline.latents.naming import Names
from pipeline.latents.probing import file_stem, named
from pipeline.latents.scale import count_pad, find_multiplier
from pipeline.latents.types import Columns, FoundLatent, PlannedLatent, ProbedLatents
from pipeline.recipe import digest
from pipeline.types import Rejection, Status
from pipeline.video_writer import MAX_FPS, MIN_FPS


def plan_latents(
    probed: Iterable[ProbedLatents],
    config: LatentInputConfig,
    recipe: str,
    default_fps: float,
    names: Names,
    *,
    is_whole: bool = True,
) -> Iterator[PlannedLatent | Rejection]:
    """The clips that ``input`` selects, in order; one that cannot be used yields a rejection.

    What ids, filters, sample and limit leave out yields nothing: nobody asked for it.

    Args:
        recipe: fingerprint of what else decides the video.
        default_fps: where a row names no rate.
        names: gives each video its own.
        is_whole: this is the whole input: what the settings name must be in it.

    Raises:
        ConfigError: the scale must be said, or a column or id of the settings is nowhere in the input.
    """
    selection = _Selection(config)
    seen = CompactSet()
    for candidate in islice(selection.select(probed), config.limit):
        try:
            planned = _plan(candidate, config, recipe, default_fps, names, seen)
        except TerminalError as error:
            yield candidate.reject("quarantined", error)
            continue
        if planned is None:
            detail = f"{candidate.file.uri}: listed twice; the first listing is kept"
            yield candidate.reject("filtered", TerminalError("plan", "duplicate", detail))
        else:
            yield planned
    if is_whole:
        selection.check_names()


@dataclass(slots=True, kw_only=True)
class _Candidate:
    """A clip that was found, or a file that could not be used."""

    file: ProbedLatents
    found: FoundLatent | None
    columns: Columns

    @property
    def source_id(self) -> str:
        """Names the clip whatever is done with it, so that a sample holds the same clips for every decoder."""
        if self.found is None:
            return self.file.key
        if self.file.is_shard and isinstance(self.columns.get("sample_id"), str):
            return str(self.columns["sample_id"])
        return digest(self.file.key, self.found.key, self.found.row, self.found.member)

    def reject(self, status: Status, error: TerminalError) -> Rejection:
        is_file = self.found is None
        return Rejection(
            sample_id=self.file.key if is_file else digest(self.file.key, self.source_id),
            uri=self.file.uri,
            status=status,
            stage=error.stage,
            reason=error.reason,
            detail=error.detail,
            file_key=self.file.key,
        )


class _Selection:
    """The rules that say what is asked for, and what of them was met."""

    def __init__(self, config: LatentInputConfig) -> None:
        self.config = config
        self._conditions, self._wanted_ids = config.conditions, frozenset(config.ids)
        self._columns: set[str] = set()
        self._ids: set[str] = set()
        self._found_any = self._is_done = False

    def select(self, probed: Iterable[ProbedLatents]) -> Iterator[_Candidate]:
        wanted = (candidate for candidate in _candidates(probed) if self._wants(candidate))
        if self.config.sample is None:
            yield from wanted
        else:
            numbered = enumerate(wanted)
            drawn = heapq.nsmallest(self.config.sample, numbered, key=lambda pair: digest(self.config.seed, pair[1].source_id))
            yield from (candidate for _, candidate in sorted(drawn, key=lambda pair: pair[0]))
        self._is_done = True

    def check_names(self) -> None:
        """Raises: ConfigError: a setting names what is nowhere in the input; a typing error would decode nothing, or all."""
        if not self._found_any:
            return
        settings = {f"input.filters {condition}": condition.column for condition in self._conditions}
        if self.config.fps_column is not None:
            settings["input.fps_column"] = self.config.fps_column
        if self.config.name_column != DEFAULT_NAME_COLUMN:
            settings["input.name_column"] = self.config.name_column
        for setting, column in settings.items():
            if column not in self._columns:
                there = ", ".join(sorted(self._columns)) or "none"
                raise ConfigError(f"{setting}: the input has no column {column!r}; there are: {there}")
        if self._is_done and (missing := [name for name in self.config.ids if name not in self._ids]):
            raise ConfigError(
                f"input.ids: the input has no {', '.join(missing[:5])}; an id is a dataset's sample_id, or a file's name "
                "without its extension"
            )

    def _wants(self, candidate: _Candidate) -> bool:
        self._columns |= candidate.columns.keys()
        self._found_any |= candidate.found is not None
        ids = self._wanted_ids & {str(candidate.columns.get("sample_id")), file_stem(candidate.file.uri)}
        if self._wanted_ids and not ids:
            return False
        self._ids |= ids
        # Of a file that cannot be read, a column that only its rows have says nothing either way.
        return all(
            condition.match(candidate.columns)
            for condition in self._conditions
            if candidate.found is not None or condition.column in candidate.columns
        )


def _candidates(probed: Iterable[ProbedLatents]) -> Iterator[_Candidate]:
    for file in probed:
        if file.error is not None:
            yield _Candidate(file=file, found=None, columns=file.columns)
        for found in file.latents:
            yield _Candidate(file=file, found=found, columns={**file.columns, **found.columns})


def _plan(
    candidate: _Candidate, config: LatentInputConfig, recipe: str, default_fps: float, names: Names, seen: CompactSet
) -> PlannedLatent | None:
    """A clip ready to decode; None if it is planned already. Raises: TerminalError: it cannot be."""
    file, found = candidate.file, candidate.found
    if found is None:
        raise file.error or TerminalError("read", "unexpected", f"{file.uri}: probing said nothing")
    if found.error is not None:
        raise named(found.error, file.uri)
    scale = check_scale(config, is_shard=file.is_shard)
    multiplier = find_multiplier(scale, config.role, config.convention)
    channels, frames, height, width = found.shape
    try:
        pad = count_pad(frames, scale, config.drop_frames)
    except TerminalError as error:
        raise named(error, file.uri) from error
    fps = _find_fps(candidate, config, default_fps)
    sample_id = digest(file.key, found.key, found.row, found.member, found.layout, multiplier, pad, fps, recipe)
    if not seen.add(sample_id):
        return None
    return PlannedLatent(
        sample_id=sample_id,
        uri=file.uri,
        size_bytes=file.size_bytes,
        version=file.version,
        key=found.key,
        row=found.row,
        member=found.member,
        layout=found.layout,
        shape=(channels, frames - pad, height, width),
        dtype=found.dtype,
        multiplier=multiplier,
        drop_frames=pad,
        name=names.take(_find_name(candidate, config), sample_id),
        fps=fps,
        columns=candidate.columns,
    )


def _find_fps(candidate: _Candidate, config: LatentInputConfig, default_fps: float) -> float:
    for column in (config.fps_column, "fps"):
        value = candidate.columns.get(column) if column is not None else None
        if value is None or value == "":
            continue
        try:
            fps = math.nan if isinstance(value, bool) else float(value)
        except ValueError:
            fps = math.nan
        if not MIN_FPS <= fps <= MAX_FPS:
            expected = f"expected frames a second, {MIN_FPS:g} to {MAX_FPS:g}"
            raise TerminalError("plan", "bad_fps", f"{candidate.file.uri}: {column} is {value!r}, {expected}")
        return fps
    return default_fps


def _find_name(candidate: _Candidate, config: LatentInputConfig) -> str:
    file, found = candidate.file, candidate.found
    assert found is not None, "only a clip that was found is named"
    named_by_row = True
    if (named := candidate.columns.get(config.name_column)) not in (None, ""):
        name, named_by_row = str(named), config.name_column in found.columns
    elif file.is_shard and isinstance(source := candidate.columns.get("source_uri"), str):
        name = file_stem(source)
    else:
        name, named_by_row = file_stem(file.uri), False
    if not named_by_row and file.latents[-1].row:  # several rows
        name = f"{name}-{found.row}"
    if found.member is not None:
        name = f"{name}-{found.member}"
    return name
