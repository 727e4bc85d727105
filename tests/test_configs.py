"""Every configuration that the project ships loads, and the commented ones are the whole truth about the settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.command_line import load_config_file
from pipeline.config import JobConfig, RunConfig
from pipeline.decode_config import DecodeRunConfig
from pipeline.service.config import ServerConfig, ServiceConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PLACES = {"input": {"uri": "videos"}, "output": {"uri": "latents"}, "vae": {"weights": "weights"}}
COMMENTED: dict[str, type[JobConfig]] = {"example": RunConfig, "decode": DecodeRunConfig}
OTHERS = ("decode", "serve", "cluster-aws", "rayjob")
ENCODING = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in OTHERS)


def load(path: Path) -> RunConfig:
    values = load_config_file(path)
    return RunConfig(**{**values, **{name: {**PLACES.get(name, {}), **values.get(name, {})} for name in PLACES}})


@pytest.mark.parametrize("path", ENCODING, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("name", COMMENTED)
def test_commented_file_gives_every_setting_its_default(name: str) -> None:
    values, settings = load_config_file(CONFIGS / f"{name}.yaml"), COMMENTED[name]
    assert {name: set(section) for name, section in values.items()} == {
        name: set(field.annotation.model_fields)  # type: ignore[union-attr]
        for name, field in settings.model_fields.items()
    }
    given = {name: values[name] for name in PLACES}
    required = {name: {key: given[name][key] for key in PLACES[name]} for name in PLACES}
    assert settings(**values) == settings(**required)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COMMENTED)
def test_commented_file_explains_every_setting_with_the_words_of_help(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    text = " ".join(line.strip().removeprefix("#").strip() for line in lines)
    for section in COMMENTED[name].model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name
            assert re.sub(r"\s+", " ", field.description) in text, name


@pytest.mark.parametrize(
    ("name", "weights", "dtype", "bucket"),
    [
        ("cogvideox-2b", "THUDM/CogVideoX-2b", "float16", "49x480x720@8"),
        ("cogvideox-5b", "THUDM/CogVideoX-5b", "bfloat16", "49x480x720@8"),
        ("cogvideox-1.5-5b", "THUDM/CogVideoX1.5-5B", "bfloat16", "81x768x1360@16"),
    ],
)
def test_a_published_model_has_its_weights_dtype_and_shape(name: str, weights: str, dtype: str, bucket: str) -> None:
    config = load(CONFIGS / f"{name}.yaml")
    assert (config.vae.weights, config.vae.subfolder, config.vae.dtype) == (weights, "vae", dtype)
    assert config.clip.buckets == (bucket,)
    assert config.vae.model == name


def test_the_service_example_gives_every_setting_its_default_and_explains_it_with_the_words_of_help() -> None:
    values = load_config_file(CONFIGS / "serve.yaml")
    config = ServerConfig(**values)
    assert (config.service, config.datasets) == (ServiceConfig(), {})
    assert set(values["service"]) == set(ServiceConfig.model_fields)
    text = " ".join(line.strip().removeprefix("#").strip() for line in (CONFIGS / "serve.yaml").read_text().splitlines())
    for name, field in ServiceConfig.model_fields.items():
        assert field.description, name
        assert re.sub(r"\s+", " ", field.description) in text, name
