"""A chunk's activation, held in pieces of a few frames that come and go one by one.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cogvae.exact.statistics import Moments
from cogvae.kernels import Operations


class Activation:
    """The pieces [B, C, few, H, W] of a chunk, channels last, and the statistics of what was appended.

    `paired`: every frame stands for two equal ones, except the first where the chunk's count is odd.
    """

    def __init__(self, num_frames: int, num_groups: int, operations: Operations, *, paired: bool = False) -> None:
        self.num_frames = num_frames
        self.paired = paired
        self.operations = operations
        self.moments = Moments()
        self.pieces: list[Tensor] = []
        self._num_groups = num_groups

    def append(self, piece_BCTHW: Tensor, bias_C: Tensor | None = None, residual_BCTHW: Tensor | None = None) -> None:
        """Takes a piece, to which bias and residual are added in place. Half as many frames of these stand for two each."""
        alone = not self.pieces and self.num_frames % 2 == 1
        spread = self.operations.finish(piece_BCTHW, self._num_groups, bias_C, residual_BCTHW)
        self.moments.add(spread, 2 if self.paired and not alone else 1)
        self.pieces.append(piece_BCTHW)

    def consume(self) -> Iterator[Tensor]:
        """Every piece once, in order; who lets go of it frees it."""
        return consume(self.pieces)


def consume(pieces: list[Tensor]) -> Iterator[Tensor]:
    """The pieces of a list, each removed from it before it is given."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def piece_sizes(num_frames: int, at_once: int) -> list[int]:
    """How a chunk is cut: the first of an odd count alone, as it has no partner in time; then `at_once` frames each."""
    alone = num_frames % 2
    sizes = [1] * alone
    rest = num_frames - alone
    while rest > 0:
        sizes.append(min(rest, at_once))
        rest -= sizes[-1]
    return sizes


def regroup(pieces: Iterable[Tensor], sizes: list[int]) -> Iterator[Tensor]:
    """The same frames in pieces of other sizes."""
    waiting: list[Tensor] = []
    frames = 0
    incoming = iter(pieces)
    for size in sizes:
        while frames < size:
            waiting.append(next(incoming))
            frames += waiting[-1].shape[2]
        joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
        waiting = [joined[:, :, size:]] if frames > size else []
        frames -= size
        piece = joined[:, :, :size]
        del joined
        yield piece
        del piece


def empty(shape: Iterable[int], like: Tensor) -> Tensor:
    """Memory for [B, C, T, H, W], channels last."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)
