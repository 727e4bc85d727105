"""The exact engine computes what diffusers and the plain modules do: every frame count, odd sizes, strips, pieces."""

import functools
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX
from cogvae.chunks import FrameLoop, run_in_chunks
from cogvae.exact import causal
from cogvae.exact.causal import Past
from cogvae.exact.network import ExactDecoder, ExactEncoder
from cogvae.exact.plan import Plan

from .pairs import make_pair, make_tiny, reference_path, relative_error

EXACT = 1e-12
FRAMES = (*range(1, 18), 49)
WHOLE = 1 << 40

plans = st.builds(
    Plan,
    piece_bytes=st.sampled_from([1, 20_000, WHOLE]),
    strip_rows=st.sampled_from([None, 1, 2, 3, 5]),
    single_frames=st.booleans(),
    fold_from_cells=st.sampled_from([0, WHOLE]),
)
clips = st.tuples(st.integers(1, 2), st.sampled_from([8, 9, 17, 24, 31]), st.sampled_from([8, 15, 24]))


@functools.cache
def shared_pair() -> tuple[AutoencoderKLCogVideoX, diffusers.AutoencoderKLCogVideoX]:
    return make_pair(block_out_channels=(4, 4, 8, 8), norm_num_groups=2)


def encode(vae: AutoencoderKLCogVideoX, plan: Plan, x: Tensor) -> Tensor:
    return run_in_chunks(FrameLoop(ExactEncoder(vae.encoder, plan), Past()), x, vae.num_sample_frames_batch_size)


def decode(vae: AutoencoderKLCogVideoX, plan: Plan, z: Tensor) -> Tensor:
    return run_in_chunks(FrameLoop(ExactDecoder(vae.decoder, plan), Past()), z, vae.num_latent_frames_batch_size)


@settings(max_examples=30)
@given(st.sampled_from(FRAMES), clips, plans)
@torch.no_grad()
def test_any_plan_encodes_as_diffusers(num_frames: int, clip: tuple[int, int, int], plan: Plan) -> None:
    ours, reference = shared_pair()
    batch, height, width = clip
    x = torch.randn(batch, 3, num_frames, height, width, dtype=torch.float64)
    assert relative_error(encode(ours, plan, x), reference.encode(x).latent_dist.parameters) < EXACT


@settings(max_examples=30)
@given(st.sampled_from(FRAMES), clips, plans)
@torch.no_grad()
def test_any_plan_decodes_as_diffusers(num_frames: int, clip: tuple[int, int, int], plan: Plan) -> None:
    ours, reference = shared_pair()
    batch, height, width = clip
    z = torch.randn(batch, 4, min(num_frames, 17), height // 8, width // 8, dtype=torch.float64)
    assert relative_error(decode(ours, plan, z), reference.decode(z).sample) < EXACT


@pytest.mark.parametrize("slicing", [True, False])
@torch.no_grad()
def test_strips_are_cut_and_leave_no_trace_for_every_frame_count(slicing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = shared_pair()
    heights: set[int] = set()
    original = causal.Kernels.frames

    def frames(self: causal.Kernels, window: Tensor) -> Tensor:
        heights.add(window.shape[3] - 2)
        return original(self, window)

    monkeypatch.setattr(causal.Kernels, "frames", frames)
    strips = AutoencoderKLCogVideoX.from_config(ours.config).double()
    strips.load_state_dict(ours.state_dict())
    strips.enable_tiling(mode="exact", strip_rows=3)
    strips.use_slicing = slicing
    for num_frames in FRAMES:
        x = torch.randn(2, 3, num_frames, 17, 25, dtype=torch.float64)
        expected = reference.encode(x).latent_dist.parameters
        assert relative_error(strips.encode(x).latent_dist.parameters, expected) < EXACT, num_frames
        z = expected[:, :4].contiguous()
        assert relative_error(strips.decode(z).sample, reference.decode(z).sample) < EXACT, num_frames
        streamed = torch.cat(list(strips.decode_stream(iter(torch.split(z, 1, dim=2)), z.shape[2])), dim=2)
        assert relative_error(streamed, reference.decode(z).sample) < EXACT, num_frames
    assert max(heights) == 3


@pytest.mark.parametrize("latent_chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("sample_chunk", [1, 3, 4, 5])
@torch.no_grad()
def test_later_chunks_of_an_odd_length_that_users_may_set(sample_chunk: int, latent_chunk: int) -> None:
    ours, reference = make_pair(block_out_channels=(4, 4, 8, 8), norm_num_groups=2)
    for model in (ours, reference):
        model.num_sample_frames_batch_size, model.num_latent_frames_batch_size = sample_chunk, latent_chunk
    for num_frames in (5, 11, 12):
        x = torch.randn(1, 3, num_frames, 16, 17, dtype=torch.float64)
        assert relative_error(ours.encode(x).latent_dist.parameters, reference.encode(x).latent_dist.parameters) < EXACT
        z = torch.randn(1, 4, num_frames, 1, 2, dtype=torch.float64)
        assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT


@pytest.mark.parametrize("act_fn", ["silu", "mish", "gelu", "relu"])
@torch.no_grad()
def test_every_activation(act_fn: str) -> None:
    ours, reference = make_pair(act_fn=act_fn)
    x = torch.randn(1, 3, 10, 16, 16, dtype=torch.float64)
    assert relative_error(ours(x).sample, reference(x).sample) < EXACT


@pytest.mark.parametrize("fold_from_cells", [0, WHOLE])
@pytest.mark.parametrize("strip_rows", [None, 3])
@torch.no_grad()
def test_a_model_of_the_default_shape(strip_rows: int | None, fold_from_cells: int) -> None:
    """All levels, layers and groups of the published models, with an eighth of their channels."""
    shape: dict[str, Any] = {"block_out_channels": (16, 32, 32, 64), "latent_channels": 16, "layers_per_block": 3}
    ours, reference = make_pair(**shape, norm_num_groups=8, norm_eps=1e-6)
    plan = Plan(piece_bytes=1, strip_rows=strip_rows, fold_from_cells=fold_from_cells)
    x = torch.randn(1, 3, 17, 16, 24, dtype=torch.float64)
    assert relative_error(encode(ours, plan, x), reference.encode(x).latent_dist.parameters) < EXACT
    z = torch.randn(1, 16, 5, 2, 3, dtype=torch.float64)
    assert relative_error(decode(ours, plan, z), reference.decode(z).sample) < EXACT


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_the_default_shape_for_every_frame_count_in_strips_at_odd_sizes() -> None:
    shape: dict[str, Any] = {"block_out_channels": (16, 32, 32, 64), "latent_channels": 16, "layers_per_block": 3}
    ours, reference = make_pair(**shape, norm_num_groups=8, norm_eps=1e-6)
    ours.enable_tiling(mode="exact", strip_rows=3)
    for num_frames in FRAMES:
        x = torch.randn(1, 3, num_frames, 17, 25, dtype=torch.float64)
        expected = reference.encode(x).latent_dist.parameters
        assert relative_error(ours.encode(x).latent_dist.parameters, expected) < EXACT, num_frames
        z = expected[:, :16].contiguous()
        assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < EXACT, num_frames


@torch.no_grad()
def test_means_far_above_the_spread_do_not_cancel() -> None:
    ours, reference = make_pair(torch.float32)
    ours.encoder.conv_in.conv.bias.fill_(300.0)
    truth = AutoencoderKLCogVideoX.from_config(reference.config).double()
    truth.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 9, 16, 16)
    expected = truth.encode(x.double()).latent_dist.parameters
    with reference_path(ours):
        plain = relative_error(ours.encode(x).latent_dist.parameters, expected)
    assert relative_error(ours.encode(x).latent_dist.parameters, expected) < 2 * plain


@torch.no_grad()
def test_frames_and_latents_in_any_memory_layout() -> None:
    vae = make_tiny(torch.float64)
    x = torch.randn(2, 3, 9, 16, 24, dtype=torch.float64)
    expected = vae(x).sample
    assert relative_error(vae(x.to(memory_format=torch.channels_last_3d)).sample, expected) < EXACT
    assert relative_error(vae(x.transpose(3, 4).contiguous().transpose(3, 4)).sample, expected) < EXACT
    assert expected.is_contiguous()
