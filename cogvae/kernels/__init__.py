"""What the exact engine does between its convolutions, as Triton kernels and in plain PyTorch: the same calls, the same numbers.

`twins` are the plain ones, `launch` calls the Triton `programs`. Triton is imported when it is first used.
"""

import functools
import importlib.util
from typing import Protocol

import torch
from torch import Tensor, nn

from cogvae.kernels import twins
from cogvae.kernels.twins import Spread

__all__ = ["Operations", "Spread", "choose_triton", "find_operations"]


class Operations(Protocol):
    """Two passes over a piece [B, C, T, H, W] of any strides: after a convolution, and before one."""

    @property
    def finish(self) -> "Finish": ...

    @property
    def scale_shift_act(self) -> "ScaleShiftAct": ...


class Finish(Protocol):
    def __call__(self, x_BCTHW: Tensor, num_groups: int, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> Spread:
        """Adds to x, in place, what is given, and measures the result's groups of channels.

        A residual of half as many frames has each stand for two.
        """
        ...


class ScaleShiftAct(Protocol):
    def __call__(self, x_BCTHW: Tensor, scale_BhwC: Tensor, shift_BhwC: Tensor, act: nn.Module, out_BCTHW: Tensor) -> None:
        """act(x * scale + shift), written to `out`; h and w divide H and W, and each of their cells stands for a block."""
        ...


def choose_triton(wanted: bool | None, device: torch.device) -> bool:
    """Whether the Triton kernels run on a device. None: where it is CUDA, and Triton is installed.

    Raises: ImportError if they are wanted and Triton is not installed.
    """
    if wanted is False or device.type == "meta":
        return False
    if wanted:
        if not _has_triton():
            raise ImportError("use_triton=True, but triton is not installed: install it, or set use_triton to None or False")
        return True
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def find_operations(triton: bool) -> Operations:
    """The kernels, or their twins."""
    if not triton:
        return twins
    from cogvae.kernels import launch

    return launch
