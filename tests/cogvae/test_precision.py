"""Encoder and decoder each compute in a dtype of their own, whatever comes in."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX

from .pairs import make_tiny, reference_path, relative_error

DTYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)]


def split(vae: AutoencoderKLCogVideoX, encoder: torch.dtype, decoder: torch.dtype) -> AutoencoderKLCogVideoX:
    both = copy.deepcopy(vae)
    both.encoder.to(encoder)
    both.decoder.to(decoder)
    return both


def whole(vae: AutoencoderKLCogVideoX, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    return copy.deepcopy(vae).to(dtype)


def moments(vae: AutoencoderKLCogVideoX, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.parameters


@pytest.mark.parametrize(("encoder", "decoder"), DTYPES)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_each_half_gives_what_a_model_of_its_dtype_does(encoder: torch.dtype, decoder: torch.dtype, given: torch.dtype) -> None:
    vae = make_tiny()
    both = split(vae, encoder, decoder)
    x = torch.randn(1, 3, 17, 16, 24).to(given)
    expected = moments(whole(vae, encoder), x.to(encoder))
    assert expected.dtype == encoder
    assert torch.equal(moments(both, x), expected)
    z = expected[:, :4].to(given)
    frames = whole(vae, decoder).decode(z.to(decoder)).sample
    assert torch.equal(both.decode(z).sample, frames)
    assert torch.equal(torch.cat(list(both.decode_stream(z)), dim=2), frames)
    assert torch.equal(torch.cat(list(both.encode_stream(x)), dim=2), expected)


@pytest.mark.parametrize(("encoder", "decoder"), DTYPES)
@torch.no_grad()
def test_pixels_become_what_the_encoder_computes_in(encoder: torch.dtype, decoder: torch.dtype) -> None:
    vae = make_tiny()
    pixels = torch.randint(0, 256, (1, 3, 9, 16, 16), dtype=torch.uint8)
    given = torch.cat(list(split(vae, encoder, decoder).encode_stream(pixels, uint8=True)), dim=2)
    assert torch.equal(given, torch.cat(list(whole(vae, encoder).encode_stream(pixels, uint8=True)), dim=2))


@torch.no_grad()
def test_a_latent_passes_from_one_half_to_the_other() -> None:
    vae = make_tiny()
    both = split(vae, torch.float64, torch.float32)
    x = torch.randn(1, 3, 9, 16, 24)
    expected = vae(x).sample
    assert both(x).sample.dtype == torch.float32
    assert relative_error(both(x).sample, expected) < 1e-4
    both.enable_tiling(16, 16, 1 / 2, 1 / 2)
    vae.enable_tiling(16, 16, 1 / 2, 1 / 2)
    assert relative_error(both(x).sample, vae(x).sample) < 1e-4
    with reference_path(both):
        assert relative_error(both(x).sample, vae(x).sample) < 1e-4


def test_gradients_reach_an_input_of_another_dtype() -> None:
    vae = make_tiny()
    x = torch.randn(1, 3, 9, 8, 8, dtype=torch.float64, requires_grad=True)
    vae(x).sample.square().mean().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float64
    assert x.grad.abs().sum() > 0


@torch.no_grad()
def test_weights_that_are_stored_in_8_bits_do_not_decide_the_dtype_of_what_comes_in() -> None:
    vae = make_tiny()
    seen: list[torch.dtype] = []

    def note(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].dtype)
        raise InterruptedError

    vae.decoder.to(torch.float8_e4m3fn)  # such as diffusers' layerwise casting, whose hooks restore them
    vae.decoder.register_forward_pre_hook(note)
    with pytest.raises(InterruptedError):
        vae.decode(torch.randn(1, 4, 3, 1, 1))
    assert seen == [torch.float32]


@torch.no_grad()
def test_pixels_come_in_float32_where_the_weights_are_stored_in_8_bits() -> None:
    vae = make_tiny()
    seen: list[torch.dtype] = []

    def note(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].dtype)
        raise InterruptedError

    vae.encoder.to(torch.float8_e4m3fn)
    vae.encoder.register_forward_pre_hook(note)
    with pytest.raises(InterruptedError):
        next(vae.encode_stream(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8), uint8=True))
    assert seen == [torch.float32]


@pytest.mark.parametrize("by_modules", [False, True])
@torch.no_grad()
def test_quant_convs_keep_a_dtype_of_their_own(by_modules: bool) -> None:
    single = AutoencoderKLCogVideoX.from_config(make_tiny().config, use_quant_conv=True, use_post_quant_conv=True)
    both = split(single, torch.float64, torch.float64)
    x = torch.randn(1, 3, 9, 16, 16)
    expected = single(x).sample
    with reference_path(both) if by_modules else contextlib.nullcontext():
        assert both.encode(x).latent_dist.parameters.dtype == torch.float32
        assert relative_error(both(x).sample, expected) < 1e-4
        assert both(x).sample.dtype == torch.float64
        z = torch.randn(1, 4, 3, 1, 1)
        assert torch.equal(torch.cat(list(both.decode_stream(z)), dim=2), both.decode(z).sample)
