"""What the exact engine does between its convolutions, as Triton kernels and in plain PyTorch: the same calls, the same numbers.

`twins` are the plain ones, `launch` calls the Triton `programs`. Triton is imported when it is first used.
"""

import functools
import importlib.util
import logging
import os
from typing import Protocol

import torch
from torch import Tensor, nn

from cogvae.kernels import twins
from cogvae.kernels.twins import Spread

logger = logging.getLogger(__name__)

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
    """Whether the Triton kernels run on a device. None: where it is CUDA, and Triton is installed and builds kernels.

    Raises: ImportError if they are wanted and Triton is not installed; ValueError if they are wanted elsewhere than
        on CUDA, where they run in Triton's interpreter only.
    """
    if wanted is False or device.type == "meta":
        return False
    if wanted:
        if not _has_triton():
            raise ImportError("use_triton=True, but triton is not installed: install it, or set use_triton to None or False")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"use_triton=True, but the model is on {device}: Triton kernels need a CUDA device. Set use_triton to None or "
                "False, or TRITON_INTERPRET=1 before Python starts to run them in Triton's interpreter, for tests"
            )
        return True
    return device.type == "cuda" and _has_triton() and _can_launch(device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _can_launch(device: torch.device) -> bool:
    """Whether Triton can build a kernel for this GPU and start it; a warning if not. Tried once a device."""
    try:
        find_operations(triton=True).finish(torch.zeros(1, 1, 1, 1, 1, device=device), 1, None, None)
    # Whatever is missing, a C compiler or support of an old GPU, the twins do without it.
    except Exception as error:
        logger.warning("Triton kernels cannot run, plain PyTorch does their work device=%s error=%r", device, error)
        return False
    return True


def find_operations(triton: bool) -> Operations:
    """The kernels, or their twins."""
    if not triton:
        return twins
    from cogvae.kernels import launch

    return launch
