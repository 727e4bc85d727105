"""From a YAML file and dotted options to a ``ServerConfig``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import CliApp

from pipeline.command_line import load_config_file
from pipeline.errors import ConfigError
from pipeline.service.config import ServerConfig
from pipeline.service.parameters import describe_problems

_HELP = """Serves a VAE and latent datasets over HTTP.

  --config FILE         settings in YAML; configs/serve.yaml explains how
  --datasets.NAME URI   show the dataset at URI under NAME; may be given several times

The bearer token comes from the environment (service.token_env). Exit codes: 0 stopped, 1 failed, 2 usage.
"""
_DATASET = "--datasets."


def parse_server_config(arguments: list[str]) -> ServerConfig:
    """Settings of the file named by ``--config``, overridden by options such as ``--service.port``.

    Prints help or a usage error and exits (0 or 2), as command lines do.
    """
    values: dict[str, Any] = {}
    if "-h" in arguments or "--help" in arguments:
        print(_HELP)
        arguments = ["--help"]
    try:
        arguments, values = _read_files(arguments)
    except ConfigError as error:
        _exit_with_usage(str(error))
    try:
        return CliApp.run(ServerConfig, cli_args=arguments, **values)
    except ValidationError as error:
        _exit_with_usage(describe_problems(error.errors()))


def _read_files(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The options that remain, and the settings of the file with the datasets of the options."""
    values: dict[str, Any] = {}
    datasets: dict[str, Any] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config" and not name.startswith(_DATASET):
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value:
            raise ConfigError(f"{name} needs a value")
        if name == "--config":
            values = load_config_file(value)
            values["datasets"] = {key: _beside(Path(value), uri) for key, uri in values.get("datasets", {}).items()}
        else:
            datasets[name.removeprefix(_DATASET)] = value
    return rest, {**values, "datasets": {**values.get("datasets", {}), **datasets}}


def _beside(file: Path, uri: Any) -> Any:
    """Paths that begin with ``./`` or ``../`` start at the file's folder."""
    if isinstance(uri, dict):
        return {name: _beside(file, value) if name == "uri" else value for name, value in uri.items()}
    if isinstance(uri, str) and uri.startswith(("./", "../")):
        return str((file.resolve().parent / uri).resolve())
    return uri


def _exit_with_usage(message: str) -> NoReturn:
    print(f"{message}\n\nSee --help for every setting.", file=sys.stderr)
    raise SystemExit(2)
