"""Changes of resolution between the levels, piece by piece.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvae.exact.folding import fold_upsample
from cogvae.exact.pieces import empty
from cogvae.exact.plan import Plan


def upsample(conv: nn.Conv2d, pieces: Iterable[Tensor], plan: Plan) -> Iterator[Tensor]:
    """Twice the height and width: repetition and convolution as one transposed convolution of four cells for nine."""
    kernel = fold_upsample(conv.weight)
    for piece in pieces:
        batch, channels, frames, height, width = piece.shape
        rows = plan.strip(4 * batch * max(channels, conv.out_channels) * frames * width, piece, height)
        if rows >= height:
            yield _double(piece, kernel, conv.bias)
            continue
        result = empty((batch, conv.out_channels, frames, 2 * height, 2 * width), piece)
        for row in range(0, height, rows):
            start, end = max(row - 1, 0), min(row + rows, height)
            strip = _double(piece[..., start : end + 1, :], kernel, conv.bias)
            result[..., 2 * row : 2 * end, :] = strip[..., 2 * (row - start) : 2 * (end - start), :]
        del piece, strip
        yield result
        del result


def _double(x_BCTHW: Tensor, kernel_IO44: Tensor, bias: Tensor | None) -> Tensor:
    dense = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    result = F.conv_transpose2d(dense.transpose(1, 2).flatten(0, 1), kernel_IO44, bias, stride=2, padding=1)
    return torch.unflatten(result, 0, (dense.shape[0], -1)).transpose(1, 2)


def downsample(conv: nn.Conv2d, pieces: Iterable[Tensor], compress_time: bool, plan: Plan) -> Iterator[Tensor]:
    """Half the height and width, and of every piece with more than one frame half the frames, by pair averages."""
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    for piece in pieces:
        batch, channels, frames, height, width = piece.shape
        halves = compress_time and frames > 1
        padded = empty((batch, channels, frames // 2 if halves else frames, height + 1, width + 1), piece)
        padded[..., -1, :] = 0
        padded[..., -1] = 0
        inner = padded[..., :-1, :-1]
        if halves:
            # Halved before they are added: float16 overflows where the average does not.
            torch.mul(piece[:, :, 0::2], 0.5, out=inner)
            inner.add_(piece[:, :, 1::2], alpha=0.5)
        else:
            inner.copy_(piece)
        del piece
        rows = plan.strip(2 * padded[..., 0, :].numel(), padded, height // 2, halo=1)
        strips = [
            _halve(padded[..., 2 * row : 2 * min(row + rows, height // 2) + 1, :], weight, conv.bias)
            for row in range(0, height // 2, rows)
        ]
        yield torch.cat(strips, dim=3) if len(strips) > 1 else strips[0]


def _halve(x_BCTHW: Tensor, weight_OI33: Tensor, bias: Tensor | None) -> Tensor:
    dense = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    result = F.conv2d(dense.transpose(1, 2).flatten(0, 1), weight_OI33, bias, stride=2)
    return torch.unflatten(result, 0, (dense.shape[0], -1)).transpose(1, 2)
