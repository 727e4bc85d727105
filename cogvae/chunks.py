"""The frame loop: a clip passes through a network chunk by chunk.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cogvae.conv import Tails

# One network on one chunk: (frames, what the chunk before left) -> (result, what this chunk leaves).
ChunkFunction = Callable[[Tensor, Tails], tuple[Tensor, Tails]]


def partition(num_frames: int, chunk_frames: int) -> list[range]:
    """The chunks of a clip, in order. The first takes the remainder: 49 by 8 is 9, 8, 8, 8, 8, 8.

    GroupNorm statistics cover one chunk, so this partition is part of what the model computes.
    """
    if num_frames < 1 or chunk_frames < 1:
        raise ValueError(f"{num_frames} frames in chunks of {chunk_frames}: both must be at least 1")
    first = min(num_frames, chunk_frames + num_frames % chunk_frames)
    return [range(0, first)] + [range(t, t + chunk_frames) for t in range(first, num_frames, chunk_frames)]


def run_in_chunks(network: ChunkFunction, x_BCTHW: Tensor, chunk_frames: int) -> Tensor:
    """Runs a network over a whole clip and joins the results along time."""
    tails = Tails()
    results = []
    chunks = partition(x_BCTHW.shape[2], chunk_frames)
    for chunk in chunks:
        if chunk is chunks[-1]:
            tails = tails.for_last_chunk()
        result, tails = network(x_BCTHW[:, :, chunk.start : chunk.stop], tails)
        results.append(result)
    return torch.cat(results, dim=2)
