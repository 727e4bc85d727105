"""The Triton kernels behind the calls of their twins. Imports Triton.

Shape legend: B batch, C channels, G groups, T frames of a piece, H/W pixels or latent cells; h, w the latent's; S splits.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from cogvae.kernels import programs, twins
from cogvae.kernels.twins import Spread, wide

# Of a tile; a program of four warps holds 32 a thread.
_TILE_ELEMENTS = 4096
_TILE_CHANNELS = 128
# Enough to keep every multiprocessor busy, also with one clip and few channels.
_PROGRAMS = 1024
_MERGED_AT_ONCE = 64
_MAX_CELLS = 2**31 - _TILE_ELEMENTS


def finish(x_BCTHW: Tensor, num_groups: int, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> Spread:
    """As `Operations.finish`, in two stages: each split of the cells by a program of its own, then all of a group."""
    return finish_in_splits(x_BCTHW, num_groups, bias_C, residual_BCTHW, _PROGRAMS)


def finish_in_splits(
    x_BCTHW: Tensor, num_groups: int, bias_C: Tensor | None, residual_BCTHW: Tensor | None, programs_wanted: int
) -> Spread:
    """As `finish`, by about so many programs."""
    batch, channels, frames, height, width = x_BCTHW.shape
    cells, cell_tile, channel_tile = _count(frames * height * width), *_tile(channels)
    blocks = triton.cdiv(channels, channel_tile)
    splits = max(1, min(programs_wanted // (batch * blocks), triton.cdiv(cells, cell_tile)))
    cells_per_split = triton.cdiv(triton.cdiv(cells, splits), cell_tile) * cell_tile
    splits = triton.cdiv(cells, cells_per_split)
    dtype = wide(x_BCTHW.dtype)
    means, squares = x_BCTHW.new_empty((2, batch, splits, channels), dtype=dtype)
    group_means, group_squares = x_BCTHW.new_empty((2, batch, num_groups), dtype=dtype)
    residual = x_BCTHW if residual_BCTHW is None else residual_BCTHW
    with _on_device_of(x_BCTHW):
        programs.finish_splits[(splits, blocks, batch)](
            *(x_BCTHW, x_BCTHW if bias_C is None else bias_C, residual, means, squares),
            *(channels, height, width, cells, cells_per_split, *x_BCTHW.stride(), *residual.stride()),
            HAS_BIAS=bias_C is not None,
            HAS_RESIDUAL=residual_BCTHW is not None,
            REPEAT=frames // residual.shape[2],
            WIDE=_triton_dtype(dtype),
            CELLS=cell_tile,
            CHANNELS=channel_tile,
        )
        each = channels // num_groups
        programs.merge_splits[(num_groups, batch)](
            *(means, squares, group_means, group_squares, splits, cells, cells_per_split, channels, each),
            WIDE=_triton_dtype(dtype),
            SPLITS=_MERGED_AT_ONCE,
            CHANNELS=triton.next_power_of_2(each),
        )
    return Spread(cells * each, group_means, group_squares)


def scale_shift_act(x_BCTHW: Tensor, scale_BhwC: Tensor, shift_BhwC: Tensor, act: nn.Module, out_BCTHW: Tensor) -> None:
    """As `Operations.scale_shift_act`. Activations other than SiLU, which no published model has, are left to the twin."""
    if not isinstance(act, nn.SiLU):
        twins.scale_shift_act(x_BCTHW, scale_BhwC, shift_BhwC, act, out_BCTHW)
        return
    batch, channels, frames, height, width = x_BCTHW.shape
    cells, cell_tile, channel_tile = _count(frames * height * width), *_tile(channels)
    rows, columns = scale_BhwC.shape[1:3]
    with _on_device_of(x_BCTHW):
        programs.scale_shift_silu[(triton.cdiv(cells, cell_tile), triton.cdiv(channels, channel_tile), batch)](
            *(x_BCTHW, scale_BhwC, shift_BhwC, out_BCTHW),
            *(channels, height, width, cells, height // rows, width // columns),
            *(*x_BCTHW.stride(), *out_BCTHW.stride(), *scale_BhwC.stride(), *shift_BhwC.stride()),
            WIDE=_triton_dtype(scale_BhwC.dtype),
            CELLS=cell_tile,
            CHANNELS=channel_tile,
        )


def _tile(channels: int) -> tuple[int, int]:
    """Cells and channels of a tile, powers of two."""
    channel_tile = min(triton.next_power_of_2(channels), _TILE_CHANNELS)
    return _TILE_ELEMENTS // channel_tile, channel_tile


def _count(cells: int) -> int:
    assert cells < _MAX_CELLS, f"{cells} cells in a piece: the kernels count them in 32 bits"
    return cells


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
