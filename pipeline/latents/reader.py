"""Planned latents as tensors, ready to decode."""

from __future__ import annotations

import threading
from typing import Any

import torch

from pipeline.errors import TerminalError, TransientError
from pipeline.inputs import read_input_range, stat_input
from pipeline.latents.file import MAX_BYTES, decode_values, parse_tensors
from pipeline.latents.headers import damaged
from pipeline.latents.layout import to_clips
from pipeline.latents.probing import check_size, file_suffix, named
from pipeline.latents.scale import unscale
from pipeline.latents.table_file import LatentTable
from pipeline.latents.types import PlannedLatent
from pipeline.storage import StoredObject, is_transient


class LatentReader:
    """Reads planned latents; thread-safe. The last file stays open, so that its clips cost one read together.

    Args:
        storage_options: passed to fsspec.
        max_file_bytes: largest file that is read whole, or row group of another program's Parquet.
    """

    def __init__(self, storage_options: dict[str, Any] | None = None, max_file_bytes: int = MAX_BYTES) -> None:
        self._options, self._max_bytes = dict(storage_options or {}), max_file_bytes
        self._lock = threading.Lock()
        self._last: _OpenFile | None = None

    def read(self, planned: PlannedLatent) -> torch.Tensor:
        """The latent, unscaled and without the front pad: ``[C, F, H, W]``, the caller's own.

        Its dtype is the stored one, or float32 where a scale is undone.

        Raises:
            TerminalError: the file is another one than was planned, is damaged, or the latent is not finite.
            TransientError: storage does not answer.
        """
        try:
            tensor = self._open(planned).read(planned)
            return _finish(tensor, planned)
        except TerminalError as error:
            raise named(error, planned.uri) from error
        except OSError as error:
            if is_transient(error):
                raise TransientError(f"{planned.uri}: {type(error).__name__}: {error}") from error
            raise

    def _open(self, planned: PlannedLatent) -> _OpenFile:
        with self._lock:
            if self._last is None or not self._last.is_of(planned):
                self._last = _OpenFile(planned, self._options, self._max_bytes)
            return self._last


class _OpenFile:
    """One file; what is read of it is kept, and so is what is wrong with it."""

    def __init__(self, planned: PlannedLatent, options: dict[str, Any], max_bytes: int) -> None:
        self._file = StoredObject(planned.uri, planned.size_bytes, planned.version)
        self._options, self._max_bytes = options, max_bytes
        self._lock = threading.Lock()
        self._content: LatentTable | dict[str, torch.Tensor] | TerminalError | None = None
        self._row: tuple[int, torch.Tensor] | None = None

    def is_of(self, planned: PlannedLatent) -> bool:
        return self._file == StoredObject(planned.uri, planned.size_bytes, planned.version)

    def read(self, planned: PlannedLatent) -> torch.Tensor:
        """The tensor that holds a planned clip. It is shared: not to be written to."""
        with self._lock:
            if self._content is None:
                self._content = self._load(planned.key)
            content = self._content
            if isinstance(content, TerminalError):
                raise TerminalError(*content.args)
            if isinstance(content, LatentTable):
                return self._read_row(content, planned.row or 0)
            if planned.key not in content:
                raise damaged(f"the tensor {planned.key!r} is not there any more")
            return content[planned.key]

    def _load(self, key: str) -> LatentTable | dict[str, torch.Tensor] | TerminalError:
        uri, size_bytes = self._file.uri, self._file.size_bytes
        try:
            found = stat_input(uri, self._options)
            if (found.size_bytes, found.version) != (size_bytes, self._file.version):
                raise TerminalError(
                    "fetch",
                    "changed",
                    f"{uri}: changed since it was planned ({size_bytes} bytes then, {found.size_bytes} now); "
                    "run again with --append to plan what it is now",
                )
            suffix = file_suffix(uri)
            if suffix == ".parquet":
                return LatentTable(uri, size_bytes, self._options, key, self._max_bytes)
            check_size(size_bytes, self._max_bytes)
            return parse_tensors(read_input_range(uri, self._options, 0, size_bytes), suffix, self._max_bytes)
        except TerminalError as error:
            return error

    def _read_row(self, table: LatentTable, row: int) -> torch.Tensor:
        if self._row is None or self._row[0] != row:  # a row may hold a batch
            spec = table.specs[row]
            if spec is None:
                raise damaged(f"row {row} has no shape or dtype any more")
            self._row = row, decode_values(table.read_bytes(row), spec.shape, spec.dtype)
        return self._row[1]


def _finish(tensor: torch.Tensor, planned: PlannedLatent) -> torch.Tensor:
    clips = to_clips(tensor, planned.layout)
    latent = clips[planned.member or 0]
    channels, frames, height, width = planned.shape
    expected = (channels, frames + planned.drop_frames, height, width)
    if tuple(latent.shape) != expected:
        raise damaged(f"a latent of shape {list(latent.shape)}, planned was {list(expected)}")
    if not torch.isfinite(torch.stack(torch.aminmax(latent))).all():  # passes NaN on, and costs a fifth of isfinite
        raise TerminalError("read", "not_finite", "the latent has NaN or infinite values; whatever generated it failed")
    latent = latent[:, planned.drop_frames :]
    if planned.multiplier is not None:
        return unscale(latent, planned.multiplier).contiguous()
    return latent.clone(memory_format=torch.contiguous_format)
