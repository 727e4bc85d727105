"""Repair moves what nothing needs and makes again what follows from the shards; it never deletes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import validate_dataset
from pipeline.checkpoints import Checkpoints, ShardAccount, list_checkpoints
from pipeline.dataset import LatentDataset, read_manifest
from pipeline.errors import DatasetError
from pipeline.status import RunStatus
from pipeline.storage import Storage
from pipeline.validation import Validation, repair_output
from tests.pipeline.validation.conftest import find


def repair(storage: Storage) -> list[str]:
    validation = Validation(storage=storage, threads=2)
    list(validation.findings())
    return list(repair_output(validation))


def content(storage: Storage) -> set[bytes]:
    return {storage.read(found.uri) for found in storage.list("")}


def test_orphans_are_moved_and_nothing_is_lost(dataset: Storage) -> None:
    for path in ("data/bucket=49x64x96@8/part-000009-ab.parquet", "index/0000-00009-ab.parquet", ".tmp/ab"):
        dataset.put(path, f"content of {path}".encode())
    dataset.put("README.md", b"edited by a person")
    before = content(dataset)
    lines = repair(dataset)
    assert len(lines) == 3
    assert lines[0].startswith("moved data/bucket=49x64x96@8/part-000009-ab.parquet to trash/")
    assert content(dataset) == before
    assert dataset.read("README.md") == b"edited by a person"  # nothing is written that was right
    assert find(dataset) == []
    assert len(LatentDataset(dataset.uri)) == 11


def test_checkpoints_are_known_and_a_damaged_one_is_moved_away(dataset: Storage) -> None:
    checkpoints = Checkpoints(dataset)
    checkpoints.write([ShardAccount("shard", 1, 2, {("quarantined", "timeout"): 1})])
    dataset.put(".probe-0123", b"first")
    assert [(finding.path, finding.what) for finding in find(dataset)] == [(".probe-0123", "stale")]
    (path,) = list_checkpoints(dataset)
    dataset.put(path, dataset.read(path)[:-20])
    assert {finding.path: finding.what for finding in find(dataset)} == {path: "damaged", ".probe-0123": "stale"}
    assert len(repair(dataset)) == 2
    assert find(dataset) == []
    assert Checkpoints(dataset).read() == {}


def test_a_damaged_index_and_wrong_tables_are_made_again(dataset: Storage) -> None:
    manifest = read_manifest(dataset)
    assert manifest is not None
    (piece,) = manifest.index
    data = bytearray(dataset.read(piece.path))
    data[100] ^= 1
    dataset.put(piece.path, bytes(data))
    dataset.put("quarantine.parquet", b"not Parquet")
    assert len(find(dataset)) >= 2
    repair(dataset)
    assert find(dataset) == []
    assert read_manifest(dataset) == manifest


def test_shards_are_never_touched_and_a_dataset_with_a_damaged_one_is_left_as_it_is(dataset: Storage) -> None:
    path = dataset.list("data", ".parquet")[0].uri
    data = bytearray(dataset.read(path))
    data[5000] ^= 1
    dataset.put(path, bytes(data))
    dataset.put(dataset.list("index")[0].uri, b"damaged too")
    before = {found.uri: dataset.read(found.uri) for found in dataset.list("")}
    with pytest.raises(DatasetError, match="index and manifest were left as they are, since plan or shards"):
        repair(dataset)
    assert {found.uri: dataset.read(found.uri) for found in dataset.list("")} == before


def test_without_a_trustworthy_manifest_the_job_is_to_make_one(dataset: Storage) -> None:
    dataset.put("manifest.json", dataset.read("manifest.json").replace(b"0.7", b"0.8"))
    with pytest.raises(DatasetError, match="run the job's command again: nothing is made twice"):
        repair(dataset)


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = validate_dataset.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_exit_codes_and_lines(dataset: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, dataset.uri)
    assert (code, out.startswith("findings 0, ")) == (0, True)
    dataset.put("data/stranger.parquet", b"x")
    code, out, _ = run(capsys, dataset.uri, "--quick", "--json")
    first, last = (json.loads(line) for line in out.splitlines())
    assert (code, first["path"], first["what"]) == (1, "data/stranger.parquet", "orphan")
    assert last["summary"]["by_kind"] == {"orphan": 1}
    code, _, err = run(capsys, dataset.uri, "--repair")
    assert (code, "moved data/stranger.parquet to trash/" in err) == (0, True)
    assert run(capsys, dataset.uri)[0] == 0
    code, _, err = run(capsys, str(tmp_path / "nowhere"))
    assert (code, "there is nothing there" in err) == (2, True)
    with pytest.raises(SystemExit, match="2"):
        validate_dataset.main([dataset.uri, "--sample", "0"])


def test_repair_is_refused_while_a_run_is_alive(
    dataset: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.05)
    dataset.put("data/stranger.parquet", b"x")
    snapshot: dict[str, Any] = {}
    with RunStatus(dataset, lambda: snapshot):
        code, _, err = run(capsys, dataset.uri, "--repair")
    assert (code, "is alive" in err) == (2, True)
    assert dataset.exists("data/stranger.parquet")
