"""What the encoder and the decoder are stacked from: norms, resnets, and levels of resnets.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels or latent cells. z is the chunk's latent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvae.conv import CausalConv3d, Downsample, Tails, Upsample, convolve, resize_nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}
# Of every norm but those of the encoder's resnets, which take the config's norm_eps.
FIXED_EPS = 1e-6


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read from the latent, cell by cell.

    The two 1x1x1 convolutions run at latent resolution and their results are repeated up to the size of `x`.
    diffusers repeats the latent first: the same numbers for up to 256 times the work.

    Source: MoVQ, arXiv:2209.09002; matches diffusers' CogVideoXSpatialNorm3D.
    """

    def __init__(self, channels: int, latent_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=FIXED_EPS)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor) -> Tensor:
        normed: Tensor = self.norm_layer(x_BCTHW)
        # A 1x1x1 convolution has no past, hence no tails.
        scale, _ = self.conv_y(z_BCTHW, Tails())
        shift, _ = self.conv_b(z_BCTHW, Tails())
        size = x_BCTHW.shape[2:]
        return normed * resize_nearest(scale, *size) + resize_nearest(shift, *size)


class ResnetBlock(nn.Module):
    """norm, activation, causal convolution, twice; added to the input or to its 1x1x1 projection.

    With `latent_channels` the norms are conditioned on the latent; without, they are GroupNorms with `eps`.

    Source: matches diffusers' CogVideoXResnetBlock3D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int,
        act_fn: str,
        eps: float = FIXED_EPS,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latent_channels is None:
                return nn.GroupNorm(num_groups, channels, eps=eps)
            return SpatialNorm(channels, latent_channels, num_groups)

        self.act = ACTIVATIONS[act_fn.lower()]()
        # In diffusers' order, which optimizer states and seeded initialisation depend on.
        self.norm1 = norm(in_channels)
        self.norm2 = norm(out_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_size=3)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_size=3)
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor | None, tails: Tails) -> tuple[Tensor, Tails]:
        condition = () if z_BCTHW is None else (z_BCTHW,)
        h, tails = self.conv1(self.act(self.norm1(x_BCTHW, *condition)), tails)
        h, tails = self.conv2(self.act(self.norm2(h, *condition)), tails)
        if self.conv_shortcut is not None:
            x_BCTHW = convolve(self.conv_shortcut, x_BCTHW)
        return h + x_BCTHW, tails


class ResnetStack(nn.Module):
    """Resnets in a row at one resolution: the middle of both networks, and the base of their levels.

    Source: matches diffusers' CogVideoXMidBlock3D.
    """

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, **resnet_options: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, **resnet_options) for i in range(num_layers)
        )
        self.gradient_checkpointing = False
        self.checkpoint_func: Callable[..., Any] = checkpoint_without_reentry

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor | None, tails: Tails) -> tuple[Tensor, Tails]:
        for resnet in self.resnets:
            # Tails go in and come out as values, so a recomputed resnet sees the past of its own chunk.
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BCTHW, tails = self.checkpoint_func(resnet, x_BCTHW, z_BCTHW, tails)
            else:
                x_BCTHW, tails = resnet(x_BCTHW, z_BCTHW, tails)
        return x_BCTHW, tails


class DownBlock(ResnetStack):
    """A level of the encoder: resnets, then half the resolution unless it is the last level.

    Source: matches diffusers' CogVideoXDownBlock3D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        downsample: bool,
        compress_time: bool,
        **resnet_options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, **resnet_options)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, compress_time)] if downsample else [])

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor | None, tails: Tails) -> tuple[Tensor, Tails]:
        x_BCTHW, tails = super().forward(x_BCTHW, z_BCTHW, tails)
        for downsampler in self.downsamplers:
            x_BCTHW = downsampler(x_BCTHW)
        return x_BCTHW, tails


class UpBlock(ResnetStack):
    """A level of the decoder: resnets, then twice the resolution unless it is the last level.

    Source: matches diffusers' CogVideoXUpBlock3D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        upsample: bool,
        compress_time: bool,
        **resnet_options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, **resnet_options)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, compress_time)] if upsample else [])

    def forward(self, x_BCTHW: Tensor, z_BCTHW: Tensor | None, tails: Tails) -> tuple[Tensor, Tails]:
        x_BCTHW, tails = super().forward(x_BCTHW, z_BCTHW, tails)
        for upsampler in self.upsamplers:
            x_BCTHW = upsampler(x_BCTHW)
        return x_BCTHW, tails


def checkpoint_without_reentry(module: nn.Module, *args: Any) -> Any:
    """Runs a module without storing its activations; they are computed again in the backward pass."""
    return checkpoint(module, *args, use_reentrant=False)
