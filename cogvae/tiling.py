"""Blend tiling: overlapping tiles of the frame go through the network alone, and their overlaps are blended.

Every tile has its own GroupNorm statistics, so the result differs from the untiled one and seams can show. It
is here because diffusers' users know it; the geometry and the weights are diffusers' own.

Shape legend: B batch, C channels, T frames, H/W pixels or latent cells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileAxis:
    """How one axis is cut, in latent cells."""

    tile: int
    overlap: int

    @property
    def stride(self) -> int:
        return self.tile - self.overlap

    def starts(self, size: int, size_per_cell: int) -> range:
        """The first cell of every tile of an axis of `size` pixels or cells."""
        starts = range(0, math.ceil(size / size_per_cell), self.stride)
        rest = size - starts[-1] * size_per_cell
        if rest < size_per_cell:
            raise ValueError(
                f"an axis of {size} pixels ends in a tile of {rest}; a latent cell takes {size_per_cell}. "
                "Crop or pad it to whole cells, or choose another tile or overlap."
            )
        return starts


def tile_axis(name: str, tile_pixels: int, tile_cells: int, overlap_factor: float, scale: int) -> TileAxis:
    """The cut of the axis called `name` ("height" or "width"); `scale` pixels make a latent cell.

    Raises: ValueError where pixels and cells would disagree. diffusers rounds both and returns a wrong size.
    """
    if tile_pixels < scale or tile_cells * scale != tile_pixels:
        floor = max(scale, tile_pixels // scale * scale)
        raise ValueError(
            f"tile_sample_min_{name}={tile_pixels} with tile_latent_min_{name}={tile_cells}: a tile must be "
            f"a whole number of latent cells of {scale} pixels. Nearest valid tile_sample_min_{name}: "
            f"{floor} or {floor + scale}."
        )
    overlap = tile_cells * overlap_factor
    if not 0 <= round(overlap) < tile_cells:
        raise ValueError(f"tile_overlap_factor_{name}={overlap_factor}: expected at least 0 and less than 1")
    if not _is_whole(overlap):
        raise ValueError(
            f"tile_sample_min_{name}={tile_pixels} ({tile_cells} latent cells) times "
            f"tile_overlap_factor_{name}={overlap_factor:.6g} is an overlap of {overlap:.6g} cells, which "
            f"must be a whole number. {_remedy(name, tile_cells, overlap_factor, scale)}"
        )
    return TileAxis(tile_cells, round(overlap))


def _is_whole(cells: float) -> bool:
    return math.isclose(cells, round(cells), abs_tol=1e-6)


def _remedy(name: str, tile_cells: int, overlap_factor: float, scale: int) -> str:
    below = math.floor(tile_cells * overlap_factor)
    factors = [f"{n}/{tile_cells}={n / tile_cells:.6f}" for n in (below, below + 1) if 0 < n < tile_cells]
    whole = [n for n in range(1, 2 * tile_cells + 64) if n * overlap_factor >= 1 and _is_whole(n * overlap_factor)]
    smaller = [n * scale for n in whole if n < tile_cells][-1:]
    larger = [n * scale for n in whole if n > tile_cells][:1]
    remedies = []
    if factors:
        remedies.append(f"Nearest valid tile_overlap_factor_{name} for this tile: {_either(factors)}.")
    if smaller or larger:
        remedies.append(f"Nearest valid tile_sample_min_{name} for this overlap: {_either(smaller + larger)}.")
    return " ".join(remedies)


def _either(values: list[int] | list[str]) -> str:
    return " or ".join(map(str, values))


def run_in_tiles(
    network: Callable[[Tensor], Tensor],
    x_BCTHW: Tensor,
    height: TileAxis,
    width: TileAxis,
    *,
    in_scale: int,
    out_scale: int,
) -> Tensor:
    """Runs a network over every tile of a clip and blends the results into one.

    `in_scale` and `out_scale` are what a latent cell spans in the input and in the output: pixels, or 1.

    Source: matches diffusers' tiled_encode and tiled_decode. A tile is blended with its upper and left
    neighbours after these were blended themselves, over their whole extent.
    """
    result_rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in height.starts(x_BCTHW.shape[3], in_scale):
        row: list[Tensor] = []
        for left in width.starts(x_BCTHW.shape[4], in_scale):
            rows = slice(top * in_scale, (top + height.tile) * in_scale)
            columns = slice(left * in_scale, (left + width.tile) * in_scale)
            tile = network(x_BCTHW[..., rows, columns])
            if above:
                blend(above[len(row)], tile, height.overlap * out_scale, dim=3)
            if row:
                blend(row[-1], tile, width.overlap * out_scale, dim=4)
            row.append(tile)
        keep_rows, keep_columns = height.stride * out_scale, width.stride * out_scale
        result_rows.append(torch.cat([tile[..., :keep_rows, :keep_columns] for tile in row], dim=4))
        above = row
    return torch.cat(result_rows, dim=3)


def blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """Fades, in place, from the end of `before` into the beginning of `tile` along `dim`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return
    # Weights of low-precision tiles stay in fp32 until the sum is made.
    dtype = torch.promote_types(tile.dtype, torch.float32)
    weight = (torch.arange(extent, dtype=torch.float64, device=tile.device) / extent).to(dtype)
    weight = weight.view([-1 if d == dim else 1 for d in range(tile.ndim)])
    start = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - weight) + start * weight)


@dataclass(frozen=True)
class Cut:
    """How clips are cut in space before a network sees them: one by one, into tiles, both, or not at all."""

    by_clip: bool
    tiles: tuple[TileAxis, TileAxis] | None
    in_scale: int
    out_scale: int

    def run(self, network: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
        """Runs a network over every part, always in the same order, and puts the results together."""
        if self.by_clip and x_BCTHW.shape[0] > 1:
            return torch.cat([self.run(network, clip) for clip in torch.split(x_BCTHW, 1)])
        if self.tiles is None:
            return network(x_BCTHW)
        return run_in_tiles(network, x_BCTHW, *self.tiles, in_scale=self.in_scale, out_scale=self.out_scale)
