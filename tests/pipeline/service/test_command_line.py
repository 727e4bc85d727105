from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.service.command_line import parse_server_config


def test_options_override_the_file_and_paths_start_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "vae: {weights: ./vae}\nservice: {port: 9000}\n"
        "datasets: {a: ./latents, b: {uri: 's3://bucket/b', storage_options: {anon: true}}}\n"
    )
    config = parse_server_config(
        ["--config", str(file), "--service.max_batch", "2", "--datasets.c", "/somewhere", "--datasets.a=x"]
    )
    assert config.vae.weights == str(tmp_path / "vae")
    assert {name: found.uri for name, found in config.datasets.items()} == {"a": "x", "b": "s3://bucket/b", "c": "/somewhere"}
    assert config.datasets["b"].storage_options == {"anon": True}
    assert (config.service.port, config.service.max_batch) == (9000, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "vae"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config"),
        (["--vae.weights", "w", "--service.port", "0"], "service.port"),
        (["--vae.weights", "w", "--datasets.a/b", "x"], "a/b"),
        (["--vae.weights", "w", "--service.prot", "1"], "service.prot"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_server_config(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_server_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--datasets.NAME" in text
    assert "--service.max_queue" in text
