"""The plain PyTorch twins of the Triton kernels; on a processor they are what runs.

Shape legend: B batch, C channels, G groups, T frames of a piece, H/W pixels or latent cells; h, w the latent's.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a piece that is centred at once: keeps the copy inside a processor's cache, or at least small.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class Spread:
    """How many values a group of a clip has, their mean, and the sum of their squared deviations from it."""

    count: int
    mean_BG: Tensor
    squares_BG: Tensor

    def times(self, times: int) -> "Spread":
        """Of the same values, each so many times."""
        return self if times == 1 else Spread(self.count * times, self.mean_BG, self.squares_BG * times)

    def merge(self, other: "Spread") -> "Spread":
        """Of the values of both.

        Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        total = self.count + other.count
        delta_BG = other.mean_BG - self.mean_BG
        squares_BG = self.squares_BG + other.squares_BG + delta_BG.square() * (self.count * other.count / total)
        return Spread(total, self.mean_BG + delta_BG * (other.count / total), squares_BG)


def finish(x_BCTHW: Tensor, num_groups: int, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> Spread:
    """As `Operations.finish`. Every block is centred on its own mean before it is squared, so that nothing cancels."""
    if bias_C is not None:
        _add_both(x_BCTHW, bias_C, residual_BCTHW)
    elif residual_BCTHW is not None:
        by_residual(x_BCTHW, residual_BCTHW.shape[2]).add_(residual_BCTHW.unsqueeze(3))
    frame = x_BCTHW[:, :, 0].numel()
    blocks = torch.split(x_BCTHW, max(1, _BLOCK_ELEMENTS // frame), dim=2)
    return functools.reduce(Spread.merge, (_measure(block, num_groups) for block in blocks))


def by_residual(x_BCTHW: Tensor, frames: int) -> Tensor:
    """A view [B, C, frames, T / frames, H, W]: what a residual's frame stands for is in a dimension of its own."""
    return torch.unflatten(x_BCTHW, 2, (frames, -1))


def _add_both(x_BCTHW: Tensor, bias_C: Tensor, residual_BCTHW: Tensor | None) -> None:
    """Rounds once."""
    total = x_BCTHW.to(wide(x_BCTHW.dtype)) + bias_C[:, None, None, None]
    if residual_BCTHW is not None:
        by_residual(total, residual_BCTHW.shape[2]).add_(residual_BCTHW.unsqueeze(3))
    x_BCTHW.copy_(total)


def _measure(block_BCTHW: Tensor, num_groups: int) -> Spread:
    values = block_BCTHW.permute(0, 2, 3, 4, 1)
    batch, dtype = values.shape[0], wide(values.dtype)
    mean_BG = values.mean(dim=(1, 2, 3), dtype=dtype).view(batch, num_groups, -1).mean(2)
    centre = mean_BG.repeat_interleave(values.shape[-1] // num_groups, 1)[:, None, None, None]
    squares_BG = (values - centre).square_().sum(dim=(1, 2, 3)).view(batch, num_groups, -1).sum(2)
    return Spread(block_BCTHW[0].numel() // num_groups, mean_BG, squares_BG)


def scale_shift_act(x_BCTHW: Tensor, scale_BhwC: Tensor, shift_BhwC: Tensor, act: nn.Module, out_BCTHW: Tensor) -> None:
    """As `Operations.scale_shift_act`."""
    rows, columns = scale_BhwC.shape[1:3]
    x, out = (_cells(part, rows, columns) for part in (x_BCTHW, out_BCTHW))
    scale, shift = (part[:, None, :, None, :, None] for part in (scale_BhwC, shift_BhwC))
    if x.dtype == scale.dtype:
        torch.addcmul(shift, x, scale, out=out)
        _activate(act, out)
    else:
        out.copy_(_activate(act, x.to(scale.dtype).mul_(scale).add_(shift)))


def _cells(x_BCTHW: Tensor, rows: int, columns: int) -> Tensor:
    """A view [B, T, h, H/h, w, W/w, C]: what a latent cell spans stands in dimensions of its own."""
    channels_last = x_BCTHW.permute(0, 2, 3, 4, 1)
    return torch.unflatten(torch.unflatten(channels_last, 3, (columns, -1)), 2, (rows, -1))


def _activate(act: nn.Module, x: Tensor) -> Tensor:
    """Applies an activation in place."""
    return F.silu(x, inplace=True) if isinstance(act, nn.SiLU) else x.copy_(act(x))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
