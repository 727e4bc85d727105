from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import ShardWriter, build_row, build_schema, passthrough_name, read_summary, shard_path
from pipeline.dataset.schema import blob_names
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage import Storage
from pipeline.types import TensorBytes
from tests.pipeline.dataset.builders import CAPTIONS, make_clip, make_encoded, make_rejection, make_summary, write_shard


def test_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    schema = build_schema(logvar=True, first_frame=True, passthrough=CAPTIONS)
    row = build_row(make_clip(4), make_encoded(4, first_frame=True), {"caption": "a cat"})
    with ShardWriter(tmp_path / "s.parquet", schema) as writer:
        writer.write(row)
        writer.close(make_summary(writer))
    (found,) = pq.read_table(tmp_path / "s.parquet").to_pylist()
    expected = {name: bytes(value) if isinstance(value, memoryview) else value for name, value in row.items()}
    assert found == expected
    assert found["frame_end"] - found["frame_start"] == found["num_frames"] == 49
    assert (found["crop_x"], found["crop_y"], found["crop_w"], found["crop_h"]) == (1, 2, 3, 4)
    assert found["vae_latent_shape"] == [16, 13, 8, 12]


def test_tensors_that_a_run_does_not_make_have_no_columns() -> None:
    names = build_schema(logvar=False, first_frame=False).names
    assert not [name for name in names if "logvar" in name or "first_frame" in name]
    assert blob_names(build_schema(logvar=True, first_frame=True)) == [
        "vae_latent",
        "vae_logvar",
        "first_frame_latent",
        "first_frame_logvar",
        "first_frame_png",
    ]


def test_tensor_columns_are_never_null_so_that_pages_hold_only_lengths_and_bytes() -> None:
    for field in build_schema(logvar=True, first_frame=True):
        if field.name.endswith(("_bytes", "_png")):
            assert field.type == pa.large_binary()
            assert not field.nullable


@pytest.mark.parametrize("name", ["fps", "FPS", "num_frames", "vae_latent_bytes", "bucket"])
def test_source_column_with_a_name_of_ours_is_kept_as_input(name: str) -> None:
    schema = build_schema(logvar=False, first_frame=False, passthrough=pa.schema([(name, pa.string())]))
    assert passthrough_name(name) == f"input_{name}"
    assert f"input_{name}" in schema.names
    row = build_row(make_clip(0), make_encoded(0), {name: "theirs"})
    assert row[f"input_{name}"] == "theirs"


def test_source_columns_that_would_share_a_name_are_an_error_that_names_both() -> None:
    for first, second in (("fps", "input_fps"), ("Caption", "caption")):
        passthrough = pa.schema([(first, pa.string()), (second, pa.string())])
        with pytest.raises(ConfigError, match=f"'{first}' and '{second}'"):
            build_schema(logvar=False, first_frame=False, passthrough=passthrough)


def test_tensor_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    encoded = dataclasses.replace(make_encoded(0), latent=TensorBytes(data=b"123", shape=(1, 1, 1, 1), dtype="float32"))
    with pytest.raises(ValueError, match="log-variance of shape"):
        build_row(make_clip(0), encoded)
    with pytest.raises(ValueError, match=r"sample-0000: vae_latent has 3 bytes, but float32 of shape .* has 4"):
        build_row(make_clip(0), dataclasses.replace(encoded, logvar=None))


def test_row_with_unknown_or_absent_columns_is_refused_by_name(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s.parquet", build_schema(logvar=True, first_frame=False)) as writer:
        with pytest.raises(ValueError, match="sample-0000: columns caption are not in the schema"):
            writer.write(build_row(make_clip(0), make_encoded(0), {"caption": "x"}))
        with pytest.raises(ValueError, match=r"sample-0000: columns vae_logvar_shape, .*vae_logvar_bytes have no value"):
            writer.write(build_row(make_clip(0), make_encoded(0, logvar=False)))


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, range(6), first_frame=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_attempt_changes_only_the_footer(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", range(6))
    write_shard(tmp_path / "b", range(6), attempt_id="attempt-2")
    a, b = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    footer_bytes = int.from_bytes(a[-8:-4], "little") + 8
    assert a != b
    assert a[:-footer_bytes] == b[:-footer_bytes]


def test_row_groups_hold_about_the_bytes_asked_for_and_a_larger_row_stands_alone(tmp_path: Path) -> None:
    # A row is 40 kB of latent and 40 kB of log-variance.
    write_shard(tmp_path / "a", range(7), row_group_bytes=250_000)
    write_shard(tmp_path / "b", range(3), row_group_bytes=1)
    groups = [pq.read_metadata(tmp_path / name) for name in ("a", "b")]
    assert [groups[0].row_group(i).num_rows for i in range(groups[0].num_row_groups)] == [3, 3, 1]
    assert groups[1].num_row_groups == 3


def test_summary_with_rejections_is_in_the_footer(storage: Storage, spool: Path) -> None:
    rejections = (make_rejection(1), make_rejection(2, "filtered"))
    summary = write_shard(spool / "s", range(3), rejections=rejections)
    path = shard_path(summary.bucket_key, 17, summary.shard_id)
    assert path == "data/bucket=49x64x96@8/part-000017-0123abcd.parquet"
    storage.put_file_if_absent(path, spool / "s")
    assert read_summary(storage, path) == summary
    assert read_summary(storage, path, (spool / "s").stat().st_size) == summary


def test_shard_may_have_no_rows(storage: Storage, spool: Path) -> None:
    summary = write_shard(spool / "s", range(0), rejections=(make_rejection(1),))
    storage.put_file_if_absent("data/s.parquet", spool / "s")
    assert read_summary(storage, "data/s.parquet") == summary
    assert pq.read_table(spool / "s").num_rows == 0


def test_exception_leaves_no_file(tmp_path: Path) -> None:
    def fail_after_a_row_group() -> None:
        with ShardWriter(tmp_path / "s.parquet", build_schema(logvar=True, first_frame=False), row_group_bytes=1) as writer:
            for number in range(2):
                writer.write(build_row(make_clip(number), make_encoded(number)))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_a_row_group()
    assert os.listdir(tmp_path) == []


def test_summary_that_counts_otherwise_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="says 5 rows of 0 bytes, but 0 of 0 were written"),
        ShardWriter(tmp_path / "s.parquet", build_schema(logvar=True, first_frame=False)) as writer,
    ):
        writer.close(make_summary(num_rows=5))
    assert os.listdir(tmp_path) == []


def test_summary_of_foreign_or_damaged_files_is_refused(storage: Storage, spool: Path) -> None:
    write_shard(spool / "s", range(3))
    whole = (spool / "s").read_bytes()
    pq.write_table(pa.table({"a": [1]}), spool / "foreign")
    cases = {
        "foreign": ((spool / "foreign").read_bytes(), "another kind"),
        "cut": (whole[:-100], "not a Parquet file, or cut short"),
        "empty": (b"", "not a Parquet file, or cut short"),
        "footer": (whole[:-500] + bytes(492) + whole[-8:], "damaged Parquet footer"),
        "length": (whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:], "damaged: its footer would take"),
        "version": (whole.replace(b"latent_dataset.format_version\x18\x011", b"latent_dataset.format_version\x18\x019"), "'9'"),
    }
    for name, (data, message) in cases.items():
        storage.put(name, data)
        with pytest.raises(DatasetError, match=message):
            read_summary(storage, name)


def test_summary_of_a_remote_shard_takes_one_request(remote: Storage, spool: Path, requests: list[object]) -> None:
    summary = write_shard(spool / "s", range(3))
    remote.put_file_if_absent("data/s.parquet", spool / "s")
    assert read_summary(remote, "data/s.parquet") == summary
    assert len(requests) == 1
