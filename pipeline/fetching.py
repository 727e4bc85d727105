"""The videos that a decoding job needs, as local files: a file as a whole, members of a tar by their place in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.errors import TerminalError
from pipeline.inputs import fetch_input, stat_input
from pipeline.storage import StoredObject
from pipeline.tars.members import fetch_members
from pipeline.types import Clip


@contextlib.contextmanager
def fetch_videos(
    clips: Sequence[Clip], options: dict[str, Any] | None, folder: str | Path
) -> Iterator[list[tuple[Path, list[Clip]]]]:
    """Each video with its clips, while the context lasts.

    Args:
        clips: of one file; if that is a tar, of members that lie side by side.

    Raises:
        TerminalError: the file does not exist, may not be read, or is not the one that was planned.
        TransientError: the store does not deliver it.
    """
    first = clips[0]
    if first.member is None:
        with fetch_input(first.uri, options, folder) as (path, found):
            _check_unchanged(first, found)
            yield [(path, list(clips))]
        return
    _check_unchanged(first, stat_input(first.file_uri, options))
    videos = [list(group) for _, group in groupby(clips, key=lambda clip: clip.member)]
    members = [video[0].member for video in videos if video[0].member is not None]
    with fetch_members(first.file_uri, first.version, members, options, folder) as paths:
        yield list(zip(paths, videos, strict=True))


def _check_unchanged(clip: Clip, found: StoredObject) -> None:
    if (found.size_bytes, found.version) != (clip.size_bytes, clip.version):
        raise TerminalError(
            "fetch",
            "changed",
            f"{clip.file_uri}: changed since it was planned ({clip.size_bytes} bytes then, {found.size_bytes} now); "
            "run again with --append to plan what it is now",
        )
