"""WebDataset tars: which ones there are. What is in them is found when they are probed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from itertools import product

from pipeline.config import InputConfig, StorageOptions
from pipeline.dataset.ordered_map import ordered_map
from pipeline.errors import ConfigError, TerminalError
from pipeline.inputs import list_inputs, read_input
from pipeline.sources.source import SourceItem, as_unnamable, resolve_address
from pipeline.storage import StoredObject

_LIST_SUFFIX = ".txt"
_SUFFIX = ".tar"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_NAMES = 1_000_000
_THREADS = 16


def is_tar(uri: str) -> bool:
    return uri.lower().endswith(_SUFFIX)


def names_tars(uri: str) -> bool:
    """Whether an input is one tar or a pattern or list of them, by its name alone."""
    return is_tar(uri) or uri.lower().endswith(_LIST_SUFFIX)


def list_tars(config: InputConfig) -> Iterator[SourceItem]:
    """The tars that ``input.uri`` names: a folder, a glob, one file, ``shard-{000..019}.tar``, or a list of these in a ``.txt``.

    Raises:
        ConfigError: there is none, or one of those that are named is not there.
    """
    options = config.storage_options
    named = _read_list(config.uri, options) if config.uri.lower().endswith(_LIST_SUFFIX) else [config.uri]
    uris = dict.fromkeys(uri for name in named for uri in expand_braces(name))
    count = 0
    for found in ordered_map(partial(_list_one, options=options), uris, _THREADS):
        for file in found:
            count += 1
            yield tar_item(file)
    if not count:
        raise ConfigError(f"input.uri {config.uri}: no tar; expected files ending in {_SUFFIX}")


def tar_item(file: StoredObject) -> SourceItem:
    """One tar, whose members are to be probed."""
    unnamable = as_unnamable(file.uri)
    return unnamable or SourceItem(uri=file.uri, size_bytes=file.size_bytes, version=file.version, is_tar=True)


def _list_one(uri: str, options: StorageOptions) -> list[StoredObject]:
    found = list(list_inputs(uri, options))
    # A single file is taken by whatever name it has.
    return found if len(found) == 1 else [file for file in found if is_tar(file.uri)]


def _read_list(uri: str, options: StorageOptions) -> list[str]:
    try:
        lines = read_input(uri, options).decode("utf-8-sig").splitlines()
    except (TerminalError, UnicodeDecodeError) as error:
        raise ConfigError(f"input.uri {uri}: cannot be read as a list of tars: {error}") from error
    named = []
    for number, line in enumerate(filter(None, map(str.strip, lines)), start=1):
        address = resolve_address(line, uri)
        if address is None or not is_tar(line):
            raise ConfigError(f"input.uri {uri}: entry {number} is {line[:100]!r}, expected the path or URI of a tar")
        named.append(address)
    return named


def expand_braces(name: str) -> list[str]:
    """The names that ``{000000..000019}`` and ``{train,val}`` stand for, in order; other braces mean themselves.

    Raises:
        ConfigError: more than a million.
    """
    pieces = _BRACES.split(name)  # text, content of braces, text, …
    choices = [[piece] if index % 2 == 0 else _choices(piece) for index, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > _MOST_NAMES:
        raise ConfigError(f"input.uri {name}: stands for more than {_MOST_NAMES} names")
    return ["".join(parts) for parts in product(*choices)]


def _choices(content: str) -> list[str]:
    bounds = _RANGE.fullmatch(content)
    if bounds is None:
        return content.split(",") if "," in content else [f"{{{content}}}"]
    first, last = bounds.groups()
    width = max(map(len, bounds.groups())) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    numbers = range(int(first), int(last) + step, step)
    if len(numbers) > _MOST_NAMES:
        raise ConfigError(f"input.uri: {{{content}}} stands for more than {_MOST_NAMES} names")
    return [f"{number:0{width}d}" for number in numbers]
