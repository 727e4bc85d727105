"""What clips a file of latents holds: from its header where the format has one, else from the whole file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pipeline.errors import TerminalError, TransientError
from pipeline.inputs import read_input_range, stat_input
from pipeline.latents.config import LatentInputConfig
from pipeline.latents.file import SUFFIXES, choose_tensor, describe_tensors
from pipeline.latents.headers import FLOATS, TensorSpec, read_npy_header, read_safetensors_header
from pipeline.latents.layout import Layout, clip_shapes, find_layout
from pipeline.latents.table_file import LatentTable
from pipeline.latents.types import Columns, FoundLatent, ProbedLatents, plain_columns
from pipeline.probing import look_at_items
from pipeline.sources.source import SourceItem
from pipeline.storage import StoredObject, is_transient


def probe_latents(items: list[SourceItem], config: LatentInputConfig, channels: int) -> list[ProbedLatents]:
    """Look at a few files, one after the other. What is wrong with one stands in its ``error``.

    Args:
        channels: of the model's latents, by which a layout is told.

    Raises:
        TransientError: storage does not answer; nothing is known.
    """
    return look_at_items(
        items,
        lambda item: _probe_item(item, config, channels),
        lambda item, error: replace(_listed(item), error=error),
    )


def file_suffix(uri: str) -> str:
    """``.npy`` of ``a.npy``, and of ``https://host/a.npy?token=…``; in lower case. Raises: TerminalError: another one."""
    suffix = "." + _path(uri).rpartition("/")[2].rpartition(".")[2].lower()
    if suffix not in SUFFIXES:
        raise TerminalError("read", "unknown_format", f"ends in none of {', '.join(SUFFIXES)}")
    return suffix


def file_stem(uri: str) -> str:
    """The last part of a path, without its extension."""
    name = _path(uri).rstrip("/").rpartition("/")[2]
    return name.rpartition(".")[0] or name


def check_size(size_bytes: int, max_bytes: int) -> None:
    """Raises: TerminalError: a file is too large to be read whole."""
    if size_bytes > max_bytes:
        raise TerminalError("read", "too_large", f"{size_bytes} bytes; input.max_file_bytes allows {max_bytes}")


def named(error: TerminalError, uri: str) -> TerminalError:
    """An error of a file's content that says which file."""
    if error.stage != "read":  # what fetching raises says it itself
        return error
    return TerminalError(error.stage, error.reason, f"{uri}: {error.detail}")


def _path(uri: str) -> str:
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri


def _listed(item: SourceItem) -> ProbedLatents:
    return ProbedLatents(
        uri=item.uri, size_bytes=item.size_bytes or 0, version=item.version or "", columns=plain_columns(item.columns)
    )


def _probe_item(item: SourceItem, config: LatentInputConfig, channels: int) -> ProbedLatents:
    probed = _listed(item)
    try:
        if item.problem is not None:
            raise TerminalError("plan", "no_latent", item.problem)
        suffix = file_suffix(item.uri)
        # Not as listed: some stores write a time in one way in listings and in another here, where the reader asks too.
        file = stat_input(item.uri, config.storage_options)
        probed = replace(probed, uri=file.uri, size_bytes=file.size_bytes, version=file.version)
        if suffix == ".parquet":
            table = LatentTable(file.uri, file.size_bytes, config.storage_options, config.key)
            return replace(probed, is_shard=table.is_shard, latents=tuple(_find_rows(table, config, channels)))
        tensors = _describe(file, suffix, config)
        key = choose_tensor(tensors, config.key)
        layout = _find_layout(tensors[key], channels, config.layout)
        return replace(probed, latents=tuple(_find_clips(tensors[key], key, layout)))
    except TerminalError as error:
        return replace(probed, error=named(error, item.uri))
    except OSError as error:
        if is_transient(error):
            raise TransientError(f"{item.uri}: {type(error).__name__}: {error}") from error
        raise


def _describe(file: StoredObject, suffix: str, config: LatentInputConfig) -> dict[str, TensorSpec]:
    read = partial(read_input_range, file.uri, config.storage_options)
    if suffix == ".safetensors":
        return read_safetensors_header(read, file.size_bytes)
    if suffix == ".npy":
        return {"": read_npy_header(read, file.size_bytes).spec}
    check_size(file.size_bytes, config.max_file_bytes)
    return describe_tensors(read(0, file.size_bytes), suffix, config.max_file_bytes)


def _find_layout(spec: TensorSpec, channels: int, stated: Layout | None) -> Layout:
    if spec.dtype not in FLOATS:
        raise TerminalError("read", "dtype", f"dtype {spec.dtype!r}; latents are {', '.join(FLOATS)}")
    return find_layout(spec.shape, channels, stated)


def _find_clips(spec: TensorSpec, key: str, layout: Layout) -> list[FoundLatent]:
    shapes = clip_shapes(spec.shape, layout)
    return [
        FoundLatent(key=key, member=number if len(shapes) > 1 else None, shape=shape, layout=layout, dtype=spec.dtype)
        for number, shape in enumerate(shapes)
    ]


def _find_rows(table: LatentTable, config: LatentInputConfig, channels: int) -> list[FoundLatent]:
    """The clips of every row; a row that is wrong is a finding of its own."""
    stated: Layout | None = "CFHW" if table.is_shard else config.layout
    found: list[FoundLatent] = []
    for row, (spec, columns) in enumerate(zip(table.specs, table.columns(), strict=True)):
        found += _find_row(row, spec, columns, table, channels, stated)
    return found


def _find_row(
    row: int, spec: TensorSpec | None, columns: Columns, table: LatentTable, channels: int, stated: Layout | None
) -> list[FoundLatent]:
    try:
        if spec is None:
            raise TerminalError("read", "no_tensor", f"{table.key} has no shape or dtype")
        layout = _find_layout(spec, channels, stated)
        table.check_declared(row, spec)  # before a batch of a million is made into as many clips
        clips = _find_clips(spec, table.key, layout)
    except TerminalError as error:
        problem = TerminalError(error.stage, error.reason, f"row {row}: {error.detail}")
        return [FoundLatent(key=table.key, row=row, columns=columns, error=problem)]
    return [replace(clip, row=row, columns=columns) for clip in clips]
