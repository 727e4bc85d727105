"""What a listed video is: its size, its streams and its captions. No Ray: the actors' room runs this as tasks."""

from __future__ import annotations

import json
from typing import Any, Protocol

from pipeline.errors import TerminalError
from pipeline.inputs import fetch_input, read_input
from pipeline.plan import ProbedVideo
from pipeline.sources import SourceItem
from pipeline.storage import StoredObject
from pipeline.types import VideoInfo


class Prober(Protocol):
    """The part of ``DecoderProcess`` that probing needs."""

    def probe(self, path: str, name: str) -> VideoInfo: ...


def probe_item(item: SourceItem, prober: Prober, options: dict[str, Any], spool: str) -> ProbedVideo:
    """Look at one video and read the captions beside it.

    What is wrong with the video stands in the result's ``error``; its ``columns`` are those of the caption
    files only.

    Raises:
        TransientError: storage does not answer; nothing is known about the video.
    """
    found = StoredObject(item.uri, item.size_bytes or 0, item.version or "")  # until the file itself is seen
    columns: dict[str, Any] = {}
    try:
        if item.problem is not None:
            raise TerminalError("plan", "no_video", item.problem)
        columns = _read_sidecars(item.sidecars, options)
        with fetch_input(item.uri, options, spool) as (path, found):
            info = prober.probe(str(path), item.uri.rpartition("/")[2])
    except TerminalError as error:
        return _probed(found, columns, error=error)
    return _probed(found, columns, info=info)


def _probed(
    found: StoredObject, columns: dict[str, Any], info: VideoInfo | None = None, error: TerminalError | None = None
) -> ProbedVideo:
    return ProbedVideo(
        uri=found.uri,
        size_bytes=found.size_bytes,
        version=found.version,
        columns=columns,
        info=info,
        error=error,
    )


def _read_sidecars(sidecars: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Columns from the files beside a video; a ``.txt`` is its caption unless the ``.json`` names one."""
    columns: dict[str, Any] = {}
    for uri in sidecars:
        try:
            text = read_input(uri, options).decode("utf-8-sig")
            found = json.loads(text) if uri.endswith(".json") else {"caption": text.strip()}
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise TerminalError("probe", "bad_sidecar", f"{uri}: cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise TerminalError("probe", "bad_sidecar", f"{uri}: holds {type(found).__name__}, expected an object")
        columns.update(found)
    return columns
