from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, TerminalError
from pipeline.latents import drop_pad, unscale
from pipeline.latents.scale import count_pad
from tests.pipeline.latents.builders import configure, make_latent


@pytest.mark.parametrize(
    ("scale", "role", "convention", "multiplier"),
    [
        ("cogvideox-2b", "video", "diffusers", 1.15258426),
        ("zai-org/CogVideoX-2b", "video", "cogvideo", 1.15258426),
        ("cogvideox-5b", "video", "diffusers", 0.7),
        ("cogvideox-5b-i2v", "first_frame", "diffusers", 0.7),
        ("cogvideox-1.5-5b", "video", "diffusers", 0.7),
        ("cogvideox-1.5-5b-i2v", "first_frame", "diffusers", 1 / 0.7),
        ("cogvideox-1.5-5b-i2v", "first_frame", "cogvideo", 0.7),
        ("cogvideox-1.5-5b-i2v", "video", "diffusers", 0.7),
        (0.18215, "first_frame", "diffusers", 0.18215),
    ],
)
def test_scale_of_model_role_and_convention_is_undone(scale: Any, role: Any, convention: Any, multiplier: float) -> None:
    latent = make_latent()
    torch.testing.assert_close(unscale(latent * multiplier, scale, role, convention), latent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unscaling_is_computed_in_float32(dtype: torch.dtype) -> None:
    scaled = make_latent(dtype=dtype)
    found = unscale(scaled, "cogvideox-5b")
    assert found.dtype == torch.float32
    assert torch.equal(found, scaled.float() / 0.7)


def test_no_scale_gives_the_tensor_itself() -> None:
    latent = make_latent(dtype=torch.bfloat16)
    assert unscale(latent, "none") is latent


@pytest.mark.parametrize("scale", ["cogvideox-9b", 0.0, -1.0, math.inf, math.nan])
def test_what_is_no_scale_is_an_error(scale: Any) -> None:
    with pytest.raises(ConfigError, match="scal"):
        unscale(make_latent(), scale)


@pytest.mark.parametrize(
    ("scale", "frames", "drop", "pad"),
    [
        ("cogvideox-1.5-5b", 22, "auto", 1),
        ("cogvideox-1.5-5b-i2v", 2, "auto", 1),
        ("cogvideox-1.5-5b", 21, "auto", 0),
        ("cogvideox-5b", 22, "auto", 0),
        ("none", 22, "auto", 0),
        (0.7, 22, "auto", 0),
        ("cogvideox-1.5-5b", 22, 0, 0),
        ("none", 22, 1, 1),
        (0.7, 13, 3, 3),
    ],
)
def test_front_pad_of_1_5_is_dropped(scale: Any, frames: int, drop: Any, pad: int) -> None:
    assert count_pad(frames, scale, drop) == pad
    latent = make_latent(shape=(16, frames, 2, 2))
    assert torch.equal(drop_pad(latent, scale, drop), latent[:, pad:])


def test_dropping_every_frame_is_an_error() -> None:
    with pytest.raises(TerminalError, match=r"2 latent frames, and input\.drop_frames is 2"):
        count_pad(2, "none", 2)


@pytest.mark.parametrize(
    ("given", "found"), [("0.7", 0.7), (1, 1.0), ("none", "none"), ("cogvideox-2b", "cogvideox-2b"), (None, None)]
)
def test_setting_takes_a_number_as_text_too(given: Any, found: Any) -> None:
    assert configure("x", scale=given).scale == found


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": "7b"},
        {"scale": True},
        {"scale": -0.7},
        {"filters": ["psnr"]},
        {"drop_frames": -1},
        {"layout": "HWCF"},
        {"colour": 1},
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        configure("x", **settings)
