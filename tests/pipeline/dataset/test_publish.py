from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.dataset import LatentDataset, Manifest, publish_dataset, read_manifest
from pipeline.errors import DatasetError
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import BUCKET, commit_shards, make_dataset, make_info, make_rejection


def snapshot(storage: Storage) -> dict[str, bytes]:
    return {stored.uri: storage.read(stored.uri) for stored in storage.list("")}


def test_manifest_counts_what_is_there(storage: Storage, spool: Path) -> None:
    shards = commit_shards(storage, spool, (7, 0, 5), rejections=(make_rejection(1), make_rejection(2, "filtered")))
    manifest = publish_dataset(storage, (path for path, _ in shards), iter([make_rejection(3)]), make_info())
    assert read_manifest(storage) == manifest
    assert (manifest.num_samples, manifest.num_shards) == (12, 3)
    assert (manifest.num_quarantined, manifest.num_filtered) == (4, 3)
    assert manifest.size_bytes == 12 * 2 * 16 * 13 * 8 * 12 * 2
    assert manifest.buckets == {BUCKET.key: 12}
    assert manifest.recipes == ("recipe-1",)
    assert manifest.columns[0] == {"name": "sample_id", "type": "string", "nullable": False}
    quarantine = pq.read_table(io.BytesIO(storage.read("quarantine.parquet"))).to_pylist()
    assert len(quarantine) == 7
    assert quarantine[-1]["detail"] == "no video stream; drop it"


def test_index_points_at_the_bytes_and_the_rows_of_every_sample(storage: Storage, published: Manifest) -> None:
    index = pq.read_table(io.BytesIO(storage.read(published.index[0].path))).to_pylist()
    assert len(index) == published.index[0].num_rows == 12
    for entry in index:
        data = storage.read(entry["file"])
        row = pq.ParquetFile(io.BytesIO(data)).read_row_group(entry["row_group"]).to_pylist()[entry["row"]]
        assert row["sample_id"] == entry["sample_id"]
        for blob, column in (("vae_latent", "vae_latent_bytes"), ("vae_logvar", "vae_logvar_bytes"), ("first_frame_png",) * 2):
            offset = entry[f"{blob}_offset"]
            assert data[offset : offset + entry[f"{blob}_length"]] == row[column]
        for part in ("shape", "dtype", "xxh3"):
            assert entry[f"vae_latent_{part}"] == row[f"vae_latent_{part}"]


def test_publishing_again_writes_the_same_bytes(storage: Storage, spool: Path) -> None:
    shards = [path for path, _ in commit_shards(storage, spool, (7, 0, 5))]
    publish_dataset(storage, shards, [make_rejection(1)], make_info())
    before = snapshot(storage)
    publish_dataset(storage, shards, [make_rejection(1)], make_info(), threads=1)
    assert snapshot(storage) == before


def test_index_files_are_immutable_and_sorted_by_generation(storage: Storage, spool: Path) -> None:
    (spool / "1").mkdir()
    (spool / "0").mkdir()
    later = [path for path, _ in commit_shards(storage, spool / "1", (3,), generation=1, shard_id="later")]
    first = publish_dataset(storage, later, [], make_info())
    earlier = [path for path, _ in commit_shards(storage, spool / "0", (4,), generation=0, shard_id="earlier")]
    second = publish_dataset(storage, [*later, *earlier], [], make_info())
    assert [Path(file.path).name[:4] for file in second.index] == ["0000", "0001"]
    assert second.index[1] == first.index[0]
    assert second.fingerprint != first.fingerprint


def test_index_is_written_in_pieces_of_bounded_size(storage: Storage, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.dataset.publish._ROWS_PER_PIECE", 8)
    manifest = make_dataset(storage, spool, (5, 5, 5, 0, 1))
    assert [file.num_rows for file in manifest.index] == [10, 6]
    assert LatentDataset(storage.uri).sample_ids == [f"sample-{number:04d}" for number in range(16)]


def test_shard_that_holds_other_rows_than_its_account_is_refused(
    storage: Storage, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((path, summary),) = commit_shards(storage, spool, (3,))
    monkeypatch.setattr("pipeline.dataset.publish.summary_of", lambda file: replace(summary, num_rows=4))
    with pytest.raises(DatasetError, match="3 rows, but its account says 4"):
        publish_dataset(storage, [path], [], make_info())
    assert read_manifest(storage) is None


def test_shards_that_hold_another_number_of_rows_than_were_committed_are_refused(storage: Storage, spool: Path) -> None:
    ((path, _),) = commit_shards(storage, spool, (3,))
    with pytest.raises(DatasetError, match="the shards hold 3 rows, but 4 were committed"):
        publish_dataset(storage, [path], [], make_info(), num_samples=4)
    assert read_manifest(storage) is None


def test_manifest_of_an_unknown_format_version_is_refused(storage: Storage, published: Manifest) -> None:
    values = json.loads(storage.read("manifest.json"))
    storage.put_json("manifest.json", {**values, "format_version": 2})
    with pytest.raises(DatasetError, match="format version 2, but this program reads 1; update it"):
        LatentDataset(storage.uri)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format_version": 1}', b'{"format_version": 1, "index": [{}]}'])
def test_damaged_manifest_is_refused(storage: Storage, data: bytes) -> None:
    storage.put("manifest.json", data)
    with pytest.raises(DatasetError, match="manifest"):
        LatentDataset(storage.uri)


def test_damaged_index_is_refused(storage: Storage, published: Manifest) -> None:
    data = bytearray(storage.read(published.index[0].path))
    data[10] ^= 1
    storage.put(published.index[0].path, bytes(data))
    with pytest.raises(DatasetError, match="does not have the hash"):
        LatentDataset(storage.uri)


def test_dataset_of_quarantined_clips_alone_can_be_published_and_opened(storage: Storage, spool: Path) -> None:
    for sizes in ((), (0,)):
        manifest = make_dataset(storage, spool, sizes)
        assert manifest.num_samples == 0
        dataset = LatentDataset(storage.uri, columns=["caption"], filters=[("caption", "=", "x")])
        assert len(dataset) == 0
        assert dataset.buckets == {}
        assert list(dataset) == []


def test_card_keeps_loaders_to_the_data_folder(storage: Storage, published: Manifest) -> None:
    card = storage.read("README.md").decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/**/*.parquet"}]
    assert "| `49x64x96@8` | 12 |" in card
    assert 'LatentDataset("<this folder>", scale={"model": "cogvideox-5b"})' in card
    for column in pa.schema(make_info(first_frame=True).schema):
        assert f"| `{column.name}` |" in card
