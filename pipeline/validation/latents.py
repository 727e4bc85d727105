"""A dataset of latents: every shard against the plan, the index against the shards, the manifest against all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.dataset.manifest import MANIFEST_PATH, Manifest
from pipeline.dataset.ordered_map import ordered_map
from pipeline.dataset.publish import INDEX_FOLDER
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import summary_of
from pipeline.outcomes import latest_summary
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, ShardRef, read_items
from pipeline.validation.findings import Finding, damaged
from pipeline.validation.index_view import IndexView
from pipeline.validation.plan_view import PlanView
from pipeline.validation.shard_checks import Ratios, ShardResult, check_footer_only, check_shard, hash_id


@dataclass(slots=True, kw_only=True)
class LatentChecks:
    """Validates one dataset. ``findings`` is run once; the counts are right after it."""

    plan: PlanView
    threads: int
    deep: frozenset[int] | None
    """Numbers of the shards that are read whole, of the others the footer; None: all."""
    read_whole: int = 0
    compared: int = 0
    """Shards whose every byte was compared."""
    _index: IndexView = field(init=False)
    _manifest: Manifest | None = None
    _buckets: Counter[str] = field(default_factory=Counter)
    _recipes: set[str] = field(default_factory=set)
    _dtypes: dict[str, str] = field(default_factory=dict)
    """With the first file that has it."""
    _ratios: dict[Ratios, str] = field(default_factory=dict)
    _id_hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    _id_paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = IndexView(self.plan.storage)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found."""
        yield from self._open_manifest()
        yield from self.plan.add_planning()
        for found in ordered_map(self._check, enumerate(self._planned()), self.threads):
            if isinstance(found, Finding):
                yield found
            else:
                yield from self._add(*found)
        yield from self._duplicates()
        yield from self._check_alike()
        if self._manifest is not None and not self.plan.unread and not self.plan.pending:
            yield from self._check_manifest(self._manifest)
            yield from self._index.end()
        yield from self.plan.check_account()
        if self._manifest is not None:
            yield from self.plan.check_quarantine()

    def find_orphans(self) -> Iterator[Finding]:
        """Objects that neither plan nor manifest names."""
        yield from self.plan.find_orphans()
        if self._manifest is not None:
            named = {piece.path for piece in self._manifest.index}
            for found in self.plan.storage.list(INDEX_FOLDER):
                if found.uri not in named:
                    yield Finding(found.uri, "orphan", "a piece of the index that the manifest names", "another")

    @property
    def manifest(self) -> Manifest | None:
        """None: there is none, or it cannot be trusted."""
        return self._manifest

    def _open_manifest(self) -> Iterator[Finding]:
        try:
            data = self.plan.storage.read(MANIFEST_PATH)
            manifest = Manifest.from_json(data)
        except FileNotFoundError:
            yield Finding(
                MANIFEST_PATH, "missing", "the manifest of a finished dataset", "nothing; run the job again to finish it"
            )
            return
        except Exception as error:  # whatever stands there
            yield damaged(MANIFEST_PATH, error)
            return
        if "xxh3" in json.loads(data) and data != manifest.to_json():  # those of older programs have none
            yield Finding(MANIFEST_PATH, "checksum", "the content whose hash it names", "another content")
            return
        self._manifest = manifest
        yield from self._index.open(manifest)

    def _planned(self) -> Iterator[tuple[Generation, ShardRef] | Finding]:
        for generation, shard in self.plan.planned_shards():
            yield self.plan.find_missing(shard) or (generation, shard)

    def _check(self, numbered: tuple[int, tuple[Generation, ShardRef] | Finding]) -> tuple[ShardRef, ShardResult] | Finding:
        """On a thread: read one shard."""
        number, planned = numbered
        if isinstance(planned, Finding):
            return planned
        generation, shard = planned
        storage, path = self.plan.storage, self.plan.commits.path(shard)
        size_bytes, recipe = self.plan.present[path], generation.recipe_fingerprint
        if self.deep is not None and number not in self.deep:
            return shard, check_footer_only(storage, path, size_bytes, shard, recipe)
        try:
            items = read_items(storage, shard, CLIP_ROWS)
        except Exception as error:  # whatever the parser says of it
            result = check_shard(storage, path, size_bytes, shard, recipe, None)
            result.findings.append(damaged(shard.file, error))
            return shard, result
        return shard, check_shard(storage, path, size_bytes, shard, recipe, items)

    def _add(self, shard: ShardRef, result: ShardResult) -> Iterator[Finding]:
        yield from result.findings
        self.plan.add(shard, result.summary)
        self.read_whole += result.index is not None
        self.compared += result.is_compared
        if result.summary is None:
            return
        self._buckets[result.summary.bucket_key] += result.summary.num_rows
        self._recipes.add(result.summary.recipe)
        for dtype in result.dtypes:
            self._dtypes.setdefault(dtype, result.path)
        for ratios in result.ratios:
            self._ratios.setdefault(ratios, result.path)
        rejected = latest_summary(result.summary, self.plan.superseded).rejections
        hashes = [hash_id(rejection.sample_id) for rejection in rejected]
        self._id_hashes.append(np.concatenate([result.id_hashes, np.array(hashes, np.uint64)]))
        self._id_paths.append(result.path)
        if self._manifest is None:
            return
        if result.columns != self._manifest.columns:
            yield Finding(result.path, "columns", "the columns that the manifest names", _other_columns(result, self._manifest))
        if result.index is not None:
            yield from self._index.check(result.path, result.index)
        elif (rows := self._index.count_rows(result.path)) != result.summary.num_rows:
            yield Finding(result.path, "index", f"{result.summary.num_rows} rows in the index", str(rows))

    def _duplicates(self) -> Iterator[Finding]:
        """Clips that two shards account for: by hashes first, then by the ids of the shards in question."""
        lengths = [len(hashes) for hashes in self._id_hashes]
        hashes = np.concatenate([np.empty(0, np.uint64), *self._id_hashes])
        values, counts = np.unique(hashes, return_counts=True)
        twice = set(values[counts > 1].tolist())
        if not twice:
            return
        owner = np.repeat(np.arange(len(lengths)), lengths)
        first_of: dict[str, str] = {}
        for number in np.unique(owner[np.isin(hashes, list(twice))]):
            path = self._id_paths[number]
            for sample_id in self._read_ids(path):
                if hash_id(sample_id) in twice and first_of.setdefault(sample_id, path) != path:
                    yield Finding(path, "duplicate", f"clip {sample_id} once", f"it is in {first_of[sample_id]} too")

    def _read_ids(self, path: str) -> list[str]:
        file = ShardFile(self.plan.storage, path)
        rejected = latest_summary(summary_of(file), self.plan.superseded).rejections
        rows = file.parquet().read(columns=["sample_id"])["sample_id"].to_pylist()
        return [*rows, *(rejection.sample_id for rejection in rejected)]

    def _check_alike(self) -> Iterator[Finding]:
        """One dtype, and one scale from clip to latent."""
        for what, seen in (("dtype", self._dtypes), ("shape", {str(ratios): path for ratios, path in self._ratios.items()})):
            first, *others = seen or [""]
            for other in others:
                yield Finding(seen[other], what, f"one {what} of all latents: {first}, as in {seen[first]}", other)
        if self._manifest is not None:
            for dtype in self._dtypes.keys() - {self._manifest.dtype}:
                yield Finding(self._dtypes[dtype], "dtype", f"{self._manifest.dtype}, as the manifest says", dtype)

    def _check_manifest(self, manifest: Manifest) -> Iterator[Finding]:
        facts = {
            "num_samples": self.plan.written,
            "num_shards": self.plan.shards,
            "num_quarantined": self.plan.quarantined,
            "num_filtered": self.plan.filtered,
            "size_bytes": self.plan.size_bytes,
            "buckets": dict(sorted(self._buckets.items())),
            "recipes": tuple(sorted(self._recipes)),
        }
        for name, expected in facts.items():
            if getattr(manifest, name) != expected:
                yield Finding(MANIFEST_PATH, "count", f"{name} {expected}", str(getattr(manifest, name)))


def _other_columns(result: ShardResult, manifest: Manifest) -> str:
    ours = {column["name"]: column for column in manifest.columns}
    theirs = {column["name"]: column for column in result.columns}
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return f"others: {', '.join(names)}" if names else "another order"
