from __future__ import annotations

from typing import get_args

import pytest
import torch

from pipeline.dataset import scale_latents, scaling_multiplier, unscale_latents
from pipeline.dataset.scaling import MODELS, Role
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("model", "video", "first_frame"),
    [
        ("cogvideox-2b", 1.15258426, 1.15258426),
        ("cogvideox-5b", 0.7, 0.7),
        ("cogvideox-5b-i2v", 0.7, 0.7),
        ("cogvideox-1.5-5b", 0.7, 1 / 0.7),
        ("cogvideox-1.5-5b-i2v", 0.7, 1 / 0.7),
    ],
)
def test_diffusers_divides_the_first_frame_of_1_5_alone(model: str, video: float, first_frame: float) -> None:
    assert scaling_multiplier(model) == video
    assert scaling_multiplier(model, "first_frame") == first_frame
    assert scaling_multiplier(model, "first_frame", "cogvideo") == scaling_multiplier(model, "video", "cogvideo") == video


@pytest.mark.parametrize(
    "name", ["5b-i2v", "CogVideoX-5b-I2V", "THUDM/CogVideoX-5b-I2V", "zai-org/CogVideoX1.5-5B-I2V", "1.5-5B"]
)
def test_models_are_known_by_short_names_and_hub_ids(name: str) -> None:
    assert scaling_multiplier(name) == 0.7


def test_custom_factor_is_taken_as_it_is() -> None:
    assert scaling_multiplier(0.31) == scaling_multiplier(0.31, "first_frame") == 0.31
    with pytest.raises(ConfigError, match="above 0"):
        scaling_multiplier(0.0)


def test_unscaling_undoes_scaling() -> None:
    latents = torch.randn(16, 3, 4, 5, dtype=torch.float64)
    for model in MODELS:
        for role in get_args(Role):
            scaled = scale_latents(latents, model, role)
            torch.testing.assert_close(unscale_latents(scaled, model, role), latents, rtol=1e-15, atol=0)


def test_unknown_role_and_convention_name_the_choices() -> None:
    with pytest.raises(ConfigError, match="role 'image' is unknown; use one of video, first_frame"):
        scaling_multiplier("5b", "image")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="convention 'sat' is unknown; use one of diffusers, cogvideo"):
        scaling_multiplier("5b", "video", "sat")  # type: ignore[arg-type]
