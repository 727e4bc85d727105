"""The class as a whole: surface, gradients, copies, and what it says when it is used wrongly."""

import copy
import functools
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvae import AutoencoderKLCogVideoX, DecoderOutput

from .pairs import assert_same_state, make_pair, make_tiny, relative_error


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss that reaches every parameter, over three chunks each way."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    posterior = model.encode(leaf).latent_dist  # type: ignore[operator]
    frames = model.decode(posterior.sample(torch.Generator().manual_seed(0))).sample  # type: ignore[operator]
    (frames.square().mean() + posterior.kl().mean()).backward()
    assert leaf.grad is not None
    return {"input": leaf.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_public_methods_take_what_those_of_diffusers_take() -> None:
    theirs = diffusers.AutoencoderKLCogVideoX
    for name in ("enable_tiling", "tiled_encode", "tiled_decode", "forward"):
        ours = list(inspect.signature(getattr(AutoencoderKLCogVideoX, name)).parameters)
        assert ours[: len(inspect.signature(getattr(theirs, name)).parameters)] == list(
            inspect.signature(getattr(theirs, name)).parameters
        )
    for name in ("encode", "decode"):  # wrapped in diffusers
        assert list(inspect.signature(getattr(AutoencoderKLCogVideoX, name)).parameters)[2] == "return_dict"


@torch.no_grad()
def test_tuples_hold_what_the_outputs_hold() -> None:
    vae = make_tiny()
    x, z = torch.randn(1, 3, 1, 8, 8), torch.randn(1, 4, 1, 1, 1)
    (posterior,) = vae.encode(x, return_dict=False)
    assert torch.equal(posterior.mean, vae.encode(x).latent_dist.mean)
    (frames,) = vae.decode(z, return_dict=False)
    assert torch.equal(frames, vae.decode(z).sample)
    (again,) = vae(x, return_dict=False)
    assert torch.equal(again, vae(x).sample)
    assert isinstance(vae(x), DecoderOutput)


def test_dtype_device_and_size_are_those_of_the_parameters() -> None:
    ours, reference = make_pair(torch.float32)
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert ours.half().dtype == torch.float16
    assert ours.to(torch.bfloat16).dtype == torch.bfloat16
    assert ours.to("meta").device.type == "meta"
    ours.encoder.requires_grad_(False)
    reference.encoder.requires_grad_(False)
    assert ours.num_parameters() == reference.num_parameters()
    assert ours.num_parameters(only_trainable=True) == reference.num_parameters(only_trainable=True)


def test_gradients_are_those_of_diffusers_with_and_without_checkpointing() -> None:
    ours, reference = make_pair()
    x = torch.randn(2, 3, 17, 8, 16, dtype=torch.float64)
    expected = gradients(reference, x)
    plain = gradients(ours, x)
    assert not ours.gradient_checkpointing
    ours.enable_gradient_checkpointing()
    assert ours.gradient_checkpointing
    checkpointed = gradients(ours, x)
    ours.disable_gradient_checkpointing()
    assert not ours.gradient_checkpointing
    assert expected.keys() == plain.keys() == checkpointed.keys()
    for name, gradient in expected.items():
        assert relative_error(plain[name], gradient) < 1e-9, name
        assert torch.equal(checkpointed[name], plain[name]), name


def test_checkpointing_recomputes_instead_of_storing() -> None:
    vae = make_tiny()
    x = torch.randn(1, 3, 9, 16, 16)

    def stored_bytes() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vae.encode(x).latent_dist.mean.sum()
        return sum(sizes.values())

    plain = stored_bytes()
    vae.enable_gradient_checkpointing()
    assert stored_bytes() < 0.7 * plain


def test_a_checkpointing_function_may_be_given() -> None:
    vae = make_tiny()
    calls: list[nn.Module] = []

    def count(module: nn.Module, *args: Any) -> Any:
        calls.append(module)
        return functools.partial(checkpoint, use_reentrant=False)(module, *args)

    vae.enable_gradient_checkpointing(count)
    x = torch.randn(1, 3, 1, 8, 8)
    vae(x).sample.sum().backward()
    assert len(calls) == 4 + 2 + 2 + 8  # every resnet of the tiny encoder and decoder
    with torch.no_grad():
        vae(x)
    assert len(calls) == 16


@torch.no_grad()
def test_copies_are_independent_and_compute_the_same() -> None:
    vae = make_tiny()
    vae.enable_tiling()
    x = torch.randn(1, 3, 17, 8, 8)
    before = vae(x).sample
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert_same_state(twin, vae)
        assert twin.use_tiling
        assert torch.equal(twin(x).sample, before)
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(vae(x).sample, before)


@torch.no_grad()
def test_threads_do_not_see_each_others_clips() -> None:
    vae = make_tiny()
    latents = [torch.randn(1, 4, 5, 1, 2) for _ in range(6)]
    expected = [vae.decode(z).sample for z in latents]
    with ThreadPoolExecutor(3) as pool:
        decoded = list(pool.map(lambda z: vae.decode(z).sample, latents))
    assert all(relative_error(*pair) < 1e-6 for pair in zip(decoded, expected, strict=True))


@torch.no_grad()
def test_a_call_leaves_nothing_on_the_modules_and_its_input_as_it_was() -> None:
    vae = make_tiny()
    before = {name: set(vars(module)) for name, module in vae.named_modules()}
    x = torch.randn(1, 3, 17, 8, 8)
    kept = x.clone()
    vae(x)
    assert torch.equal(x, kept)
    assert {name: set(vars(module)) for name, module in vae.named_modules()} == before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 8), r"frames of shape \[1, 3, 8, 8\]: expected \[batch, 3, frames, height, width\]"),
        ((1, 4, 1, 8, 8), r"frames of shape \[1, 4, 1, 8, 8\]: expected \[batch, 3"),
        ((1, 3, 0, 8, 8), "one frame"),
        ((0, 3, 1, 8, 8), "one clip"),
        ((1, 3, 1, 7, 8), "height and width 8 at least"),
    ],
)
def test_frames_of_a_wrong_shape_are_named(shape: tuple[int, ...], message: str) -> None:
    vae = make_tiny()
    for encode in (vae.encode, vae.tiled_encode, vae):
        with pytest.raises(ValueError, match=message):
            encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1, 8, 8), r"latents of shape \[4, 1, 8, 8\]: expected \[batch, 4"),
        ((1, 16, 1, 8, 8), r"latents of shape \[1, 16, 1, 8, 8\]: expected \[batch, 4"),
        ((1, 4, 1, 0, 8), "height and width 1 at least"),
    ],
)
def test_latents_of_a_wrong_shape_are_named(shape: tuple[int, ...], message: str) -> None:
    vae = make_tiny()
    for decode in (vae.decode, vae.tiled_decode):
        with pytest.raises(ValueError, match=message):
            decode(torch.zeros(shape))


def test_integer_frames_are_refused_with_the_conversion() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8.*x / 127\.5 - 1"):
        make_tiny().encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
