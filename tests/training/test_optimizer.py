"""The course of the learning rate, what Muon does to a matrix, and the running average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config import OptimizerConfig
from training.optimizer import Muon, RunningAverage, build_optimizers, learning_rate, orthogonalized


def test_the_rate_warms_up_stays_and_falls_to_a_fiftieth() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonalized_matrix_keeps_its_directions_and_evens_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalized(matrix)
    along = left.T @ result @ right.T
    kept = along.diagonal()[sizes > 0.1 * sizes.max()]
    assert kept.min() > 0.6
    assert kept.max() < 1.3
    assert (along - torch.diag(along.diagonal())).abs().max() < 1e-4


def test_muon_updates_are_as_large_as_those_of_adamw() -> None:
    kernel = nn.Parameter(torch.zeros(16, 8, 3, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    Muon([kernel], lr=0.1, weight_decay=0.0).step()
    assert kernel.detach().square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.25)
    assert (kernel * kernel.grad).sum() < 0


def test_muon_takes_the_inner_kernels_and_adamw_the_rest() -> None:
    module = nn.ModuleDict(
        {"inner": nn.Conv3d(4, 8, 3), "pixels": nn.Conv3d(3, 8, 3), "point": nn.Conv3d(4, 8, 1), "norm": nn.GroupNorm(2, 8)}
    )
    adamw, muon = build_optimizers(module, OptimizerConfig())
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert taken == {id(module["inner"].weight)}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert len(rest) + 1 == len(list(module.parameters()))
    assert [type(o) for o in build_optimizers(module, OptimizerConfig(name="adamw"))] == [torch.optim.AdamW]


def test_the_average_follows_at_once_and_then_slowly() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = RunningAverage(module, decay=0.9)
    nn.init.ones_(module.weight)
    average.update(module, step=0)
    assert average.tensors["weight"].item() == pytest.approx(0.9)
    average.update(module, step=10_000)
    assert average.tensors["weight"].item() == pytest.approx(0.91)
