"""The decoder: a chunk of latent frames in, frames out.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels; t, h, w their latent counterparts.
"""

from torch import Tensor, nn

from cogvae.blocks import ResnetStack, SpatialNorm, UpBlock
from cogvae.config import VAEConfig
from cogvae.conv import CausalConv3d, Tails


class Decoder(nn.Module):
    """Levels of resnets that double the resolution, and the first of them also the frame count.

    Every norm is conditioned on the chunk's own latent.

    Source: matches diffusers' CogVideoXDecoder3D.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        last = len(channels) - 1
        latent_channels, num_groups = config.latent_channels, config.norm_num_groups
        resnet_options = {
            "num_groups": num_groups,
            "act_fn": config.act_fn,
            "latent_channels": latent_channels,
        }
        self.conv_in = CausalConv3d(latent_channels, channels[0], kernel_size=3)
        self.mid_block = ResnetStack(channels[0], channels[0], 2, **resnet_options)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                channels[max(level - 1, 0)],
                channels[level],
                config.layers_per_block + 1,
                upsample=level < last,
                compress_time=2**level < config.temporal_compression_ratio,
                **resnet_options,
            )
            for level in range(len(channels))
        )
        self.norm_out = SpatialNorm(channels[-1], latent_channels, num_groups)
        self.conv_act = nn.SiLU()
        self.conv_out = CausalConv3d(channels[-1], config.out_channels, kernel_size=3)

    def forward(self, z_BCthw: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        """[B, latent_channels, t, h, w] to [B, out_channels, T, H, W]."""
        h, tails = self.conv_in(z_BCthw, tails)
        for block in (self.mid_block, *self.up_blocks):
            h, tails = block(h, z_BCthw, tails)
        frames, tails = self.conv_out(self.conv_act(self.norm_out(h, z_BCthw)), tails)
        return frames, tails
