"""From a model's latents back to what the VAE decodes: the scale undone, the front pad dropped."""

from __future__ import annotations

import math
from typing import Literal

import torch

from pipeline.dataset.scaling import MODELS, Convention, Role, pads_time, scaling_multiplier
from pipeline.errors import ConfigError, TerminalError

NO_SCALE = "none"
SCALE_CHOICES = f"none, a number, or one of {', '.join(MODELS)}"


def find_multiplier(scale: str | float, role: Role = "video", convention: Convention = "diffusers") -> float | None:
    """What latents were multiplied by; None: nothing.

    Args:
        scale: ``none``, a number, or a model such as ``cogvideox-5b``.
        role: ``first_frame``: the image latents of an image-to-video model.

    Raises:
        ConfigError: an unknown model, role or convention, or a number that is no scale.
    """
    if scale == NO_SCALE:
        return None
    if isinstance(scale, int | float) and not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale {scale} must be a number above 0; choose {SCALE_CHOICES}")
    return scaling_multiplier(scale, role, convention)


def unscale(latent: torch.Tensor, scale: str | float, role: Role = "video", convention: Convention = "diffusers") -> torch.Tensor:
    """A latent as the VAE decodes it: float32, or with ``none`` the tensor itself. Raises: ConfigError: as above."""
    multiplier = find_multiplier(scale, role, convention)
    return latent if multiplier is None else latent.float() / multiplier


def count_pad(num_frames: int, scale: str | float, drop_frames: int | Literal["auto"] = "auto") -> int:
    """Latent frames in front that are no part of the clip.

    Args:
        num_frames: latent frames as they are found.
        drop_frames: ``auto``: one where a 1.5 model is named and the frames are even in number.

    Raises:
        TerminalError: nothing would be left.
        ConfigError: an unknown model.
    """
    if drop_frames == "auto":
        is_model = isinstance(scale, str) and scale != NO_SCALE
        return int(is_model and num_frames % 2 == 0 and pads_time(str(scale)))
    if drop_frames >= num_frames:
        raise TerminalError("read", "too_short", f"it has {num_frames} latent frames, and input.drop_frames is {drop_frames}")
    return drop_frames


def drop_pad(latent: torch.Tensor, scale: str | float, drop_frames: int | Literal["auto"] = "auto") -> torch.Tensor:
    """``[C, F, H, W]`` without the frames that ``count_pad`` counts; a view. Raises: as ``count_pad``."""
    return latent[:, count_pad(latent.shape[1], scale, drop_frames) :]
