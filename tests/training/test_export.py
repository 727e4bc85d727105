"""Exported weights load in diffusers, carry the scale of their own latents, and come with a card that says it all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX as Reference

from cogvae import AutoencoderKLCogVideoX
from tests.training.conftest import MakeConfig, tiny_config
from tests.training.test_data import CLIPS
from training.evaluate import ClipScore, latent_deviation, mean_scores, reconstruct, table
from training.trainer import WEIGHTS, Trainer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    held_out, videos = folder / "held_out", folder / "videos"
    held_out.mkdir()
    videos.mkdir()
    shutil.copy(CLIPS / "racing_car_1906.gif", held_out)
    shutil.copy(CLIPS / "cockatoo_anamorphic.mov", videos)
    (videos / "SOURCES.md").write_text("### Videos\n\n| `a-package` | 1.0 | CC0-1.0 |\n")
    trainer = Trainer(tiny_config(folder / "run", run={"steps": 2}, data={"held_out": str(held_out), "videos": str(videos)}))
    trainer.run()
    return trainer.folder / WEIGHTS


def test_an_export_is_what_diffusers_computes_with(exported: Path) -> None:
    ours, reference = AutoencoderKLCogVideoX.from_pretrained(exported), Reference.from_pretrained(exported)
    clip = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        found, expected = ours(clip)[0], reference(clip).sample
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_scaling_factor_brings_the_latents_to_a_deviation_of_one(exported: Path, make_config: MakeConfig) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(exported)
    data = Trainer(make_config("other")).data
    deviation = latent_deviation(vae, [data.batch(step) for step in range(40)])
    assert vae.config.scaling_factor * deviation == pytest.approx(1, rel=0.3)


def test_the_card_says_what_it_was_made_of_and_how_good_it_is(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "2 steps" in card
    assert "`racing_car_1906.gif` | 17x192x256 |" in card
    assert "cockatoo_anamorphic.mov" in card
    assert "| `a-package` | 1.0 | CC0-1.0 |" in card
    assert "python jobs/train_vae.py \\\n  --run.output run \\\n  --run.steps 2" in card
    assert str(exported.parents[1]) not in card
    assert "{" not in card.replace("{{", "")


def test_a_table_ends_with_its_mean() -> None:
    scores = [ClipScore(name=name, shape=(17, 8, 9), psnr=p, ssim=s) for name, p, s in (("a", 20.0, 0.5), ("b", 30.0, 0.7))]
    assert mean_scores(scores) == (25.0, pytest.approx(0.6))
    assert list(table(scores))[-2:] == ["| `b` | 17x8x9 | 30.00 | 0.700 |", "| **mean** | | **25.00** | **0.600** |"]


def test_a_reconstruction_has_the_form_of_its_source(make_config: MakeConfig) -> None:
    vae = Trainer(make_config()).averaged_vae()
    frames = (torch.rand(9, 16, 24, 3) * 255).byte().numpy()
    result = reconstruct(vae, frames)
    assert (result.shape, result.dtype) == (frames.shape, frames.dtype)
