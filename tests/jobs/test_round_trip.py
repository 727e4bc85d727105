"""A finished dataset through every reader and back to pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.dataset as arrow_dataset
import pytest
import torch

from pipeline.config import RunConfig
from pipeline.dataset import LatentDataset
from pipeline.driver import run_encode
from pipeline.engine import VaeEngine, load_engine
from pipeline.show import decode_sample, describe
from pipeline.types import TensorBytes

Row = dict[str, Any]


def by_pyarrow(dataset: str, sample_id: str) -> Row:
    table = arrow_dataset.dataset(f"{dataset}/data", partitioning="hive").to_table(
        filter=arrow_dataset.field("sample_id") == sample_id
    )
    return table.to_pylist()[0]


def by_duckdb(dataset: str, sample_id: str) -> Row:
    import duckdb

    with duckdb.connect() as connection:
        result = connection.execute(f"select * from '{dataset}/data/**/*.parquet' where sample_id = ?", [sample_id])
        names = [column[0] for column in result.description]
        (row,) = result.fetchall()
    return dict(zip(names, row, strict=True))


def by_polars(dataset: str, sample_id: str) -> Row:
    import polars

    scan = polars.scan_parquet(f"{dataset}/data/**/*.parquet")
    return scan.filter(polars.col("sample_id") == sample_id).collect().row(0, named=True)


def by_datasets(dataset: str, sample_id: str) -> Row:
    import datasets

    rows = datasets.load_dataset(dataset, split="train", cache_dir=f"{dataset}/../hf-cache")
    return next(row for row in rows if row["sample_id"] == sample_id)


@pytest.fixture
def encoded(cluster: None, make_config: Any) -> RunConfig:
    config = make_config()
    run_encode(config)
    return config


def test_one_latent_decodes_to_the_same_frames_through_every_reader(encoded: RunConfig) -> None:
    dataset = LatentDataset(encoded.output.uri)
    item = dataset[1]
    engine = load_engine(encoded, None, "cpu", 1)
    (frames,) = engine.decode([item["latent"]])
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (9, 32, 48, 3)
    assert frames.std() > 1
    readers: tuple[Callable[[str, str], Row], ...] = (by_pyarrow, by_duckdb, by_polars, by_datasets)
    for read in readers:
        row = read(encoded.output.uri, item["sample_id"])
        latent = torch.frombuffer(bytearray(row["vae_latent_bytes"]), dtype=torch.float32).view(row["vae_latent_shape"])
        np.testing.assert_array_equal(engine.decode([latent])[0], frames, err_msg=read.__name__)


def test_a_dataset_is_described_and_a_latent_becomes_a_video(encoded: RunConfig, tmp_path: Path) -> None:
    lines = list(describe(encoded.output.uri))
    assert lines[0].startswith("4 samples")
    assert any("rabbit" in line for line in lines)
    video = tmp_path / "decoded.mp4"
    decode_sample(encoded.output.uri, 0, video)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate)) == (48, 32, 8.0)
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert list(tmp_path.glob(".*.partial")) == []


def test_the_engine_quarantines_a_latent_that_is_not_finite(encoded: RunConfig) -> None:
    engine: VaeEngine = load_engine(encoded, None, "cpu", 1)
    for parameter in engine._vae.encoder.conv_out.parameters():
        parameter.fill_(float("nan"))
    (result,) = engine.encode([np.zeros((9, 32, 48, 3), np.uint8)])
    assert getattr(result, "reason", None) == "not_finite"


def test_stored_bytes_are_the_model_s_own_posterior(encoded: RunConfig) -> None:
    from cogvae import AutoencoderKLCogVideoX

    frames = np.random.default_rng(5).integers(0, 256, (2, 9, 32, 48, 3), np.uint8)
    engine = load_engine(encoded, None, "cpu", 1)
    vae = AutoencoderKLCogVideoX.from_pretrained(encoded.vae.weights)
    x = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.inference_mode():
        expected = vae.encode(x).latent_dist
    for clip, mean in zip(engine.encode(list(frames)), expected.mean, strict=True):
        assert isinstance(clip.latent, TensorBytes)  # type: ignore[union-attr]
        np.testing.assert_array_equal(np.frombuffer(clip.latent.data, np.float32).reshape(mean.shape), mean.numpy())  # type: ignore[union-attr]
