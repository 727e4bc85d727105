"""Norm and activation of a piece in one go: the norm becomes a scale and a shift, at the latent's resolution.

Shape legend: B batch, C channels, G groups, T frames of a piece, H/W pixels or latent cells; t, h, w the latent's.
"""

import itertools
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from cogvae.blocks import SpatialNorm
from cogvae.exact.pieces import Activation


class Fill(Protocol):
    """Writes a piece, as a convolution is to see it, to `out`; `first_frame` counts the frames held before it."""

    def __call__(self, piece_BCTHW: Tensor, first_frame: int, out_BCTHW: Tensor) -> None: ...


def copy(piece_BCTHW: Tensor, first_frame: int, out_BCTHW: Tensor) -> None:
    """The piece as it is."""
    out_BCTHW.copy_(piece_BCTHW)


class NormAct:
    """act(norm(x)) of an activation whose statistics are complete."""

    def __init__(self, norm: nn.Module, act: nn.Module, x: Activation, z_BCthw: Tensor | None) -> None:
        group_norm = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        assert isinstance(group_norm, nn.GroupNorm)
        mean_BG, variance_BG = x.moments.mean_and_variance()
        each = group_norm.num_channels // group_norm.num_groups
        dtype = mean_BG.dtype
        scale_BC = (variance_BG + group_norm.eps).rsqrt().repeat_interleave(each, 1) * group_norm.weight.to(dtype)
        shift_BC = group_norm.bias.to(dtype) - mean_BG.repeat_interleave(each, 1) * scale_BC
        scale, shift = scale_BC[:, None, None, None], shift_BC[:, None, None, None]
        if isinstance(norm, SpatialNorm):
            assert z_BCthw is not None
            z = z_BCthw.permute(0, 2, 3, 4, 1).to(dtype)
            by_cell = _linear(norm.conv_y.conv, z)
            shift = by_cell * shift + _linear(norm.conv_b.conv, z)
            scale = by_cell.mul_(scale)
        self._scale_BthwC, self._shift_BthwC = scale, shift
        self._act, self._scale_shift_act = act, x.operations.scale_shift_act
        self._num_frames, self._paired = x.num_frames, x.paired

    def __call__(self, piece_BCTHW: Tensor, first_frame: int, out_BCTHW: Tensor) -> None:
        latent_frames = self._scale_BthwC.shape[1]

        def latent_frame(held: int) -> int:
            return find_latent_frame(held, self._num_frames, latent_frames, paired=self._paired)

        for t, run in itertools.groupby(range(piece_BCTHW.shape[2]), lambda i: latent_frame(first_frame + i)):
            frames = list(run)
            part, out = (x[:, :, frames[0] : frames[-1] + 1] for x in (piece_BCTHW, out_BCTHW))
            self._scale_shift_act(part, self._scale_BthwC[:, t], self._shift_BthwC[:, t], self._act, out)


def find_latent_frame(held: int, num_frames: int, latent_frames: int, *, paired: bool) -> int:
    """Which latent frame conditions a frame that is held, where a chunk of `num_frames` has `latent_frames`."""
    if latent_frames == 1:
        return 0
    alone = num_frames % 2
    frame = held * 2 - alone if paired and held >= alone else held
    if num_frames == latent_frames:
        return frame
    return alone + (frame - alone) // ((num_frames - alone) // (latent_frames - alone)) if frame >= alone else 0


def _linear(conv: nn.Conv3d, x_BTHWC: Tensor) -> Tensor:
    """A 1x1x1 convolution in the dtype of `x`, channels last."""
    bias = None if conv.bias is None else conv.bias.to(x_BTHWC.dtype)
    return F.linear(x_BTHWC, conv.weight.flatten(1).to(x_BTHWC.dtype), bias)


def project(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """A 1x1x1 convolution of a piece."""
    return F.linear(x_BCTHW.permute(0, 2, 3, 4, 1), conv.weight.flatten(1), conv.bias).permute(0, 4, 1, 2, 3)
