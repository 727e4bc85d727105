"""The exact engine as the frame loop of a clip.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels; t, h, w their latent counterparts.
"""

from torch import Tensor, nn

from cogvae.chunks import FrameLoop
from cogvae.decoder import Decoder
from cogvae.encoder import Encoder
from cogvae.exact.causal import Past
from cogvae.exact.memory import find_plan
from cogvae.exact.network import ExactDecoder, ExactEncoder
from cogvae.exact.plan import Limits


def encoding_loop(
    encoder: Encoder, quant_conv: nn.Module | None, first_BCTHW: Tensor, is_last: bool, limits: Limits
) -> FrameLoop[Past]:
    """The loop of a clip whose first chunk this is."""
    network = ExactEncoder(encoder, find_plan(limits, encoder, first_BCTHW, is_last))

    def encode(x_BCTHW: Tensor, past: Past) -> tuple[Tensor, Past]:
        moments, past = network(x_BCTHW, past)
        return (moments if quant_conv is None else quant_conv(moments)), past

    return FrameLoop(encode, Past())


def decoding_loop(
    decoder: Decoder, post_quant_conv: nn.Module | None, first_BCthw: Tensor, is_last: bool, limits: Limits
) -> FrameLoop[Past]:
    """The loop of a clip whose first chunk of latents this is."""
    network = ExactDecoder(decoder, find_plan(limits, decoder, first_BCthw, is_last))

    def decode(z_BCthw: Tensor, past: Past) -> tuple[Tensor, Past]:
        return network(z_BCthw if post_quant_conv is None else post_quant_conv(z_BCthw), past)

    return FrameLoop(decode, Past())
