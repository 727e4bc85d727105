"""From a file and options to settings; what cannot be used ends with exit code 2 and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline.command_line import JOB_HELP, load_config_file, parse_command_line
from pipeline.config import RunConfig
from pipeline.errors import ConfigError

Refused = Callable[..., str]
MINIMAL = ["--input.uri", "in", "--output.uri", "out", "--vae.weights", "w"]


def parse(arguments: list[str], quick_start: Path | None = None) -> RunConfig:
    return parse_command_line(arguments, RunConfig, JOB_HELP, quick_start)


def every_setting() -> list[str]:
    return [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name in (field.annotation.model_fields if issubclass(field.annotation, BaseModel) else ())  # type: ignore[arg-type, union-attr]
    ]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "config.yaml"
    path.parent.mkdir()
    path.write_text("""
input:
  uri: ./videos
  storage_options: {anon: true}
output:
  uri: ../latents
vae:
  weights: ./weights
encode:
  batch_size: 3
  max_attempts: 5
clip:
decode: {}
""")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The usage error that arguments lead to."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse(list(arguments))
        assert caught.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    return run


def test_file_and_defaults_make_the_settings(config_file: Path) -> None:
    config = parse(["--config", str(config_file)])
    assert (config.encode.batch_size, config.encode.max_attempts) == (3, 5)
    assert config.encode.qa_share == 0
    assert config.clip.buckets == ("49x480x720@8",)
    assert config.input.storage_options == {"anon": True}


def test_options_alone_make_the_settings() -> None:
    config = parse(MINIMAL)
    assert (config.input.uri, config.output.uri, config.vae.weights) == ("in", "out", "w")


def test_option_wins_over_the_file_and_leaves_its_neighbours(config_file: Path) -> None:
    config = parse(["--config", str(config_file), "--encode.batch_size", "2", "--input.uri=s3://x/y"])
    assert (config.encode.batch_size, config.encode.max_attempts) == (2, 5)
    assert config.input.uri == "s3://x/y"
    assert config.input.storage_options == {"anon": True}


def test_config_option_stands_anywhere_and_takes_an_equals_sign(config_file: Path) -> None:
    assert parse(["--encode.batch_size=2", f"--config={config_file}"]).encode.batch_size == 2


@pytest.mark.parametrize(
    "buckets",
    [["17x64x64@8,49x64x64@8"], ["17x64x64@8", "49x64x64@8"], ['["17x64x64@8", "49x64x64@8"]']],
    ids=["commas", "repeated", "json"],
)
def test_list_is_written_in_one_option_or_several(buckets: list[str]) -> None:
    arguments = [part for bucket in buckets for part in ("--clip.buckets", bucket)]
    assert parse([*MINIMAL, *arguments]).clip.buckets == ("17x64x64@8", "49x64x64@8")


@pytest.mark.parametrize("options", ['{"endpoint_url": "http://x"}', "endpoint_url=http://x"])
def test_mapping_is_written_as_json_or_by_key(options: str) -> None:
    config = parse([*MINIMAL, "--input.storage_options", options])
    assert config.input.storage_options == {"endpoint_url": "http://x"}


def test_short_forms_mean_the_long_ones() -> None:
    short = parse([*MINIMAL, "--append", "--takeover", "--limit", "7"])
    long = parse([*MINIMAL, "--run.append", "--run.takeover", "--input.limit=7"])
    assert short == long
    assert (short.run.append, short.run.takeover, short.input.limit) == (True, True, 7)
    assert parse([*MINIMAL, "--limit=7"]).input.limit == 7


def test_flag_is_switched_off_by_its_no_form() -> None:
    assert parse([*MINIMAL, "--no-output.logvar"]).output.logvar is False


def test_environment_is_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPUT", '{"uri": "environment"}')
    monkeypatch.setenv("ENCODE", '{"batch_size": 9}')
    monkeypatch.setenv("ENCODE__BATCH_SIZE", "9")
    config = parse(MINIMAL)
    assert (config.input.uri, config.encode.batch_size) == ("in", 1)


def test_paths_in_the_file_start_at_the_files_folder(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = parse(["--config", str(config_file)])
    root = config_file.parents[1]
    assert config.input.uri == str(root / "runs" / "videos")
    assert config.output.uri == str(root / "latents")
    assert config.vae.weights == str(root / "runs" / "weights")


def test_other_paths_in_the_file_stand_as_they_are(tmp_path: Path) -> None:
    for uri in ("s3://bucket/x", "/data/x", "org/model", "videos"):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"input": {"uri": uri}}))
        assert load_config_file(tmp_path / "c.yaml")["input"]["uri"] == uri


def test_quick_start_runs_where_there_are_no_arguments(config_file: Path) -> None:
    assert parse([], quick_start=config_file).encode.batch_size == 3
    assert parse(MINIMAL, quick_start=config_file).encode.batch_size == 1


def test_help_mentions_every_setting_and_exits_with_0(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    for arguments in (["--help"], ["-h"], ["--config", str(config_file), "--help"]):
        with pytest.raises(SystemExit) as caught:
            parse(arguments)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert [
            name for name in [*every_setting(), "config FILE", "append", "limit N", "takeover"] if f"--{name}" not in text
        ] == []


def test_every_setting_has_an_explanation() -> None:
    unexplained = [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name, setting in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if not setting.description
    ]
    assert unexplained == []


@pytest.mark.parametrize("option", ["--encode.batch", "--encode.nope", "--nope.x", "--output.uri.x"])
def test_unknown_option_is_named(refused: Refused, option: str) -> None:
    assert option in refused(*MINIMAL, option, "5")


def test_misspelt_option_is_answered_with_the_nearest(refused: Refused) -> None:
    assert refused(*MINIMAL, "--clip.bucket", "17x96x160@8").startswith(
        "--clip.bucket: no such setting; did you mean --clip.buckets?"
    )


def test_buckets_may_stand_without_brackets(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("clip:\n  buckets: 9x96x160@8\n")
    assert parse(["--config", str(tmp_path / "c.yaml"), *MINIMAL]).clip.buckets == ("9x96x160@8",)
    assert parse([*MINIMAL, "--clip.buckets", "9x96x160@8,9x160x96@8"]).clip.buckets == ("9x96x160@8", "9x160x96@8")


def test_unknown_setting_or_section_of_the_file_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("encode:\n  batchsize: 5\nencoder:\n  batch_size: 5\n")
    message = refused("--config", str(tmp_path / "c.yaml"), *MINIMAL)
    assert "encode.batchsize: no such setting" in message
    assert "encoder: no such setting" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("encode.batch_size", "x", "encode.batch_size: Input should be a valid integer"),
        ("encode.batch_size", "0", "encode.batch_size: Input should be greater than 0 (given: '0')"),
        ("encode.qa_share", "2", "encode.qa_share: Input should be less than or equal to 1 (given: '2')"),
        ("clip.buckets", "49x480x720", "bucket '49x480x720' is not of the form FRAMESxHEIGHTxWIDTH@FPS"),
        ("clip.buckets", "50x480x720@8", "50 frames do not survive encoding and decoding; use 8k+1, here 49 or 57"),
        ("clip.short", "pad", "clip.short: Input should be 'drop' or 'repeat_last' (given: 'pad')"),
        ("cluster.frame_budget_bytes", "1000", "cluster.frame_budget_bytes is 1000, but one batch of 1 clips"),
    ],
)
def test_wrong_value_is_explained(refused: Refused, option: str, value: str, message: str) -> None:
    assert message in refused(*MINIMAL, f"--{option}", value)


def test_missing_settings_are_named(refused: Refused) -> None:
    message = refused("--input.limit", "3")
    assert message.splitlines()[:3] == [
        f"{name}: needs a value, in the file or on the command line" for name in ("input.uri", "output.uri", "vae.weights")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "expected sections such as 'input:' with settings in them"),
        ("", "expected sections such as 'input:' with settings in them"),
        ("input: videos\n", "input: expected settings such as 'uri: …' in it, found 'videos'"),
        ("input: {uri: [}\n", "not YAML"),
        ("input:\n\turi: x\n", "not YAML"),
    ],
)
def test_file_that_is_no_settings_file_is_explained(refused: Refused, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert f"--config {tmp_path / 'c.yaml'}: {message}" in refused("--config", str(tmp_path / "c.yaml"))


def test_file_that_is_not_there_is_explained(refused: Refused, tmp_path: Path) -> None:
    assert "no.yaml: No such file or directory" in refused("--config", str(tmp_path / "no.yaml"))
    assert "--config needs a file" in refused("--config")
    (tmp_path / "c.yaml").write_bytes(b"input: \xff\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config_file(tmp_path / "c.yaml")
