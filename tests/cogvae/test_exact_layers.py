"""The parts of the exact engine, each against what it stands for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cogvae.conv import resize_nearest
from cogvae.exact import causal, folding
from cogvae.exact.norms import find_latent_frame
from cogvae.exact.pieces import piece_sizes, regroup
from cogvae.exact.statistics import Moments
from cogvae.kernels import twins

from .pairs import relative_error

EXACT = 1e-14


def random_conv() -> tuple[Tensor, Tensor, Tensor]:
    """A 3x3x3 kernel, a bias, and a window of 8 frames with its halo of rows."""
    weight, bias = torch.randn(5, 3, 3, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    return weight, bias, torch.randn(2, 3, 8, 6, 7, dtype=torch.float64)


def test_two_frames_of_four_products_are_those_of_six() -> None:
    weight, bias, window = random_conv()
    expected = F.conv3d(window, weight, bias, padding=(0, 0, 1))
    assert relative_error(causal.convolve_two_frames(window, folding.fold_two_frames(weight), bias), expected) < EXACT


def test_a_convolution_is_the_sum_of_its_taps() -> None:
    weight, bias, window = random_conv()
    expected = F.conv3d(window, weight, bias, padding=(0, 0, 1))
    assert relative_error(causal.convolve_by_taps(window, folding.taps(weight), bias), expected) < EXACT


def test_frames_in_pairs_need_no_third_tap() -> None:
    weight, bias, window = random_conv()
    expected = F.conv3d(window.repeat_interleave(2, dim=2), weight, bias, padding=(0, 0, 1))
    assert relative_error(causal.convolve_pairs(window, folding.taps(weight), bias), expected) < EXACT
    each = [F.conv3d(window, kernel, bias, padding=(0, 0, 1)) for kernel in folding.fold_pairs(weight)]
    assert relative_error(torch.stack(each, dim=3).flatten(2, 3), expected) < EXACT


def test_a_still_frame_needs_one_tap() -> None:
    weight, bias, window = random_conv()
    still = window[:, :, :1]
    expected = F.conv3d(still.expand(-1, -1, 3, -1, -1), weight, bias, padding=(0, 0, 1))
    assert relative_error(causal.planes(still, folding.fold_still(weight), bias), expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_still_frame_of_16_bits_has_the_sum_of_the_taps_in_twice_as_many(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, 3, 3, 3).to(dtype)
    halves = folding.fold_still_in_halves(weight)
    assert halves.dtype == dtype
    total = weight.double().sum(2)
    assert relative_error(halves.double().sum(2), total) < 0.01 * relative_error(total.to(dtype), total)


def test_doubling_and_convolving_is_one_transposed_convolution() -> None:
    weight, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    assert relative_error(F.conv_transpose2d(x, folding.fold_upsample(weight), stride=2, padding=1), expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_kernels_are_summed_before_they_are_rounded(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, 3, 3, 3).to(dtype)
    first, second, third = weight.unbind(2)
    wide = weight.double()
    assert torch.equal(folding.fold_still(weight), wide.sum(2).to(dtype))
    assert not torch.equal(wide.sum(2).to(dtype), first + second + third)
    assert torch.equal(folding.fold_pairs(weight)[0][:, :, 0], (wide[:, :, 0] + wide[:, :, 1]).to(dtype))
    assert torch.equal(folding.fold_pairs(weight)[1][:, :, 1], (wide[:, :, 1] + wide[:, :, 2]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_upsampler_is_summed_before_it_is_rounded(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, 3, 3).to(dtype)
    assert torch.equal(folding.fold_upsample(weight), folding.fold_upsample(weight.double()).to(dtype))
    corner = (weight[..., 1, 1] + weight[..., 1, 2]) + (weight[..., 2, 1] + weight[..., 2, 2])
    assert not torch.equal(folding.fold_upsample(weight)[:, :, 1, 1].T, corner)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_moments_of_pieces_are_those_of_the_whole(pieces: list[tuple[int, int]], offset: float) -> None:
    moments = Moments()
    parts = []
    for i, (frames, times) in enumerate(pieces):
        part = torch.randn(2, 6, frames, 3, 4, dtype=torch.float64) + offset * i
        moments.add(twins.finish(part, 2, None, None), times)
        parts += [part] * times
    whole = torch.cat(parts, dim=2).view(2, 2, -1)
    mean, variance = moments.mean_and_variance()
    assert relative_error(mean, whole.mean(2)) < 1e-11
    assert relative_error(variance, whole.var(2, correction=0)) < 1e-11


def test_moments_merge_the_spread_between_pieces_too() -> None:
    moments = Moments()
    for mean in (0.0, 2.0):
        moments.add(twins.finish(torch.tensor([mean - 1, mean + 1]).view(1, 1, 1, 1, 2), 1, None, None))
    assert [float(x) for x in moments.mean_and_variance()] == [1.0, 2.0]


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 100]))
def test_pieces_cover_a_chunk_and_cut_no_pair(num_frames: int, at_once: int) -> None:
    sizes = piece_sizes(num_frames, at_once)
    assert sum(sizes) == num_frames
    assert max(sizes) <= at_once
    assert num_frames % 2 == 0 or sizes[0] == 1
    if at_once > 1:
        assert all(size % 2 == 0 for size in sizes[num_frames % 2 :])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms())
def test_regrouping_keeps_frames_and_order(sizes: list[int], random: object) -> None:
    x = torch.arange(sum(sizes)).view(1, 1, -1, 1, 1)
    other = sorted(sizes, key=lambda _: random.random())  # type: ignore[attr-defined]
    pieces = list(regroup(torch.split(x, sizes, dim=2), other))
    assert [piece.shape[2] for piece in pieces] == other
    assert torch.equal(torch.cat(pieces, dim=2), x)


@pytest.mark.parametrize(
    ("latent_frames", "num_frames"), [(1, 1), (2, 2), (3, 3), (2, 4), (2, 8), (3, 5), (3, 9), (5, 9), (4, 16), (1, 4), (5, 17)]
)
def test_every_frame_has_the_latent_that_repetition_would_give_it(latent_frames: int, num_frames: int) -> None:
    latents = torch.arange(float(latent_frames)).view(1, 1, -1, 1, 1)
    repeated = [int(t) for t in resize_nearest(latents, num_frames, 1, 1).flatten()]
    assert [find_latent_frame(i, num_frames, latent_frames, paired=False) for i in range(num_frames)] == repeated
    if num_frames > latent_frames:
        alone = num_frames % 2
        unique = repeated[:alone] + repeated[alone::2]
        held = range(alone + num_frames // 2)
        assert [find_latent_frame(i, num_frames, latent_frames, paired=True) for i in held] == unique
