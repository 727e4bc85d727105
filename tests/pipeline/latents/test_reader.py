"""From a URI to tensors: the same latent in whatever form reads the same, and what is not it is told apart."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import LatentDataset
from pipeline.errors import TerminalError, TransientError
from pipeline.latents import LatentReader
from pipeline.storage import Storage
from pipeline.types import Rejection
from tests.pipeline.dataset.builders import make_dataset
from tests.pipeline.fakes import Fault, FlakyFileSystem
from tests.pipeline.latents.builders import (
    FORMATS,
    LAYOUTS,
    configure,
    file_bytes,
    lay_out,
    make_latent,
    plan,
    plan_all,
    read_all,
    rejections,
    to_bytes,
    triplet,
    write_rows,
)


def reason_of(call: Any) -> str:
    with pytest.raises(TerminalError) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_one_latent_reads_the_same_from_every_form(tmp_path: Path, suffix: str, layout: str, dtype: torch.dtype) -> None:
    latent = make_latent(dtype=dtype)
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(file_bytes(lay_out(latent, layout), suffix))
    (planned,) = plan_all(configure(path))
    assert (planned.layout, planned.shape, planned.name) == (layout, (16, 5, 4, 6), "clip")
    assert (planned.bucket_key, planned.num_frames) == ("16x5x4x6", 17)
    found = LatentReader().read(planned)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, latent)


@pytest.mark.parametrize("layout", ["BCFHW", "BFCHW"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_members_of_a_batch_are_clips_of_their_own(tmp_path: Path, suffix: str, layout: str) -> None:
    latents = [make_latent(seed) for seed in range(3)]
    batch = torch.cat([lay_out(latent, layout) for latent in latents])
    (tmp_path / f"run{suffix}").write_bytes(file_bytes(batch, suffix))
    config = configure(tmp_path)
    assert [item.name for item in plan_all(config)] == ["run-0", "run-1", "run-2"]
    assert all(torch.equal(found, latent) for found, latent in zip(read_all(config), latents, strict=True))


def test_layout_that_could_be_two_is_a_rejection_until_it_is_stated(tmp_path: Path) -> None:
    latent = make_latent(shape=(16, 16, 4, 6))
    (tmp_path / "a.npy").write_bytes(file_bytes(lay_out(latent, "FCHW"), ".npy"))
    (rejection,) = rejections(configure(tmp_path))
    assert (rejection.status, rejection.stage, rejection.reason) == ("quarantined", "read", "layout_ambiguous")
    assert rejection.detail.startswith(f"{tmp_path}/a.npy: shape 16x16x4x6 could be")
    (found,) = read_all(configure(tmp_path, layout="FCHW"))
    assert torch.equal(found, latent)


@pytest.mark.parametrize(("scale", "divisor"), [("cogvideox-5b", 0.7), ("cogvideox-2b", 1.15258426), (0.5, 0.5)])
def test_scale_is_undone_in_float32(tmp_path: Path, scale: Any, divisor: float) -> None:
    latent = make_latent(dtype=torch.bfloat16)
    (tmp_path / "a.pt").write_bytes(file_bytes(latent, ".pt"))
    (found,) = read_all(configure(tmp_path, scale=scale))
    assert found.dtype == torch.float32
    assert torch.equal(found, latent.float() / divisor)


def test_front_pad_of_a_1_5_model_is_dropped(tmp_path: Path) -> None:
    latent = make_latent(shape=(16, 6, 4, 6))
    (tmp_path / "a.pt").write_bytes(file_bytes(lay_out(latent, "BFCHW"), ".pt"))
    config = configure(tmp_path, scale="zai-org/CogVideoX1.5-5B")
    (planned,) = plan_all(config)
    assert (planned.shape, planned.drop_frames, planned.num_frames) == ((16, 5, 4, 6), 1, 17)
    assert torch.equal(LatentReader().read(planned), latent[:, 1:] / 0.7)
    (whole,) = plan_all(configure(tmp_path, scale="cogvideox-5b"))
    assert (whole.shape, whole.num_frames) == ((16, 6, 4, 6), 24)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_our_shards_read_as_the_dataset_reads_them(tmp_path: Path, compression: str) -> None:
    (tmp_path / "spool").mkdir()
    make_dataset(Storage(str(tmp_path / "dataset")), tmp_path / "spool", compression=compression)
    expected = LatentDataset(str(tmp_path / "dataset"))
    config = configure(tmp_path / "dataset", scale=None)
    planned = plan_all(config)
    assert [item.columns["sample_id"] for item in planned] == expected.sample_ids
    for item, found, sample in zip(planned, read_all(config), expected, strict=True):
        assert (item.multiplier, item.fps, item.bucket_key) == (None, 8.0, "16x13x8x12")
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, sample["latent"])


def test_first_frames_of_our_dataset_are_read_by_key(dataset: Storage) -> None:
    found = read_all(configure(dataset.uri, scale=None, key="first_frame_latent"))
    expected = LatentDataset(dataset.uri, columns=["first_frame_latent"])
    assert all(torch.equal(one, sample["first_frame_latent"]) for one, sample in zip(found, expected, strict=True))
    assert {tuple(latent.shape) for latent in found} == {(16, 1, 8, 12)}


@pytest.mark.parametrize(
    "settings", [{"compression": "snappy"}, {"compression": "none", "use_dictionary": False}, {"row_group_size": 2}]
)
@pytest.mark.parametrize("name", ["vae_latent", "latents"])
def test_rows_of_another_programs_parquet_are_read(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    latents = [make_latent(seed) for seed in range(5)]
    rows = [{**triplet(latent, name), f"{name}_dtype": "torch.float32", "caption": f"no {n}"} for n, latent in enumerate(latents)]
    config = configure(write_rows(tmp_path / "part.parquet", rows, **settings))
    planned = plan_all(config)
    assert [item.name for item in planned] == [f"part-{row}" for row in range(5)]
    assert [item.columns for item in planned] == [{"caption": f"no {row}"} for row in range(5)]
    assert all(torch.equal(found, latent) for found, latent in zip(read_all(config), latents, strict=True))


def test_parquet_written_with_one_row_a_page_is_read_by_offset(tmp_path: Path) -> None:
    latents = [make_latent(seed) for seed in range(3)]
    schema = pa.schema(
        [
            ("vae_latent_shape", pa.list_(pa.int64())),
            ("vae_latent_dtype", pa.string()),
            pa.field("vae_latent_bytes", pa.large_binary(), nullable=False),
        ]
    )
    table = pa.Table.from_pylist([triplet(latent) for latent in latents], schema=schema)
    settings: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_batch_size": 1, "data_page_size": 1}
    pq.write_table(table, tmp_path / "a.parquet", write_page_index=True, **settings)
    assert all(torch.equal(found, latent) for found, latent in zip(read_all(configure(tmp_path)), latents, strict=True))


def test_row_that_is_wrong_is_rejected_and_its_neighbours_are_not(tmp_path: Path) -> None:
    good = triplet(make_latent())
    bad_shape = {**good, "vae_latent_shape": [16, 16, 4, 6]}
    no_shape = {**good, "vae_latent_shape": None}
    integers = {**good, "vae_latent_dtype": "int8"}
    config = configure(write_rows(tmp_path / "a.parquet", [good, bad_shape, no_shape, integers, good]))
    found = rejections(config)
    assert [(item.reason, item.status) for item in found] == [
        ("layout_ambiguous", "quarantined"), ("no_tensor", "quarantined"), ("dtype", "quarantined"),
    ]  # fmt: skip
    assert [item.detail.partition(" row ")[2][0] for item in found] == ["1", "2", "3"]
    assert len({item.sample_id for item in found}) == 3


def test_damage_of_a_row_is_found_when_it_is_read(tmp_path: Path) -> None:
    latent = make_latent()
    short = {**triplet(latent), "vae_latent_bytes": b"1234"}
    nothing = {**triplet(latent), "vae_latent_bytes": None}
    wrong = {**triplet(latent), "vae_latent_xxh3": "0" * 32}
    planned = plan_all(
        configure(write_rows(tmp_path / "a.parquet", [{**triplet(latent), "vae_latent_xxh3": None}, short, nothing, wrong]))
    )
    reader = LatentReader()
    assert torch.equal(reader.read(planned[0]), latent)
    assert reason_of(lambda: reader.read(planned[1])) == "damaged"
    assert reason_of(lambda: reader.read(planned[2])) == "no_tensor"
    with pytest.raises(TerminalError, match=r"a\.parquet: row 3: vae_latent_bytes has xxh3 [0-9a-f]{32}, expected 0{32}"):
        reader.read(planned[3])


@given(st.sampled_from(["snappy", "none"]), st.data())
def test_parquet_with_bytes_changed_is_read_or_told(
    tmp_path_factory: pytest.TempPathFactory, compression: str, draw: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.parquet"
    row = {**triplet(make_latent(shape=(16, 1, 2, 2))), "caption": "x"}
    write_rows(path, [row] * 3, compression=compression, use_dictionary=False)
    data = bytearray(path.read_bytes())
    for _ in range(draw.draw(st.integers(1, 4))):
        # The footer is what most damage is about.
        data[draw.draw(st.one_of(st.integers(-1400, -1), st.integers(0, len(data) - 1)))] = draw.draw(st.integers(0, 255))
    path.write_bytes(data)
    reader = LatentReader()
    for planned in plan(configure(path, format="files")):
        if isinstance(planned, Rejection):
            assert planned.reason != "unexpected"
        else:
            with contextlib.suppress(TerminalError):
                reader.read(planned)


def test_shard_whose_tensor_was_changed_is_damaged(dataset: Storage) -> None:
    config = configure(dataset.uri, scale=None)
    planned = plan_all(config)[0]
    path = Path(planned.uri)
    data, latent = path.read_bytes(), to_bytes(LatentReader().read(planned))
    path.write_bytes(data.replace(latent[:64], bytes(64)))
    now = plan_all(config)[0]
    assert now.sample_id != planned.sample_id
    assert reason_of(lambda: LatentReader().read(now)) == "damaged"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latent_that_is_not_finite_is_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    latent = make_latent(dtype=dtype)
    latent[3, 2, 1, 0] = value
    (tmp_path / "a.npy").write_bytes(file_bytes(latent, ".npy"))
    (planned,) = plan_all(configure(tmp_path))
    with pytest.raises(TerminalError, match=r"a\.npy: the latent has NaN or infinite values"):
        LatentReader().read(planned)


@pytest.mark.parametrize("suffix", FORMATS)
def test_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(file_bytes(make_latent(), suffix))
    (planned,) = plan_all(configure(tmp_path))
    path.write_bytes(file_bytes(make_latent(1, (16, 5, 4, 8)), suffix))
    with pytest.raises(TerminalError, match="changed since it was planned") as caught:
        LatentReader().read(planned)
    assert (caught.value.stage, caught.value.reason) == ("fetch", "changed")
    path.unlink()
    assert reason_of(lambda: LatentReader().read(planned)) == "not_found"


def test_file_that_is_not_what_its_plan_says_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(file_bytes(make_latent(), ".pt"))
    (planned,) = plan_all(configure(tmp_path))
    assert reason_of(lambda: LatentReader().read(replace(planned, shape=(16, 4, 4, 6)))) == "damaged"
    assert reason_of(lambda: LatentReader().read(replace(planned, key="other"))) == "damaged"


def test_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(file_bytes(make_latent(), ".npy"))
    (planned,) = plan_all(configure(tmp_path))
    assert reason_of(lambda: LatentReader(max_file_bytes=1000).read(planned)) == "too_large"
    (tmp_path / "a.npy").rename(tmp_path / "a.txt")
    (tmp_path / "b.pt").write_bytes(file_bytes(make_latent(), ".pt"))
    (rejection,) = rejections(configure(tmp_path, max_file_bytes=1000))
    assert rejection.reason == "too_large"
    (planned,) = plan_all(configure(write_rows(tmp_path / "c.parquet", [triplet(make_latent())])))
    with pytest.raises(TerminalError, match=r"row 0: vae_latent_bytes has 7\d\d\d bytes in its row group"):
        LatentReader(max_file_bytes=1000).read(planned)


def test_what_a_caller_does_to_a_latent_is_not_seen_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(file_bytes(make_latent(), ".pt"))
    (planned,) = plan_all(configure(tmp_path))
    reader = LatentReader()
    reader.read(planned).zero_()
    assert torch.equal(reader.read(planned), make_latent())


def fill(flaky: type[FlakyFileSystem], name: str, data: bytes) -> None:
    Storage("flaky://bucket").put(name, data)
    flaky.calls.clear()


def test_clips_of_one_remote_file_cost_one_read(flaky: type[FlakyFileSystem]) -> None:
    batch = torch.stack([make_latent(seed) for seed in range(4)])
    fill(flaky, "a.safetensors", safetensors.torch.save({"latents": batch}))
    planned = plan_all(configure("flaky://bucket"))
    assert flaky.calls.count("cat_file") == 1  # its header
    flaky.calls.clear()
    reader = LatentReader()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.read, planned))
    assert flaky.calls.count("cat_file") == 1
    assert torch.equal(torch.stack(found), batch)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_probing_a_remote_file_reads_its_header_only(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    latent = make_latent(shape=(16, 13, 30, 45))
    if suffix == ".parquet":
        write = pa.BufferOutputStream()
        rows = [triplet(latent)] * 4
        pq.write_table(pa.Table.from_pylist(rows), write, row_group_size=1, use_dictionary=False, compression="none")
        data = write.getvalue().to_pybytes()
    else:
        data = file_bytes(latent, suffix)
    fill(flaky, f"a{suffix}", data)
    sizes: list[int] = []
    read = FlakyFileSystem.cat_file

    def counted(self: FlakyFileSystem, path: str, start: int | None = None, end: int | None = None, **rest: Any) -> bytes:
        sizes.append((len(data) if end is None else end) - (start or 0))
        return read(self, path, start=start, end=end, **rest)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", counted)
    assert plan_all(configure("flaky://bucket"))
    assert sum(sizes) < 600_000 < len(data)
    assert len(sizes) <= (8 if suffix == ".parquet" else 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_store_that_fails_now_and_then_is_asked_again(flaky: type[FlakyFileSystem], suffix: str) -> None:
    fill(flaky, f"a{suffix}", file_bytes(make_latent(), suffix))
    flaky.faults[:] = [Fault("cat_file", OSError("reset")), Fault("cat_file", cut_bytes=3), Fault("cat_file", OSError("reset"))]
    (planned,) = plan_all(configure("flaky://bucket"))
    flaky.faults[:] = [Fault("info", OSError("reset")), Fault("cat_file", OSError("reset")), Fault("cat_file", cut_bytes=1)]
    assert torch.equal(LatentReader().read(planned), make_latent())
    assert not flaky.faults


@pytest.mark.parametrize("suffix", FORMATS)
def test_store_that_does_not_answer_is_no_fault_of_the_latent(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("pipeline.probing._PAUSE_S", 0.0)
    fill(flaky, f"a{suffix}", file_bytes(make_latent(), suffix))
    (planned,) = plan_all(configure("flaky://bucket"))
    reader = LatentReader()
    flaky.faults[:] = [Fault("cat_file", OSError("down"))] * 8
    with pytest.raises(TransientError, match="down"):
        reader.read(planned)
    assert torch.equal(reader.read(planned), make_latent())
    flaky.faults[:] = [Fault("cat_file", OSError("down"))] * 100
    with pytest.raises(TransientError, match="down"):
        plan_all(configure("flaky://bucket", format="files"))


def test_damage_is_told_once_and_read_once(flaky: type[FlakyFileSystem]) -> None:
    batch = torch.stack([make_latent(seed) for seed in range(3)])
    fill(flaky, "a.npz", file_bytes(batch, ".npz"))
    planned = plan_all(configure("flaky://bucket"))
    flaky.calls.clear()
    reader = LatentReader(max_file_bytes=1)
    assert [reason_of(lambda item=item: reader.read(item)) for item in planned] == ["too_large"] * 3
    assert flaky.calls == ["info"]


def test_threads_share_a_reader(tmp_path: Path) -> None:
    batches = {}
    for number in range(4):
        batches[number] = torch.stack([make_latent(10 * number + member) for member in range(4)])
        (tmp_path / f"{number}.npy").write_bytes(file_bytes(batches[number], ".npy"))
    planned = plan_all(configure(tmp_path))
    reader, barrier = LatentReader(), threading.Barrier(8)

    def read(start: int) -> list[tuple[int, torch.Tensor]]:
        barrier.wait()
        return [(step % 16, reader.read(planned[step % 16])) for step in range(start, start + 16)]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read, range(0, 16, 2)):
            assert all(torch.equal(latent, batches[number // 4][number % 4]) for number, latent in found)


@pytest.mark.parametrize("shape", [[16, 10**6, 10**6, 10**6], [10**9, 16, 3, 2, 2], [16, 5, 4, 6, 2**60]])
def test_row_that_declares_more_than_the_file_holds_is_rejected_and_costs_nothing(tmp_path: Path, shape: list[int]) -> None:
    lying = {**triplet(make_latent()), "vae_latent_shape": shape}
    (found,) = rejections(configure(write_rows(tmp_path / "a.parquet", [lying]), layout="BCFHW" if len(shape) == 5 else "CFHW"))
    assert found.reason in ("damaged", "layout_unknown")
