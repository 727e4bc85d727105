"""When the exact engine may stand in for the modules: where these are what they were built as, and nobody watches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cogvae import blocks, conv, decoder, encoder

_OWN = (
    *(encoder.Encoder, decoder.Decoder, blocks.ResnetStack, blocks.DownBlock, blocks.UpBlock, blocks.ResnetBlock),
    *(blocks.SpatialNorm, conv.CausalConv3d, conv.Downsample, conv.Upsample),
)
_PLAIN = (nn.ModuleList, nn.GroupNorm, nn.Conv2d, nn.Conv3d, nn.SiLU, nn.Mish, nn.GELU, nn.ReLU)
_KNOWN = frozenset((*_OWN, *_PLAIN))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def can_run(networks: Iterable[nn.Module | None], x: Tensor) -> bool:
    """Whether the engine gives what the modules would for `x`.

    It does not where gradients are wanted, where autocast chooses dtypes, where a module is wrapped, replaced,
    hooked, parametrised or patched, or where weights are of another kind or dtype than the input. Then the modules run.
    Hooks on all modules of the process do not count: those are tools that watch, such as torch's FLOP counter.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    needs_grad = torch.is_grad_enabled()
    if needs_grad and x.requires_grad:
        return False
    modules = [module for module in networks if module is not None]
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if type(parameter) not in (nn.Parameter, Tensor) or parameter.dtype != x.dtype or parameter.device != x.device:
            return False
        if needs_grad and parameter.requires_grad:
            return False
    return all(_is_as_built(part) for module in modules for part in module.modules())


def _is_as_built(module: nn.Module) -> bool:
    if type(module) not in _KNOWN or "forward" in vars(module) or any(vars(module)[name] for name in _HOOKS):
        return False
    # Users make seamless textures by changing this one.
    return not isinstance(module, nn.Conv2d | nn.Conv3d) or module.padding_mode == "zeros"
