"""The exact engine's way through the encoder and the decoder, over the very modules that the reference path calls.

Shape legend: B batch, C channels, T frames of the chunk, H/W pixels; t, h, w their latent counterparts.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cogvae.blocks import DownBlock, ResnetBlock, ResnetStack, SpatialNorm, UpBlock
from cogvae.conv import CausalConv3d, Downsample, Upsample
from cogvae.decoder import Decoder
from cogvae.encoder import Encoder
from cogvae.exact import allocator, causal, norms, resample
from cogvae.exact.causal import Past
from cogvae.exact.pieces import Activation, piece_sizes, regroup
from cogvae.exact.plan import Plan
from cogvae.kernels import find_operations


class _Walk:
    """One chunk on its way: what every layer needs to know beside its input."""

    def __init__(self, plan: Plan, past: Past, num_groups: int, z_BCthw: Tensor | None) -> None:
        self._plan, self._past, self._num_groups, self._z = plan, past, num_groups, z_BCthw
        self._operations = find_operations(plan.triton)

    def sizes(self, num_frames: int, channels: int, like: Tensor, cells: int) -> list[int]:
        """How a chunk of that many frames is cut at a level."""
        at_once = self._plan.frames_at_once(like.shape[0] * channels * cells * like.element_size())
        return piece_sizes(num_frames, at_once)

    def conv_in(self, conv: CausalConv3d, x_BCTHW: Tensor) -> Activation:
        frames, height, width = x_BCTHW.shape[2:]
        sizes = self.sizes(frames, conv.conv.out_channels, x_BCTHW, height * width)
        pieces = torch.split(x_BCTHW, sizes, dim=2)
        convolved = causal.convolve(conv, pieces, max(sizes), norms.copy, self._past, self._plan)
        return self._collect(convolved, frames, bias=self._left_bias(conv))

    def stack(self, stack: ResnetStack, x: Activation) -> Activation:
        for resnet in stack.resnets:
            assert isinstance(resnet, ResnetBlock)
            x = self._resnet(resnet, x)
        return x

    def _resnet(self, block: ResnetBlock, x: Activation) -> Activation:
        h = Activation(x.num_frames, self._num_groups, self._operations)
        bias = self._left_bias(block.conv1)
        for i, piece in enumerate(self._norm_act_conv(block.norm1, block.act, block.conv1, x, x.pieces)):
            h.append(piece, bias)
            if block.conv_shortcut is not None:
                # The frame itself is not read again: its projection, often smaller, takes its place.
                x.pieces[i] = norms.project(block.conv_shortcut, x.pieces[i])
        y = Activation(x.num_frames, self._num_groups, self._operations)
        bias = self._left_bias(block.conv2)
        residuals = x.consume()
        for piece in self._norm_act_conv(block.norm2, block.act, block.conv2, h, h.consume()):
            y.append(piece, bias, next(residuals))
        if self._plan.single_frames:
            allocator.release_freed(y.pieces[-1])
        return y

    def _left_bias(self, conv: CausalConv3d) -> Tensor | None:
        """The bias, where a causal convolution leaves it to the pass that follows."""
        return conv.conv.bias if self._plan.leaves_bias else None

    def _norm_act_conv(
        self, norm: nn.Module, act: nn.Module, conv: CausalConv3d, x: Activation, pieces: Iterable[Tensor]
    ) -> Iterator[Tensor]:
        most_frames = max(piece.shape[2] for piece in x.pieces)
        fill = norms.NormAct(norm, act, x, self._z)
        first_alone = x.num_frames % 2 == 1
        return causal.convolve(conv, pieces, most_frames, fill, self._past, self._plan, paired=x.paired, first_alone=first_alone)

    def down(self, downsampler: Downsample, x: Activation) -> Activation:
        channels, like = downsampler.conv.out_channels, x.pieces[0]
        height, width = like.shape[3:]
        halves = downsampler.compress_time and x.num_frames > 1
        frames = (x.num_frames + 1) // 2 if halves else x.num_frames
        sizes = self.sizes(x.num_frames, channels, like, height * width)
        if halves:  # a pair is never cut
            sizes = piece_sizes(x.num_frames, max(2, *sizes))
        given = resample.downsample(downsampler.conv, regroup(x.consume(), sizes), halves, self._plan)
        sizes = self.sizes(frames, channels, like, (height // 2) * (width // 2))
        return self._collect(regroup(given, sizes), frames)

    def up(self, upsampler: Upsample, x: Activation) -> Activation:
        channels, like = upsampler.conv.out_channels, x.pieces[0]
        cells = 4 * like.shape[3] * like.shape[4]
        alone = x.num_frames % 2
        doubles = upsampler.compress_time and x.num_frames > 1
        if not doubles:
            sizes = self.sizes(x.num_frames, channels, like, cells)
            return self._collect(resample.upsample(upsampler.conv, regroup(x.consume(), sizes), self._plan), x.num_frames)
        frames = 2 * x.num_frames - alone
        at_once = max(self.sizes(frames, channels, like, cells))
        pieces = regroup(x.consume(), piece_sizes_of_pairs(frames, at_once))
        if alone and not self._past.at_start:
            # The lone frame's past is another than itself: frames no longer come in pairs, and are repeated.
            given = resample.upsample(upsampler.conv, pieces, self._plan)
            return self._collect((_repeat(piece, 1 if i == 0 else 2) for i, piece in enumerate(given)), frames)
        return self._collect(resample.upsample(upsampler.conv, pieces, self._plan), frames, paired=True)

    def conv_out(self, norm: nn.Module, act: nn.Module, conv: CausalConv3d, x: Activation) -> Tensor:
        batch, _, _, height, width = x.pieces[0].shape
        result = x.pieces[0].new_empty(batch, conv.conv.out_channels, x.num_frames, height, width)
        bias, t = self._left_bias(conv), 0
        for piece in self._norm_act_conv(norm, act, conv, x, x.consume()):
            result[:, :, t : t + piece.shape[2]] = piece if bias is None else piece.add_(bias[:, None, None, None])
            t += piece.shape[2]
        return result

    def _collect(
        self, pieces: Iterable[Tensor], num_frames: int, *, paired: bool = False, bias: Tensor | None = None
    ) -> Activation:
        """A level's first activation, made while that of the level before is let go."""
        x = Activation(num_frames, self._num_groups, self._operations, paired=paired)
        for piece in pieces:
            x.append(piece, bias)
        allocator.release_freed(x.pieces[-1])
        return x


def piece_sizes_of_pairs(num_frames: int, at_once: int) -> list[int]:
    """As `piece_sizes`, of frames that stand for two."""
    alone = num_frames % 2
    return [1] * alone + [(size + 1) // 2 for size in piece_sizes(num_frames - alone, max(2, at_once))]


def _repeat(piece_BCTHW: Tensor, times: int) -> Tensor:
    return piece_BCTHW.repeat_interleave(times, dim=2) if times > 1 else piece_BCTHW


class ExactEncoder:
    """The encoder as a chunk function: frames [B, 3, T, H, W] to moments [B, 2C, t, h, w]."""

    def __init__(self, encoder: Encoder, plan: Plan) -> None:
        self._encoder, self._plan = encoder, plan

    def __call__(self, x_BCTHW: Tensor, past: Past) -> tuple[Tensor, Past]:
        encoder = self._encoder
        walk = _Walk(self._plan, past, encoder.norm_out.num_groups, None)
        h = walk.conv_in(encoder.conv_in, x_BCTHW)
        for block in encoder.down_blocks:
            assert isinstance(block, DownBlock)
            h = walk.stack(block, h)
            for downsampler in block.downsamplers:
                assert isinstance(downsampler, Downsample)
                h = walk.down(downsampler, h)
        h = walk.stack(encoder.mid_block, h)
        moments = walk.conv_out(encoder.norm_out, encoder.conv_act, encoder.conv_out, h)
        past.end_chunk()
        return moments, past


class ExactDecoder:
    """The decoder as a chunk function: latents [B, C, t, h, w] to frames [B, 3, T, H, W]."""

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        self._decoder, self._plan = decoder, plan

    def __call__(self, z_BCthw: Tensor, past: Past) -> tuple[Tensor, Past]:
        decoder = self._decoder
        norm_out = decoder.norm_out
        assert isinstance(norm_out, SpatialNorm)
        walk = _Walk(self._plan, past, norm_out.norm_layer.num_groups, z_BCthw)
        h = walk.stack(decoder.mid_block, walk.conv_in(decoder.conv_in, z_BCthw))
        for block in decoder.up_blocks:
            assert isinstance(block, UpBlock)
            h = walk.stack(block, h)
            for upsampler in block.upsamplers:
                assert isinstance(upsampler, Upsample)
                h = walk.up(upsampler, h)
        frames = walk.conv_out(norm_out, decoder.conv_act, decoder.conv_out, h)
        past.end_chunk()
        return frames, past
