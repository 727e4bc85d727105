"""How weights move: Muon and AdamW, the learning rate's course, and the running average that is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig

_FINAL_SHARE = 0.02
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_UPDATE_RMS = 0.2
"""Size of a Muon update relative to the rate: that of AdamW's, so that both take the same rate."""


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is replaced by the nearest orthogonal matrix; kernels count as [out, in * cells].

    All directions of a layer learn equally fast, the rare ones too. torch's own Muon takes plain matrices only.

    Source: Jordan et al. 2024, and the scale of arXiv:2502.16982 (section 2.2).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])
                update = orthogonalized(ahead.flatten(1)).view_as(parameter)
                scale = _UPDATE_RMS * math.sqrt(max(update.flatten(1).shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix of the same singular vectors whose singular values are all near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    result: Tensor = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
    return result


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for the kernels inside the networks, AdamW for the rest: pixel ends, 1x1 kernels, biases and norms.

    Weight decay goes to weights of more than one dimension: not to biases, not to norms.
    """
    named = dict(module.named_parameters())
    inner = [name for name, p in named.items() if config.name == "muon" and _is_inner_kernel(p)]
    rest = [p for name, p in named.items() if name not in inner]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    muon = [Muon([named[name] for name in inner], config.learning_rate, config.weight_decay)] if inner else []
    return [adamw, *muon]


def _is_inner_kernel(parameter: nn.Parameter) -> bool:
    shape = parameter.shape
    return parameter.ndim >= 4 and shape[-1] > 1 and min(shape[0], shape[1]) > 3


def learning_rate(step: int, last_step: int, config: OptimizerConfig) -> float:
    """Linear warm-up, constant, and at the end a half cosine down to a fiftieth.

    The rate is constant in between so that a run can go on for longer than was planned.
    """
    share = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = last_step - step
    if left < config.decay_steps:
        share *= _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 - math.cos(math.pi * left / config.decay_steps))
    return config.learning_rate * share


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], module: nn.Module) -> dict[str, Tensor]:
    """The optimizers' moments under the names of their parameters."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for optimizer in optimizers
        for name, parameter in module.named_parameters()
        for moment in _MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], module: nn.Module, tensors: Mapping[str, Tensor], num_updates: int
) -> None:
    """Give the optimizers the moments that `optimizer_tensors` took."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[parameter]
            moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS if f"{m}.{name}" in tensors}
            if moments:
                step = {} if isinstance(optimizer, Muon) else {"step": torch.tensor(float(num_updates))}
                optimizer.state[parameter] = {**step, **moments}


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
