"""The numbers are diffusers': fp64 to 1e-12, fp32 to 1e-5, bf16 no further from the truth than diffusers."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX

from .pairs import make_pair, relative_error

FRAMES = (1, 2, 5, 8, 9, 13, 16, 17, 49)
LATENT_FRAMES = (1, 2, 3, 4, 5, 8, 13, 17)  # 13 are 49 frames of the published models
# Batch, height and width: one clip and three, even sizes and odd ones.
CLIPS = ((1, 16, 16), (3, 16, 16), (1, 17, 23), (3, 17, 23))
EXACT = 1e-12


def moments(model: Any, x: Tensor) -> Tensor:
    parameters: Tensor = model.encode(x).latent_dist.parameters
    return parameters


def random_frames(num_frames: int, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, num_frames, height, width)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_every_frame_count_gives_diffusers_numbers(ratio: int) -> None:
    ours, reference = make_pair(temporal_compression_ratio=ratio)
    for num_frames in FRAMES:
        x = torch.randn(1, 3, num_frames, 16, 24, dtype=torch.float64)
        assert relative_error(moments(ours, x), moments(reference, x)) < EXACT, num_frames
        assert relative_error(ours(x).sample, reference(x).sample) < EXACT, num_frames
    for latent_frames in LATENT_FRAMES:
        z = torch.randn(1, 4, latent_frames, 2, 3, dtype=torch.float64)
        assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT, latent_frames


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (9, 3), (16, 4), (49, 13)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15), (33, 16), (24, 41)])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_odd_and_even_sizes_give_diffusers_numbers(height: int, width: int, num_frames: int, latent_frames: int) -> None:
    ours, reference = make_pair()
    x = torch.randn(1, 3, num_frames, height, width, dtype=torch.float64)
    assert moments(ours, x).shape[2:] == (latent_frames, height // 8, width // 8)
    assert relative_error(moments(ours, x), moments(reference, x)) < EXACT
    z = torch.randn(1, 4, latent_frames, height // 8, width // 8, dtype=torch.float64)
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (9, 3), (16, 4), (49, 13)])
@pytest.mark.parametrize("slicing", [True, False])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_batches_give_diffusers_numbers_with_and_without_slicing(slicing: bool, num_frames: int, latent_frames: int) -> None:
    ours, reference = make_pair()
    for model in (ours, reference):
        model.enable_slicing() if slicing else model.disable_slicing()
    x = torch.randn(3, 3, num_frames, 16, 24, dtype=torch.float64)
    z = torch.randn(3, 4, latent_frames, 2, 3, dtype=torch.float64)
    assert relative_error(moments(ours, x), moments(reference, x)) < EXACT
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"act_fn": "gelu"},
        {"block_out_channels": (8, 16), "down_block_types": ("CogVideoXDownBlock3D",) * 2,
         "up_block_types": ("CogVideoXUpBlock3D",) * 2, "temporal_compression_ratio": 2},
        {"in_channels": 1, "out_channels": 5, "layers_per_block": 2},
        {"temporal_compression_ratio": 1},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_other_constructor_arguments_give_diffusers_numbers(options: dict[str, Any]) -> None:
    ours, reference = make_pair(**options)
    x = torch.randn(1, options.get("in_channels", 3), 9, 16, 16, dtype=torch.float64)
    z = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    assert relative_error(moments(ours, x), moments(reference, x)) < EXACT
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_users_may_set_the_chunk_sizes_as_in_diffusers() -> None:
    ours, reference = make_pair()
    for model in (ours, reference):
        model.num_sample_frames_batch_size, model.num_latent_frames_batch_size = 4, 3
    x = torch.randn(1, 3, 11, 16, 16, dtype=torch.float64)
    z = torch.randn(1, 4, 7, 2, 2, dtype=torch.float64)
    assert relative_error(moments(ours, x), moments(reference, x)) < EXACT
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_fp32_stays_within_1e_5_of_diffusers(ratio: int) -> None:
    ours, reference = make_pair(torch.float32, temporal_compression_ratio=ratio)
    for num_frames, clips in itertools.product(FRAMES, CLIPS):
        x = random_frames(num_frames, *clips)
        expected = moments(reference, x)
        assert relative_error(moments(ours, x), expected) < 1e-5, (num_frames, clips)
        z = torch.randn_like(expected[:, :4])
        assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < 1e-5, (num_frames, clips)


# float16 is slow on processors, and differs from bfloat16 in nothing that frames change.
@pytest.mark.parametrize(
    ("num_frames", "dtype"), [(1, torch.bfloat16), (9, torch.bfloat16), (16, torch.bfloat16), (9, torch.float16)]
)
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_16_bits_are_as_close_to_the_truth_as_diffusers(num_frames: int, dtype: torch.dtype) -> None:
    """Errors are sums over fresh draws: a single one tells more of its weights and pixels than of the arithmetic."""
    errors: Counter[str] = Counter()
    for ratio, clips in itertools.product((2, 4, 8), CLIPS):
        ours, reference = make_pair(dtype, temporal_compression_ratio=ratio)
        truth = AutoencoderKLCogVideoX.from_config(reference.config).double()
        truth.load_state_dict(reference.state_dict())
        x = random_frames(num_frames, *clips).to(dtype)
        encoded = moments(truth, x.double())
        z = torch.randn_like(encoded[:, :4]).to(dtype)
        decoded = truth.decode(z.double()).sample
        for model, suffix in ((ours, ""), (reference, " diffusers")):
            errors["encode" + suffix] += relative_error(moments(model, x), encoded)
            errors["decode" + suffix] += relative_error(model.decode(z).sample, decoded)
    assert 0 < errors["encode"] <= 1.05 * errors["encode diffusers"], errors
    assert 0 < errors["decode"] <= 1.05 * errors["decode diffusers"], errors


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_sampling_with_a_seed_gives_diffusers_frames() -> None:
    ours, reference = make_pair()
    x = torch.randn(2, 3, 9, 16, 16, dtype=torch.float64)
    frames = [model(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for model in (ours, reference)]
    assert relative_error(*frames) < EXACT


def test_a_seed_initialises_the_weights_of_diffusers() -> None:
    torch.manual_seed(5)
    ours, reference = make_pair()
    states = []
    for cls in (type(ours), type(reference)):
        torch.manual_seed(5)
        states.append(cls(**{k: v for k, v in ours.config.items() if not k.startswith("_")}).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@torch.no_grad()
def test_quant_convs_fit_the_latent_where_those_of_diffusers_do_not() -> None:
    ours, reference = make_pair()
    quant = AutoencoderKLCogVideoX.from_config(reference.config, use_quant_conv=True, use_post_quant_conv=True).double()
    quant.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    for conv in (quant.quant_conv, quant.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    assert relative_error(quant(x).sample, ours(x).sample) < EXACT

    broken = type(reference)(**{**dict(reference.config), "use_quant_conv": True}).double()
    with pytest.raises(RuntimeError, match="channels"):
        broken.encode(x)


PUBLISHED: dict[str, Any] = {
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound", "num_frames", "size"),
    [(torch.float64, EXACT, 9, 32), (torch.float32, 1e-5, 9, 96), (torch.float32, 1e-5, 49, 32)],
)
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_the_published_shape_gives_diffusers_numbers(dtype: torch.dtype, bound: float, num_frames: int, size: int) -> None:
    ours, reference = make_pair(dtype, **PUBLISHED)
    x = torch.randn(1, 3, num_frames, size, size, dtype=dtype)
    z = torch.randn(1, 16, (num_frames - 1) // 4 + 1, size // 8, size // 8, dtype=dtype)
    assert relative_error(moments(ours, x), moments(reference, x)) < bound
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_the_published_shape_in_16_bits_is_as_close_to_the_truth_as_diffusers(dtype: torch.dtype) -> None:
    ours, reference = make_pair(dtype, **PUBLISHED)
    truth = AutoencoderKLCogVideoX.from_config(reference.config).double()
    truth.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 9, 32, 32).to(dtype)
    z = torch.randn(1, 16, 3, 4, 4).to(dtype)
    encoded, decoded = moments(truth, x.double()), truth.decode(z.double()).sample
    assert relative_error(moments(ours, x), encoded) <= 1.05 * relative_error(moments(reference, x), encoded)
    assert relative_error(ours.decode(z).sample, decoded) <= 1.05 * relative_error(reference.decode(z).sample, decoded)
