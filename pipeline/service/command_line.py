"""The service's command line: that of every entry point, and ``--datasets.NAME URI``."""

from __future__ import annotations

from pipeline.command_line import exit_with_usage, parse_command_line
from pipeline.service.config import ServerConfig

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
    rest: list[str] = []
    datasets: dict[str, str] = {}
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if not name.startswith(_DATASET):
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value:
            exit_with_usage(f"{name} needs the dataset's URI")
        datasets[name.removeprefix(_DATASET)] = value
    return parse_command_line(rest, ServerConfig, _HELP, given={"datasets": datasets})
