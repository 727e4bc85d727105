"""Latents in Parquet: columns ``<key>_bytes``, ``<key>_shape`` and ``<key>_dtype``, of our own shards or another program's."""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa

from pipeline.dataset.pages import Extents, locate_values
from pipeline.dataset.schema import LATENT, tensor_digest, tensor_name
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.writer import is_shard
from pipeline.errors import DatasetError, TerminalError
from pipeline.inputs import read_input_range, stat_input
from pipeline.latents.file import MAX_BYTES
from pipeline.latents.headers import TensorSpec, damaged
from pipeline.latents.types import Columns, plain_columns
from pipeline.storage import is_transient

_SMALL_BYTES = 16 << 10
"""Mean size of a value above which a column is no description of a clip: embeddings, pictures."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What pyarrow makes of a damaged file is many kinds of error; of a file of its own they all say one thing."""
    try:
        yield
    except DatasetError as error:
        raise damaged(str(error)) from error
    except OSError as error:
        if error.errno is not None and is_transient(error):  # the disk's, not the file's
            raise
        raise damaged(f"Parquet: {error}") from error
    except (pa.ArrowException, ValueError, OverflowError, LookupError, TypeError) as error:
        raise damaged(f"Parquet: {type(error).__name__}: {error}") from error


class InputRanges:
    """An input file as ``ShardFile`` reads it: what is wrong with it is a ``TerminalError``."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        self._uri, self._options = uri, options

    def size(self, path: str) -> int:
        return stat_input(self._uri, self._options).size_bytes

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        return read_input_range(self._uri, self._options, offset, length)


def open_parquet(uri: str, size_bytes: int, options: dict[str, Any]) -> ShardFile:
    """An input as a Parquet file; its errors do not name it, since what is raised of an input does."""
    return ShardFile(InputRanges(uri, options), "Parquet", size_bytes)


class LatentTable:
    """One Parquet file with a latent in every row. Opening it reads the footer.

    Args:
        key: prefix of the tensor's columns; None: ``vae_latent``, or the only tensor.
        max_bytes: of latents that are read together, where another program's file gives no smaller unit.

    Raises:
        TerminalError: the file is damaged or has no such columns.
    """

    @_explained()
    def __init__(
        self, uri: str, size_bytes: int, options: dict[str, Any], key: str | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        self._file = open_parquet(uri, size_bytes, options)
        self._parquet = self._file.parquet()
        self._schema: pa.Schema = self._parquet.schema_arrow
        metadata = self._parquet.metadata
        self.is_shard = is_shard(metadata)
        self.num_rows: int = metadata.num_rows
        self.key = _choose_key(self._schema, key)
        self._max_bytes = max_bytes
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._group_starts = [0, *accumulate(sizes)]
        self._group: tuple[int, pa.ChunkedArray] | None = None

    def check_declared(self, row: int, spec: TensorSpec) -> None:
        """Raises: TerminalError: a row's shape takes more bytes than its whole row group holds."""
        group = bisect.bisect_right(self._group_starts, row) - 1
        if spec.size_bytes > self._latent_bytes[group]:
            raise damaged(
                f"shape {list(spec.shape)} of {spec.dtype} takes {spec.size_bytes} bytes, but all of {self.key}_bytes in its "
                f"row group are {self._latent_bytes[group]}"
            )

    @cached_property
    def _latent_bytes(self) -> list[int]:
        """Unpacked bytes of the latents of each row group, by the footer."""
        groups = range(self._parquet.metadata.num_row_groups)
        return [self._group_sizes(group)[f"{self.key}_bytes"] for group in groups]

    @cached_property
    @_explained()
    def specs(self) -> list[TensorSpec | None]:
        """Shape and dtype of every row's latent; None where a row has none."""
        shapes, dtypes = self._read([f"{self.key}_shape", f"{self.key}_dtype"])
        return [
            None if shape is None or dtype is None else TensorSpec(tuple(shape), str(dtype).removeprefix("torch."))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    @_explained()
    def columns(self) -> list[Columns]:
        """What every row says about its latent: the columns that are neither tensors nor other large or binary values."""
        names = self._small_columns()
        values = self._read(names)
        return [plain_columns(dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)] or [
            {} for _ in range(self.num_rows)
        ]

    @_explained()
    def read_bytes(self, row: int) -> bytes:
        """The bytes of one row's latent.

        Raises:
            TerminalError: the file is damaged there.
        """
        column = f"{self.key}_bytes"
        if self._extents is not None:
            data = self._file.read_at(int(self._extents.offsets[row]), int(self._extents.lengths[row]))
        else:
            data = self._read_from_group(row, column)
        expected = self._digests[row] if self._digests else None
        if expected is not None and (found := tensor_digest(data)) != expected:
            raise damaged(f"row {row}: {column} has xxh3 {found}, expected {expected}")
        return data

    def _read_from_group(self, row: int, column: str) -> bytes:
        group = bisect.bisect_right(self._group_starts, row) - 1
        if self._group is None or self._group[0] != group:
            size_bytes = self._group_sizes(group)[column]
            if size_bytes > self._max_bytes:
                raise TerminalError(
                    "read",
                    "too_large",
                    f"row {row}: {column} has {size_bytes} bytes in its row group; input.max_file_bytes allows {self._max_bytes}",
                )
            self._group = None  # before the next one is there
            self._group = group, self._parquet.read_row_group(group, columns=[column])[column]
        value = self._group[1][row - self._group_starts[group]]
        if not value.is_valid:
            raise TerminalError("read", "no_tensor", f"row {row}: {column} has no value")
        data: bytes = value.as_buffer().to_pybytes()
        return data

    def _group_sizes(self, group: int) -> Counter[str]:
        """Unpacked bytes of each column in a row group, by the footer."""
        sizes, chunks = Counter[str](), self._parquet.metadata.row_group(group)
        for chunk in map(chunks.column, range(chunks.num_columns)):
            sizes[chunk.path_in_schema.partition(".")[0]] += chunk.total_uncompressed_size
        return sizes

    @cached_property
    def _extents(self) -> Extents | None:
        """Byte ranges of the latents; None: they are to be read by row groups."""
        try:
            return locate_values(self._file, [f"{self.key}_bytes"]).get(f"{self.key}_bytes")
        except DatasetError as error:
            if self.is_shard:
                raise damaged(str(error)) from error
            return None

    @cached_property
    def _digests(self) -> list[str | None]:
        column = f"{self.key}_xxh3"
        return self._read([column])[0] if column in self._schema.names else []

    def _read(self, names: list[str]) -> list[list[Any]]:
        """The values of columns, one list a column."""
        table = self._parquet.read(columns=names) if names else pa.table({})
        return [table[name].to_pylist() for name in names]

    def _small_columns(self) -> list[str]:
        sizes = sum(map(self._group_sizes, range(self._parquet.metadata.num_row_groups)), Counter[str]())
        tensors = set(_tensor_names(self._schema))
        return [
            field.name
            for field in self._schema
            if not _is_binary(field.type)
            and sizes[field.name.partition(".")[0]] <= _SMALL_BYTES * max(self.num_rows, 1)
            and not any(field.name == f"{tensor}_{part}" for tensor in tensors for part in ("shape", "dtype", "xxh3"))
        ]


@_explained()
def has_latents(uri: str, size_bytes: int, options: dict[str, Any]) -> bool:
    """Whether a Parquet file holds tensors rather than paths. Raises: TerminalError: it is damaged."""
    return bool(_tensor_names(open_parquet(uri, size_bytes, options).parquet().schema_arrow))


def _tensor_names(schema: pa.Schema) -> list[str]:
    binary = [field.name for field in schema if _is_binary(field.type)]
    return [name for column in binary if (name := tensor_name(schema.names, column))]


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _choose_key(schema: pa.Schema, key: str | None) -> str:
    tensors = _tensor_names(schema)
    if key is not None:
        if key not in tensors:
            raise TerminalError(
                "read", "no_tensor", f"no columns {key}_bytes, _shape and _dtype; tensors there: {tensors or 'none'}"
            )
        return key
    if LATENT in tensors:
        return LATENT
    if len(tensors) != 1:
        reason = "key_ambiguous" if tensors else "no_tensor"
        raise TerminalError(
            "read",
            reason,
            f"which columns hold the latent? Expected {LATENT}_bytes, _shape and _dtype, or one such triplet of another name; "
            f"tensors there: {', '.join(tensors) or 'none'}; say in input.key",
        )
    return tensors[0]
