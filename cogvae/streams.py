"""Clips that come and go in pieces: the memory is that of a chunk, however long the clip is.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cogvae.chunks import ChunkFunction
from cogvae.tiling import Cut


def run_stream(
    start_loop: Callable[[], ChunkFunction], chunks: Iterable[tuple[Tensor, bool]], find_cut: Callable[[Tensor], Cut]
) -> Iterator[Tensor]:
    """Runs a clip through frame loops as its chunks come; one result a chunk.

    What `find_cut` says of the first chunk holds for all. Every part has a frame loop of its own, and all go in step.
    """
    loops: defaultdict[int, ChunkFunction] = defaultdict(start_loop)
    cut: Cut | None = None
    for chunk_BCTHW, is_last in chunks:
        cut = cut or find_cut(chunk_BCTHW)
        # Not named before it is yielded: a name would keep it while the next chunk is computed.
        yield cut.run(_next_chunk(loops, is_last), chunk_BCTHW)


def _next_chunk(loops: defaultdict[int, ChunkFunction], is_last: bool) -> Callable[[Tensor], Tensor]:
    """The network of one chunk: it gives each part, told by its turn, to that part's frame loop."""
    turn = itertools.count()
    return lambda part_BCTHW: loops[next(turn)](part_BCTHW, is_last)


def check_pieces(pieces: Iterable[Tensor], check: Callable[[Tensor], None]) -> Iterator[Tensor]:
    """The pieces that have frames.

    Raises: ValueError if one fails `check`, or differs from the first in more than its length.
    """
    first: tuple[object, ...] | None = None
    for piece in pieces:
        if piece.ndim == 5 and piece.shape[2] == 0:
            continue
        check(piece)
        kind = ([*piece.shape[:2], *piece.shape[3:]], piece.dtype, piece.device)
        first = first or kind
        if kind != first:
            raise ValueError(
                f"a piece with [batch, channels, height, width], dtype and device {kind} in a stream that began with "
                f"{first}: only the number of frames may differ"
            )
        yield piece


def from_uint8(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels 0 to 255 as the model takes them: -1 to 1. Computed in float32 at least."""
    return pixels.to(torch.promote_types(dtype, torch.float32)).div_(127.5).sub_(1).to(dtype)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames of -1 to 1 as pixels 0 to 255: rounded to the nearest, ties to even, and clamped.

    Finite frames only: what NaN becomes is not defined.
    """
    wide = frames.detach().to(torch.promote_types(frames.dtype, torch.float32))
    return (wide + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
