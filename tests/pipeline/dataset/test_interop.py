"""The dataset is ordinary Parquet: whoever reads it sees the same bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import LatentDataset, Manifest
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_encoded

LATENTS = {f"sample-{number:04d}": bytes(make_encoded(number).latent.data) for number in range(12)}


def test_pyarrow_reads_the_same_latents_and_the_folders_as_partitions(storage: Storage, published: Manifest) -> None:
    table = pq.read_table(f"{storage.uri}/data")
    assert dict(zip(table["sample_id"].to_pylist(), table["vae_latent_bytes"].to_pylist(), strict=True)) == LATENTS
    assert set(table["bucket"].to_pylist()) == {"49x64x96@8"}
    scanned = pa_dataset.dataset(f"{storage.uri}/data", partitioning="hive").to_table(columns=["sample_id", "bucket_key"])
    assert set(scanned["bucket_key"].to_pylist()) == {"49x64x96@8"}


def test_duckdb_reads_the_same_latents(storage: Storage, published: Manifest) -> None:
    import duckdb

    rows = duckdb.sql(f"select sample_id, vae_latent_bytes from '{storage.uri}/data/**/*.parquet'").fetchall()
    assert dict(rows) == LATENTS
    counted = duckdb.sql(f"select count(*) from '{storage.uri}/data/**/*.parquet' where psnr > 35").fetchall()
    assert counted == [(3,)]


def test_polars_reads_the_same_latents(storage: Storage, published: Manifest) -> None:
    import polars

    frame = polars.read_parquet(f"{storage.uri}/data/**/*.parquet", columns=["sample_id", "vae_latent_bytes"])
    assert dict(frame.iter_rows()) == LATENTS


def test_huggingface_loads_the_folder_and_only_its_samples(
    storage: Storage, published: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    loaded = datasets.load_dataset(storage.uri, split="train", cache_dir=str(tmp_path / "hf"))
    assert dict(zip(loaded["sample_id"], loaded["vae_latent_bytes"], strict=True)) == LATENTS
    streamed = datasets.load_dataset(storage.uri, split="train", streaming=True, cache_dir=str(tmp_path / "hf"))
    assert {row["sample_id"]: row["vae_latent_bytes"] for row in streamed} == LATENTS


def test_our_reader_reads_the_same_latents(storage: Storage, published: Manifest) -> None:
    import torch

    found = {item["sample_id"]: item["latent"].view(torch.int16).numpy().tobytes() for item in LatentDataset(storage.uri)}
    assert found == LATENTS
