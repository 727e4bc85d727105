"""What a URI names: a dataset, files or a table; and that the scale is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.latents import list_latents
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import commit_shards
from tests.pipeline.fakes import FlakyFileSystem
from tests.pipeline.latents.builders import (
    configure,
    file_bytes,
    make_latent,
    plan_all,
    read_all,
    rejections,
    triplet,
    write_rows,
    write_table,
)


def uris(uri: Any, **settings: Any) -> list[str]:
    return [item.uri for item in list_latents(configure(uri, **settings)).items]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.npy", "a.safetensors", "sub/c.PT", "sub/d.parquet", "notes.txt", "video.mp4"):
        path = tmp_path / "latents" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(file_bytes(make_latent(), path.suffix.lower()) if path.suffix not in (".txt", ".mp4") else b"x")
    return tmp_path / "latents"


def test_folder_glob_and_file_name_files_in_order(folder: Path) -> None:
    names = ["a.safetensors", "b.npy", "sub/c.PT", "sub/d.parquet"]
    assert uris(folder) == [f"{folder}/{name}" for name in names]
    assert uris(f"{folder}/*.npy") == [f"{folder}/b.npy"]
    assert uris(folder / "sub" / "c.PT") == [f"{folder}/sub/c.PT"]
    assert len(read_all(configure(folder))) == 4


def test_folder_without_latents_is_an_error_that_names_the_extensions(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"1 files, none of which ends in \.safetensors, \.npy"):
        uris(tmp_path)
    with pytest.raises(ConfigError, match="there is nothing there"):
        uris(tmp_path / "absent")


def test_dataset_is_told_by_its_manifest_and_lists_its_shards(dataset: Storage) -> None:
    found = uris(dataset.uri, scale=None)
    assert len(found) == 2
    assert all(uri.startswith(f"{dataset.uri}/data/bucket=49x64x96@8/part-") for uri in found)
    assert uris(f"{dataset.uri}/", scale=None, format="dataset") == found


def test_shard_that_is_committed_but_not_published_is_passed_over(dataset: Storage, tmp_path: Path) -> None:
    published = uris(dataset.uri, scale=None)
    commit_shards(dataset, tmp_path, (1,), index=9, shard_id="99999999")
    assert uris(dataset.uri, scale=None) == published


def test_published_shard_that_is_missing_is_an_error(dataset: Storage) -> None:
    Path(uris(dataset.uri, scale=None)[0]).unlink()
    with pytest.raises(ConfigError, match=r"1 shards are missing.*part-000000"):
        uris(dataset.uri, scale=None)


def test_dataset_that_is_not_finished_is_refused_with_a_way_out(dataset: Storage) -> None:
    Path(dataset.uri, "manifest.json").unlink()
    for form in ("auto", "dataset"):
        with pytest.raises(ConfigError, match=r"not a finished dataset.*/data with input\.scale: none"):
            uris(dataset.uri, scale=None, format=form)
    assert len(plan_all(configure(f"{dataset.uri}/data"))) == 12


def test_folder_that_should_be_a_dataset_and_is_not(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not a finished dataset"):
        uris(folder, format="dataset")


def test_manifest_of_another_program_is_no_dataset(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": 4}')
    assert len(uris(folder)) == 4


def test_manifest_of_a_later_version_is_an_error(dataset: Storage) -> None:
    path = Path(dataset.uri, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ConfigError, match="format version 99"):
        uris(dataset.uri, scale=None)


def test_damaged_index_is_an_error(dataset: Storage) -> None:
    (piece,) = Path(dataset.uri, "index").iterdir()
    piece.write_bytes(b"x")
    with pytest.raises(ConfigError, match="damaged"):
        uris(dataset.uri, scale=None)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_table_names_files_and_its_columns_pass(folder: Path, kind: str) -> None:
    rows = [{"latent": "a.safetensors", "fps": 16, "caption": "one"}, {"latent": f"{folder}/b.npy", "fps": 24, "caption": "two"}]
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("latent,fps,caption\n" + "".join(f"{row['latent']},{row['fps']},{row['caption']}\n" for row in rows))
    else:
        write_table(path, rows)
    planned = plan_all(configure(path))
    assert [(item.name, item.fps, item.columns["caption"]) for item in planned] == [("a", 16, "one"), ("b", 24, "two")]


def test_table_may_have_its_paths_in_another_column(folder: Path) -> None:
    path = write_table(folder / "t.jsonl", [{"file": "a.safetensors"}])
    with pytest.raises(ConfigError, match=r"has no column 'latent', only file; set input\.latent_column"):
        uris(path)
    assert uris(path, latent_column="file") == [f"{folder}/a.safetensors"]


def test_row_without_a_usable_path_is_a_rejection(folder: Path) -> None:
    path = write_table(
        folder / "t.jsonl", [{"latent": None}, {"latent": "gone.pt"}, {"latent": "video.mp4"}, {"latent": "a.safetensors"}]
    )
    found = rejections(configure(path))
    assert [(item.stage, item.reason) for item in found] == [
        ("plan", "no_latent"),
        ("fetch", "not_found"),
        ("read", "unknown_format"),
    ]
    assert found[0].detail == f"{path}: row 1 has None for a latent, expected a path or URI"
    assert found[2].detail.startswith(f"{folder}/video.mp4: ends in none of .safetensors")


def test_parquet_is_told_by_its_columns(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", [triplet(make_latent(), "mine")])
    paths = write_rows(tmp_path / "paths.parquet", [{"latent": "rows.parquet"}])
    assert uris(rows) == [str(rows)]
    assert uris(paths) == [str(rows)]
    assert torch.equal(read_all(configure(paths))[0], make_latent())


def test_parquet_with_several_tensors_asks_for_the_key(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [triplet(make_latent(1), "one") | triplet(make_latent(2), "two")])
    (rejection,) = rejections(configure(path))
    assert rejection.reason == "key_ambiguous"
    assert rejection.detail.startswith(f"{path}: which columns hold the latent?")
    assert torch.equal(read_all(configure(path, key="two"))[0], make_latent(2))
    (rejection,) = rejections(configure(path, key="three"))
    assert "no columns three_bytes" in rejection.detail
    both = write_rows(tmp_path / "b.parquet", [triplet(make_latent(1), "one") | triplet(make_latent(2))])
    assert torch.equal(read_all(configure(both))[0], make_latent(2))


def test_damaged_parquet_alone_is_an_error_and_among_others_a_rejection(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(file_bytes(make_latent(), ".parquet")[:-9])
    with pytest.raises(ConfigError, match="not a Parquet file, or cut short"):
        uris(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(file_bytes(make_latent(), ".parquet"))
    (rejection,) = rejections(configure(tmp_path))
    assert (rejection.reason, rejection.uri) == ("damaged", f"{tmp_path}/a.parquet")


def test_scale_must_be_said_but_for_our_own_latents(folder: Path, dataset: Storage) -> None:
    table = write_table(folder / "t.jsonl", [{"latent": "a.safetensors"}])
    for uri in (folder, folder / "a.safetensors", table, f"{dataset.uri}/data"):
        with pytest.raises(ConfigError, match=r"say in input\.scale.*none, a number, or one of cogvideox-2b, cogvideox-5b"):
            uris(uri, scale=None)
    for scale in ("none", 1.0, None):
        assert plan_all(configure(dataset.uri, scale=scale))[0].multiplier is None or scale == 1.0
    with pytest.raises(ConfigError, match=r"input\.scale is cogvideox-5b, but the latents of our datasets are stored unscaled"):
        uris(dataset.uri, scale="cogvideox-5b")


def test_latents_in_an_object_store_are_found_the_same(flaky: type[FlakyFileSystem], folder: Path) -> None:
    storage = Storage("flaky://bucket/latents")
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(str(path.relative_to(folder)), path.read_bytes())
    storage.put("meta/t.jsonl", b'{"latent": "../a.safetensors"}\n')
    assert [uri.partition("latents/")[2] for uri in uris("flaky://bucket/latents")] == [
        "a.safetensors",
        "b.npy",
        "sub/c.PT",
        "sub/d.parquet",
    ]
    assert all(torch.equal(latent, make_latent()) for latent in read_all(configure("flaky://bucket/latents")))
    assert torch.equal(read_all(configure("flaky://bucket/latents/meta/t.jsonl"))[0], make_latent())


def test_dataset_in_an_object_store_is_read(flaky: type[FlakyFileSystem], dataset: Storage) -> None:
    storage = Storage("flaky://bucket/dataset")
    for path in Path(dataset.uri).rglob("*"):
        if path.is_file():
            storage.put(str(path.relative_to(dataset.uri)), path.read_bytes())
    here = read_all(configure(dataset.uri, scale=None))
    there = read_all(configure("flaky://bucket/dataset", scale=None))
    assert len(there) == 12
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_name_that_is_not_utf8_is_a_rejection(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(file_bytes(make_latent(), ".npy"))
    (tmp_path / "b\udcff.npy").write_bytes(b"x")
    (rejection,) = rejections(configure(tmp_path))
    assert "its name is not UTF-8" in rejection.detail
