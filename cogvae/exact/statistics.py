"""GroupNorm statistics of a chunk that is never seen as a whole.

Shape legend: B batch, G groups.
"""

from torch import Tensor

from cogvae.kernels import Spread


class Moments:
    """Mean and variance per clip and group, merged piece by piece."""

    def __init__(self) -> None:
        self._spread: Spread | None = None

    def add(self, piece: Spread, times: int = 1) -> None:
        """Takes a piece in, as if it came so many times."""
        piece = piece.times(times)
        self._spread = piece if self._spread is None else self._spread.merge(piece)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """[B, G] each; the variance is that of the values themselves, not an estimate."""
        assert self._spread is not None
        return self._spread.mean_BG, self._spread.squares_BG / self._spread.count
