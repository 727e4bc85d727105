"""One committed shard of latents: its footer, its rows against the plan, its tensors, its bytes.

C channels, F latent frames, H/W latent cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.dataset.index import index_shard
from pipeline.dataset.schema import (
    FIRST_FRAME_PNG,
    blob_column,
    blob_names,
    clip_facts,
    describe_schema,
    is_blob,
    tensor_digest,
    tensor_size_bytes,
)
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import check_footer, stored_schema, summary_of
from pipeline.plan import PlannedClip
from pipeline.plan_store import ShardRef
from pipeline.storage import Storage
from pipeline.types import Bucket, ShardSummary
from pipeline.validation.findings import Finding, damaged, first_findings
from pipeline.validation.same_bytes import Rewriter
from pipeline.validation.whole_file import WholeFile, open_whole

_PNG = b"\x89PNG\r\n\x1a\n"
Ratios = tuple[int, int, int]
"""Channels, and pixels and frames of a clip for one of the latent."""


@dataclass(slots=True, kw_only=True)
class ShardResult:
    """What one shard holds, and what is wrong with it."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    summary: ShardSummary | None = None
    """None: the footer cannot be read."""
    columns: tuple[dict[str, Any], ...] = ()
    """As the manifest has them."""
    index: pa.Table | None = None
    """Its rows of the index; None where only the footer was read."""
    id_hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Of its sample ids, in row order."""
    dtypes: set[str] = field(default_factory=set)
    """Of its latents."""
    ratios: set[Ratios] = field(default_factory=set)
    is_compared: bool = False
    """Whether every byte was compared with what this version of the writer makes of the rows."""


def hash_id(sample_id: str) -> int:
    """64 bits that stand for a sample id: a list of ten million ids fits in 80 MB."""
    return int(xxhash.xxh3_64_intdigest(sample_id.encode()))


def check_footer_only(storage: Storage, path: str, size_bytes: int, shard: ShardRef | None, recipe: str | None) -> ShardResult:
    """What a few kilobytes at the end of a shard tell."""
    result = ShardResult(path=path)
    try:
        file = ShardFile(storage, path, size_bytes)
        _read_footer(result, file, shard, recipe)
    except Exception as error:  # whatever it is that the parsers say of it, it is wrong with this file
        result.findings.append(damaged(path, error))
    return result


def check_shard(
    storage: Storage,
    path: str,
    size_bytes: int,
    shard: ShardRef | None,
    recipe: str | None,
    items: Sequence[PlannedClip] | None,
) -> ShardResult:
    """Read all of a shard.

    Args:
        shard: as the plan has it; None: there is no plan.
        recipe: fingerprint of the shard's generation.
        items: the clips that the plan puts into it.
    """
    result = ShardResult(path=path)
    try:
        with open_whole(storage, path, size_bytes) as whole:
            file = ShardFile(whole, path, size_bytes)
            metadata = _read_footer(result, file, shard, recipe)
            if whole.data[:4] != b"PAR1":
                result.findings.append(Finding(path, "damaged", "PAR1 at the start", repr(whole.data[:4])))
            result.findings += first_findings(_check_content(result, file, metadata, whole, items))
    except Exception as error:  # as above
        result.findings.append(damaged(path, error))
    return result


def _read_footer(result: ShardResult, file: ShardFile, shard: ShardRef | None, recipe: str | None) -> pq.FileMetaData:
    metadata = file.metadata()
    check_footer(file.path, metadata)
    summary = summary_of(file)
    result.summary = summary
    result.columns = tuple(describe_schema(stored_schema(metadata)))
    facts: list[tuple[str, object, object]] = [("rows", summary.num_rows, metadata.num_rows)]
    stored_recipe = (metadata.metadata or {}).get(b"latent_dataset.recipe", b"").decode(errors="replace")
    facts.append(("recipe in the footer", summary.recipe, stored_recipe))
    if shard is not None:
        facts += [
            ("shard id", shard.shard_id, summary.shard_id),
            ("generation", shard.generation, summary.generation),
            ("index", shard.index, summary.index),
            ("bucket", shard.bucket_key, summary.bucket_key),
            ("recipe", recipe, summary.recipe),
            ("clips, written and rejected", shard.num_clips, summary.num_rows + len(summary.rejections)),
        ]
    result.findings += [
        Finding(file.path, "account", f"{name} {expected}", str(found)) for name, expected, found in facts if expected != found
    ]
    return metadata


def _check_content(
    result: ShardResult, file: ShardFile, metadata: pq.FileMetaData, whole: WholeFile, items: Sequence[PlannedClip] | None
) -> Iterator[Finding]:
    path = file.path
    version = check_footer(path, metadata)
    result.is_compared = version == pa.__version__
    result.index = index_shard(file)
    planned = None if items is None else {item.sample_id: item for item in items}
    parquet = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
    ids: list[str] = []
    size_bytes = 0
    for group in range(metadata.num_row_groups):
        table = parquet.read_row_group(group)
        extents = result.index.slice(len(ids), len(table))
        yield from _check_rows(path, table, planned)
        yield from _check_blobs(result, table, extents, whole)
        size_bytes += sum(pc.sum(pc.binary_length(table[column])).as_py() or 0 for column in _blob_columns(table))
        ids += table["sample_id"].to_pylist()
    result.id_hashes = np.array([hash_id(name) for name in ids], np.uint64)
    summary = result.summary
    assert summary is not None, "content before footer"
    if size_bytes != summary.size_bytes:
        yield Finding(path, "account", f"{summary.size_bytes} bytes of tensors", f"{size_bytes}")
    if items is not None:
        yield from _check_membership(path, ids, summary, items)
    if result.is_compared:
        yield from _check_bytes(path, metadata, parquet, whole)


def _check_bytes(path: str, metadata: pq.FileMetaData, parquet: pq.ParquetFile, whole: WholeFile) -> Iterator[Finding]:
    with Rewriter(metadata, whole) as rewriter:
        for group in range(metadata.num_row_groups):
            rewriter.add(parquet.read_row_group(group))
        difference = rewriter.finish()
    if difference is not None:
        position, expected, found = difference
        yield Finding(path, "bytes", f"{expected} at {position}, as the writer makes it of these rows", found)


def _blob_columns(table: pa.Table) -> list[str]:
    return [blob_column(table.schema, name) for name in blob_names(table.schema)]


def _check_membership(path: str, ids: list[str], summary: ShardSummary, items: Sequence[PlannedClip]) -> Iterator[Finding]:
    """Every clip of the plan is a row or a rejection, once, and nothing else is."""
    rejected = [rejection.sample_id for rejection in summary.rejections]
    outcomes = [*ids, *rejected]
    for sample_id, count in Counter(outcomes).items():
        if count > 1:
            yield Finding(path, "duplicate", f"clip {sample_id} once", f"{count} times")
    planned = [item.sample_id for item in items]
    for sample_id in sorted(set(planned) - set(outcomes)):
        yield Finding(path, "missing", f"clip {sample_id} of the plan", "neither a row nor a rejection")
    for sample_id in sorted(set(outcomes) - set(planned)):
        yield Finding(path, "unplanned", "clips of the plan only", f"clip {sample_id}")
    rows = set(ids)
    if rows <= set(planned) and ids != [name for name in planned if name in rows]:
        yield Finding(path, "order", "rows in plan order", "another order")


def _check_rows(path: str, table: pa.Table, planned: dict[str, PlannedClip] | None) -> Iterator[Finding]:
    """The small columns against the plan."""
    if planned is None:
        return
    columns = [field.name for field in table.schema if not is_blob(field)]
    for row in table.select(columns).to_pylist():
        item = planned.get(row["sample_id"])
        if item is None:
            continue  # said elsewhere
        for name, expected in clip_facts(item.clip).items():
            if row[name] != expected:
                yield Finding(path, "row", f"{name} {expected!r} of {row['sample_id']}", repr(row[name]))


def _check_blobs(result: ShardResult, table: pa.Table, extents: pa.Table, whole: WholeFile) -> Iterator[Finding]:
    ids = table["sample_id"].to_pylist()
    buckets = table["bucket_key"].to_pylist()
    shapes: dict[str, list[Any]] = {}
    for blob in blob_names(table.schema):
        values = table[blob_column(table.schema, blob)]
        offsets = extents[f"{blob}_offset"].to_pylist()
        is_tensor = f"{blob}_shape" in table.column_names
        facts = [table[f"{blob}_{part}"].to_pylist() for part in ("shape", "dtype", "xxh3")] if is_tensor else []
        if is_tensor:
            shapes[blob] = facts[0]
        for number, value in enumerate(values):
            data = memoryview(value.as_buffer()).cast("B")
            name = f"{blob} of {ids[number]}"
            if offsets[number] is not None and whole.data[offsets[number] : offsets[number] + len(data)] != data:
                yield Finding(result.path, "offset", f"the bytes of {name} at {offsets[number]}", "others")
            if is_tensor:
                shape, dtype, digest = (fact[number] for fact in facts)
                yield from _check_tensor(result.path, name, data, shape, dtype, digest)
                if blob == "vae_latent":
                    result.dtypes.add(dtype)
            elif blob == FIRST_FRAME_PNG and bytes(data[:4]) != _PNG[:4]:
                yield Finding(result.path, "content", f"a PNG as {name}", repr(bytes(data[:8])))
    for number, bucket in enumerate(buckets):
        yield from _check_shapes(result, ids[number], bucket, {blob: shapes[blob][number] for blob in shapes})


def _check_tensor(path: str, name: str, data: memoryview, shape: list[int], dtype: str, digest: str) -> Iterator[Finding]:
    found = tensor_digest(data)
    if found != digest:
        yield Finding(path, "checksum", f"xxh3 {digest} of {name}", found)
    try:
        expected = tensor_size_bytes(tuple(shape), dtype)
    except ValueError as error:
        yield Finding(path, "dtype", f"a known dtype of {name}", str(error))
        return
    if len(data) != expected:
        yield Finding(path, "shape", f"{expected} bytes of {name}: {dtype} {shape}", f"{len(data)}")
    elif bad := count_not_finite(data, dtype):
        yield Finding(path, "not_finite", f"finite values in {name}", f"{bad} that are NaN or infinite")


def count_not_finite(data: memoryview, dtype: str) -> int:
    """How many values of a tensor are NaN or infinite. numpy has no bfloat16: those have all bits of the exponent set."""
    if dtype == "bfloat16":
        return int(np.count_nonzero((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80))
    values = np.frombuffer(data, "<f2" if dtype == "float16" else "<f4")
    return int(len(values) - np.count_nonzero(np.isfinite(values)))


def _check_shapes(result: ShardResult, sample_id: str, bucket_key: str, shapes: dict[str, list[int]]) -> Iterator[Finding]:
    """A latent has its bucket's shape in whole parts, its log-variance the same, its first frame one frame of it."""
    latent = shapes.get("vae_latent", [])
    ratios = find_ratios(Bucket.parse(bucket_key), latent)
    if ratios is None:
        yield Finding(result.path, "shape", f"vae_latent of {sample_id} as [C, F, H, W] of {bucket_key}", str(latent))
        return
    result.ratios.add(ratios)
    frame = [latent[0], 1, *latent[2:]]
    for blob, expected in (("vae_logvar", latent), ("first_frame_latent", frame), ("first_frame_logvar", frame)):
        if blob in shapes and shapes[blob] != expected:
            yield Finding(result.path, "shape", f"{expected} of {blob} of {sample_id}", str(shapes[blob]))


def find_ratios(bucket: Bucket, shape: Sequence[int]) -> Ratios | None:
    """How a model that made this latent of such a clip scales; None: no model does."""
    if len(shape) != 4 or min(shape) < 1:
        return None
    channels, frames, height, width = shape
    if bucket.height % height or bucket.width % width or bucket.height // height != bucket.width // width:
        return None
    if (frames == 1) != (bucket.num_frames == 1) or (frames > 1 and (bucket.num_frames - 1) % (frames - 1)):
        return None
    return channels, bucket.height // height, (bucket.num_frames - 1) // (frames - 1) if frames > 1 else 0
