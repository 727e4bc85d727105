"""PSNR and SSIM against values worked out by hand and against a loop that follows the paper word by word."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from training.metrics import psnr, ssim


def test_psnr_of_a_known_error() -> None:
    clip = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    assert psnr(clip, clip + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(clip, clip + 255) == pytest.approx(0.0, abs=1e-12)
    assert psnr(clip, clip) == math.inf


def reference_ssim(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], peak: float) -> float:
    """One channel of one frame, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def test_ssim_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(5)
    source = rng.uniform(0, 255, (3, 2, 16, 20))
    noisy = np.clip(source + rng.normal(0, 40, source.shape), 0, 255)
    expected = np.mean([reference_ssim(source[c, t], noisy[c, t], 255.0) for c in range(3) for t in range(2)])
    assert 0.3 < expected < 0.99
    assert ssim(torch.from_numpy(source), torch.from_numpy(noisy)) == pytest.approx(expected, abs=1e-9)


def test_ssim_of_equal_clips_is_one() -> None:
    clip = torch.randint(0, 256, (3, 2, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert ssim(clip, clip) == pytest.approx(1.0)


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="smaller than the window of 11"):
        ssim(torch.zeros(3, 1, 10, 16), torch.zeros(3, 1, 10, 16))
