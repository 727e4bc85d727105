"""The frame loop: a clip passes through a network chunk by chunk.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class State(Protocol):
    """What a chunk leaves for the next: `conv.Tails` on the reference path, `exact.Past` in the exact engine."""

    def for_last_chunk(self) -> Self:
        """The same past, for a chunk that no other follows."""


S = TypeVar("S", bound=State)
# One clip's next chunk, and whether it is the last, to the result.
ChunkFunction = Callable[[Tensor, bool], Tensor]


def partition(num_frames: int, chunk_frames: int) -> list[range]:
    """The chunks of a clip, in order. The first takes the remainder: 49 by 8 is 9, 8, 8, 8, 8, 8.

    GroupNorm statistics cover one chunk, so this partition is part of what the model computes.
    """
    if num_frames < 1 or chunk_frames < 1:
        raise ValueError(f"{num_frames} frames in chunks of {chunk_frames}: both must be at least 1")
    first = min(num_frames, chunk_frames + num_frames % chunk_frames)
    return [range(0, first)] + [range(t, t + chunk_frames) for t in range(first, num_frames, chunk_frames)]


class FrameLoop(Generic[S]):
    """One clip on its way through a network: takes its chunks in order, and keeps what each leaves for the next."""

    def __init__(self, network: Callable[[Tensor, S], tuple[Tensor, S]], start: S) -> None:
        """`network` on one chunk: (frames, what the chunk before left) to (result, what this one leaves)."""
        self._network = network
        self._state = start

    def __call__(self, chunk_BCTHW: Tensor, is_last: bool) -> Tensor:
        if is_last:
            self._state = self._state.for_last_chunk()
        result, self._state = self._network(chunk_BCTHW, self._state)
        return result


class LateLoop:
    """A frame loop that is chosen when the first chunk, the longest of its clip, is seen."""

    def __init__(self, start: Callable[[Tensor, bool], ChunkFunction]) -> None:
        self._start = start
        self._loop: ChunkFunction | None = None

    def __call__(self, chunk_BCTHW: Tensor, is_last: bool) -> Tensor:
        self._loop = self._loop or self._start(chunk_BCTHW, is_last)
        return self._loop(chunk_BCTHW, is_last)


def run_in_chunks(loop: ChunkFunction, x_BCTHW: Tensor, chunk_frames: int) -> Tensor:
    """Runs a frame loop over a whole clip and joins the results along time."""
    return torch.cat([loop(*chunk) for chunk in split_in_chunks([x_BCTHW], chunk_frames, x_BCTHW.shape[2])], dim=2)


def split_in_chunks(pieces: Iterable[Tensor], chunk_frames: int, num_frames: int | None) -> Iterator[tuple[Tensor, bool]]:
    """Cuts a clip that comes in pieces of any length into its chunks, each with whether it is known as the last.

    `num_frames` is what the pieces add up to. None: one more than a multiple of `chunk_frames`, and no chunk is
    known as the last.

    Raises: ValueError as soon as the pieces are more than that, and when they end elsewhere.
    """
    if num_frames is None:
        sizes: Iterator[int] = chain([chunk_frames + 1 % chunk_frames], repeat(chunk_frames))
    else:
        sizes = iter([len(chunk) for chunk in partition(num_frames, chunk_frames)])
    size = next(sizes)
    waiting: list[Tensor] = []
    received = passed = 0
    for piece_BCTHW in pieces:
        received += piece_BCTHW.shape[2]
        if num_frames is not None and received > num_frames:
            raise ValueError(f"a stream of {received} frames or more where num_frames={num_frames}")
        waiting.append(piece_BCTHW)
        while size and received - passed >= size:
            joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            passed += size
            waiting = [joined[:, :, size:]] if received > passed else []
            yield joined[:, :, :size], passed == num_frames
            size = next(sizes, 0)
    if num_frames is None and received == 1 and waiting:
        yield torch.cat(waiting, dim=2), True  # a piece may be empty
    elif received == 0 or received > passed:
        raise ValueError(_wrong_end(received, chunk_frames, num_frames))


def _wrong_end(received: int, chunk_frames: int, num_frames: int | None) -> str:
    if num_frames is not None:
        return f"the stream ended after {received} frames where num_frames={num_frames}"
    return (
        f"the stream ended after {received} frames. Without num_frames it must have 1, {chunk_frames + 1} or "
        f"{2 * chunk_frames + 1} and so on; give num_frames for any other count, as the first chunk takes the remainder"
    )
