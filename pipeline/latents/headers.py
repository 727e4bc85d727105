"""What tensors a safetensors or npy file holds, from its first bytes alone.

A header is believed only as far as the file is long: nothing is allocated by what it claims.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import TerminalError

ReadRange = Callable[[int, int], bytes]
"""Bytes from an offset, so many; only called within the file's length."""

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Dtypes that latents may have, and their bytes a value."""

_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_MAX_HEADER_BYTES = 16 << 20
_HEAD_BYTES = 64 << 10  # of a remote file, more costs no more time; holds any npy header and most of the others
_NPY_HEADER_BYTES = 12 << 10  # numpy reads none above 10,000 characters


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor; the dtype's name is torch's, or the format's own for those we do not read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Of a dtype that we read; 0 for others."""
        return math.prod(self.shape) * FLOATS.get(self.dtype, 0)


class NpyHeader(NamedTuple):
    spec: TensorSpec
    dtype: np.dtype[Any]
    is_fortran: bool
    data_start: int


def damaged(detail: str) -> TerminalError:
    return TerminalError("read", "damaged", f"{detail}; write the file again")


def read_safetensors_header(read: ReadRange, size_bytes: int) -> dict[str, TensorSpec]:
    """Name, shape and dtype of each tensor.

    Raises:
        TerminalError: the file is damaged or cut short.
    """
    if size_bytes < 8:
        raise damaged(f"{size_bytes} bytes are no safetensors file")
    head = read(0, min(size_bytes, _HEAD_BYTES))
    length = int.from_bytes(head[:8], "little")
    if length > size_bytes - 8:
        raise damaged(f"not a safetensors file, or cut short: a header of {length} bytes in a file of {size_bytes}")
    if length > _MAX_HEADER_BYTES:
        raise TerminalError("read", "too_large", f"a safetensors header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
    text = head[8 : 8 + length] if 8 + length <= len(head) else read(8, length)
    try:
        entries = json.loads(text)
        return {
            name: _safetensors_spec(entry, size_bytes - 8 - length) for name, entry in entries.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"not a safetensors file, or damaged: {type(error).__name__}: {error}") from error


def _safetensors_spec(entry: dict[str, Any], data_bytes: int) -> TensorSpec:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"], str(entry["dtype"]))
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"shape {shape} at {start} to {end}")
    if not start <= end <= data_bytes:
        raise ValueError(f"a tensor at {start} to {end}, but there are {data_bytes} bytes of data")
    if dtype in FLOATS and math.prod(shape) * FLOATS[dtype] != end - start:
        raise ValueError(f"{dtype} of shape {list(shape)} in {end - start} bytes")
    return TensorSpec(shape, dtype)


def read_npy_header(read: ReadRange, size_bytes: int) -> NpyHeader:
    """Shape, dtype and where the values begin.

    Raises:
        TerminalError: the file is damaged, cut short, or longer than its header says.
    """
    head = io.BytesIO(read(0, min(size_bytes, _NPY_HEADER_BYTES)))
    try:
        version = np.lib.format.read_magic(head)
        # 3.0 exists for field names that are not Latin-1: no array of numbers has it.
        parse = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = parse(head)
        if any(length < 0 for length in shape):
            raise ValueError(f"shape {shape}")
    # numpy parses the header as Python source: whatever that can raise says the same here.
    except Exception as error:
        raise damaged(f"not a npy file, or damaged: {type(error).__name__}: {error}") from error
    name = _npy_dtype(dtype)
    expected = math.prod(shape) * dtype.itemsize
    if expected != size_bytes - head.tell() and not dtype.hasobject:  # objects are pickled, and never read
        raise damaged(f"npy: {dtype} of shape {list(shape)} takes {expected} bytes, there are {size_bytes - head.tell()}")
    return NpyHeader(TensorSpec(tuple(shape), name), dtype, is_fortran, head.tell())


def _npy_dtype(dtype: np.dtype[Any]) -> str:
    if dtype == np.dtype("V2"):  # how numpy writes the bfloat16 of ml_dtypes, which JAX uses
        return "bfloat16"
    return f"float{8 * dtype.itemsize}" if dtype.kind == "f" else str(dtype)
