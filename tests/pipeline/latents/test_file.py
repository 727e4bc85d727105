"""Files of tensors: what they say, what is wrong with them, and what they must not make this program do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TerminalError
from pipeline.latents import choose_tensor, load_tensor, parse_tensors
from pipeline.latents.file import TENSOR_SUFFIXES, describe_tensors
from pipeline.latents.headers import TensorSpec, read_npy_header, read_safetensors_header
from tests.pipeline.latents.builders import file_bytes, make_latent

LATENT = make_latent(shape=(16, 2, 2, 3))


def saved(content: Any, **settings: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink, **settings)
    return sink.getvalue()


def reason_of(data: bytes, suffix: str) -> str:
    with pytest.raises(TerminalError) as caught:
        parse_tensors(data, suffix)
    assert caught.value.stage == "read"
    return caught.value.reason


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_come_back_bit_for_bit(suffix: str, dtype: torch.dtype) -> None:
    latent = LATENT.to(dtype)
    (found,) = parse_tensors(file_bytes(latent, suffix), suffix).values()
    assert found.dtype == dtype
    assert torch.equal(found, latent)


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
def test_float64_becomes_float32(suffix: str) -> None:
    (found,) = parse_tensors(file_bytes(LATENT.double(), suffix), suffix).values()
    assert found.dtype == torch.float32
    assert torch.equal(found, LATENT)


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_other_dtypes_are_refused_by_name(suffix: str, dtype: torch.dtype) -> None:
    assert reason_of(file_bytes((LATENT * 9).to(dtype), suffix), suffix) == "dtype"


@pytest.mark.parametrize("order", ["F", "C"])
@pytest.mark.parametrize("descr", [">f4", "<f4", ">f2", ">f8"])
def test_npy_of_any_byte_order_and_memory_order_is_read(order: Any, descr: str) -> None:
    sink = io.BytesIO()
    np.save(sink, np.array(LATENT.numpy(), dtype=descr, order=order))
    (found,) = parse_tensors(sink.getvalue(), ".npy").values()
    assert torch.equal(found.float(), LATENT.to(found.dtype).float())
    assert found.is_contiguous()


def test_names_of_nested_dicts_are_joined() -> None:
    data = saved({"latents": LATENT, "more": {"sigma": LATENT + 1, "deep": {"er": LATENT}}, "fps": 8, "prompt": "a dog"})
    found = parse_tensors(data, ".pt")
    assert list(found) == ["latents", "more.sigma"]
    assert torch.equal(found["more.sigma"], LATENT + 1)


def test_parameter_and_slice_of_a_larger_tensor_are_tensors() -> None:
    batch = torch.stack([LATENT, LATENT + 1])
    found = parse_tensors(saved({"a": torch.nn.Parameter(LATENT), "b": batch[1]}), ".pt")
    assert torch.equal(found["a"], LATENT)
    assert not found["a"].requires_grad
    assert torch.equal(found["b"], LATENT + 1)


def test_npz_and_safetensors_pass_over_what_is_no_float() -> None:
    sink = io.BytesIO()
    np.savez(sink, latent=LATENT.numpy(), step=np.int64(3), prompt=np.array(["a dog", None], dtype=object))
    assert list(parse_tensors(sink.getvalue(), ".npz")) == ["latent"]
    data = safetensors.torch.save({"latent": LATENT, "step": torch.tensor(3)}, metadata={"prompt": "a dog"})
    assert list(parse_tensors(data, ".safetensors")) == ["latent"]


class Attack:
    """Runs a command where pickle is trusted."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz"])
def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "ran"
    sink = io.BytesIO()
    if suffix == ".pt":
        torch.save({"latent": LATENT, "x": Attack(mark)}, sink)
    elif suffix == ".npy":
        np.save(sink, np.array([Attack(mark)], dtype=object))
    else:
        np.savez(sink, x=np.array([Attack(mark)], dtype=object))
    assert reason_of(sink.getvalue(), suffix) in ("not_tensors", "damaged", "dtype")
    assert not mark.exists()


def test_pt_that_is_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    assert reason_of(pickle.dumps(Attack(mark)), ".pt") == "damaged"
    assert reason_of(saved(LATENT, _use_new_zipfile_serialization=False), ".pt") == "damaged"
    assert not mark.exists()


def repacked(data: bytes, compression: int = zipfile.ZIP_STORED, *, pickled: tuple[bytes, bytes] | None = None) -> bytes:
    """A torch archive with other compression, or with bytes of its pickle replaced."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(sink, "w", compression) as target:
        for name in source.namelist():
            content = source.read(name)
            if pickled and name.endswith("data.pkl"):
                assert pickled[0] in content
                content = content.replace(*pickled)
            target.writestr(name, content)
    return sink.getvalue()


def test_pt_that_would_unpack_to_more_than_its_size_is_refused() -> None:
    data = saved(torch.zeros(1 << 20))
    packed = repacked(data, zipfile.ZIP_DEFLATED)
    assert len(packed) < len(data) // 100
    assert reason_of(packed, ".pt") == "damaged"


def test_pt_whose_shape_claims_more_than_is_stored_is_refused() -> None:
    assert reason_of(saved(torch.zeros(1).expand(16, 1000, 1000, 1000)), ".pt") == "damaged"
    # Of eight values stored, the pickle claims 16384.
    assert reason_of(repacked(saved(torch.arange(8.0)), pickled=(b"K\x08tq", b"M\x00\x40tq")), ".pt") == "damaged"


@pytest.mark.parametrize("content", [torch.eye(16).to_sparse(), torch.zeros(16, 2, device="meta")])
def test_pt_of_another_kind_of_tensor_is_refused(content: torch.Tensor) -> None:
    assert reason_of(saved({"latent": content}), ".pt") in ("dtype", "damaged")


def test_npz_may_not_unpack_to_more_than_the_limit() -> None:
    sink = io.BytesIO()
    np.savez_compressed(sink, latent=np.zeros((16, 1024, 64), np.float32))
    assert len(sink.getvalue()) < 20_000
    with pytest.raises(TerminalError, match=r"4194\d+ bytes unpacked; input\.max_file_bytes allows 1000000"):
        parse_tensors(sink.getvalue(), ".npz", 1_000_000)
    with pytest.raises(TerminalError, match="unpacked"):
        describe_tensors(sink.getvalue(), ".npz", 1_000_000)


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
def test_file_cut_anywhere_is_damaged(suffix: str) -> None:
    data = file_bytes(LATENT, suffix)
    for length in {*range(0, 130), *range(0, len(data), 97), len(data) - 1}:
        assert reason_of(data[:length], suffix) == "damaged", length


def test_file_of_another_kind_is_damaged() -> None:
    for suffix in TENSOR_SUFFIXES:
        for data in (b"", b"\0" * 100, b"<html>not found</html>" * 10, b"\xff" * 100):
            assert reason_of(data, suffix) == "damaged"
    assert reason_of(b"x", ".mp4") == "unknown_format"


def test_what_a_header_claims_is_not_allocated() -> None:
    """Ten terabytes are claimed; a few kilobytes may be taken to see that they are not there."""
    claims = {"latent": {"dtype": "F32", "shape": [16, 10**6, 400, 400], "data_offsets": [0, 10240 * 10**9]}}
    header = json.dumps(claims).encode()
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<f4", "fortran_order": False, "shape": (16, 10**6, 400, 400)})
    files = {
        ".safetensors": len(header).to_bytes(8, "little") + header + bytes(100),
        ".npy": sink.getvalue() + bytes(100),
    }
    for suffix, data in files.items():
        tracemalloc.start()
        assert reason_of(data, suffix) == "damaged"
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def test_large_safetensors_header_is_refused_before_it_is_read() -> None:
    asked: list[int] = []

    def read(start: int, length: int) -> bytes:
        asked.append(length)
        return (1 << 30).to_bytes(8, "little").ljust(length, b" ")

    with pytest.raises(TerminalError, match="header of 1073741824 bytes"):
        read_safetensors_header(read, 1 << 40)
    assert sum(asked) <= 1 << 16


HEADER_TYPES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["F16", "BF16", "F32"])),
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(st.text(max_size=8), children, max_size=4)),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": HEADER_TYPES,
        "shape": st.one_of(HEADER_TYPES, st.lists(st.integers(-1, 1 << 70), max_size=5)),
        "data_offsets": st.one_of(HEADER_TYPES, st.lists(st.integers(-9, 1 << 70), min_size=1, max_size=3)),
    },
)


@given(st.one_of(HEADER_TYPES, st.dictionaries(st.text(max_size=8), ENTRY, max_size=3)), st.integers(0, 200), st.integers(-3, 3))
def test_any_safetensors_header_is_read_or_damaged(header: Any, data_bytes: int, lie: int) -> None:
    text = json.dumps(header).encode()
    data = max(0, len(text) + lie).to_bytes(8, "little") + text + bytes(data_bytes)
    parse_or_refuse(data, ".safetensors")


@given(
    st.one_of(
        st.text(max_size=60),
        st.fixed_dictionaries(
            {
                "descr": st.one_of(
                    st.sampled_from(["<f4", ">f2", "|V2", "|O", "<f16", "<c8", [("a", "<f4")]]), st.text(max_size=6)
                ),
                "fortran_order": st.one_of(st.booleans(), st.integers()),
                "shape": st.one_of(st.tuples(st.integers(-2, 1 << 70), st.integers(0, 9)), st.integers()),
            }
        ).map(repr),
    ),
    st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]),
    st.integers(0, 100),
    st.integers(-3, 3),
)
def test_any_npy_header_is_read_or_damaged(header: str, version: bytes, data_bytes: int, lie: int) -> None:
    text = header.encode("utf-8", "replace")
    length = max(0, len(text) + lie).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    parse_or_refuse(b"\x93NUMPY" + version + length + text + bytes(data_bytes), ".npy")


@given(st.sampled_from(TENSOR_SUFFIXES), st.data())
def test_file_with_bytes_changed_is_read_or_damaged(suffix: str, draw: st.DataObject) -> None:
    data = bytearray(file_bytes(LATENT[:, :1].contiguous(), suffix))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[
            draw.draw(st.integers(0, min(len(data), 600) - 1) if draw.draw(st.booleans()) else st.integers(0, len(data) - 1))
        ] = draw.draw(st.integers(0, 255))
    parse_or_refuse(bytes(data[: draw.draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]), suffix)


def parse_or_refuse(data: bytes, suffix: str) -> None:
    """Parsing gives tensors no larger than the file's content, or a ``TerminalError``; so does probing."""
    with contextlib.suppress(TerminalError):
        tensors = parse_tensors(data, suffix)
        limit = len(data) if suffix != ".npz" else 100_000
        assert all(tensor.numel() * tensor.element_size() <= limit for tensor in tensors.values())
    with_header = {".safetensors": read_safetensors_header, ".npy": read_npy_header}.get(suffix)
    if with_header is not None:
        with contextlib.suppress(TerminalError):
            with_header(lambda start, length: data[start : start + length], len(data))


SPECS = {
    "latents": TensorSpec((1, 16, 5, 4, 6), "bfloat16"),
    "prompt": TensorSpec((226, 4096), "bfloat16"),
    "step": TensorSpec((), "I64"),
}


def test_latent_is_the_stated_tensor_or_the_only_one_of_its_kind() -> None:
    assert choose_tensor(SPECS) == "latents"
    assert choose_tensor(SPECS, "prompt") == "prompt"
    assert choose_tensor({"x": SPECS["prompt"]}) == "x"
    assert choose_tensor({"x": SPECS["latents"], "step": SPECS["step"]}) == "x"
    assert choose_tensor({"": SPECS["latents"]}, "latents") == ""  # npy has no names to choose by


def test_latent_that_could_be_several_is_asked_for() -> None:
    specs = {**SPECS, "noise": SPECS["latents"]}
    with pytest.raises(TerminalError, match=r"input\.key; there are: 'latents' \(bfloat16 1x16x5x4x6\), 'prompt'") as caught:
        choose_tensor(specs)
    assert caught.value.reason == "key_ambiguous"
    assert choose_tensor(specs, "noise") == "noise"
    with pytest.raises(TerminalError, match=r"no tensor 'other', which input\.key names"):
        choose_tensor(specs, "other")
    with pytest.raises(TerminalError, match="dtype I64"):
        choose_tensor(specs, "step")
    with pytest.raises(TerminalError, match="there are: none"):
        choose_tensor({})


def test_loading_chooses_and_parses() -> None:
    data = safetensors.torch.save({"latent": LATENT, "pooled": torch.zeros(3)})
    assert torch.equal(load_tensor(data, ".safetensors"), LATENT)
    assert load_tensor(data, ".safetensors", "pooled").shape == (3,)
