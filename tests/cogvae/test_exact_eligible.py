"""Where the plain modules must run they do, and what was done to the weights is what both paths compute with."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from cogvae import AutoencoderKLCogVideoX
from cogvae.exact import eligible, find_obstacle

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


def patch_the_inside(vae: AutoencoderKLCogVideoX) -> None:
    """As recipes for seamless textures do, which give each convolution another padding."""

    def scaled(conv: nn.Conv2d) -> Callable[..., Tensor]:
        return lambda x, weight, bias: 2 * nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding)

    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = scaled(module)


CHANGES = [wrap, wrap_an_upsampler, hook, patch, patch_the_inside, parametrise, wind_around]


@pytest.mark.parametrize("change", CHANGES)
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
    assert find_obstacle(vae.encoder, None, x) is None
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
    assert find_obstacle(vae.decoder, None, z) is None
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
    quant_conv = nn.Conv3d(4, 4, 1)
    z = torch.randn(1, 4, 3, 1, 1)
    assert "no_grad" in str(find_obstacle(vae.decoder, None, z))  # its parameters want gradients
    with torch.no_grad():
        assert find_obstacle(vae.decoder, quant_conv, z) is None
    vae.requires_grad_(False)
    assert find_obstacle(vae.decoder, None, z) is None
    assert "no_grad" in str(find_obstacle(vae.decoder, quant_conv, z))
    assert "no_grad" in str(find_obstacle(vae.decoder, None, z.requires_grad_()))
    with torch.inference_mode():
        assert find_obstacle(vae.decoder, None, z) is None


@torch.no_grad()
def test_other_dtypes_than_the_weights_and_autocast_keep_the_engine_out() -> None:
    vae = make_tiny()
    z = torch.randn(1, 4, 3, 1, 1)
    assert "torch.float32 on cpu where torch.float64" in str(find_obstacle(vae.decoder, None, z.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in str(find_obstacle(vae.decoder, None, z))
    vae.decoder.norm_out.double()
    assert "norm_out.norm_layer is torch.float64" in str(find_obstacle(vae.decoder, None, z))


@torch.no_grad()
def test_quant_convs_run_with_the_engine() -> None:
    ours, _ = make_pair()
    quant = AutoencoderKLCogVideoX.from_config(ours.config, use_quant_conv=True, use_post_quant_conv=True).double()
    x = torch.randn(1, 3, 10, 16, 16, dtype=torch.float64)
    calls: list[Any] = []
    with reference_path(quant):
        expected = quant(x).sample
    assert find_obstacle(quant.decoder, quant.post_quant_conv, x) is None
    assert relative_error(quant(x).sample, expected) < EXACT
    quant.post_quant_conv.register_forward_hook(lambda *_: calls.append(1))
    quant(x)
    assert calls


@pytest.mark.parametrize(("kind", "method"), [(nn.Conv2d, "_conv_forward"), (nn.GroupNorm, "forward")])
@torch.no_grad()
def test_a_patched_class_is_run_as_it_is(kind: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_tiny(torch.float64)
    z = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64)
    before, original = vae.decode(z).sample, getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *args: original(*args) * 2)
    assert relative_error(vae.decode(z).sample, before) > 1e-3
    monkeypatch.undo()
    assert torch.equal(vae.decode(z).sample, before)


def test_a_budget_that_has_no_effect_is_said_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    vae = make_tiny()
    z = torch.randn(1, 4, 1, 1, 1)
    eligible._reported.clear()
    with caplog.at_level(logging.DEBUG, "cogvae.exact.eligible"):
        vae.decode(z)
        assert [record.levelname for record in caplog.records] == ["DEBUG"]
        for setting in ({"memory_budget_bytes": 1}, {"strip_rows": 3}):
            caplog.clear()
            eligible._reported.clear()
            vae.enable_tiling(mode="exact", **setting)
            vae.decode(z)
            vae.decode(z)
            (record,) = caplog.records
            assert record.levelname == "WARNING"
            assert "no effect" in record.message
            assert "call under torch.no_grad()" in record.message


SHALLOW: dict[str, Any] = {
    "block_out_channels": (4, 4),
    "down_block_types": ("CogVideoXDownBlock3D",) * 2,
    "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    "temporal_compression_ratio": 2,
}


@pytest.mark.parametrize("budget", [None, 1])
@torch.no_grad()
def test_the_model_compiles_by_its_modules(budget: int | None) -> None:
    vae = make_tiny(torch.float64, **SHALLOW)
    z = torch.randn(1, 4, 1, 2, 3, dtype=torch.float64)
    expected = vae.decode(z).sample
    if budget is not None:
        vae.enable_tiling(mode="exact", memory_budget_bytes=budget)
    torch._dynamo.reset()
    assert relative_error(torch.compile(vae.decode, backend="eager")(z).sample, expected) < EXACT


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_of_torch_run_the_modules() -> None:
    vae = make_tiny(torch.float64).requires_grad_(False)
    z, tangent = torch.randn(2, 1, 4, 3, 1, 2, dtype=torch.float64)

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z).sample

    step = 1e-5
    slope = (decode(z + step * tangent) - decode(z - step * tangent)) / (2 * step)
    assert relative_error(torch.func.jvp(decode, (z,), (tangent,))[1], slope) < 1e-6
    with forward_ad.dual_level():
        frames = forward_ad.unpack_dual(decode(forward_ad.make_dual(z, tangent)))
        assert relative_error(frames.tangent, slope) < 1e-6
    both = torch.stack([z, tangent])
    assert relative_error(torch.func.vmap(decode)(both), torch.stack([decode(z), decode(tangent)])) < EXACT
    traced = torch.jit.trace(decode, z, check_trace=False)
    assert relative_error(traced(tangent), decode(tangent)) < EXACT


def test_weights_that_are_no_parameters_run_as_they_are() -> None:
    """As in the replicas of DataParallel and inside FSDP: plain tensors, which may want gradients."""
    vae = make_tiny(torch.float64)
    x = torch.randn(1, 3, 9, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = vae(x).sample
    leaves = []
    for module in list(vae.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, 1 * parameter)
            leaves.append(parameter)
    assert list(vae.parameters()) == []
    assert (vae.dtype, vae.device) == (x.dtype, x.device)
    assert relative_error(vae(x).sample.detach(), expected) < EXACT
    vae(x.float()).sample.square().mean().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.no_grad():
        assert "was wrapped" in str(find_obstacle(vae.decoder, None, x))
        assert relative_error(vae(x).sample, expected) < EXACT
