"""GroupNorm statistics of a chunk that is never seen as a whole.

Shape legend: B batch, C channels, G groups, T frames of a piece, H/W pixels or latent cells.
"""

import torch
from torch import Tensor

from cogvae.exact.folding import wide

# Of a piece that is centred at once: keeps the copy inside a processor's cache, or at least small.
_BLOCK_ELEMENTS = 2**22


class Moments:
    """Count, mean and sum of squared deviations per clip and group, merged piece by piece.

    Every piece is centred on its own mean before it is squared, so that nothing cancels.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._count = 0
        self._mean_BG: Tensor | None = None
        self._squares_BG: Tensor | None = None

    def add(self, piece_BCTHW: Tensor, times: int = 1) -> None:
        """Takes the piece in, as if it came so many times."""
        frame = piece_BCTHW[:, :, 0].numel()
        for block in torch.split(piece_BCTHW, max(1, _BLOCK_ELEMENTS // frame), dim=2):
            self._add_block(block, times)

    def _add_block(self, block_BCTHW: Tensor, times: int) -> None:
        values = block_BCTHW.permute(0, 2, 3, 4, 1)
        batch, groups, dtype = values.shape[0], self._num_groups, wide(values.dtype)
        count = block_BCTHW[0].numel() // groups * times
        mean_BG = values.mean(dim=(1, 2, 3), dtype=dtype).view(batch, groups, -1).mean(2)
        centre = mean_BG.repeat_interleave(values.shape[-1] // groups, 1)[:, None, None, None]
        squares_BG = (values - centre).square_().sum(dim=(1, 2, 3)).view(batch, groups, -1).sum(2).mul_(times)
        if self._mean_BG is None or self._squares_BG is None:
            self._count, self._mean_BG, self._squares_BG = count, mean_BG, squares_BG
            return
        total = self._count + count
        delta_BG = mean_BG - self._mean_BG
        self._squares_BG = self._squares_BG + squares_BG + delta_BG.square() * (self._count * count / total)
        self._mean_BG = self._mean_BG + delta_BG * (count / total)
        self._count = total

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """[B, G] each; the variance is that of the values themselves, not an estimate."""
        assert self._mean_BG is not None
        assert self._squares_BG is not None
        return self._mean_BG, self._squares_BG / self._count
