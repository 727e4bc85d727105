"""Batches depend on seed and step alone; photos and videos are read; the demo's clips are what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import MakeConfig
from training.config import BatchShape
from training.data import TrainingData, cut_from, decode_for_training, decode_held_out
from training.pictures import load_photos

CLIPS = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "clips"


def data_of(make_config: MakeConfig, **settings: object) -> TrainingData:
    config = make_config(data=settings)
    return TrainingData(config.data, config.shapes, seed=3)


def test_a_batch_is_a_function_of_its_step(make_config: MakeConfig) -> None:
    data, again = data_of(make_config), data_of(make_config)
    later = again.batch(5)
    assert torch.equal(data.batch(4), again.batch(4))
    assert torch.equal(data.batch(5), later)
    assert not torch.equal(data.batch(4)[:, :, :9], later[:, :, :9])


def test_batches_have_the_shapes_of_the_configuration_and_their_range(make_config: MakeConfig) -> None:
    data = data_of(make_config)
    batches = [data.batch(step) for step in range(12)]
    assert {tuple(batch.shape) for batch in batches} == {(2, 3, 9, 16, 16), (2, 3, 17, 16, 16)}
    assert min(batch.min() for batch in batches) >= -1
    assert max(batch.max() for batch in batches) <= 1
    assert min(batch.min() for batch in batches) < -0.5


def test_photos_are_used(make_config: MakeConfig, tmp_path: Path) -> None:
    Image.new("RGB", (200, 150), (255, 0, 0)).save(tmp_path / "red.png")
    data = data_of(make_config, photos=str(tmp_path), photo_share=1.0)
    assert data.num_photos == 1
    red, green, _ = data.batch(0).mean(dim=(0, 2, 3, 4))
    assert red > green + 0.3


def test_large_photos_are_reduced_and_tiny_ones_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (2400, 1200)).save(tmp_path / "large.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "tiny.png")
    (tmp_path / "SOURCES.md").write_text("about")
    [photo] = load_photos(str(tmp_path))
    assert photo.levels[0].shape == (3, 800, 1600)


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file ending in"):
        load_photos(str(tmp_path))


def test_videos_to_train_on_come_through_the_pipeline(tmp_path: Path) -> None:
    shutil.copy(CLIPS / "bunny_wakes_up.mp4", tmp_path)
    [video] = decode_for_training(str(tmp_path))
    assert (video.name, video.fps, video.frames.shape) == ("bunny_wakes_up.mp4", 25.0, (73, 352, 640, 3))


def test_held_out_clips_are_those_of_the_demo_without_the_broken_one() -> None:
    clips = decode_held_out(str(CLIPS))
    videos = {p.name for p in CLIPS.iterdir() if p.suffix not in (".md", ".txt", ".json")}
    assert {clip.name for clip in clips} == videos - {"broken.mp4"}
    for clip in clips:
        assert clip.frames.shape[0] == 17
        assert 128 <= min(clip.frames.shape[1:3]) <= max(clip.frames.shape[1:3]) <= 256


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no video there that can be decoded"):
        decode_held_out(str(tmp_path))


@pytest.mark.parametrize("size", [(20, 40, 50), (64, 16, 16), (17, 12, 100)])
def test_cuts_fit_videos_of_any_size(size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    for _ in range(10):
        clip = cut_from(rng, frames, BatchShape.parse("1x17x16x32"))
        assert clip.shape == (3, 17, 16, 32)
        assert 0 <= clip.min() <= clip.max() <= 1
