"""Settings in themselves: checks across sections, and what is written beside the output."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.command_line import parse_command_line
from pipeline.config import RunConfig, redact


def make_config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig(**({"input": {"uri": "in"}, "output": {"uri": "out"}, "vae": {"weights": "w"}} | sections))  # type: ignore[arg-type]


def test_public_settings_load_again_as_the_same_settings() -> None:
    config = make_config(clip={"buckets": ["17x64x64@8", "49x64x64@29.97"]}, output={"uri": "o", "dtype": "float16"})
    assert RunConfig(**yaml.safe_load(yaml.safe_dump(config.to_public_dict()))) == config


def test_secrets_are_not_among_the_public_settings() -> None:
    options = {
        "key": "AKIA",
        "secret": "s3cr3t",
        "client_kwargs": {"aws_session_token": "t0k3n", "endpoint_url": "http://x"},
        "anon": False,
        "hosts": [{"password": "pa55"}],
    }
    sections = {name: {"storage_options": options} for name in ("input", "output", "vae")}
    config = make_config(
        input={"uri": "in", **sections["input"]},
        output={"uri": "o", **sections["output"]},
        vae={"weights": "w", **sections["vae"]},
    )
    written = yaml.safe_dump(config.to_public_dict())
    assert not [secret for secret in ("AKIA", "s3cr3t", "t0k3n", "pa55") if secret in written]
    assert written.count("http://x") == 3
    assert config.input.storage_options["secret"] == "s3cr3t"  # the settings themselves keep it


def test_address_with_a_password_is_refused_and_the_message_does_not_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    others = ["--output.uri", "o", "--vae.weights", "w"]
    with pytest.raises(SystemExit):
        parse_command_line(["--input.uri", "sftp://me:pa55@host/x", *others], RunConfig, "about")
    said = capsys.readouterr().err
    assert "input.uri: holds credentials (user:password@); give them by the environment or in storage_options" in said
    assert "pa55" not in said


def test_redaction_leaves_names_and_harmless_values() -> None:
    assert redact({"anon": True, "SECRET": "x", "nested": [{"sas_token": 1}, 2]}) == {
        "anon": True,
        "SECRET": "***",
        "nested": [{"sas_token": "***"}, 2],
    }


def test_budget_must_hold_a_batch_of_the_largest_bucket() -> None:
    buckets = {"buckets": ["9x16x16@8", "17x64x64@8"]}
    needed = 3 * 17 * 64 * 64 * 3
    make_config(clip=buckets, encode={"batch_size": 3}, cluster={"frame_budget_bytes": needed})
    with pytest.raises(ValidationError, match=f"one batch of 3 clips of the largest bucket holds {needed}; raise it or lower"):
        make_config(clip=buckets, encode={"batch_size": 3}, cluster={"frame_budget_bytes": needed - 1})


def test_bucket_keys_are_written_in_one_form() -> None:
    assert make_config(clip={"buckets": [" 49x480x720@8.0 "]}).clip.buckets == ("49x480x720@8",)


def test_extensions_are_lower_case_and_begin_with_a_dot() -> None:
    assert make_config(input={"uri": "in", "extensions": ["MP4", ".MoV"]}).input.extensions == (".mp4", ".mov")


def test_stored_dtype_is_that_of_the_model_unless_set() -> None:
    assert make_config().stored.dtype == "bfloat16"
    assert make_config(vae={"weights": "w", "dtype": "float32"}).stored.dtype == "float32"
    assert make_config(output={"uri": "o", "dtype": "float16"}).stored.dtype == "float16"


def test_a_memory_budget_goes_with_exact_tiling_alone() -> None:
    make_config(vae={"weights": "w", "memory_budget_bytes": 1 << 30})
    with pytest.raises(ValidationError, match="memory_budget_bytes needs tiling: exact"):
        make_config(vae={"weights": "w", "memory_budget_bytes": 1 << 30, "tiling": "blend"})
    with pytest.raises(ValidationError, match="greater than 0"):
        make_config(vae={"weights": "w", "memory_budget_bytes": 0})


def test_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="batchsize"):
        make_config(encode={"batchsize": 2})
