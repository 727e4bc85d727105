"""How near a reconstruction comes to its source, as papers measure it.

Shape legend: B batch, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(clip: Tensor, other: Tensor, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB over all numbers of two clips; infinite where they are equal."""
    error = F.mse_loss(clip.double(), other.double()).item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim_map(x_NCHW: Tensor, y_NCHW: Tensor, peak: float) -> Tensor:
    """Structural similarity around every pixel that has a whole window, [N, C, H-10, W-10]; differentiable.

    Source: Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, biased moments, each channel by itself.
    """
    if min(x_NCHW.shape[-2:]) < _WINDOW:
        raise ValueError(f"frames of {list(x_NCHW.shape[-2:])} pixels are smaller than the window of {_WINDOW}")
    mean_x, mean_y = _blur(x_NCHW), _blur(y_NCHW)
    var_x = _blur(x_NCHW * x_NCHW) - mean_x * mean_x
    var_y = _blur(y_NCHW * y_NCHW) - mean_y * mean_y
    cov = _blur(x_NCHW * y_NCHW) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return brightness * (2 * cov + c2) / (var_x + var_y + c2)


def ssim(clip_CTHW: Tensor, other_CTHW: Tensor, peak: float = 255.0) -> float:
    """Mean structural similarity of two clips, frame by frame and channel by channel; 1 where they are equal."""
    x, y = clip_CTHW.double().transpose(0, 1), other_CTHW.double().transpose(0, 1)
    return ssim_map(x, y, peak).mean().item()


def _blur(x_NCHW: Tensor) -> Tensor:
    """The Gaussian window's mean; down the columns, then along the rows."""
    window = _window(x_NCHW.dtype, x_NCHW.device)
    planes = x_NCHW.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, window[None, None, :, None]), window[None, None, None, :])
    return torch.unflatten(blurred[:, 0], 0, x_NCHW.shape[:2])


@cache
def _window(dtype: torch.dtype, device: torch.device) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    return (weights / weights.sum()).to(device, dtype)
