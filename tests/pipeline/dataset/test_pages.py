from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset import ShardWriter
from pipeline.dataset.pages import locate_values
from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.thrift import read_struct
from pipeline.errors import DatasetError
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_summary, write_shard

# Two blobs among columns that are null, repeated, or of odd size.
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("a_bytes", pa.large_binary(), nullable=False),
        pa.field("b", pa.large_binary(), nullable=False),
    ]
)
SIZES = st.one_of(st.integers(0, 300), st.integers(100, 40_000), st.sampled_from([16_383, 16_384, 70_000, 1 << 20, 3_000_000]))
ROWS = st.lists(
    st.tuples(SIZES, SIZES, st.none() | st.text(max_size=200), st.none() | st.lists(st.text(max_size=5))), max_size=12
)


def write_blobs(path: Path, rows: list[tuple[int, int, Any, Any]], row_group_bytes: int) -> None:
    rng = np.random.default_rng(len(rows))
    with ShardWriter(path, SCHEMA, row_group_bytes=row_group_bytes) as writer:
        for number, (a, b, caption, tags) in enumerate(rows):
            ours = {"sample_id": str(number), "a_bytes": rng.bytes(a), "b": rng.bytes(b)}
            writer.write({**ours, "caption": caption, "tags": tags})
        writer.close(make_summary(writer))


def assert_ranges_hold_the_values(path: Path, columns: list[str]) -> None:
    data, table = path.read_bytes(), pq.read_table(path)
    found = locate_values(ShardFile(Storage(str(path.parent)), path.name), columns)
    assert list(found) == columns
    for name in columns:
        assert len(found[name].offsets) == len(table)
        for value, offset, length in zip(table[name], *found[name], strict=True):
            assert data[offset : offset + length] == value.as_py()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, row_group_bytes=st.sampled_from([1, 50_000, 2_000_000, 1 << 30]))
def test_byte_ranges_hold_what_pyarrow_reads(tmp_path: Path, rows: list[Any], row_group_bytes: int) -> None:
    write_blobs(tmp_path / "s.parquet", rows, row_group_bytes)
    assert_ranges_hold_the_values(tmp_path / "s.parquet", ["a_bytes", "b"])


def test_equal_rows_of_latent_size_have_a_page_each(tmp_path: Path) -> None:
    for size in (65_000, 302_000, 2_250_000):
        write_blobs(tmp_path / "s.parquet", [(size, size, "x", None)] * 6, 4 * size)
        file = ShardFile(Storage(str(tmp_path)), "s.parquet")
        footer, _ = read_struct(file.footer)
        for group in footer[4]:
            chunk = group[1][-1]
            index, _ = read_struct(file.read_at(chunk[4], chunk[5]))
            assert [page[3] for page in index[1]] == [0, 1]  # first rows
        assert_ranges_hold_the_values(tmp_path / "s.parquet", ["a_bytes", "b"])


def test_pages_of_small_rows_of_a_writer_without_sizes_are_walked(tmp_path: Path) -> None:
    values = pa.array([bytes([n]) * (n * 100) for n in range(200)], pa.large_binary())
    table = pa.table([values], schema=pa.schema([pa.field("x", pa.large_binary(), nullable=False)]))
    options: dict[str, Any] = {
        "use_dictionary": False,
        "compression": "none",
        "write_page_index": True,
        "write_statistics": False,
    }
    pq.write_table(table, tmp_path / "s.parquet", **options)
    assert_ranges_hold_the_values(tmp_path / "s.parquet", ["x"])


@pytest.mark.parametrize(
    ("nullable", "options"),
    [
        (False, {"compression": "zstd"}),
        (False, {"use_dictionary": True}),
        (False, {"write_page_index": False}),
        (True, {}),
    ],
)
def test_layout_without_byte_ranges_is_left_out(tmp_path: Path, nullable: bool, options: dict[str, Any]) -> None:
    table = pa.table(
        [pa.array([b"x" * 50] * 5, pa.large_binary())], schema=pa.schema([pa.field("x", pa.large_binary(), nullable)])
    )
    layout = {"use_dictionary": False, "compression": "none", "write_page_index": True, **options}
    pq.write_table(table, tmp_path / "s.parquet", **layout)
    assert locate_values(ShardFile(Storage(str(tmp_path)), "s.parquet"), ["x"]) == {}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damaged_page_index_is_an_error_or_gives_ranges_inside_the_file(tmp_path: Path, position: float, value: int) -> None:
    path = tmp_path / "s.parquet"
    if not path.exists():
        write_blobs(path, [(20_000, 100, "x", None)] * 4, 50_000)
    data = bytearray(path.read_bytes())
    start = len(data) - 6_000  # page index and footer
    data[start + int(position * (6_000 - 8))] = value
    (tmp_path / "damaged").write_bytes(data)
    try:
        found = locate_values(ShardFile(Storage(str(tmp_path)), "damaged"), ["a_bytes"])
    except DatasetError:
        return
    for extents in found.values():
        assert (extents.offsets >= 0).all()
        assert (extents.offsets + extents.lengths <= len(data)).all()


def test_page_header_that_contradicts_the_index_is_an_error(tmp_path: Path) -> None:
    write_blobs(tmp_path / "s.parquet", [(20_000, 100, "x", None)] * 4, 50_000)
    data = bytearray((tmp_path / "s.parquet").read_bytes())
    first = pq.read_metadata(tmp_path / "s.parquet").row_group(0).column(3).data_page_offset
    data[first + 3] ^= 0x10  # a size in the page's header
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(DatasetError, match="damaged page index"):
        locate_values(ShardFile(Storage(str(tmp_path)), "damaged"), ["a_bytes"])


def test_byte_ranges_of_a_remote_shard_take_few_requests(remote: Storage, spool: Path, requests: list[object]) -> None:
    write_shard(spool / "s", range(40), row_group_bytes=400_000)
    assert pq.read_metadata(spool / "s").num_row_groups == 8
    remote.put_file_if_absent("s.parquet", spool / "s")
    found = locate_values(ShardFile(remote, "s.parquet"), ["vae_latent_bytes", "vae_logvar_bytes"])
    assert len(found["vae_logvar_bytes"].offsets) == 40
    assert len(requests) == 3  # the tail, and one page's header of each column


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x1c" * 5000, b"\x19\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x18\x7fabc", b"\x1b\x00"]
)
def test_bytes_that_are_no_thrift_struct_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"Thrift|bits"):
        read_struct(data)
