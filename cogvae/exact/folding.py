"""Kernels that do the work of several: sums of a convolution's own, made from its live weights.

Sums are formed in float32 at least and then rounded to the weights' dtype once.

Shape legend: O and I channels out and in, 3x3x3 time, height, width; weights are [O, I, ...].
"""

import torch
from torch import Tensor

from cogvae.kernels.twins import wide


def fold_still(weight_OI333: Tensor) -> Tensor:
    """[O, I, 3, 3] for a frame whose past are copies of itself: the three taps see the same."""
    return _plane(weight_OI333.sum(2, dtype=wide(weight_OI333.dtype)), weight_OI333)


def fold_still_in_halves(weight_OI333: Tensor) -> Tensor:
    """[O, I, 2, 3, 3] for the same, of 16 bits: the sum and what its rounding leaves, for two copies of the frame.

    An image has no other kernels, and rounding each would show: every layer would be a little off in the same way.
    """
    total = weight_OI333.sum(2, dtype=wide(weight_OI333.dtype))
    rounded = total.to(weight_OI333.dtype)
    return _volume(torch.stack([rounded, total - rounded], dim=2), weight_OI333)


def taps(weight_OI333: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One [O, I, 3, 3] for each frame that is seen, the earliest first."""
    first, second, third = weight_OI333.unbind(2)
    return _plane(first, first), _plane(second, second), _plane(third, third)


def fold_two_frames(weight_OI333: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four [O, I, 3, 3] that give two frames of output where the taps one by one would take six.

    Source: minimal filtering F(2,3), Winograd 1980, along time; see `causal.convolve_two_frames`.
    """
    first, second, third = weight_OI333.unbind(2)
    outer, inner = (first + third).mul_(0.5), second * 0.5
    return _plane(first, first), _plane(outer + inner, first), _plane(outer.sub_(inner), first), _plane(third, third)


def fold_pairs(weight_OI333: Tensor) -> tuple[Tensor, Tensor]:
    """Two [O, I, 2, 3, 3] for frames that come in equal pairs: of the earlier and of the later frame of a pair.

    Each sees two different frames, of which one fills two taps.
    """
    first, second, third = weight_OI333.to(wide(weight_OI333.dtype)).unbind(2)
    earlier = torch.stack([first + second, third], dim=2)
    later = torch.stack([first, second + third], dim=2)
    return _volume(earlier, weight_OI333), _volume(later, weight_OI333)


def fold_upsample(weight_OI33: Tensor) -> Tensor:
    """[I, O, 4, 4] of the transposed convolution, stride 2 and padding 1, that doubles by repetition and convolves."""
    w = weight_OI33.to(wide(weight_OI33.dtype))
    rows = torch.stack([w[:, :, 2], w[:, :, 1] + w[:, :, 2], w[:, :, 0] + w[:, :, 1], w[:, :, 0]], dim=2)
    both = torch.stack([rows[..., 2], rows[..., 1] + rows[..., 2], rows[..., 0] + rows[..., 1], rows[..., 0]], dim=3)
    return _plane(both.transpose(0, 1), weight_OI33)


def _plane(kernel: Tensor, like: Tensor) -> Tensor:
    return kernel.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _volume(kernel: Tensor, like: Tensor) -> Tensor:
    return kernel.to(like.dtype).contiguous(memory_format=torch.channels_last_3d)
