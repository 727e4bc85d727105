"""How much of a chunk the exact engine does at once. The results are the same; memory and time are not.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

from dataclasses import dataclass

from torch import Tensor

from cogvae.conv import MAX_CONV_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes that a walk through the network keeps to."""

    piece_bytes: int
    """Of a piece of the widest activation of a level. A piece has one frame, or an even number, whatever their size."""
    strip_bytes: int | None = None
    """Of the rows that one convolution reads or gives; None: whole frames, within MAX_CONV_ELEMENTS."""
    strip_rows: int | None = None
    """Rows of a strip at every level; None: as strip_bytes say."""
    fold_from_cells: int = 1024
    """Cells of a frame from which folding a kernel costs less than the multiplications that it saves."""
    single_frames: bool = False
    """Whether pieces of two frames are cut to one where they are above piece_bytes."""
    triton: bool = False
    """Whether the passes between convolutions are Triton kernels, or their plain twins."""

    @property
    def leaves_bias(self) -> bool:
        """Whether causal convolutions leave their bias to the pass that follows: cuDNN would add it in one of its own."""
        return self.triton

    def frames_at_once(self, frame_bytes: int) -> int:
        """Frames in a piece whose frames have so many bytes: even, or 1."""
        even = self.piece_bytes // frame_bytes // 2 * 2
        return even or (1 if self.single_frames else 2)

    def strip(self, elements_per_row: int, like: Tensor, height: int, *, halo: int = 2) -> int:
        """Rows of a strip, where a row of the larger of input and output has so many elements, and `halo` more are read."""
        fit = MAX_CONV_ELEMENTS // elements_per_row - halo
        if self.strip_rows is not None:
            fit = min(fit, self.strip_rows)
        elif self.strip_bytes is not None:
            fit = min(fit, self.strip_bytes // (elements_per_row * like.element_size()) - halo)
        return max(1, min(fit, height))

    def by_frame(self, like: Tensor) -> bool:
        """Whether causal convolutions are sums of two-dimensional ones: never where the sums would be rounded to 16 bits."""
        wide = like.element_size() >= 4 and like.device.type in ("cpu", "meta")
        return wide and like[0, 0, 0].numel() >= self.fold_from_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user asks of the engine."""

    memory_budget_bytes: int | None = None
    """For everything but weights, input and result; None: no bound."""
    strip_rows: int | None = None
    """Rows that a convolution does at once; None: as the budget allows."""
    triton: bool | None = None
    """Whether the passes between convolutions are Triton kernels; None: on CUDA, where Triton is installed."""

    def __post_init__(self) -> None:
        for name in ("memory_budget_bytes", "strip_rows"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected a positive integer, or None")
