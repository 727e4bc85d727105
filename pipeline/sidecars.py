"""Captions and columns from the files beside a video."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import TerminalError


def parse_sidecar(uri: str, data: bytes, *, text_column: str = "caption") -> dict[str, Any]:
    """The columns that one file brings: those of its object, if it is JSON, else its text.

    Raises:
        TerminalError: it cannot be read, or holds what no column can.
    """
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(text) if uri.lower().endswith(".json") else {text_column: text.strip()}
        json.dumps(found, ensure_ascii=False).encode()  # JSON can spell half a character, which no column can hold
    except (ValueError, RecursionError) as error:  # what decoding, parsing and encoding raise is a ValueError
        raise TerminalError("probe", "bad_sidecar", f"{uri}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise TerminalError("probe", "bad_sidecar", f"{uri}: holds {type(found).__name__}, expected an object")
    for name, value in found.items():
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise TerminalError("probe", "bad_sidecar", f"{uri}: {name!r} is {value}, which does not fit 64 bits")
    return found
