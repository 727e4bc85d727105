"""What a listed video is: its size, its streams and its captions. No Ray: the actors' room runs this as tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from pipeline.errors import ENDS_THE_RUN, TerminalError, TransientError
from pipeline.inputs import fetch_input, read_input
from pipeline.plan import ProbedVideo
from pipeline.sidecars import parse_sidecar
from pipeline.sources import SourceItem
from pipeline.storage import StoredObject, is_transient
from pipeline.types import VideoInfo

logger = logging.getLogger(__name__)

_TRIES = 3
_PAUSE_S = 1.0
# No answer for so many videos and so long: the rest is not even asked, as each may take minutes to fail.
_OUTAGE_ITEMS = 5
_OUTAGE_S = 60.0


class Listed(Protocol):
    """What can be looked at: a listed file, or a member of one."""

    @property
    def uri(self) -> str: ...

    @property
    def problem(self) -> str | None:
        """Why there is nothing to look at."""
        ...


T = TypeVar("T")
AnyListed = TypeVar("AnyListed", bound=Listed)


class Prober(Protocol):
    """The part of ``DecoderProcess`` that probing needs."""

    def probe(self, path: str, name: str) -> VideoInfo: ...


def probe_items(items: list[SourceItem], prober: Prober, options: dict[str, Any], spool: str) -> list[ProbedVideo]:
    """Look at a few videos, as ``look_at_items`` does."""
    return look_at_items(
        items,
        lambda item: probe_item(item, prober, options, spool),
        lambda item, error: _probed(_as_listed(item), {}, error=error),
    )


def look_at_items(
    items: list[AnyListed], look: Callable[[AnyListed], T], give_up: Callable[[AnyListed, TerminalError], T]
) -> list[T]:
    """Look at a few files, one after the other; whatever happens to one of them is a finding about that one.

    Args:
        give_up: makes a finding of what is wrong with a file that cannot be looked at.

    Raises:
        TransientError: none of them is reached, or none any more: storage is down, and no file is to blame.
        Exception: none of several can be looked at: the code or this machine is broken.
    """
    findings: dict[int, T] = {}
    failed: dict[int, Exception] = {}
    answered: AnyListed | None = None
    started = time.monotonic()
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        for position, item in enumerate(items):
            if position in findings:
                continue
            try:
                findings[position] = look(item)
            except ENDS_THE_RUN:
                raise
            except Exception as error:
                logger.warning("probing failed uri=%s attempt=%d error=%s", item.uri, attempt + 1, error)
                failed[position] = error
                if answered is None and len(failed) >= _OUTAGE_ITEMS and time.monotonic() - started > _OUTAGE_S:
                    raise
            else:
                failed.pop(position, None)
                answered = answered or (item if item.problem is None else None)
        if not failed:
            break
        first = next(iter(failed.values()))
        if answered is None and (isinstance(first, TransientError) or len(failed) > 1):
            raise first
    if answered and any(isinstance(failure, TransientError) for failure in failed.values()):
        look(answered)  # raises TransientError if storage has gone down meanwhile
    for position, failure in failed.items():
        findings[position] = give_up(items[position], _as_finding(items[position], failure))
    return [findings[position] for position in range(len(items))]


def _as_finding(item: Listed, failure: Exception) -> TerminalError:
    if isinstance(failure, TransientError):
        return TerminalError("fetch", "unreachable", f"{item.uri}: failed {_TRIES} times while others did not: {failure}")
    return TerminalError.unexpected("probe", failure)


def probe_item(item: SourceItem, prober: Prober, options: dict[str, Any], spool: str) -> ProbedVideo:
    """Look at one video and read the captions beside it.

    What is wrong with the video stands in the result's ``error``; its ``columns`` are those of the caption
    files only.

    Raises:
        TransientError: storage does not answer; nothing is known about the video.
    """
    found = _as_listed(item)  # until the file itself is seen
    columns: dict[str, Any] = {}
    try:
        if item.problem is not None:
            raise TerminalError("plan", "no_video", item.problem)
        columns = _read_sidecars(item.sidecars, options)
        with fetch_input(item.uri, options, spool) as (path, found):
            info = prober.probe(str(path), item.uri.rpartition("/")[2])
    except TerminalError as error:
        return _probed(found, columns, error=error)
    except OSError as error:
        if is_transient(error):
            raise TransientError(f"{item.uri}: {type(error).__name__}: {error}") from error
        raise
    return _probed(found, columns, info=info)


def _as_listed(item: SourceItem) -> StoredObject:
    return StoredObject(item.uri, item.size_bytes or 0, item.version or "")


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
        columns.update(parse_sidecar(uri, read_input(uri, options)))
    return columns
