"""The exact engine as the frame loop of a clip.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels; t, h, w their latent counterparts.
"""

import torch
from torch import Tensor, nn

from cogvae.chunks import ChunkFunction, FrameLoop
from cogvae.decoder import Decoder
from cogvae.encoder import Encoder
from cogvae.exact.causal import Past
from cogvae.exact.memory import find_plan
from cogvae.exact.network import ExactDecoder, ExactEncoder
from cogvae.exact.plan import Limits
from cogvae.precision import cast


def encoding_loop(
    encoder: Encoder, quant_conv: nn.Module | None, first_BCTHW: Tensor, is_last: bool, limits: Limits
) -> ChunkFunction:
    """The loop of a clip whose first chunk this is."""
    network = ExactEncoder(encoder, find_plan(limits, encoder, first_BCTHW, is_last))

    def encode(x_BCTHW: Tensor, past: Past) -> tuple[Tensor, Past]:
        moments, past = network(x_BCTHW, past)
        return (moments if quant_conv is None else quant_conv(cast(moments, quant_conv))), past

    return _without_gradients(FrameLoop(encode, Past()), "encode_stream")


def decoding_loop(
    decoder: Decoder, post_quant_conv: nn.Module | None, first_BCthw: Tensor, is_last: bool, limits: Limits
) -> ChunkFunction:
    """The loop of a clip whose first chunk of latents this is."""
    network = ExactDecoder(decoder, find_plan(limits, decoder, cast(first_BCthw, decoder), is_last))

    def decode(z_BCthw: Tensor, past: Past) -> tuple[Tensor, Past]:
        if post_quant_conv is not None:
            z_BCthw = cast(post_quant_conv(z_BCthw), decoder)
        return network(z_BCthw, past)

    return _without_gradients(FrameLoop(decode, Past()), "decode_stream")


def _without_gradients(loop: FrameLoop[Past], stream: str) -> ChunkFunction:
    """The loop for a clip of which no chunk is to pass gradients on: the engine was chosen when the first came."""

    def run(chunk_BCTHW: Tensor, is_last: bool) -> Tensor:
        if chunk_BCTHW.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{stream}: a chunk requires gradients in a stream that began without. Begin with one that requires them, "
                "outside of torch.no_grad(), or detach() the others"
            )
        with torch.no_grad():
            return loop(chunk_BCTHW, is_last)

    return run
