"""Members of a tar as local files, by one ranged read for all that lie side by side."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import TransientError
from pipeline.inputs import read_input_range
from pipeline.tars.headers import Read
from pipeline.types import Clip, TarMember

_MOST_TOGETHER_BYTES = 4 << 20
_MOST_TWICE_SHARE = 0.08
"""Of a member's size that may be read twice: its header when it was probed, and what lies before it when it is not read alone."""
_HEADER_BYTES = 2048
_MOST_RANGE_BYTES = 32 << 20
"""A larger member is read in pieces, so that it is never in memory as a whole."""


def lie_together(earlier: Sequence[Clip], clip: Clip) -> bool:
    """Whether a clip's video is best read by the same request as those of the clips before it."""
    first, last, member = earlier[0].member, earlier[-1].member, clip.member
    if member is not None and member == last:
        return True
    if first is None or last is None or member is None or clip.file_uri != earlier[0].file_uri:
        return False
    gap = member.offset - last.end
    is_near = 0 <= gap <= member.size_bytes * _MOST_TWICE_SHARE - _HEADER_BYTES
    return is_near and member.end - first.offset <= _MOST_TOGETHER_BYTES


@contextlib.contextmanager
def fetch_members(
    tar_uri: str, version: str, members: Sequence[TarMember], options: dict[str, Any] | None, folder: str | Path
) -> Iterator[list[Path]]:
    """Local files with the members' bytes while the context lasts. The members lie in order, and near each other.

    Args:
        version: of the tar, as its listing gave it.

    Raises:
        TerminalError: the tar does not exist, may not be read, or has another version.
        TransientError: the store does not deliver it.
    """
    paths = [Path(folder) / uuid.uuid4().hex for _ in members]
    read = partial(read_input_range, tar_uri, options, version=version)
    try:
        if len(members) == 1:
            _copy(read, members[0], paths[0])
        else:
            start = members[0].offset
            data = memoryview(read(start, members[-1].end - start))
            for member, path in zip(members, paths, strict=True):
                spool(path, data[member.offset - start : member.end - start])
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _copy(read: Read, member: TarMember, path: Path) -> None:
    for offset in range(member.offset, member.end, _MOST_RANGE_BYTES):
        spool(path, read(offset, min(_MOST_RANGE_BYTES, member.end - offset)))


def spool(path: Path, data: bytes | memoryview) -> None:
    """Append to a local file. Raises: TransientError: the disk does not take it, for which no video is to blame."""
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise TransientError(f"{path}: cannot be written: {error.strerror}") from error
