"""Every term of the loss at points where its value is known, and what the terms ask for."""

from __future__ import annotations

import math

import pytest
import torch

from cogvae import DiagonalGaussianDistribution
from training.config import LossConfig
from training.losses import charbonnier, kl_per_number, loss_terms, pyramid_error, total_loss


def posterior(mean: float, logvar: float) -> DiagonalGaussianDistribution:
    moments = torch.cat([torch.full((2, 4, 3, 2, 2), mean), torch.full((2, 4, 3, 2, 2), logvar)], dim=1)
    return DiagonalGaussianDistribution(moments)


def test_small_errors_count_as_squares_and_large_ones_as_sizes() -> None:
    assert charbonnier(torch.tensor([0.0])).item() == 0
    assert charbonnier(torch.tensor([0.002])).item() == pytest.approx(0.002**2 / (2 * 0.02), rel=0.01)
    assert charbonnier(torch.tensor([-1.0])).item() == pytest.approx(1 - 0.02, abs=3e-4)


def test_pyramid_of_an_even_error_is_in_its_coarsest_level_alone() -> None:
    error = torch.full((2, 3, 16, 16), 0.5)
    assert pyramid_error(error).item() == pytest.approx(charbonnier(error).item() / 4)


def test_pyramid_of_a_checkerboard_is_in_its_finest_level_alone() -> None:
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float() - 0.5
    assert pyramid_error(board[None, None]).item() == pytest.approx(charbonnier(board).item() / 4)


def test_kl_of_known_posteriors() -> None:
    assert kl_per_number(posterior(0.0, 0.0)).item() == 0
    assert kl_per_number(posterior(1.0, 0.0)).item() == pytest.approx(0.5)
    assert kl_per_number(posterior(0.0, -6.0)).item() == pytest.approx(0.5 * (math.exp(-6) + 5))


def test_a_perfect_reconstruction_costs_its_kl_alone() -> None:
    clip = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    terms = loss_terms(clip, clip, posterior(1.0, 0.0))
    assert total_loss(terms, LossConfig(kl=0.1)).item() == pytest.approx(0.05, abs=1e-5)


def test_total_is_the_weighted_sum_and_has_a_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    clip = torch.rand(2, 3, 9, 16, 16, generator=generator) * 2 - 1
    output = (torch.rand(clip.shape, generator=generator) * 2 - 1).requires_grad_()
    terms = loss_terms(output, clip, posterior(0.0, 0.0))
    total = total_loss(terms, LossConfig(pyramid=2.0, structure=3.0))
    assert total.item() == pytest.approx((terms["pixel"] + 2 * terms["pyramid"] + 3 * terms["structure"]).item(), rel=1e-6)
    total.backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert (output.grad != 0).float().mean() > 0.99
