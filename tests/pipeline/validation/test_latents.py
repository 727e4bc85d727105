"""Validation of a dataset: what is whole is clean, and each thing that can be wrong is said, once, where it is."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset import read_manifest
from pipeline.dataset.schema import tensor_digest
from pipeline.dataset.writer import FOOTER_KEYS, shard_settings, stored_schema
from pipeline.errors import DatasetError
from pipeline.plan_store import read_generations
from pipeline.requeue import requeue
from pipeline.storage import Storage
from pipeline.types import Bucket
from pipeline.validation import Validation
from pipeline.validation.shard_checks import count_not_finite, find_ratios
from tests.pipeline.outputs import commit_pending, make_output, plan_output, publish_output
from tests.pipeline.validation.conftest import FAILED_CLIP, find, kinds


def shard_paths(storage: Storage) -> list[str]:
    return [found.uri for found in storage.list("data", ".parquet")]


def rewrite(storage: Storage, path: str, change: Callable[[dict[str, Any]], None], number: int = 0) -> None:
    """Write a shard anew with one row changed and all its checksums right, as a program with a mistake would."""
    data = storage.read(path)
    parquet = pq.ParquetFile(io.BytesIO(data))
    metadata = parquet.metadata.metadata
    schema = stored_schema(parquet.metadata)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, **shard_settings(schema, "none")) as writer:
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.read_row_group(group).to_pylist()
            if group == 0:
                change(rows[number])
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
        writer.add_key_value_metadata({key: metadata[key] for key in FOOTER_KEYS})
    storage.put(path, sink.getvalue())


# What is whole


def test_a_finished_dataset_is_clean(dataset: Storage) -> None:
    validation = Validation(storage=dataset, threads=2)
    assert list(validation.findings()) == []
    summary = validation.summary()
    assert (summary["planned"], summary["written"], summary["quarantined"], summary["filtered"]) == (14, 11, 2, 1)
    assert (summary["shards"], summary["shards_read_whole"], summary["shards_compared_byte_by_byte"]) == (3, 3, 3)


@pytest.mark.parametrize("sample", [0, 1, 99])
def test_of_a_sample_the_rest_is_read_by_its_footers(dataset: Storage, sample: int) -> None:
    validation = Validation(storage=dataset, threads=2, sample=sample)
    assert list(validation.findings()) == []
    assert validation.summary()["shards_read_whole"] == min(sample, 3)


def test_a_dataset_in_an_object_store_is_read_as_one_on_disk(dataset: Storage) -> None:
    remote = Storage("memory://validated")
    for found in dataset.list(""):
        remote.put(found.uri, dataset.read(found.uri))
    assert find(remote) == []


def test_what_is_no_output_is_refused(output: Storage) -> None:
    with pytest.raises(DatasetError, match="there is nothing there"):
        find(output)
    output.put("notes.txt", b"x")
    with pytest.raises(DatasetError, match="there is no plan; expected the output of an encode or decode job"):
        find(output)


# Missing, unneeded, twice


def test_a_run_that_is_not_finished_lacks_shards_and_the_manifest(output: Storage, spool: Path) -> None:
    plan_output(output)
    findings = find(output)
    assert [finding.what for finding in findings] == ["missing"] * 4
    assert findings[0].path == "manifest.json"
    assert "a committed shard of 5 clips" in str(findings[1])


def test_a_lost_shard_is_said_and_what_else_it_would_upset_is_not(dataset: Storage) -> None:
    path = shard_paths(dataset)[1]
    dataset.move(path, "elsewhere.parquet")
    assert [(finding.path, finding.what) for finding in find(dataset)] == [(path, "missing")]


def test_objects_that_nothing_names_are_orphans(dataset: Storage) -> None:
    paths = shard_paths(dataset)
    copy = paths[0].replace("part-000000", "part-000009")
    dataset.put(copy, dataset.read(paths[0]))
    dataset.put("data/bucket=49x64x96@8/notes.txt", b"x")
    dataset.put("index/0000-00009-abc.parquet", b"x")
    dataset.put("plan/00000/clips-loser-000.parquet", b"x")
    dataset.put("plan/00000/probed/abc.json", b"[]")
    dataset.put("plan/00007/clips-of-a-run-that-goes-on.parquet", b"x")
    dataset.put(".tmp/abc", b"x")
    assert {finding.path: finding.what for finding in find(dataset)} == {
        copy: "orphan",
        "data/bucket=49x64x96@8/notes.txt": "orphan",
        "index/0000-00009-abc.parquet": "orphan",
        "plan/00000/clips-loser-000.parquet": "orphan",
        ".tmp/abc": "stale",
    }


def test_what_a_live_run_is_writing_is_not_stale(dataset: Storage) -> None:
    dataset.put(".tmp/abc", b"x")
    dataset.put_json("status.json", {"run_id": "r", "exit_code": None, "heartbeat_at": time.time()})
    assert find(dataset) == []


def test_a_clip_that_stands_in_two_shards_is_a_duplicate(dataset: Storage) -> None:
    first, second, _ = shard_paths(dataset)
    sample_id = pq.ParquetFile(io.BytesIO(dataset.read(first))).read(columns=["sample_id"])["sample_id"][0].as_py()
    rewrite(dataset, second, lambda row: row.update(sample_id=sample_id))
    findings = [finding for finding in find(dataset) if finding.what == "duplicate"]
    assert [(finding.path, sample_id in finding.expected) for finding in findings] == [(second, True)]


# Rows and tensors


def test_each_mistake_in_a_row_is_told_apart(dataset: Storage) -> None:
    path = shard_paths(dataset)[0]
    whole = dataset.read(path)

    def found(change: Callable[[dict[str, Any]], None]) -> set[str]:
        rewrite(dataset, path, change)
        said = set(kinds(dataset)) - {"index", "count"}  # the index is that of the right rows
        dataset.put(path, whole)
        return said

    def nan(row: dict[str, Any]) -> None:
        data = bytearray(row["vae_latent_bytes"])
        data[:2] = b"\xc0\x7f"
        row.update(vae_latent_bytes=bytes(data), vae_latent_xxh3=tensor_digest(bytes(data)))

    assert found(nan) == {"not_finite"}
    assert found(lambda row: row.update(vae_latent_xxh3="0" * 32)) == {"checksum"}
    assert "dtype" in found(lambda row: row.update(vae_latent_dtype="float16"))
    assert found(lambda row: row.update(vae_logvar_shape=[16, 13, 12, 8])) == {"shape"}
    assert found(lambda row: row.update(vae_latent_shape=[16, 13, 96])) == {"shape"}
    assert found(lambda row: row.update(frame_start=77)) == {"row"}
    assert found(lambda row: row.update(sample_id="somebody else's")) == {"missing", "unplanned"}


def test_other_values_of_latents_are_not_what_is_asked() -> None:
    bucket = Bucket.parse("49x480x720@8")
    assert find_ratios(bucket, [16, 13, 60, 90]) == (16, 8, 4)
    assert find_ratios(Bucket.parse("1x480x720@8"), [16, 1, 60, 90]) == (16, 8, 0)
    for shape in ([16, 13, 90, 60], [16, 1, 60, 90], [16, 14, 60, 90], [16, 13, 60], [16, 0, 60, 90], []):
        assert find_ratios(bucket, shape) is None, shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_counted(dtype: str) -> None:
    values = np.array([0, 1, np.nan, np.inf, -np.inf, 60000], dtype)
    assert count_not_finite(memoryview(values.tobytes()), dtype) == 3


def test_values_of_bfloat16_that_are_not_finite_are_counted() -> None:
    values = np.array([0.0, np.nan, -np.inf, 3e38, 1e-40], np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert count_not_finite(memoryview(stored.tobytes()), "bfloat16") == 2


# Tables that follow from the shards


def test_the_quarantine_table_must_say_what_plan_and_footers_say(dataset: Storage) -> None:
    table = pq.read_table(io.BytesIO(dataset.read("quarantine.parquet")))
    rows = table.to_pylist()
    rows[0]["reason"] = "another"
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    dataset.put("quarantine.parquet", sink.getvalue())
    assert kinds(dataset) == ["quarantine", "quarantine"]


def test_a_manifest_of_other_counts_is_told_from_a_damaged_one(dataset: Storage) -> None:
    manifest = read_manifest(dataset)
    assert manifest is not None
    dataset.put("manifest.json", replace(manifest, num_samples=12, num_filtered=0).to_json())
    assert [str(finding) for finding in find(dataset)] == [
        "manifest.json: count: expected num_samples 11; found 12",
        "manifest.json: count: expected num_filtered 1; found 0",
    ]
    dataset.put("manifest.json", json.dumps(asdict(manifest)).encode())  # of a program before the hash
    assert find(dataset) == []


def test_the_status_of_a_finished_run_must_add_up(dataset: Storage) -> None:
    status = {"run_id": "r", "state": "complete", "exit_code": 0, "planned": 14, "written": 11, "quarantined": 2, "filtered": 1}
    dataset.put_json("status.json", status)
    assert find(dataset) == []
    dataset.put_json("status.json", {**status, "written": 12})
    assert kinds(dataset) == ["account"]


def test_an_index_of_other_offsets_is_found_in_its_row(dataset: Storage) -> None:
    manifest = read_manifest(dataset)
    assert manifest is not None
    (piece,) = manifest.index
    table = pq.read_table(io.BytesIO(dataset.read(piece.path)))
    offsets = table["vae_latent_offset"].to_pylist()
    offsets[6] += 1
    column = table.schema.get_field_index("vae_latent_offset")
    sink = io.BytesIO()
    pq.write_table(table.set_column(column, "vae_latent_offset", pa.array(offsets)), sink)
    data = sink.getvalue()
    dataset.put(piece.path, data)
    other = replace(piece, size_bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))
    dataset.put("manifest.json", replace(manifest, index=(other,)).to_json())
    (finding,) = find(dataset)
    assert (finding.path, finding.what) == (piece.path, "index")
    assert f"vae_latent_offset {offsets[6] - 1} in row 6" in finding.expected


# Any byte


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_output(Storage(str(folder / "output")), folder / "spool", count=6, failing={FAILED_CLIP})
    return folder / "output"


@pytest.mark.parametrize("kind", ["data", "index", "manifest.json", "quarantine.parquet", "plan"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_other_byte_anywhere_is_found_and_never_raises(whole: Path, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    files = [copy / kind] if (copy / kind).is_file() else sorted(path for path in (copy / kind).rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    near_an_end = st.integers(0, min(len(content), 4000) - 1)
    position = data.draw(
        st.one_of(st.integers(0, len(content) - 1), near_an_end, near_an_end.map(lambda n: len(content) - 1 - n))
    )
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    findings = find(Storage(str(copy)))
    if kind in ("data", "index", "manifest.json"):
        assert findings, f"{file}: byte {position} of {len(content)}"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_was_cut_short_is_found_and_never_raises(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    files = sorted(path for name in ("data", "index") for path in (copy / name).rglob("*") if path.is_file())
    file = data.draw(st.sampled_from([*files, copy / "manifest.json", copy / "quarantine.parquet"]))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert find(Storage(str(copy)))


def test_a_plan_of_requeued_clips_is_clean(dataset: Storage, spool: Path) -> None:
    requeue(dataset, lambda rejection: rejection.reason == "timeout")
    assert kinds(dataset) == ["missing"]
    commit_pending(dataset, spool)
    assert read_generations(dataset)[-1].num_shards == 1
    publish_output(dataset)
    assert find(dataset) == []
