"""What may go into the model, and what is said of anything else."""

import torch
from torch import Tensor

from cogvae.config import VAEConfig


def check_frames(x: Tensor, config: VAEConfig, *, uint8: bool = False) -> None:
    """Raises: ValueError unless these are frames [B, in_channels, T, H, W], floats or, if asked, pixels."""
    _check(x, "frames", config.in_channels, config.spatial_compression_ratio)
    if uint8 and x.dtype != torch.uint8:
        raise ValueError(f"frames of dtype {x.dtype} with uint8=True: expected torch.uint8")
    if not uint8 and not x.is_floating_point():
        raise ValueError(f"frames of dtype {x.dtype}: expected floats; uint8 frames become x / 127.5 - 1")


def check_latents(z: Tensor, config: VAEConfig) -> None:
    """Raises: ValueError unless these are latents [B, latent_channels, t, h, w] of floats."""
    _check(z, "latents", config.latent_channels, 1)
    if not z.is_floating_point():
        raise ValueError(f"latents of dtype {z.dtype}: expected floats")


def _check(x: Tensor, what: str, channels: int, smallest: int) -> None:
    shape = list(x.shape)
    if len(shape) != 5 or shape[1] != channels:
        raise ValueError(
            f"{what} of shape {shape}: expected [batch, {channels}, frames, height, width]. An image is "
            "a clip of one frame: image[:, :, None]."
        )
    if min(shape[0], shape[2]) < 1 or min(shape[3:]) < smallest:
        raise ValueError(
            f"{what} of shape {shape}: expected one clip and one frame at least, height and width {smallest} at least"
        )
