"""How weights move: AdamW over named parameters, the learning rate's course, and the running average that is exported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig

_FINAL_SHARE = 0.02
_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay goes to weights of more than one dimension: not to biases, not to norms."""
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, last_step: int, config: OptimizerConfig) -> float:
    """Linear warm-up, constant, and at the end a half cosine down to a fiftieth.

    The rate is constant in between so that a run can go on for longer than was planned.
    """
    share = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = last_step - step
    if left < config.decay_steps:
        share *= _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 - math.cos(math.pi * left / config.decay_steps))
    return config.learning_rate * share


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's moments under the names of their parameters."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    num_updates: int,
) -> None:
    for name, parameter in named:
        if f"{_MOMENTS[0]}.{name}" in tensors:
            state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(num_updates)), **state}


class RunningAverage:
    """Exponential average of the weights. It forgets faster at the start, where weights are not worth remembering."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in module.state_dict().items():
            self.tensors[name].lerp_(tensor, 1 - decay)
