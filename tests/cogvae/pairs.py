"""Our model and diffusers' with the same random weights, small enough for two busy cores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX

TINY: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-3,  # far from 1e-6, so that a norm with the wrong epsilon shows
    "sample_height": 96,
    "sample_width": 160,
}


def make_reference(dtype: torch.dtype = torch.float64, **overrides: Any) -> diffusers.AutoencoderKLCogVideoX:
    """diffusers' model, every norm and bias random as well."""
    torch.manual_seed(torch.seed() % 2**31)
    model = diffusers.AutoencoderKLCogVideoX(**{**TINY, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def make_pair(
    dtype: torch.dtype = torch.float64, **overrides: Any
) -> tuple[AutoencoderKLCogVideoX, diffusers.AutoencoderKLCogVideoX]:
    reference = make_reference(dtype, **overrides)
    ours = AutoencoderKLCogVideoX.from_config(reference.config).to(dtype).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def make_tiny(dtype: torch.dtype = torch.float32, **overrides: Any) -> AutoencoderKLCogVideoX:
    return make_pair(dtype, **overrides)[0]


@contextmanager
def reference_path(vae: AutoencoderKLCogVideoX) -> Iterator[None]:
    """Plain modules instead of the exact engine, which leaves a hooked model alone."""
    hooks = [part.conv_in.register_forward_hook(lambda *_: None) for part in (vae.encoder, vae.decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_same_state(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual_state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(actual_state) == list(expected_state)
    for key, tensor in actual_state.items():
        assert tensor.dtype == expected_state[key].dtype
        assert torch.equal(tensor, expected_state[key]), key
