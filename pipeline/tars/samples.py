"""The videos of a WebDataset tar, each with its header and what stands beside it.

A member's key is its path up to the first dot of the base name, the rest is its extension. Consecutive members of one
key are a sample: every video of it takes the columns of its JSON and text members. Others are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import TerminalError
from pipeline.sidecars import parse_sidecar
from pipeline.tars.headers import BLOCK_BYTES, Read, TarProblem, read_members
from pipeline.types import TarMember
from pipeline.video_header import find_video_header

TEXT_SUFFIXES = (".txt", ".text", ".caption", ".transcript", ".cls")
_MOST_TEXT_BYTES = 1 << 20
_MOST_VIDEOS = 64
"""Of one key; an endless sample would fill the memory."""


@dataclass(frozen=True, slots=True)
class TarVideo:
    """One video of a tar."""

    member: TarMember
    header: bytes | None
    """As ``find_video_header`` finds it."""
    columns: dict[str, Any]
    error: TerminalError | None = None
    """Why what stands beside it cannot be used."""


def read_videos(read: Read, tar_uri: str, tar_bytes: int, extensions: tuple[str, ...]) -> Iterator[TarVideo | TarProblem]:
    """The videos of a tar in order, and what is refused of it. Reads forward, and nothing twice.

    Args:
        extensions: in lower case; a member whose name ends in one of them is a video.
    """
    sample = _Sample("")
    for member in read_members(read, tar_bytes):
        if isinstance(member, TarProblem):
            yield member
            continue
        key, extension = _split_name(member.name)
        if key != sample.key or len(sample.videos) == _MOST_VIDEOS:
            yield from sample.finish()
            sample = _Sample(key)
        if not extension:
            continue
        if extension.endswith(extensions):
            sample.add_video(member, read)
        elif extension.endswith((".json", *TEXT_SUFFIXES)):
            sample.add_text(member, extension, read, member.uri(tar_uri))
    yield from sample.finish()


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, in lower case and with its dot; no extension for a hidden file."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower() if stem else ""


@dataclass(slots=True)
class _Sample:
    key: str
    videos: list[tuple[TarMember, bytes | None]] = field(default_factory=list)
    _texts: dict[str, Any] = field(default_factory=dict)
    _columns: dict[str, Any] = field(default_factory=dict)
    _text_bytes: int = 0
    _error: TerminalError | None = None

    def add_video(self, member: TarMember, read: Read) -> None:
        self.videos.append((member, find_video_header(_within(member, read), member.size_bytes)))

    def add_text(self, member: TarMember, extension: str, read: Read, uri: str) -> None:
        self._text_bytes += BLOCK_BYTES + member.size_bytes
        try:
            if self._text_bytes > _MOST_TEXT_BYTES:
                problem = f"{uri}: with it the sample's text takes {self._text_bytes} bytes, expected {_MOST_TEXT_BYTES} at most"
                raise TerminalError("probe", "bad_sidecar", problem)
            column = "caption" if extension == ".txt" else extension[1:]
            found = parse_sidecar(uri, read(member.offset, member.size_bytes), text_column=column)
            (self._columns if extension.endswith(".json") else self._texts).update(found)
        except TerminalError as error:
            self._error = self._error or error

    def finish(self) -> Iterator[TarVideo]:
        """The videos, with what the sample says about them; JSON counts more than text, as with files."""
        for member, header in self.videos:
            yield TarVideo(member, header, {**self._texts, **self._columns}, self._error)


def _within(member: TarMember, read: Read) -> Callable[[int, int], bytes]:
    return lambda offset, length: read(member.offset + offset, length)
