import copy
import inspect
import logging
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import diffusers
import pytest

from cogvae import AutoencoderKLCogVideoX, VAEConfig
from cogvae.config import ANNOTATIONS, FIELD_NAMES


def test_arguments_and_defaults_are_those_of_diffusers() -> None:
    def arguments(cls: type) -> dict[str, Any]:
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}

    theirs = arguments(diffusers.AutoencoderKLCogVideoX)
    assert list(arguments(AutoencoderKLCogVideoX).items()) == list(theirs.items())
    assert dict(VAEConfig()) == theirs
    assert set(FIELD_NAMES) >= ANNOTATIONS


def test_a_config_reads_by_attribute_by_key_and_as_a_mapping() -> None:
    config = VAEConfig(latent_channels=4, hidden={"_name_or_path": "here"})
    assert config.latent_channels == config["latent_channels"] == config.get("latent_channels") == 4
    assert config._name_or_path == config["_name_or_path"] == "here"
    assert "latent_channels" in config
    assert "_name_or_path" in config
    assert "nothing" not in config
    assert config.get("nothing", 5) == 5
    assert list(dict(config)) == list(config) == [*FIELD_NAMES, "_name_or_path"]
    assert len(config) == len(dict(config))
    with pytest.raises(KeyError):
        config["nothing"]
    with pytest.raises(AttributeError, match="nothing"):
        config.nothing  # noqa: B018
    with pytest.raises(FrozenInstanceError):
        config.latent_channels = 5  # type: ignore[misc]


def test_hidden_keys_are_kept_and_do_not_make_configs_differ() -> None:
    config = VAEConfig.from_dict({"_diffusers_version": "0.30.0", "latent_channels": 4})
    assert config["_diffusers_version"] == "0.30.0"
    assert config == VAEConfig(latent_channels=4)
    assert hash(config) == hash(VAEConfig(latent_channels=4))


def test_unknown_keys_warn_and_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cogvae"):
        assert VAEConfig.from_dict({"wings": 2}) == VAEConfig()
    assert "wings" in caplog.text


def test_a_config_pickles_and_copies() -> None:
    config = VAEConfig(latent_channels=4, hidden={"_a": 1})
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert dict(twin) == dict(config)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("in_channels", 0, "positive integer"),
        ("latent_channels", "16", "positive integer"),
        ("layers_per_block", True, "positive integer"),
        ("norm_num_groups", -1, "positive integer"),
        ("block_out_channels", [128, 250], "multiples of norm_num_groups=32"),
        ("block_out_channels", [], "multiples"),
        ("block_out_channels", 128, "a list"),
        ("down_block_types", ["DownEncoderBlock2D"] * 4, "CogVideoXDownBlock3D"),
        ("up_block_types", ["CogVideoXUpBlock3D"] * 3, "4 entries"),
        ("act_fn", "sine", "silu"),
        ("act_fn", None, "silu"),
        ("norm_eps", 0.0, "above zero"),
        ("norm_eps", float("nan"), "above zero"),
        ("temporal_compression_ratio", 3, "power of two"),
        ("temporal_compression_ratio", 16, "from 1 to 8"),
        ("sample_height", 480.5, "positive integer"),
        ("scaling_factor", 0.0, "other than zero"),
        ("shift_factor", "none", "number or null"),
        ("latents_mean", [0.0] * 3, "16 numbers"),
        ("use_quant_conv", "yes", "true or false"),
    ],
)
def test_an_invalid_value_is_named_with_what_was_expected(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*{expected}"):
        VAEConfig.from_dict({name: value})


def test_lists_become_tuples_and_whole_ratios_integers() -> None:
    config = VAEConfig.from_dict({"block_out_channels": [32, 32, 32, 32], "temporal_compression_ratio": 4.0})
    assert config.block_out_channels == (32, 32, 32, 32)
    assert isinstance(config.temporal_compression_ratio, int)


def test_from_config_takes_ours_a_dict_and_diffusers() -> None:
    small: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    theirs = diffusers.AutoencoderKLCogVideoX(**small)
    for config in (VAEConfig(**small), small, theirs.config):
        assert AutoencoderKLCogVideoX.from_config(config).config == VAEConfig(**small)
    overridden = AutoencoderKLCogVideoX.from_config(small, latent_channels=3)
    assert overridden.config.latent_channels == 3
    assert type(theirs).from_config(dict(overridden.config)).config["latent_channels"] == 3
    # As in diffusers: the constructor takes a whole config, hidden keys and all, but no unknown argument.
    assert AutoencoderKLCogVideoX(**overridden.config).config == overridden.config
    with pytest.raises(TypeError, match="wings"):
        AutoencoderKLCogVideoX(wings=2)
