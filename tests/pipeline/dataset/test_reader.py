from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.dataset import LatentDataset, Manifest, read_summary, scale_latents
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import SHAPE, commit_shards, make_dataset, make_encoded

Requests = list[tuple[str, int | None, int | None]]
FRAME = (16, 1, 8, 12)


def expected(number: int, name: str = "latent", dtype: str = "bfloat16") -> torch.Tensor:
    tensor = getattr(make_encoded(number, first_frame=True, dtype=dtype), name)
    return torch.frombuffer(bytearray(tensor.data), dtype=getattr(torch, dtype)).view(tensor.shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_tensors_are_exact_in_every_dtype_and_compression(storage: Storage, spool: Path, dtype: str, compression: str) -> None:
    make_dataset(storage, spool, dtype=dtype, compression=compression, first_frame=True)
    dataset = LatentDataset(storage.uri, columns=["logvar", "first_frame_latent", "first_frame_logvar", "first_frame_png"])
    for number in (11, 0, 6, 7):
        item = dataset[number]
        for name in ("latent", "logvar", "first_frame_latent", "first_frame_logvar"):
            assert item[name].dtype == getattr(torch, dtype)
            assert item[name].shape == (FRAME if name.startswith("first") else SHAPE)
            assert bits(item[name]) == bits(expected(number, name, dtype))
        assert item["first_frame_png"] == make_encoded(number, first_frame=True).first_frame_png


def test_bfloat16_bits_survive_whatever_they_mean(storage: Storage, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)  # infinities, every NaN payload, subnormals, both zeros
    tensor = make_encoded(0).latent
    data = np.resize(every, tensor.shape).tobytes()
    monkeypatch.setattr(
        "tests.pipeline.dataset.builders.make_tensor", lambda *_, **__: type(tensor)(data=data, shape=SHAPE, dtype="bfloat16")
    )
    make_dataset(storage, spool, (1,))
    assert bits(LatentDataset(storage.uri)[0]["latent"]) == data


def test_items_hold_the_columns_asked_for(storage: Storage, published: Manifest) -> None:
    item = LatentDataset(storage.uri, columns=["caption", "psnr", "num_frames", "vae_latent_xxh3"])[4]
    assert list(item) == ["sample_id", "bucket_key", "latent", "caption", "psnr", "num_frames", "vae_latent_xxh3"]
    assert (item["sample_id"], item["caption"], item["psnr"], item["num_frames"]) == ("sample-0004", "caption 4", 34.0, 49)
    assert list(LatentDataset(storage.uri)[0]) == ["sample_id", "bucket_key", "latent"]


def test_indexing_is_that_of_a_sequence(storage: Storage, published: Manifest) -> None:
    dataset = LatentDataset(storage.uri)
    assert len(dataset) == len(list(dataset)) == 12
    assert dataset[-1]["sample_id"] == dataset[11]["sample_id"] == "sample-0011"
    for index in (12, -13):
        with pytest.raises(IndexError):
            dataset[index]
    assert dataset.sample_ids == [f"sample-{number:04d}" for number in range(12)]
    assert dataset.bucket_keys == ["49x64x96@8"] * 12
    assert dataset.buckets["49x64x96@8"].tolist() == list(range(12))
    assert [item["sample_id"] for item in dataset.__getitems__([5, 0, 5])] == ["sample-0005", "sample-0000", "sample-0005"]


def test_samples_are_found_by_id(storage: Storage, published: Manifest) -> None:
    dataset = LatentDataset(storage.uri)
    assert dataset.index_of("sample-0009") == 9
    assert bits(dataset.get("sample-0009")["latent"]) == bits(expected(9))
    with pytest.raises(KeyError):
        dataset.get("sample-9999")


def test_tensors_belong_to_the_caller(storage: Storage, published: Manifest) -> None:
    dataset = LatentDataset(storage.uri)
    dataset[0]["latent"].zero_()
    assert bits(dataset[0]["latent"]) == bits(expected(0))


def test_layout_for_transformers_has_frames_first(storage: Storage, published: Manifest) -> None:
    latent = LatentDataset(storage.uri, layout="FCHW")[3]["latent"]
    assert latent.shape == (13, 16, 8, 12)
    assert latent.is_contiguous()
    assert torch.equal(latent, expected(3).transpose(0, 1))


def test_scaling_follows_each_tensors_role(storage: Storage, published: Manifest) -> None:
    for model, convention, frame_role in (
        ("1.5-5b-i2v", "diffusers", 1 / 0.7),
        ("1.5-5b-i2v", "cogvideo", 0.7),
        ("5b-i2v", "diffusers", 0.7),
    ):
        scale: Any = {"model": model, "convention": convention}
        item = LatentDataset(storage.uri, columns=["first_frame_latent", "logvar"], scale=scale)[2]
        assert bits(item["latent"]) == bits(expected(2) * 0.7)
        assert bits(item["first_frame_latent"]) == bits(expected(2, "first_frame_latent") * frame_role)
        assert bits(item["logvar"]) == bits(expected(2, "logvar"))
    as_frame = LatentDataset(storage.uri, scale={"model": "cogvideox-1.5-5b", "role": "first_frame"})[2]["latent"]
    assert bits(as_frame) == bits(scale_latents(expected(2), "cogvideox-1.5-5b", "first_frame"))


def test_scale_without_a_model_takes_the_manifests(storage: Storage, published: Manifest) -> None:
    assert published.model == "cogvideox-5b"
    assert bits(LatentDataset(storage.uri, scale={})[0]["latent"]) == bits(expected(0) * 0.7)


def test_moments_come_as_mean_and_logvar(storage: Storage, published: Manifest) -> None:
    item = LatentDataset(storage.uri, sample="moments")[1]
    assert bits(item["latent"]) == bits(expected(1))
    assert bits(item["logvar"]) == bits(expected(1, "logvar"))


def test_posterior_noise_depends_on_seed_epoch_and_sample_alone(storage: Storage, published: Manifest) -> None:
    def draw(index: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
        dataset = LatentDataset(storage.uri, sample="sample", seed=seed)
        dataset.set_epoch(epoch)
        item = dataset[index]
        assert "logvar" not in item
        latent: torch.Tensor = item["latent"]
        return latent

    again = LatentDataset(storage.uri, sample="sample", filters=[("sample_id", "=", "sample-0005")])[0]["latent"]
    assert bits(draw(5)) == bits(draw(5)) == bits(again)
    assert len({bits(draw(5)), bits(draw(5, seed=1)), bits(draw(5, epoch=1)), bits(expected(5))}) == 4
    noise = (draw(5).double() - expected(5).double()) / torch.exp(0.5 * expected(5, "logvar").double())
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_drawing_without_stored_logvar_is_refused(storage: Storage, spool: Path) -> None:
    make_dataset(storage, spool, logvar=False)
    with pytest.raises(DatasetError, match=r"needs logvar, which this dataset does not store .*use sample='mode'"):
        LatentDataset(storage.uri, sample="sample")


def test_wrong_options_name_the_choices(storage: Storage, published: Manifest) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"columns": ["captoin"]}, "no column captoin; there are latent, logvar, first_frame_latent, .*caption"),
        ({"layout": "FHWC"}, "layout 'FHWC' is unknown; use one of CFHW, FCHW"),
        ({"sample": "mean"}, "use one of mode, moments, sample"),
        ({"scale": {"model": "cogvideox-7b"}}, "'cogvideox-7b' is unknown; use one of cogvideox-2b, .*scaling_factor"),
        ({"scale": {"modle": "5b"}}, "unknown modle; it takes model, role, convention"),
        ({"scale": {}, "sample": "moments"}, "use scale_latents"),
        ({"filters": [("captoin", "=", "x")]}, "no column captoin"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            LatentDataset(storage.uri, **options)


def test_filters_keep_samples_by_any_column(storage: Storage, published: Manifest) -> None:
    by_id = LatentDataset(storage.uri, filters=[("sample_id", "in", ["sample-0002", "sample-0008"])])
    assert by_id.sample_ids == ["sample-0002", "sample-0008"]
    assert bits(by_id[1]["latent"]) == bits(expected(8))
    either: list[list[tuple[str, str, Any]]] = [[("psnr", ">", 38)], [("caption", "=", "caption 1")]]
    by_facts = LatentDataset(storage.uri, columns=["caption"], filters=either)
    assert [item["caption"] for item in by_facts] == ["caption 1", "caption 10"]


def test_flipped_bit_is_caught_at_first_read(storage: Storage, published: Manifest) -> None:
    place = LatentDataset(storage.uri)._catalog.locate(3, "vae_latent")
    path = Path(storage.local_path(place.file))
    data = bytearray(path.read_bytes())
    assert place.offset is not None
    data[place.offset + place.length // 2] ^= 1
    path.write_bytes(data)
    dataset = LatentDataset(storage.uri)
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"part-000000.* latent of sample-0003 is damaged: .* expected"):
            dataset[3]
    assert bits(dataset[2]["latent"]) == bits(expected(2))
    assert bits(LatentDataset(storage.uri, verify=False)[3]["latent"]) != bits(expected(3))


def test_file_cut_short_is_an_error(storage: Storage, published: Manifest) -> None:
    path = Path(storage.local_path(LatentDataset(storage.uri)._catalog.files[0]))
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(DatasetError, match="cut short"):
        LatentDataset(storage.uri)[5]


def test_remote_sample_takes_one_ranged_request(remote: Storage, spool: Path, requests: Requests) -> None:
    make_dataset(remote, spool)
    dataset = LatentDataset(remote.uri)
    requests.clear()
    assert bits(dataset[9]["latent"]) == bits(expected(9))
    ((path, start, end),) = requests
    assert path.endswith("part-000001-00000001.parquet")
    assert start is not None
    assert end is not None
    assert end - start == expected(9).nbytes
    requests.clear()
    items = dataset.__getitems__([8, 2, 5, 11])
    assert [item["sample_id"] for item in items] == ["sample-0008", "sample-0002", "sample-0005", "sample-0011"]
    assert len(requests) == 4


def test_small_columns_of_a_remote_shard_are_read_once_and_without_its_tensors(
    remote: Storage, spool: Path, requests: Requests
) -> None:
    make_dataset(remote, spool, (40,))
    dataset = LatentDataset(remote.uri, columns=["caption"])
    requests.clear()
    assert [item["caption"] for item in dataset] == [f"caption {number}" for number in range(40)]
    tensors = 40 * expected(0).nbytes
    assert sum((end or 0) - (start or 0) for _, start, end in requests) < tensors + 400_000
    assert len(requests) <= 40 + 1 + 20  # the samples, the footer, the row groups


def test_opening_a_remote_dataset_reads_the_manifest_and_the_index_alone(
    remote: Storage, spool: Path, requests: Requests
) -> None:
    make_dataset(remote, spool)
    requests.clear()
    LatentDataset(remote.uri)
    assert sorted(path.rpartition("/")[2][:8] for path, _, _ in requests) == ["0000-000", "manifest"]


def test_unfinished_dataset_is_refused_unless_asked_for(storage: Storage, spool: Path) -> None:
    shards = commit_shards(storage, spool)
    with pytest.raises(DatasetError, match=r"no manifest.json.*allow_incomplete=True"):
        LatentDataset(storage.uri)
    dataset = LatentDataset(storage.uri, columns=["caption"], allow_incomplete=True)
    assert len(dataset) == 12
    assert dataset[11]["caption"] == "caption 11"
    assert bits(dataset[11]["latent"]) == bits(expected(11))
    assert dataset.manifest is None
    with pytest.raises(ConfigError, match="name the model"):
        LatentDataset(storage.uri, scale={}, allow_incomplete=True)
    assert read_summary(storage, shards[0][0]).num_rows == 7


def test_folder_without_parquet_files_is_refused(storage: Storage) -> None:
    with pytest.raises(DatasetError, match="there is nothing there"):
        LatentDataset(storage.uri, allow_incomplete=True)
    storage.put("notes.txt", b"mine")
    with pytest.raises(DatasetError, match="no Parquet files"):
        LatentDataset(storage.uri, allow_incomplete=True)


@pytest.mark.usefixtures("published")
def test_scale_may_be_the_name_of_a_model_or_a_factor(storage: Storage) -> None:
    plain = LatentDataset(storage.uri)[0]["latent"].float()
    for scale, factor in (("cogvideox-5b", 0.7), (0.5, 0.5)):
        scaled = LatentDataset(storage.uri, scale=scale)[0]["latent"].float()
        torch.testing.assert_close(scaled, plain * factor, rtol=1e-2, atol=0, equal_nan=True)


def test_latents_of_two_recipes_are_refused_unless_asked_for(storage: Storage, spool: Path) -> None:
    commit_shards(storage, spool, (3,), recipe="recipe-a")
    commit_shards(storage, spool, (3,), recipe="recipe-b", shard_id="b")
    with pytest.raises(DatasetError, match="2 recipes: recipe-a, recipe-b"):
        LatentDataset(storage.uri, allow_incomplete=True)
    assert len(LatentDataset(storage.uri, allow_incomplete=True, allow_mixed_recipes=True)) == 6


@pytest.mark.parametrize("layout", [{}, {"use_dictionary": False, "compression": "none", "write_page_index": True}])
def test_foreign_parquet_is_read_through_row_groups(storage: Storage, layout: dict[str, Any]) -> None:
    tensors = [make_encoded(number, dtype="float32").latent for number in range(5)]
    table = pa.table(
        {
            "id": [str(number) for number in range(5)],
            "vae_latent_bytes": pa.array([bytes(tensor.data) for tensor in tensors], pa.binary()),
            "vae_latent_shape": [list(tensor.shape) for tensor in tensors],
            "vae_latent_dtype": ["float32"] * 5,
        }
    )
    Path(storage.uri).mkdir()
    pq.write_table(table, f"{storage.uri}/theirs.parquet", row_group_size=2, **layout)
    for dataset in (
        LatentDataset(storage.uri, columns=["id"], allow_incomplete=True),
        LatentDataset(f"{storage.uri}/theirs.parquet", columns=["id"]),
    ):
        assert dataset.sample_ids[3] == "theirs.parquet#3"
        assert dataset.bucket_keys[0] == "16x13x8x12"
        for number in (4, 0, 3):
            assert bits(dataset[number]["latent"]) == bits(expected(number, dtype="float32"))
            assert dataset[number]["id"] == str(number)


def test_parquet_without_latents_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="it lacks vae_latent_bytes"):
        LatentDataset(str(tmp_path / "a.parquet"))


def test_pickled_dataset_reads_the_same_samples(storage: Storage, published: Manifest) -> None:
    dataset = LatentDataset(storage.uri, columns=["caption"], filters=[("psnr", ">", 30)], sample="sample", scale={})
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.sample_ids == dataset.sample_ids
    assert copy.fingerprint == dataset.fingerprint
    assert bits(copy[2]["latent"]) == bits(dataset[2]["latent"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_loader_read_the_same_samples(storage: Storage, published: Manifest, context: str) -> None:
    dataset = LatentDataset(storage.uri, columns=["caption"])
    dataset[0]  # something is open when the workers start
    loader: Any = DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert [caption for batch in batches for caption in batch["caption"]] == [f"caption {number}" for number in range(12)]
    assert bits(torch.cat([batch["latent"] for batch in batches])) == b"".join(bits(expected(number)) for number in range(12))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_threads_share_one_dataset(storage: Storage, spool: Path, compression: str) -> None:
    make_dataset(storage, spool, compression=compression)
    dataset = LatentDataset(storage.uri, columns=["caption"])
    start = threading.Barrier(8)

    def read(first: int) -> list[tuple[str, bytes]]:
        start.wait()
        return [(item["caption"], bits(item["latent"])) for item in (dataset[(first + step) % 12] for step in range(12))]

    with ThreadPoolExecutor(8) as pool:
        for first, found in enumerate(pool.map(read, range(8))):
            assert found == [(f"caption {n % 12}", bits(expected(n % 12))) for n in range(first, first + 12)]


def test_facts_of_one_sample_come_without_its_tensors(
    published: Manifest, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LatentDataset(storage.uri)
    assert {"caption", "psnr", "vae_latent_shape"} <= set(dataset.fact_columns)
    assert not [name for name in dataset.fact_columns if name.endswith("_bytes")]
    assert dataset.blob_columns == ["first_frame_png"]
    assert dataset.blob(3, "first_frame_png")[:4] == b"\x89PNG"
    monkeypatch.setattr(LatentDataset, "_read_tensor", None)
    assert dataset.facts(3, ["caption", "num_frames"]) == {
        "sample_id": dataset.sample_ids[3],
        "bucket_key": "49x64x96@8",
        "caption": "caption 3",
        "num_frames": 49,
    }
    assert dataset.facts(3, []) == {"sample_id": dataset.sample_ids[3], "bucket_key": "49x64x96@8"}
