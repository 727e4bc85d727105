"""Tensors of latent files: safetensors, npy, npz and pt. Nothing in a file is ever run.

Whatever is wrong with a file is a ``TerminalError``, and no file makes this program take more memory than a
few times the file's own size.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors.torch
import torch

from pipeline.errors import TerminalError
from pipeline.latents.headers import FLOATS, NpyHeader, TensorSpec, damaged, read_npy_header, read_safetensors_header

TENSOR_SUFFIXES = (".safetensors", ".npy", ".npz", ".pt")
SUFFIXES = (*TENSOR_SUFFIXES, ".parquet")
MAX_BYTES = 4 << 30

_TORCH_DTYPES = {name: getattr(torch, name) for name in FLOATS}


class Described(Protocol):
    """A tensor, or the ``TensorSpec`` of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


D = TypeVar("D", bound=Described)


def parse_tensors(data: bytes, suffix: str, max_bytes: int = MAX_BYTES) -> dict[str, torch.Tensor]:
    """The float tensors of a file by name; float64 becomes float32, others are left out.

    Args:
        suffix: one of ``TENSOR_SUFFIXES``. An npy file's tensor has the name ``""``; one in a dict in a dict of a
            pt file is called ``outer.inner``.
        max_bytes: that the tensors may take when unpacked.

    Raises:
        TerminalError: the file is damaged, too large, of another kind, or holds no floats.
    """
    suffix = suffix.lower()
    if suffix == ".safetensors":
        tensors = _parse_safetensors(data)
    elif suffix == ".npy":
        tensors = {"": _npy_tensor(data, _npy_header(data))}
    elif suffix == ".npz":
        tensors = _parse_npz(data, max_bytes)
    elif suffix == ".pt":
        tensors = _parse_pt(data)
    else:
        raise TerminalError("read", "unknown_format", f"{suffix!r} is no file of tensors; use {', '.join(TENSOR_SUFFIXES)}")
    floats = {name: tensor for name, tensor in tensors.items() if _dtype_name(tensor) in FLOATS}
    if tensors and not floats:
        raise _wrong_dtype(tensors)
    return {name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in floats.items()}


def choose_tensor(tensors: Mapping[str, D], key: str | None = None) -> str:
    """The name of the latent: the stated one, else the only one, else the only one with 4 or 5 dimensions.

    Raises:
        TerminalError: there is none, or one cannot tell which; the detail names those there are.
    """
    there = ", ".join(f"{name!r} ({_describe(tensor)})" for name, tensor in list(tensors.items())[:20]) or "none"
    candidates = dict(tensors)
    if key is not None and list(tensors) != [""]:  # where a format has no names, none is asked for
        if key not in tensors:
            raise TerminalError("read", "no_tensor", f"there is no tensor {key!r}, which input.key names; there are: {there}")
        candidates = {key: tensors[key]}
    floats = [name for name, tensor in candidates.items() if _dtype_name(tensor) in FLOATS]
    if candidates and not floats:
        raise _wrong_dtype(candidates)
    if len(floats) > 1:
        floats = [name for name in floats if len(tensors[name].shape) in (4, 5)]
    if len(floats) != 1:
        reason = "key_ambiguous" if tensors else "no_tensor"
        raise TerminalError("read", reason, f"which tensor is the latent? Say in input.key; there are: {there}")
    return floats[0]


def load_tensor(data: bytes, suffix: str, key: str | None = None, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """The latent of a file. Raises: TerminalError: as ``parse_tensors`` and ``choose_tensor``."""
    tensors = parse_tensors(data, suffix, max_bytes)
    return tensors[choose_tensor(tensors, key)]


def describe_tensors(data: bytes, suffix: str, max_bytes: int = MAX_BYTES) -> dict[str, TensorSpec]:
    """Shape and dtype of each tensor of a whole file. Raises: TerminalError: as ``parse_tensors``."""
    if suffix == ".npz":
        return {name: header.spec for name, _, header in _npz_members(data, max_bytes)}
    if suffix == ".pt":
        return {name: TensorSpec(tuple(tensor.shape), _dtype_name(tensor)) for name, tensor in _parse_pt(data).items()}
    raise ValueError(f"{suffix}: its header is read on its own")


def decode_values(data: bytes | memoryview, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor of little-endian bytes in C order; a copy. Raises: TerminalError: their number does not fit."""
    if dtype not in FLOATS:
        raise TerminalError("read", "dtype", f"dtype {dtype!r}; latents are {', '.join(FLOATS)}")
    expected = math.prod(shape) * FLOATS[dtype]
    if len(data) != expected:
        raise damaged(f"{dtype} of shape {list(shape)} takes {expected} bytes, there are {len(data)}")
    flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    tensor = flat.view(_TORCH_DTYPES[dtype]).view(shape)
    return tensor.float() if dtype == "float64" else tensor


def _parse_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    read_safetensors_header(lambda start, length: data[start : start + length], len(data))
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, and whatever an unknown dtype or a shape that overflows raises
        raise damaged(f"not a safetensors file, or damaged: {error}") from error


def _npy_header(data: bytes) -> NpyHeader:
    return read_npy_header(lambda start, length: data[start : start + length], len(data))


def _npy_tensor(data: bytes, header: NpyHeader) -> torch.Tensor:
    if header.spec.dtype not in FLOATS:
        raise _wrong_dtype({"": header.spec})
    stored = np.dtype(np.uint16) if header.spec.dtype == "bfloat16" else header.dtype
    values = np.frombuffer(data, stored, offset=header.data_start)
    values = values.reshape(header.spec.shape, order="F" if header.is_fortran else "C")
    tensor = torch.from_numpy(values.astype(stored.newbyteorder("="), order="C", copy=True))
    return tensor.view(torch.bfloat16) if header.spec.dtype == "bfloat16" else tensor


def _parse_npz(data: bytes, max_bytes: int) -> dict[str, torch.Tensor]:
    members = list(_npz_members(data, max_bytes))
    floats = {name: _npy_tensor(member, header) for name, member, header in members if header.spec.dtype in FLOATS}
    if members and not floats:
        raise _wrong_dtype({name: header.spec for name, _, header in members})
    return floats


def _npz_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes, NpyHeader]]:
    """Name, bytes and header of each array. A member says how large it is unpacked, and is never read further."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            total = sum(member.file_size for member in members)
            if total > max_bytes:
                raise TerminalError("read", "too_large", f"npz: {total} bytes unpacked; input.max_file_bytes allows {max_bytes}")
            for member in members:
                content = archive.read(member)
                yield member.filename.removesuffix(".npy"), content, _npy_header(content)
    except TerminalError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError of a password, …
        raise damaged(f"not a npz file, or damaged: {type(error).__name__}: {error}") from error


def _parse_pt(data: bytes) -> dict[str, torch.Tensor]:
    """Raises: TerminalError: not only tensors, or their shapes claim more than is stored."""
    stored_bytes = _check_pt_archive(data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text recommends to load it without that check
        raise TerminalError(
            "read",
            "not_tensors",
            "holds other objects than tensors, which may run code when loaded; store plain tensors",
        ) from error
    except Exception as error:  # torch names no common class for what a damaged or hostile file raises
        raise TerminalError(
            "read",
            "damaged",
            f"torch.load cannot read it: {type(error).__name__}: {str(error)[:100]}; store plain tensors",
        ) from error
    tensors = {name: tensor.detach() for name, tensor in _flatten(content)}
    for name, tensor in tensors.items():
        _check_storage(name, tensor, stored_bytes)
    return tensors


def _check_pt_archive(data: bytes) -> set[int]:
    """Sizes of the records of a file that ``torch.save`` may have written: a zip in which nothing is packed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
    except Exception as error:  # as for npz
        raise damaged(f"not a file that torch.save of torch 1.6 or later writes: {type(error).__name__}: {error}") from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or sum(r.file_size for r in records) > len(data):
        raise damaged("pt: packed records, which torch.save does not write")
    return {record.file_size for record in records}


def _check_storage(name: str, tensor: torch.Tensor, stored_bytes: set[int]) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise TerminalError("read", "dtype", f"pt: {name!r} is no dense tensor; store dense float tensors")
    held = tensor.untyped_storage().nbytes()
    # The first: some versions of torch believe what the pickle says of a record's size.
    if (held and held not in stored_bytes) or tensor.numel() * tensor.element_size() > held:
        raise damaged(f"pt: {name!r} of shape {list(tensor.shape)} claims more than the {held} bytes that are stored for it")


def _flatten(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a tensor, a dict, or a dict of dicts; what else it holds is passed over."""
    if isinstance(content, torch.Tensor):
        yield "", content
    elif isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, torch.Tensor):
                yield str(name), value
            elif isinstance(value, dict):
                yield from ((f"{name}.{inner}", leaf) for inner, leaf in value.items() if isinstance(leaf, torch.Tensor))


def _dtype_name(tensor: Described) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: Described) -> str:
    return f"{_dtype_name(tensor)} {'x'.join(map(str, tensor.shape))}"


def _wrong_dtype(tensors: Mapping[str, Described]) -> TerminalError:
    found = ", ".join(sorted({_dtype_name(tensor) for tensor in tensors.values()}))
    return TerminalError("read", "dtype", f"dtype {found}; latents are {', '.join(FLOATS)}")
