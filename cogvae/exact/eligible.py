"""When the exact engine may stand in for the modules: where these are what they were built as, and nobody watches."""

import logging

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cogvae import blocks, conv, decoder, encoder
from cogvae.exact.plan import Limits
from cogvae.precision import weights_of

logger = logging.getLogger(__name__)

_OWN = (
    *(encoder.Encoder, decoder.Decoder, blocks.ResnetStack, blocks.DownBlock, blocks.UpBlock, blocks.ResnetBlock),
    *(blocks.SpatialNorm, conv.CausalConv3d, conv.Downsample, conv.Upsample),
)
_WEIGHTED = (nn.GroupNorm, nn.Conv2d, nn.Conv3d)
_KNOWN = frozenset((*_OWN, *_WEIGHTED, nn.ModuleList, nn.SiLU, nn.Mish, nn.GELU, nn.ReLU))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _methods() -> list[object]:
    return [getattr(kind, name, None) for kind in (*_OWN, *_WEIGHTED) for name in ("forward", "_conv_forward")]


_METHODS = _methods()
_reported: set[str] = set()


def find_obstacle(network: nn.Module, quant_conv: nn.Module | None, x: Tensor) -> str | None:
    """Why the modules must run on `x`, and what to do about it; None where the engine gives what they would.

    `quant_conv` is called as it is, and must only want no gradients. Hooks on all modules of the process do not
    count: those are tools that watch, such as torch's FLOP counter.
    """
    return _find_in_call(x) or _find_gradients(network, quant_conv, x) or _find_in_modules(network, x)


def _find_in_call(x: Tensor) -> str | None:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "torch.compile or torch.jit traces the call: call the model itself"
    # Of tensors that only one of the modules holds, too.
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation transforms the call: call the model itself"
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return "autocast chooses the dtypes: call outside of it, with weights of the dtype that is wanted"
    return None


def _find_gradients(network: nn.Module, quant_conv: nn.Module | None, x: Tensor) -> str | None:
    if not torch.is_grad_enabled():
        return None
    halves = [network] if quant_conv is None else [network, quant_conv]
    if x.requires_grad or any(weight.requires_grad for half in halves for weight in weights_of(half)):
        return "gradients are wanted: call under torch.no_grad() or torch.inference_mode()"
    return None


def _find_in_modules(network: nn.Module, x: Tensor) -> str | None:
    if _methods() != _METHODS:
        return "the class of a module was patched: undo that"
    for name, module in network.named_modules():
        if not _is_as_built(module):
            return f"{name or 'the network'} was wrapped, replaced, hooked or patched: undo that"
        for weight in module._parameters.values():
            if weight is not None and (weight.dtype, weight.device) != (x.dtype, x.device):
                return f"{name} is {weight.dtype} on {weight.device} where {x.dtype} on {x.device} comes in: make them one"
    return None


def _is_as_built(module: nn.Module) -> bool:
    if type(module) not in _KNOWN or any(vars(module)[name] for name in _HOOKS):
        return False
    if any(callable(getattr(type(module), name, None)) for name in vars(module)):
        return False  # such as the _conv_forward of one convolution, which makes textures seamless
    if not isinstance(module, _WEIGHTED):
        return True
    weights = (module._parameters.get("weight"), module._parameters.get("bias"))
    # A subclass of Tensor computes in its own way. Seamless textures also come by padding_mode.
    return (
        all(type(weight) in (nn.Parameter, Tensor) for weight in weights) and getattr(module, "padding_mode", "zeros") == "zeros"
    )


def report_obstacle(obstacle: str, limits: Limits) -> None:
    """Says that the modules run: once a process as a warning, where limits are asked for that only the engine keeps."""
    if limits.memory_budget_bytes is None and limits.strip_rows is None:
        if not torch.compiler.is_compiling():
            logger.debug("exact engine not used reason=%r", obstacle)
    elif obstacle not in _reported:
        _reported.add(obstacle)  # not functools.cache: torch.compile fails on it
        logger.warning("memory_budget_bytes and strip_rows have no effect, as the exact engine cannot run: %s", obstacle)
