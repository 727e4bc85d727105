"""From a YAML file and dotted options to the settings of an entry point."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp

from pipeline.config import Settings
from pipeline.errors import ConfigError

S = TypeVar("S", bound=Settings)

SHORT_FORMS = {
    "--append": "--run.append",
    "--takeover": "--run.takeover",
    "--limit": "--input.limit",
}
JOB_HELP = """
  --config FILE   settings in YAML; {example} explains every one
  --append        the same as --run.append
  --limit N       the same as --input.limit N
  --takeover      the same as --run.takeover

Run the same command again to resume. Exit codes: 0 complete, 1 failed, 2 usage, 3 over run.max_quarantined,
4 stopped and resumable. The outcome also stands in <output.uri>/status.json.
"""
_PATH_SETTINGS = (("input", "uri"), ("output", "uri"), ("vae", "weights"))


def load_config_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file. Paths that begin with ``./`` or ``../`` start at the file's folder.

    Raises:
        ConfigError: the file does not exist, or is not a YAML mapping of sections.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections such as 'input:' with settings in them")
    values = {section: {} if settings is None else settings for section, settings in values.items()}
    for section, settings in values.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"--config {path}: {section}: expected settings such as 'uri: …' in it, found {settings!r}")
    return {section: _resolve_paths(section, settings, path.resolve().parent) for section, settings in values.items()}


def _resolve_paths(section: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose paths no longer depend on the file that they stand in."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict) and section == "datasets":
            return value | {"uri": resolve(value.get("uri"))}
        is_relative = isinstance(value, str) and value.startswith(("./", "../"))
        return str((folder / value).resolve()) if is_relative else value

    is_path = {name for known, name in _PATH_SETTINGS if known == section}
    return {name: resolve(value) if section == "datasets" or name in is_path else value for name, value in settings.items()}


def parse_command_line(
    arguments: list[str],
    settings: type[S],
    about: str,
    quick_start: Path | None = None,
    given: dict[str, dict[str, Any]] | None = None,
) -> S:
    """Settings of the file named by ``--config``, overridden by options such as ``--input.uri``.

    Prints help or a usage error and exits (0 or 2), as command lines do.

    Args:
        settings: the class to make.
        about: what ``--help`` says before the settings.
        quick_start: the settings to run with where there are no arguments at all.
        given: more settings by section, which go before the file's.
    """
    try:
        arguments, file = _take_config_option(arguments)
        if not arguments and file is None:
            file = quick_start
        wants_help = "-h" in arguments or "--help" in arguments
        values = load_config_file(file) if file is not None and not wants_help else {}
    except ConfigError as error:
        exit_with_usage(str(error))
    for section, more in (given or {}).items():
        values[section] = values.get(section, {}) | more
    if wants_help:
        print(about)
    arguments = [_long_form(argument) for argument in arguments]
    _check_options(arguments, settings)
    try:
        return CliApp.run(settings, cli_args=arguments, **values)
    except ValidationError as error:
        exit_with_usage("\n".join(_describe(problem) for problem in error.errors()))


def _take_config_option(arguments: list[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    file: Path | None = None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value:
            raise ConfigError("--config needs a file")
        file = Path(value)
    return rest, file


def _long_form(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return SHORT_FORMS.get(name, name) + equals + value


def _check_options(arguments: list[str], settings: type[Settings]) -> None:
    """Name an unknown option and its nearest neighbour, rather than print the usage of all of them."""
    names = [f"{section}.{name}" for section, field in settings.model_fields.items() for name in _fields(field.annotation)]
    short = (name for name, setting in SHORT_FORMS.items() if setting.removeprefix("--") in names)
    known = {"-h", "--help", *short, *(f"--{name}" for name in (*names, *settings.model_fields))}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known and f"--{name.removeprefix('--no-')}" not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            exit_with_usage(f"{name}: no such setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def _fields(section: Any) -> Iterable[str]:
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()


def _describe(problem: Any) -> str:
    if problem["type"] == "missing":
        return f"{_required_setting(problem['loc'])}: needs a value, in the file or on the command line"
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such setting"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _required_setting(loc: tuple[str, ...]) -> str:
    """The setting that is missing; of a section that is missing, the setting that it cannot do without."""
    section, *rest = loc
    return ".".join([section, *(rest or [dict(_PATH_SETTINGS)[section]])])


def exit_with_usage(message: str) -> NoReturn:
    print(f"{message}\n\nSee --help for every setting.", file=sys.stderr)
    raise SystemExit(2)
