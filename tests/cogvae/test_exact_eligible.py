"""Where the plain modules must run they do, and what was done to the weights is what both paths compute with."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cogvae import AutoencoderKLCogVideoX
from cogvae.exact import can_run

from .pairs import make_pair, make_tiny, reference_path, relative_error

EXACT = 1e-12


class LoRA(nn.Module):
    """A convolution with a trained detour, as adapters wrap it."""

    def __init__(self, base: nn.Conv3d) -> None:
        super().__init__()
        self.base = base
        self.detour = nn.Conv3d(base.in_channels, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.detour(x[:, :, 2:])
        return y


def wrap(vae: AutoencoderKLCogVideoX) -> None:
    conv = vae.decoder.mid_block.resnets[0].conv1
    conv.conv = LoRA(conv.conv)


def wrap_an_upsampler(vae: AutoencoderKLCogVideoX) -> None:
    upsampler = vae.decoder.up_blocks[0].upsamplers[0]
    upsampler.conv = nn.Sequential(upsampler.conv, nn.Tanh())


def hook(vae: AutoencoderKLCogVideoX) -> None:
    vae.decoder.up_blocks[1].resnets[0].conv2.conv.register_forward_hook(lambda module, args, output: output * 1.5)


def patch(vae: AutoencoderKLCogVideoX) -> None:
    conv = vae.decoder.conv_out.conv
    original = conv.forward
    conv.forward = lambda x: original(x) + 1


def parametrise(vae: AutoencoderKLCogVideoX) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    parametrize.register_parametrization(vae.decoder.conv_in.conv, "weight", Half())


def wind_around(vae: AutoencoderKLCogVideoX) -> None:
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


@pytest.mark.parametrize("change", [wrap, wrap_an_upsampler, hook, patch, parametrise, wind_around])
@torch.no_grad()
def test_a_changed_module_is_run_as_it_is(change: Callable[[AutoencoderKLCogVideoX], None]) -> None:
    vae, (_, reference) = make_tiny(torch.float64), make_pair()
    reference.load_state_dict(vae.state_dict())
    z = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64)
    before = vae.decode(z).sample
    change(vae)
    change(reference)
    if change is wrap:
        reference.decoder.mid_block.resnets[0].conv1.conv.load_state_dict(
            vae.decoder.mid_block.resnets[0].conv1.conv.state_dict()
        )
    after = vae.decode(z).sample
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, reference.decode(z).sample) < EXACT
    assert relative_error(torch.cat(list(vae.decode_stream(z)), dim=2), after) < EXACT


@torch.no_grad()
def test_a_wrapped_convolution_of_the_encoder_is_run_as_it_is() -> None:
    vae = make_tiny(torch.float64)
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    before = vae.encode(x).latent_dist.parameters
    conv = vae.encoder.down_blocks[1].resnets[0].conv2
    conv.conv = LoRA(conv.conv)
    wrapped = vae.encode(x).latent_dist.parameters
    assert relative_error(wrapped, before) > 1e-3
    detour, conv.conv = conv.conv.detour, conv.conv.base
    conv.conv.weight.data[:, :, 2, 1, 1] += detour.weight[:, :, 0, 0, 0]
    assert can_run([vae.encoder], x)
    assert relative_error(vae.encode(x).latent_dist.parameters, wrapped) < EXACT


@torch.no_grad()
def test_a_merged_adapter_is_what_the_wrapped_one_computed() -> None:
    vae = make_tiny(torch.float64)
    z = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64)
    wrap(vae)
    expected = vae.decode(z).sample
    conv = vae.decoder.mid_block.resnets[0].conv1
    detour, conv.conv = conv.conv.detour, conv.conv.base
    conv.conv.weight.data[:, :, 2, 1, 1] += detour.weight[:, :, 0, 0, 0]
    assert can_run([vae.decoder], z)
    assert relative_error(vae.decode(z).sample, expected) < EXACT


@torch.no_grad()
def test_edits_in_place_through_data_take_effect_at_once() -> None:
    vae = make_tiny(torch.float64)
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    vae(x)
    for parameter in vae.parameters():
        parameter.data.mul_(1.1)
    with reference_path(vae):
        expected = vae(x).sample
    assert relative_error(vae(x).sample, expected) < EXACT


@torch.no_grad()
def test_copies_and_other_dtypes_compute_with_their_own_weights() -> None:
    vae = make_tiny(torch.float64)
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    expected = vae(x).sample
    twins = [copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))]
    for parameter in vae.parameters():
        parameter.zero_()
    for twin in twins:
        assert relative_error(twin(x).sample, expected) < EXACT
        assert relative_error(twin.float()(x.float()).sample, expected) < 1e-4
        assert relative_error(twin.double()(x).sample, expected) < 1e-4
        assert relative_error(twin.bfloat16()(x.bfloat16()).sample, expected) < 0.2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_seen_by_the_next_call(checkpointing: bool) -> None:
    ours, reference = make_pair()
    if checkpointing:
        ours.enable_gradient_checkpointing()
    x = torch.randn(1, 3, 9, 8, 16, dtype=torch.float64)
    for model in (ours, reference):
        with torch.no_grad():
            model(x)  # ours by the engine, before anything is trained
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(x).sample.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert relative_error(ours(x).sample, reference(x).sample) < 1e-11
        assert relative_error(ours.encode(x).latent_dist.mean, reference.encode(x).latent_dist.mean) < 1e-11


def test_gradients_keep_the_engine_out() -> None:
    vae = make_tiny()
    z = torch.randn(1, 4, 3, 1, 1)
    networks = [vae.decoder, None]
    assert not can_run(networks, z)  # its parameters want gradients
    with torch.no_grad():
        assert can_run(networks, z)
    vae.requires_grad_(False)
    assert can_run(networks, z)
    assert not can_run(networks, z.requires_grad_())
    with torch.inference_mode():
        assert can_run(networks, z)


@torch.no_grad()
def test_other_dtypes_than_the_weights_and_autocast_keep_the_engine_out() -> None:
    vae = make_tiny()
    z = torch.randn(1, 4, 3, 1, 1)
    assert not can_run([vae.decoder], z.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_run([vae.decoder], z)
    vae.decoder.norm_out.double()
    assert not can_run([vae.decoder], z)


@torch.no_grad()
def test_quant_convs_run_with_the_engine() -> None:
    ours, _ = make_pair()
    quant = AutoencoderKLCogVideoX.from_config(ours.config, use_quant_conv=True, use_post_quant_conv=True).double()
    x = torch.randn(1, 3, 10, 16, 16, dtype=torch.float64)
    calls: list[Any] = []
    with reference_path(quant):
        expected = quant(x).sample
    assert can_run([quant.decoder, quant.post_quant_conv], x)
    assert relative_error(quant(x).sample, expected) < EXACT
    quant.post_quant_conv.register_forward_hook(lambda *_: calls.append(1))
    quant(x)
    assert calls
