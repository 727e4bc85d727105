"""Rendered pictures and scenes: functions of their seed, in range, in motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.config import BatchShape
from training.pictures import Picture, render_picture, render_pictures, spectral_noise
from training.scenes import Motion, render_clip

SHAPE = BatchShape.parse("1x9x32x48")


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return render_pictures(seed=4, count=6, side=128)


def scene(pictures: list[Picture], seed: int) -> torch.Tensor:
    return render_clip(np.random.default_rng(seed), lambda rng: pictures[rng.integers(len(pictures))], SHAPE)


def test_a_scene_is_a_function_of_its_seed(pictures: list[Picture]) -> None:
    assert torch.equal(scene(pictures, 1), scene(pictures, 1))
    assert not torch.equal(scene(pictures, 1), scene(pictures, 2))


def test_a_scene_has_its_shape_and_range_and_is_not_flat(pictures: list[Picture]) -> None:
    deviations = []
    for seed in range(30):
        clip = scene(pictures, seed)
        assert clip.shape == (3, 9, 32, 48)
        assert clip.isfinite().all()
        assert clip.min() >= 0
        assert clip.max() <= 1
        deviations.append(clip.std().item())
    assert np.median(deviations) > 0.05


def test_most_scenes_move_and_some_stand_still(pictures: list[Picture]) -> None:
    changes = []
    for seed in range(60):
        clip = scene(pictures, seed)
        changes.append((clip[:, 0] - clip[:, 8]).abs().mean().item())
    assert np.quantile(changes, 0.75) > 0.05
    assert np.quantile(changes, 0.05) < 0.03


def test_a_motion_begins_at_rest() -> None:
    motion = Motion.draw(np.random.default_rng(0), 9, 0.0)
    assert motion.x.tolist() == motion.y.tolist() == motion.turn.tolist() == [0.0] * 9
    assert motion.size.tolist() == [1.0] * 9


def test_pictures_are_functions_of_seed_and_number() -> None:
    first, again = render_pictures(seed=4, count=3, side=96), render_pictures(seed=4, count=2, side=96)
    assert all(torch.equal(a.levels[0], b.levels[0]) for a, b in zip(first[:2], again, strict=True))
    assert not torch.equal(first[0].levels[0], first[1].levels[0])


def test_every_kind_of_picture_is_in_range() -> None:
    for seed in range(16):
        pixels = render_picture(np.random.default_rng(seed), 96)
        assert pixels.shape == (96, 96, 3)
        assert pixels.min() >= 0
        assert pixels.max() <= 1


def test_levels_of_a_picture_are_halvings() -> None:
    picture = Picture.of("p", torch.arange(3 * 200 * 100, dtype=torch.float32).reshape(3, 200, 100).remainder(256).byte())
    assert [list(level.shape) for level in picture.levels] == [[3, 200, 100], [3, 100, 50]]
    expected = picture.levels[0][:, :2, :2].float().mean(dim=(1, 2))
    assert (picture.levels[1][:, 0, 0].float() - expected).abs().max() <= 0.5


def test_noise_has_the_spectrum_asked_for() -> None:
    noise = spectral_noise(np.random.default_rng(0), 256, 1.0)
    power = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None, :])
    low = power[(frequency > 0.02) & (frequency < 0.03)].mean()
    high = power[(frequency > 0.2) & (frequency < 0.3)].mean()
    assert low / high == pytest.approx(100, rel=0.3)
