"""In which order a tensor has its dimensions, told by where the model's channels are.

B clips, C channels, F latent frames, H/W latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from pipeline.errors import TerminalError

Layout = Literal["CFHW", "FCHW", "BCFHW", "BFCHW"]


def find_layout(shape: Sequence[int], channels: int, stated: Layout | None = None) -> Layout:
    """The layout of a tensor of this shape.

    Args:
        channels: of the model's latents.
        stated: what ``input.layout`` says; it must fit.

    Raises:
        TerminalError: the shape fits no layout, or two, or not the stated one.
    """
    size = "x".join(map(str, shape))
    if any(length < 1 for length in shape):
        raise TerminalError("read", "layout_unknown", f"a tensor of shape {size} is empty")
    if stated is not None:
        if not _fits(shape, channels, stated):
            raise TerminalError(
                "read",
                "layout_unknown",
                f"shape {size} is not {stated}, which has {len(stated)} dimensions, {channels} channels at number "
                f"{stated.index('C') + 1}; correct input.layout{_hint(shape, channels)}",
            )
        return stated
    fitting = [layout for layout in get_args(Layout) if _fits(shape, channels, layout)]
    if len(fitting) > 1:
        raise TerminalError(
            "read",
            "layout_ambiguous",
            f"shape {size} could be {' or '.join(fitting)}, since {channels} is the number of channels; "
            "say which in input.layout",
        )
    if not fitting:
        raise TerminalError(
            "read",
            "layout_unknown",
            f"shape {size} is none of {', '.join(get_args(Layout))} with {channels} channels{_hint(shape, channels)}",
        )
    layout: Layout = fitting[0]
    return layout


def to_clips(tensor: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """The clips of a tensor, each ``[C, F, H, W]``; views of it."""
    batch = tensor if layout.startswith("B") else tensor.unsqueeze(0)
    return list(batch if layout in ("CFHW", "BCFHW") else batch.transpose(1, 2))


def clip_shapes(shape: Sequence[int], layout: Layout) -> list[tuple[int, int, int, int]]:
    """The shapes that ``to_clips`` gives, one a clip."""
    sizes = dict(zip(layout, shape, strict=True))
    return [(sizes["C"], sizes["F"], sizes["H"], sizes["W"])] * sizes.get("B", 1)


def _fits(shape: Sequence[int], channels: int, layout: Layout) -> bool:
    return len(shape) == len(layout) and shape[layout.index("C")] == channels


def _hint(shape: Sequence[int], channels: int) -> str:
    if len(shape) in (4, 5) and 2 * channels in shape[:-2]:
        return (
            f"; with {2 * channels} channels these look like moments, mean and log-variance: "
            f"give the mean, the first {channels} channels"
        )
    return ""
