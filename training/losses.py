"""What training makes small. No term needs a network of its own.

Shape legend: B batch, C channels, T frames, H/W pixels; N all frames of all clips.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvae import DiagonalGaussianDistribution
from training.config import LossConfig
from training.metrics import ssim_map

_SMOOTH = 0.02
"""Errors well below this count as their square, errors well above as their size. Frames reach from -1 to 1."""
_PYRAMID_LEVELS = 3
_LUMA = (0.299, 0.587, 0.114)


def loss_terms(output_BCTHW: Tensor, target_BCTHW: Tensor, posterior: DiagonalGaussianDistribution) -> dict[str, Tensor]:
    """Every term of the loss by name, unweighted, computed in float32. Frames reach from -1 to 1."""
    x, y = _frames(output_BCTHW.float()), _frames(target_BCTHW.float())
    return {
        "pixel": charbonnier(x - y),
        "pyramid": pyramid_error(x - y),
        "structure": 1 - ssim_map(_luma(x), _luma(y), peak=2.0).mean(),
        "kl": kl_per_number(posterior),
    }


def total_loss(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    return terms["pixel"] + weights.pyramid * terms["pyramid"] + weights.structure * terms["structure"] + weights.kl * terms["kl"]


def charbonnier(error: Tensor) -> Tensor:
    """Mean of a smooth absolute value: sqrt(e^2 + s^2) - s."""
    return (torch.sqrt(error * error + _SMOOTH**2) - _SMOOTH).mean()


def pyramid_error(error_NCHW: Tensor) -> Tensor:
    """Mean over the levels of a Laplacian pyramid of the error: each octave of detail counts alike.

    The pyramid is linear, so the pyramid of the error is the error of the pyramids.
    """
    total = error_NCHW.new_zeros(())
    for _ in range(_PYRAMID_LEVELS):
        small = F.avg_pool2d(error_NCHW, 2)
        total = total + charbonnier(error_NCHW - F.interpolate(small, scale_factor=2.0, mode="nearest"))
        error_NCHW = small
    return (total + charbonnier(error_NCHW)) / (_PYRAMID_LEVELS + 1)


def kl_per_number(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Divergence from the standard normal in nats, mean over all latent numbers."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean * mean + logvar.exp() - 1 - logvar).mean()


def _frames(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _luma(x_NCHW: Tensor) -> Tensor:
    weights = x_NCHW.new_tensor(_LUMA)
    return (x_NCHW * weights[:, None, None]).sum(1, keepdim=True)
