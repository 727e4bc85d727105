"""Blend tiling has diffusers' geometry, weights and seams, and refuses what diffusers gets wrong."""

from typing import Any

import pytest
import torch

from cogvae.tiling import TileAxis, blend, run_in_tiles, tile_axis

from .pairs import make_pair, make_tiny, relative_error

EXACT = 1e-10


@pytest.mark.parametrize(
    ("tile", "size"),
    [
        ((16, 24, 1 / 2, 1 / 3), (40, 48)),
        ((24, 32, 2 / 3, 1 / 4), (48, 47)),
        ((40, 16, 1 / 5, 1 / 2), (48, 48)),
        ((32, 48, 3 / 4, 2 / 3), (40, 56)),
    ],
)
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_tiles_of_any_size_and_overlap_give_diffusers_numbers(tile: tuple[Any, ...], size: tuple[int, int]) -> None:
    ours, reference = make_pair()
    for model in (ours, reference):
        model.enable_tiling(*tile)
    x = torch.randn(1, 3, 2, *size, dtype=torch.float64)
    z = torch.randn(1, 4, 2, size[0] // 8, size[1] // 8, dtype=torch.float64)
    encoded = reference.tiled_encode(x)
    assert relative_error(ours.tiled_encode(x), encoded) < EXACT
    assert relative_error(ours.encode(x).latent_dist.parameters, encoded) < EXACT
    decoded = reference.tiled_decode(z).sample
    assert relative_error(ours.tiled_decode(z).sample, decoded) < EXACT
    assert relative_error(ours.decode(z, return_dict=False)[0], decoded) < EXACT


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_the_default_tile_is_half_the_sample_with_diffusers_overlap() -> None:
    ours, reference = make_pair(torch.float32)
    for model in (ours, reference):
        model.enable_tiling()
        model.enable_slicing()
    for name in vars(reference):
        if name.startswith(("tile_", "use_")):
            assert getattr(ours, name) == getattr(reference, name), name
    x = torch.randn(2, 3, 1, 96, 160)
    assert relative_error(ours(x).sample, reference(x).sample) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_default_geometry_of_the_published_models_gives_diffusers_numbers() -> None:
    tiny = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2}
    ours, reference = make_pair(torch.float32, sample_height=480, sample_width=720, **tiny)
    for model in (ours, reference):
        model.enable_tiling()
    x, z = torch.randn(1, 3, 9, 480, 720), torch.randn(1, 4, 3, 60, 90)
    assert relative_error(ours.tiled_encode(x), reference.tiled_encode(x)) < 1e-5
    assert relative_error(ours.decode(z).sample, reference.decode(z).sample) < 1e-5


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_bf16_tiles_are_as_close_to_the_truth_as_diffusers() -> None:
    ours, reference = make_pair(torch.bfloat16)
    truth, _ = make_pair()
    truth.load_state_dict(reference.state_dict())
    for model in (ours, reference, truth):
        model.enable_tiling(16, 16, 1 / 2, 1 / 2)
    z = torch.randn(1, 4, 2, 3, 4, dtype=torch.bfloat16)
    expected = truth.decode(z.double()).sample
    their_error = relative_error(reference.decode(z).sample, expected)
    assert relative_error(ours.decode(z).sample, expected) <= 1.05 * their_error


@torch.no_grad()
def test_frames_up_to_a_tile_are_not_tiled() -> None:
    vae = make_tiny()
    x = torch.randn(1, 3, 1, 48, 80)
    untiled = vae.encode(x).latent_dist.mean
    vae.enable_tiling()
    assert torch.equal(vae.encode(x).latent_dist.mean, untiled)
    larger = torch.randn(1, 3, 1, 56, 80)
    tiled = vae.encode(larger).latent_dist.mean
    vae.disable_tiling()
    assert not torch.equal(vae.encode(larger).latent_dist.mean, tiled)


@torch.no_grad()
def test_a_tile_times_overlap_that_is_no_whole_number_is_refused_where_diffusers_returns_a_wrong_width() -> None:
    ours, reference = make_pair(torch.float32, sample_width=144)
    reference.enable_tiling(tile_sample_min_width=72)
    z = torch.randn(1, 4, 1, 6, 18)
    assert reference.tiled_decode(z).sample.shape[-1] == 148  # of 144
    with pytest.raises(ValueError, match=r"72.*9 latent cells.*0\.2 .*1\.8 cells.*1/9=.*2/9=.*40 or 80"):
        ours.enable_tiling(tile_sample_min_width=72)
    assert not ours.use_tiling
    ours.tile_sample_min_width, ours.tile_latent_min_width = 72, 9
    with pytest.raises(ValueError, match="tile_overlap_factor_width"):
        ours.tiled_decode(z)


def test_an_overlap_that_is_whole_but_for_rounding_has_the_right_width() -> None:
    # 0.1 is left of 1 - 0.9, times 20 cells 1.9999999999999996: diffusers steps by 1 cell.
    axis = tile_axis("width", 160, 20, 0.9, 8)
    assert (axis.overlap, axis.stride) == (18, 2)
    assert int(20 * (1 - 0.9)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_height": 100}, "tile_sample_min_height=100.*96 or 104"),
        ({"tile_sample_min_height": 4}, "tile_sample_min_height=4.*8 or 16"),
        ({"tile_overlap_factor_width": 1.0}, "tile_overlap_factor_width=1.0"),
        ({"tile_overlap_factor_width": -0.5}, "tile_overlap_factor_width=-0.5"),
        ({"mode": "feather"}, "'blend' or 'exact'"),
        ({"memory_budget_bytes": 1 << 30}, "mode='exact'"),
        ({"strip_rows": 8}, "mode='exact'"),
        ({"mode": "exact", "memory_budget_bytes": 0}, "memory_budget_bytes=0: expected a positive integer"),
        ({"mode": "exact", "strip_rows": 1.5}, r"strip_rows=1\.5: expected a positive integer"),
        ({"mode": "exact", "strip_rows": True}, r"strip_rows=True: expected a positive integer"),
        ({"mode": "exact", "tile_sample_min_width": 64}, "no tiles"),
    ],
)
def test_invalid_tiling_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    vae = make_tiny()
    before = {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**arguments)
    assert before == {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_exact_mode_is_the_untiled_result_at_any_size() -> None:
    vae = make_tiny()
    x = torch.randn(1, 3, 1, 56, 88)
    untiled = vae.encode(x).latent_dist.mean
    vae.enable_tiling()
    vae.enable_tiling(mode="exact")
    assert torch.equal(vae.encode(x).latent_dist.mean, untiled)


@torch.no_grad()
def test_a_last_tile_thinner_than_a_latent_cell_is_refused() -> None:
    vae = make_tiny()
    vae.enable_tiling(32, 32, 1 / 4, 1 / 4)
    with pytest.raises(ValueError, match="49 pixels ends in a tile of 1"):
        vae.encode(torch.randn(1, 3, 1, 49, 64))


def test_zero_keeps_the_present_value_as_in_diffusers() -> None:
    ours, reference = make_pair()
    for model in (ours, reference):
        model.enable_tiling(48, 0, 1 / 3, 0)
    assert ours.tile_overlap_factor_width == reference.tile_overlap_factor_width
    assert ours.tile_sample_min_width == reference.tile_sample_min_width


def test_a_blend_fades_from_one_tile_to_the_next() -> None:
    before, tile = torch.zeros(1, 1, 1, 1, 6), torch.ones(1, 1, 1, 1, 5)
    blend(before, tile, 4, dim=4)
    assert tile.flatten().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_tiles_of_the_identity_are_the_whole() -> None:
    x = torch.randn(1, 1, 2, 13, 17, dtype=torch.float64)
    axes = TileAxis(tile=5, overlap=2), TileAxis(tile=7, overlap=3)
    whole = run_in_tiles(torch.clone, x, *axes, in_scale=1, out_scale=1)
    assert relative_error(whole, x) < 1e-15


def test_gradients_pass_through_the_seams() -> None:
    ours, reference = make_pair()
    grads = []
    z = torch.randn(1, 4, 1, 5, 6, dtype=torch.float64)
    for model in (ours, reference):
        model.enable_tiling(24, 24, 1 / 3, 1 / 3)
        leaf = z.clone().requires_grad_()
        model.tiled_decode(leaf).sample.square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert relative_error(*grads) < EXACT
