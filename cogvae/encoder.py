"""The encoder: a chunk of frames in, mean and log variance of its latent out.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels; t, h, w their latent counterparts.
"""

from torch import Tensor, nn

from cogvae.blocks import FIXED_EPS, DownBlock, ResnetStack
from cogvae.config import VAEConfig
from cogvae.conv import CausalConv3d, Tails


class Encoder(nn.Module):
    """Levels of resnets that halve the resolution, and the first of them also the frame count.

    Source: matches diffusers' CogVideoXEncoder3D.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        last = len(channels) - 1
        resnet_options = {
            "num_groups": config.norm_num_groups,
            "act_fn": config.act_fn,
            "eps": config.norm_eps,
        }
        self.conv_in = CausalConv3d(config.in_channels, channels[0], kernel_size=3)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                channels[max(level - 1, 0)],
                channels[level],
                config.layers_per_block,
                downsample=level < last,
                compress_time=2**level < config.temporal_compression_ratio,
                **resnet_options,
            )
            for level in range(len(channels))
        )
        self.mid_block = ResnetStack(channels[-1], channels[-1], 2, **resnet_options)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=FIXED_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels, kernel_size=3)

    def forward(self, x_BCTHW: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        """[B, in_channels, T, H, W] to [B, 2*latent_channels, t, h, w]."""
        h, tails = self.conv_in(x_BCTHW, tails)
        for block in (*self.down_blocks, self.mid_block):
            h, tails = block(h, None, tails)
        moments, tails = self.conv_out(self.conv_act(self.norm_out(h)), tails)
        return moments, tails
