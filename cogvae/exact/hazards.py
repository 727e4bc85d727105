"""Convolutions of which a library is known to be wrong or slow: avoided where the engine can, else said once."""

import functools
import logging
import re

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# C*T*H up to which oneDNN leaves a float32 conv3d of one clip to slower code. Measured on an AVX-512 processor with
# torch 2.13: 1.8 to 2.3 times as slow as three conv2d at 9984 to 12288, no slower from 20992 on.
_SLOW_VOLUME = 20480


def is_slow_volume(device_type: str, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether conv3d of [B, C, T, H, W] is slower than a conv2d for each of its taps."""
    batch, channels, frames, height, _ = shape
    return device_type == "cpu" and dtype == torch.float32 and batch == 1 and channels * frames * height <= _SLOW_VOLUME


def find_hazard(device_type: str, dtype: torch.dtype, torch_version: str, cudnn_version: int | None) -> str | None:
    """What is known of 3D convolutions on such a system; cuDNN's version as torch gives it, 91002 for 9.10.2.

    Source: pytorch issues 163539, 163581, 166643.
    """
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or cudnn_version is None or cudnn_version < 90800:
        return None
    system = f"torch {torch_version} with cuDNN {_dotted(cudnn_version)}"
    release = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:3])
    if release < (2, 9):
        if dtype == torch.float16 or cudnn_version >= 91100:
            return None
        return f"{system} may give wrong results of conv3d in bfloat16: use torch 2.10 or newer, or float16 or float32"
    if release[:3] == (2, 9, 0) or cudnn_version < 91500:
        return (
            f"{system} does not use cuDNN for conv3d in 16 bits, which makes it several times slower and takes more "
            "memory: use torch 2.10 or newer, with cuDNN 9.15 or newer"
        )
    return None


def _dotted(cudnn_version: int) -> str:
    return f"{cudnn_version // 10000}.{cudnn_version // 100 % 100}.{cudnn_version % 100}"


def warn_of_hazards(x: Tensor) -> None:
    """Logs, once a process, what is known of this system's convolutions of such tensors."""
    cudnn_version: int | None = None
    if x.device.type == "cuda" and torch.version.hip is None:  # on ROCm it would be the version of another library
        cudnn_version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    hazard = find_hazard(x.device.type, x.dtype, torch.__version__, cudnn_version)
    if hazard is not None:
        _warn_once(hazard)


@functools.cache
def _warn_once(hazard: str) -> None:
    logger.warning("convolutions at risk: %s", hazard)
