"""The Triton programs. Channels are expected to lie next to each other, which makes them fast; any strides are right.

Offsets are int64: an activation may have more than 2^31 elements. Cells (the pixels of all frames, counted through) are
int32, as they are divided, which is slow in 64 bits. `WIDE` is the dtype of sums, float32 at least. A tile has `CELLS`
cells and `CHANNELS` of their channels. Sizes in cells are not specialised: each kind of them would be compiled anew, and
only channels and strides decide how wide loads and stores are.
"""

import triton
import triton.language as tl


@triton.jit
def cell_offsets(cell, height, width, stride_t, stride_h, stride_w, REPEAT: tl.constexpr):
    """Where a cell lies in a clip of which every frame stands for `REPEAT`."""
    row = cell // width
    frame = row // height
    h, w = (row - frame * height).to(tl.int64), (cell - row * width).to(tl.int64)
    return (frame // REPEAT).to(tl.int64) * stride_t + h * stride_h + w * stride_w


@triton.jit(do_not_specialize=["height", "width", "cells", "cells_per_split"])
def finish_splits(
    x,
    bias,
    residual,
    means,
    squares,
    channels,
    height,
    width,
    cells,
    cells_per_split,
    x_b,
    x_c,
    x_t,
    x_h,
    x_w,
    residual_b,
    residual_c,
    residual_t,
    residual_h,
    residual_w,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    REPEAT: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds bias and residual to a split of a clip's cells, and gives mean and squared deviations of each channel.

    Every tile is centred on its own means. Grid: splits, blocks of channels, clips.
    """
    split = tl.program_id(0)
    clip = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    in_channels = channel < channels
    first = split * cells_per_split
    last = tl.minimum(first + cells_per_split, cells)
    mean = tl.zeros((CHANNELS,), WIDE)
    square = tl.zeros((CHANNELS,), WIDE)
    for start in range(first, last, CELLS):
        cell = start + tl.arange(0, CELLS)
        mask = (cell < last)[:, None] & in_channels[None, :]
        where = cell_offsets(cell, height, width, x_t, x_h, x_w, 1)
        at = x + clip * x_b + where[:, None] + (channel * x_c)[None, :]
        values = tl.load(at, mask=mask, other=0.0).to(WIDE)
        if HAS_BIAS:
            values += tl.load(bias + channel, mask=in_channels, other=0.0).to(WIDE)[None, :]
        if HAS_RESIDUAL:
            where = cell_offsets(cell, height, width, residual_t, residual_h, residual_w, REPEAT)
            other = residual + clip * residual_b + where[:, None] + (channel * residual_c)[None, :]
            values += tl.load(other, mask=mask, other=0.0).to(WIDE)
        if HAS_BIAS or HAS_RESIDUAL:
            rounded = values.to(x.dtype.element_ty)
            tl.store(at, rounded, mask=mask)
            values = rounded.to(WIDE)
        before = (start - first).to(WIDE)
        count = tl.minimum(last - start, CELLS).to(WIDE)
        tile_mean = tl.sum(tl.where(mask, values, 0.0), 0) / count
        deviation = tl.where(mask, values - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        # Source: Chan, Golub, LeVeque 1979.
        square += tl.sum(deviation * deviation, 0) + delta * delta * (before * count / (before + count))
        mean += delta * (count / (before + count))
    at_split = (clip * tl.num_programs(0) + split) * channels + channel
    tl.store(means + at_split, mean, mask=in_channels)
    tl.store(squares + at_split, square, mask=in_channels)


@triton.jit(do_not_specialize=["splits", "cells", "cells_per_split"])
def merge_splits(
    means,
    squares,
    group_means,
    group_squares,
    splits,
    cells,
    cells_per_split,
    channels,
    channels_per_group,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and squared deviations of a group from those of its channels in every split. Grid: groups, clips."""
    group = tl.program_id(0).to(tl.int64)
    clip = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    in_group = channel < channels_per_group
    at_group = clip * splits * channels + group * channels_per_group + channel
    total = tl.zeros((CHANNELS,), WIDE)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS).to(tl.int64)
        mask = (split < splits)[:, None] & in_group[None, :]
        count = tl.maximum(tl.minimum(cells - split * cells_per_split, cells_per_split), 0).to(WIDE)
        mean = tl.load(means + (split * channels)[:, None] + at_group[None, :], mask=mask, other=0.0)
        total += tl.sum(mean * (count / cells)[:, None], 0)
    group_mean = tl.sum(total, 0) / channels_per_group
    square = tl.zeros((CHANNELS,), WIDE)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS).to(tl.int64)
        mask = (split < splits)[:, None] & in_group[None, :]
        count = tl.maximum(tl.minimum(cells - split * cells_per_split, cells_per_split), 0).to(WIDE)
        at = (split * channels)[:, None] + at_group[None, :]
        delta = tl.where(mask, tl.load(means + at, mask=mask, other=0.0) - group_mean, 0.0)
        square += tl.sum(tl.load(squares + at, mask=mask, other=0.0) + delta * delta * count[:, None], 0)
    at = clip * tl.num_programs(0) + group
    tl.store(group_means + at, group_mean)
    tl.store(group_squares + at, tl.sum(square, 0))


@triton.jit(do_not_specialize=["height", "width", "cells", "rows_per_cell", "columns_per_cell"])
def scale_shift_silu(
    x,
    scale,
    shift,
    out,
    channels,
    height,
    width,
    cells,
    rows_per_cell,
    columns_per_cell,
    x_b,
    x_c,
    x_t,
    x_h,
    x_w,
    out_b,
    out_c,
    out_t,
    out_h,
    out_w,
    scale_b,
    scale_h,
    scale_w,
    scale_c,
    shift_b,
    shift_h,
    shift_w,
    shift_c,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """silu(x * scale + shift); scale and shift are read where the cell's latent cell is. Grid: tiles, channels, clips."""
    clip = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    mask = (cell < cells)[:, None] & (channel < channels)[None, :]
    row = cell // width
    h = (row % height // rows_per_cell).to(tl.int64)
    w = ((cell - row * width) // columns_per_cell).to(tl.int64)
    at_scale = clip * scale_b + (h * scale_h + w * scale_w)[:, None] + (channel * scale_c)[None, :]
    at_shift = clip * shift_b + (h * shift_h + w * shift_w)[:, None] + (channel * shift_c)[None, :]
    at_x = clip * x_b + cell_offsets(cell, height, width, x_t, x_h, x_w, 1)[:, None] + (channel * x_c)[None, :]
    at_out = clip * out_b + cell_offsets(cell, height, width, out_t, out_h, out_w, 1)[:, None] + (channel * out_c)[None, :]
    values = tl.load(x + at_x, mask=mask, other=0.0).to(WIDE)
    values = values * tl.load(scale + at_scale, mask=mask, other=0.0) + tl.load(shift + at_shift, mask=mask, other=0.0)
    values = values / (1.0 + tl.exp(-values))
    tl.store(out + at_out, values.to(out.dtype.element_ty), mask=mask)
