"""Causal convolutions over pieces: each frame is prepared once, and no cache is ever joined to a chunk.

Prepared frames stand in a buffer between the last frames of the past and a row of zeros above and below, so that a
strip of rows is a view of it that brings its own halo.

Shape legend: B batch, C channels in, O out, P past frames, T frames of a window, H/W pixels or latent cells.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvae.conv import CausalConv3d
from cogvae.exact import folding
from cogvae.exact.hazards import is_slow_volume
from cogvae.exact.norms import Fill
from cogvae.exact.pieces import empty
from cogvae.exact.plan import Plan


class Past:
    """What the causal convolutions of one clip saw last. Changes as the clip goes on, so that no frame is held twice."""

    def __init__(self) -> None:
        self._frames: dict[CausalConv3d, Tensor] = {}
        self._last_chunk = False
        self.at_start = True

    def for_last_chunk(self) -> "Past":
        """The same past, for a chunk that no other follows: it leaves nothing."""
        self._last_chunk = True
        return self

    def end_chunk(self) -> None:
        self.at_start = False

    def take(self, conv: CausalConv3d) -> Tensor | None:
        """The frames [B, C, P, H+2, W] before this chunk, which are then forgotten; None at the clip's start."""
        return self._frames.pop(conv, None)

    def keep(self, conv: CausalConv3d, frames_BCPHW: Tensor) -> None:
        if not self._last_chunk:
            self._frames[conv] = frames_BCPHW.clone()


def convolve(
    conv: CausalConv3d,
    pieces: Iterable[Tensor],
    most_frames: int,
    fill: Fill,
    past: Past,
    plan: Plan,
    *,
    paired: bool = False,
    first_alone: bool = True,
) -> Iterator[Tensor]:
    """Convolves what `fill` makes of each piece [B, C, up to most_frames, H, W]; gives as many pieces.

    `paired`: every frame stands for two equal ones, except the first if it is `first_alone`, and two come out.
    """
    before = past.take(conv)
    at_start = before is None
    past_frames, held = (1 if paired else 2), 0
    buffer: Tensor | None = None
    for piece in pieces:
        if buffer is None:
            buffer = _make_buffer(piece, past_frames + most_frames)
            kernels = Kernels(conv.conv, plan, piece)
            if before is not None:
                buffer[:, :, :past_frames] = before[:, :, -past_frames:]
                before = None
        window = buffer[:, :, : past_frames + piece.shape[2]]
        fill(piece, held, window[:, :, past_frames:, 1:-1])
        is_start = at_start and held == 0
        if is_start:
            window[:, :, :past_frames] = window[:, :, past_frames : past_frames + 1]
        is_still = is_start and piece.shape[2] == 1 and (first_alone or not paired)
        held += piece.shape[2]
        del piece
        if is_still:
            yield kernels.in_strips(kernels.still, window[:, :, -1:])
        else:
            yield kernels.in_strips(kernels.pairs if paired else kernels.frames, window)
        _move_to_front(window, past_frames)
    assert buffer is not None
    past.keep(conv, buffer[:, :, :past_frames])


def _make_buffer(piece_BCTHW: Tensor, frames: int) -> Tensor:
    batch, channels, _, height, width = piece_BCTHW.shape
    buffer = empty((batch, channels, frames, height + 2, width), piece_BCTHW)
    buffer[..., 0, :] = 0
    buffer[..., -1, :] = 0
    return buffer


def _move_to_front(window_BCTHW: Tensor, past_frames: int) -> None:
    step = window_BCTHW.shape[2] - past_frames
    if step >= past_frames:
        window_BCTHW[:, :, :past_frames] = window_BCTHW[:, :, step:]
        return
    for t in range(past_frames):
        window_BCTHW[:, :, t] = window_BCTHW[:, :, t + step]


class Kernels:
    """A 3x3x3 convolution in the forms that a window may ask for, folded when first used.

    A window [B, C, T, rows+2, W] has its halo of rows, zeros at the frame's edges, and is padded in width only.
    """

    def __init__(self, conv: nn.Conv3d, plan: Plan, like: Tensor) -> None:
        self._conv, self._plan = conv, plan
        self._by_frame = plan.by_frame(like)
        self._bias = None if plan.leaves_bias else conv.bias

    def in_strips(self, kernel: Callable[[Tensor], Tensor], window_BCTHW: Tensor) -> Tensor:
        """Applies a kernel to as many rows at once as the plan allows."""
        batch, channels, frames, height, width = window_BCTHW.shape
        height -= 2
        rows = self._plan.strip(batch * max(channels, self._conv.out_channels) * frames * width, window_BCTHW, height)
        if rows >= height:
            return kernel(window_BCTHW)
        result: Tensor | None = None
        for row in range(0, height, rows):
            strip = kernel(window_BCTHW[..., row : row + rows + 2, :])
            if result is None:
                result = empty((*strip.shape[:3], height, width), strip)
            result[..., row : row + rows, :] = strip
            del strip
        assert result is not None
        return result

    def still(self, window_BCTHW: Tensor) -> Tensor:
        """One frame whose past are copies of itself."""
        if window_BCTHW.element_size() < 4:
            twice = window_BCTHW.expand(-1, -1, 2, -1, -1)
            return F.conv3d(twice, self._still_in_halves, self._bias, padding=(0, 0, 1))
        return planes(window_BCTHW, self._still, self._bias)

    def frames(self, window_BCTHW: Tensor) -> Tensor:
        """T-2 frames of T."""
        if self._by_frame and window_BCTHW.shape[2] % 2 == 0:
            return convolve_two_frames(window_BCTHW, self._two_frames, self._bias)
        if is_slow_volume(window_BCTHW.device.type, window_BCTHW.dtype, window_BCTHW.shape):
            return convolve_by_taps(window_BCTHW, self._taps, self._bias)
        return F.conv3d(window_BCTHW, self._weight, self._bias, padding=(0, 0, 1))

    def pairs(self, window_BCTHW: Tensor) -> Tensor:
        """2(T-1) frames of T that each stand for two."""
        if self._by_frame or is_slow_volume(window_BCTHW.device.type, window_BCTHW.dtype, window_BCTHW.shape):
            return convolve_pairs(window_BCTHW, self._taps, self._bias)
        frames = [F.conv3d(window_BCTHW, kernel, self._bias, padding=(0, 0, 1)) for kernel in self._pairs]
        return torch.stack(frames, dim=3).flatten(2, 3)

    @cached_property
    def _weight(self) -> Tensor:
        # By its layout the result gets its own, which must be channels last.
        return self._conv.weight.contiguous(memory_format=torch.channels_last_3d)

    @cached_property
    def _still(self) -> Tensor:
        return folding.fold_still(self._conv.weight)

    @cached_property
    def _still_in_halves(self) -> Tensor:
        return folding.fold_still_in_halves(self._conv.weight)

    @cached_property
    def _two_frames(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return folding.fold_two_frames(self._conv.weight)

    @cached_property
    def _taps(self) -> tuple[Tensor, Tensor, Tensor]:
        return folding.taps(self._conv.weight)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        return folding.fold_pairs(self._conv.weight)


def convolve_by_taps(window_BCTHW: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """T-2 frames of T as three two-dimensional convolutions: no fewer multiplications."""
    result = planes(window_BCTHW[:, :, :-2], taps[0], bias)
    result += planes(window_BCTHW[:, :, 1:-1], taps[1])
    result += planes(window_BCTHW[:, :, 2:], taps[2])
    return result


def convolve_two_frames(window_BCTHW: Tensor, kernels: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """T-2 frames of an even T by two thirds of the multiplications: four of two-dimensional kernels for two frames.

    Source: minimal filtering F(2,3), Winograd 1980.
    """
    frames = window_BCTHW.shape[2] - 2
    first, second, third, fourth = (window_BCTHW[:, :, t : t + frames : 2] for t in range(4))
    both = planes(second + third, kernels[1], bias)
    result = empty((*both.shape[:2], frames, *both.shape[3:]), both)
    earlier, later = result[:, :, 0::2], result[:, :, 1::2]
    one = planes(third - second, kernels[2])
    torch.add(both, one, out=earlier)
    torch.sub(both, one, out=later)
    del both, one
    earlier += planes(first - third, kernels[0])
    later -= planes(second - fourth, kernels[3])
    return result


def convolve_pairs(window_BCTHW: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """2(T-1) frames of T that each stand for two: the outer taps see the same frames in both of a pair."""
    middle = planes(window_BCTHW, taps[1], bias)
    outer = planes(window_BCTHW[:, :, :-1], taps[0])
    outer += planes(window_BCTHW[:, :, 1:], taps[2])
    result = empty((*outer.shape[:2], 2 * outer.shape[2], *outer.shape[3:]), outer)
    torch.add(outer, middle[:, :, :-1], out=result[:, :, 0::2])
    torch.add(outer, middle[:, :, 1:], out=result[:, :, 1::2])
    return result


def planes(window_BCTHW: Tensor, kernel_OI33: Tensor, bias: Tensor | None = None) -> Tensor:
    """A two-dimensional convolution of every frame, padded in width only."""
    dense = window_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    result = F.conv2d(dense.transpose(1, 2).flatten(0, 1), kernel_OI33, bias, padding=(0, 1))
    return torch.unflatten(result, 0, (dense.shape[0], -1)).transpose(1, 2)
