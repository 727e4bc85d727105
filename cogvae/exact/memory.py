"""What a plan takes, and which plan a budget allows.

Shape legend: B batch, T frames of the chunk, H/W pixels or latent cells.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cogvae.blocks import DownBlock, ResnetBlock, ResnetStack, UpBlock
from cogvae.decoder import Decoder
from cogvae.encoder import Encoder
from cogvae.exact.hazards import warn_of_hazards
from cogvae.exact.plan import Limits, Plan
from cogvae.kernels import choose_triton

logger = logging.getLogger(__name__)

# Pieces of this size keep a processor's cores busy, and a GPU's much larger ones its many more.
_PIECE_BYTES = {"cpu": 1 << 26, "meta": 1 << 26}
_LARGE_PIECE_BYTES = 1 << 30
_STRIP_BYTES = (1 << 26, 1 << 24, 1 << 22, 1 << 20)
# What memory allocators and convolution libraries take on top. Measured on a processor: up to 1.45 for one chunk.
_OVERHEAD = 1.45


@dataclass(frozen=True, slots=True)
class Layer:
    """A causal convolution of a resnet, and what is held while it runs."""

    in_channels: int
    out_channels: int
    frames: int
    """That come out of it."""
    height: int
    width: int
    held_channels: int
    """Of the frames of the chunk that are held beside buffer and piece, at the most."""


class MemoryBudgetError(ValueError):
    """A memory budget that no plan keeps to. A smaller batch may."""


def find_plan(limits: Limits, network: Encoder | Decoder, first_BCTHW: Tensor, is_last: bool) -> Plan:
    """The fastest plan within the limits, for a clip whose first and longest chunk this is. Logged once.

    Raises: MemoryBudgetError that names the least budget, if no plan keeps to it.
    """
    warn_of_hazards(first_BCTHW)
    budget = limits.memory_budget_bytes
    sizes = []
    for plan, size in _sized_plans(limits, network, first_BCTHW, is_last):
        if budget is None or size <= budget:
            _log_choice(type(network).__name__, tuple(first_BCTHW.shape), first_BCTHW.dtype, budget, size, plan)
            return plan
        sizes.append(size)
    raise MemoryBudgetError(
        f"memory_budget_bytes={budget}: a chunk of shape {list(first_BCTHW.shape)} in {first_BCTHW.dtype} takes "
        f"{min(sizes)} bytes at the least. Give that much, or pass fewer clips, smaller frames or a smaller dtype."
    )


def find_least_bytes(limits: Limits, network: Encoder | Decoder, first_BCTHW: Tensor, is_last: bool) -> int:
    """The smallest budget that `find_plan` accepts."""
    return min(size for _, size in _sized_plans(limits, network, first_BCTHW, is_last))


def _sized_plans(limits: Limits, network: Encoder | Decoder, first_BCTHW: Tensor, is_last: bool) -> Iterator[tuple[Plan, int]]:
    layers = list(_layers(network, first_BCTHW))
    device = first_BCTHW.device
    fastest = Plan(
        piece_bytes=_PIECE_BYTES.get(device.type, _LARGE_PIECE_BYTES),
        strip_rows=limits.strip_rows,
        triton=choose_triton(limits.triton, device),
    )
    for plan in _plans(fastest):
        yield plan, estimate_bytes(layers, plan, first_BCTHW, keeps_past=not is_last)


@functools.lru_cache(maxsize=256)
def _log_choice(network: str, chunk: tuple[int, ...], dtype: torch.dtype, budget: int | None, size: int, plan: Plan) -> None:
    """One line for every kind of clip, not for every clip."""
    logger.info(
        "plan chosen network=%s chunk=%s dtype=%s budget_bytes=%s estimated_bytes=%d piece_bytes=%d strip_bytes=%s "
        "strip_rows=%s single_frames=%s",
        *(network, list(chunk), dtype, budget, size, plan.piece_bytes, plan.strip_bytes, plan.strip_rows, plan.single_frames),
    )


def _plans(default: Plan) -> Iterator[Plan]:
    """From the fastest to the leanest."""
    yield default
    pairs = replace(default, piece_bytes=1)
    yield pairs
    for plan in (pairs, replace(pairs, single_frames=True)):
        for strip_bytes in (None,) if plan.strip_rows else _STRIP_BYTES:
            yield replace(plan, strip_bytes=strip_bytes)


def estimate_bytes(layers: list[Layer], plan: Plan, like: Tensor, *, keeps_past: bool) -> int:
    """What a chunk takes beside weights, input and result: the largest layer, and the past of all where one is kept."""
    cell_bytes = like.shape[0] * like.element_size()
    past = sum(2 * layer.in_channels * (layer.height + 2) * layer.width for layer in layers) if keeps_past else 0
    return int(_OVERHEAD * (max(_layer_bytes(layer, plan, like) for layer in layers) + past * cell_bytes))


def _layer_bytes(layer: Layer, plan: Plan, like: Tensor) -> int:
    batch, item = like.shape[0], like.element_size()
    wide = max(item, 4) / item  # sums are formed in float32 at least
    frame = batch * layer.height * layer.width * item
    at_once = min(plan.frames_at_once(frame * max(layer.in_channels, layer.out_channels)), layer.frames)
    widest = max(layer.in_channels, layer.out_channels)
    rows = plan.strip(batch * widest * (2 + at_once) * layer.width, like, layer.height)
    share = min(1.0, (rows + 2) / layer.height)
    buffer = (2 + at_once) * layer.in_channels * frame * (layer.height + 2) / layer.height
    convolution = at_once * (layer.in_channels / 2 + 1.5 * layer.out_channels) * share
    norm = at_once * layer.in_channels * (wide if wide > 1 else 0)
    statistics = layer.out_channels * wide
    piece = at_once * layer.out_channels
    kernels = 1.5 * 9 * layer.in_channels * layer.out_channels * 3 * item
    return int(kernels + buffer + frame * (layer.frames * layer.held_channels + piece + max(convolution, norm, statistics)))


def _layers(network: Encoder | Decoder, first_BCTHW: Tensor) -> Iterator[Layer]:
    frames, height, width = first_BCTHW.shape[2:]
    if isinstance(network, Encoder):
        for block in network.down_blocks:
            assert isinstance(block, DownBlock)
            yield from _stack_layers(block, frames, height, width)
            for downsampler in block.downsamplers:
                frames = (frames + 1) // 2 if downsampler.compress_time and frames > 1 else frames
                height, width = height // 2, width // 2
        yield from _stack_layers(network.mid_block, frames, height, width)
        return
    yield from _stack_layers(network.mid_block, frames, height, width)
    for block in network.up_blocks:
        assert isinstance(block, UpBlock)
        yield from _stack_layers(block, frames, height, width)
        for upsampler in block.upsamplers:
            frames = 2 * frames - frames % 2 if upsampler.compress_time and frames > 1 else frames
            height, width = 2 * height, 2 * width


def _stack_layers(stack: nn.Module, frames: int, height: int, width: int) -> Iterator[Layer]:
    assert isinstance(stack, ResnetStack)
    for resnet in stack.resnets:
        assert isinstance(resnet, ResnetBlock)
        conv1, conv2 = resnet.conv1.conv, resnet.conv2.conv
        # A frame gives way to its projection while the next activation grows.
        held = conv1.in_channels + conv1.out_channels
        if resnet.conv_shortcut is not None:
            held = max(conv1.in_channels, 2 * conv1.out_channels)
        yield Layer(conv1.in_channels, conv1.out_channels, frames, height, width, held)
        yield Layer(conv2.in_channels, conv2.out_channels, frames, height, width, 2 * conv2.out_channels)
