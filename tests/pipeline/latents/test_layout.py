from __future__ import annotations

import pytest
import torch

from pipeline.errors import TerminalError
from pipeline.latents import Layout, find_layout, to_clips
from pipeline.latents.layout import clip_shapes
from tests.pipeline.latents.builders import LAYOUTS, lay_out, make_latent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_told_by_the_channels(layout: Layout) -> None:
    latent = make_latent()
    tensor = lay_out(latent, layout)
    assert find_layout(tensor.shape, 16) == layout
    (clip,) = to_clips(tensor, layout)
    assert torch.equal(clip, latent)
    assert clip_shapes(tensor.shape, layout) == [tuple(latent.shape)]


def test_clips_of_a_batch_are_views_in_order() -> None:
    batch = torch.stack([lay_out(make_latent(seed), "FCHW") for seed in range(3)])
    clips = to_clips(batch, "BFCHW")
    assert all(torch.equal(clip, make_latent(seed)) for seed, clip in enumerate(clips))
    assert clips[1].untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()
    assert clip_shapes(batch.shape, "BFCHW") == [(16, 5, 4, 6)] * 3


@pytest.mark.parametrize("shape", [(16, 16, 60, 90), (2, 16, 16, 60, 90)])
def test_layout_that_could_be_two_is_asked_for(shape: tuple[int, ...]) -> None:
    size = "x".join(map(str, shape))
    with pytest.raises(TerminalError, match=rf"{size} could be B?CFHW or B?FCHW.*say which in input\.layout") as caught:
        find_layout(shape, 16)
    assert (caught.value.stage, caught.value.reason) == ("read", "layout_ambiguous")
    stated: Layout = "FCHW" if len(shape) == 4 else "BFCHW"
    assert find_layout(shape, 16, stated) == stated


@pytest.mark.parametrize("shape", [(), (16,), (16, 5, 4), (5, 4, 16, 6), (3, 5, 4, 6), (1, 1, 16, 5, 4, 6), (16, 0, 4, 6)])
def test_shape_that_is_no_latent_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(TerminalError) as caught:
        find_layout(shape, 16)
    assert caught.value.reason == "layout_unknown"


@pytest.mark.parametrize("shape", [(32, 13, 60, 90), (13, 32, 60, 90), (1, 13, 32, 60, 90)])
def test_twice_the_channels_look_like_moments(shape: tuple[int, ...]) -> None:
    with pytest.raises(TerminalError, match="look like moments, mean and log-variance"):
        find_layout(shape, 16)


@pytest.mark.parametrize(("shape", "stated"), [((5, 16, 4, 6), "CFHW"), ((16, 5, 4, 6), "BCFHW"), ((1, 16, 5, 4, 6), "CFHW")])
def test_stated_layout_must_fit(shape: tuple[int, ...], stated: Layout) -> None:
    with pytest.raises(TerminalError, match=f"is not {stated}.*correct input.layout"):
        find_layout(shape, 16, stated)


def test_stated_layout_may_be_one_that_inference_would_not_choose() -> None:
    assert find_layout((4, 16, 16, 6), 16, "FCHW") == "FCHW"
    assert find_layout((16, 4, 16, 6), 16) == "CFHW"
