"""Settings of training: shapes are checked, and every shipped configuration loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvae import AutoencoderKLCogVideoX
from pipeline.command_line import load_config_file
from training.config import BatchShape, TrainConfig
from training.trainer import build_vae

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "training"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_loads(path: Path) -> None:
    TrainConfig(**load_config_file(path))


def test_the_small_model_has_the_published_compression_and_fits_in_five_megabytes() -> None:
    vae: AutoencoderKLCogVideoX = build_vae(TrainConfig(**load_config_file(CONFIGS / "small.yaml")))
    config = vae.config
    assert (config.spatial_compression_ratio, config.temporal_compression_ratio, config.latent_channels) == (8, 4, 16)
    assert 2 * vae.num_parameters() <= 5_000_000


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("9x64x64", "is not of the form"),
        ("4x8x64x64", "8k\\+1"),
        ("0x9x64x64", "at least 1 clip"),
        ("4x9x60x64", "multiples of 16"),
    ],
)
def test_a_shape_that_cannot_be_trained_on_is_refused(key: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BatchShape.parse(key)


def test_shapes_may_stand_in_one_string() -> None:
    config = TrainConfig(run={"output": "x"}, data={"shapes": "4x9x64x64, 2x17x32x48"})  # type: ignore[arg-type]
    assert [shape.key for shape in config.shapes] == ["4x9x64x64", "2x17x32x48"]
