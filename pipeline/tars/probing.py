"""What the members of one tar are, from headers only: the tar's and the videos'.

Nothing of a video is read that will be read again to decode it, but for its header. Where that does not tell everything,
the member is fetched and looked at like a file.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import TerminalError, TransientError
from pipeline.inputs import read_input_range, stat_input
from pipeline.plan import ProbedVideo
from pipeline.probing import Prober, look_at_items
from pipeline.sources import SourceItem
from pipeline.storage import StoredObject, is_transient
from pipeline.tars.headers import TarProblem
from pipeline.tars.members import fetch_members, spool
from pipeline.tars.samples import TarVideo, read_videos
from pipeline.tars.window import ReadAhead
from pipeline.types import VideoInfo, member_uri

_AT_ONCE = 32
"""Videos whose headers are held together: those that fail are tried again after the others."""


class HeaderProber(Prober, Protocol):
    """The part of ``DecoderProcess`` that probing the members of a tar needs."""

    def probe_header(self, path: str, name: str, size_bytes: int) -> VideoInfo | None: ...


@dataclass(frozen=True, slots=True)
class _Found:
    """A video of the tar, or what is refused of it."""

    tar: StoredObject
    what: TarVideo | TarProblem

    @property
    def uri(self) -> str:
        if isinstance(self.what, TarProblem):
            return member_uri(self.tar.uri, self.what.name) if self.what.name else self.tar.uri
        return self.what.member.uri(self.tar.uri)

    @property
    def problem(self) -> str | None:
        return self.what.problem if isinstance(self.what, TarProblem) else None


def probe_tar(
    item: SourceItem, extensions: tuple[str, ...], prober: HeaderProber, options: dict[str, Any], folder: str
) -> list[ProbedVideo]:
    """Every video of one tar in order, and everything in it that is refused, or breaks off, as a finding of its own.

    Raises:
        TransientError: storage does not answer, or the tar was replaced meanwhile.
    """
    try:
        tar = stat_input(item.uri, options)
        try:
            findings = list(_look(tar, extensions, prober, options, folder))
        except TerminalError as error:
            findings = [_probed_tar(tar, error)]
        if stat_input(item.uri, options) != tar:
            raise TransientError(f"{item.uri}: was replaced while it was read")
    except TerminalError as error:
        return [_probed_tar(StoredObject(item.uri, item.size_bytes or 0, item.version or ""), error)]
    except OSError as error:
        if is_transient(error):
            raise TransientError(f"{item.uri}: {type(error).__name__}: {error}") from error
        raise
    if not findings:
        detail = f"{item.uri}: no member ends in {', '.join(extensions)}; see input.extensions"
        return [_probed_tar(tar, TerminalError("plan", "no_video", detail))]
    return findings


def _look(
    tar: StoredObject, extensions: tuple[str, ...], prober: HeaderProber, options: dict[str, Any], folder: str
) -> Iterator[ProbedVideo]:
    window = ReadAhead(partial(read_input_range, tar.uri, options, version=tar.version), tar.size_bytes)
    videos = (_Found(tar, what) for what in read_videos(window.read, tar.uri, tar.size_bytes, extensions))
    look = partial(_probe, prober=prober, options=options, folder=folder)
    while found := list(islice(videos, _AT_ONCE)):
        yield from look_at_items(found, look, lambda item, error: _probed(item, error=error))


def _probe(found: _Found, *, prober: HeaderProber, options: dict[str, Any], folder: str) -> ProbedVideo:
    what, tar = found.what, found.tar
    if isinstance(what, TarProblem):
        return _probed(found, error=TerminalError("plan", what.reason, f"{found.uri}: at byte {what.offset}: {what.problem}"))
    if what.error is not None:
        return _probed(found, error=what.error)
    if not what.member.size_bytes:
        return _probed(found, error=TerminalError("probe", "empty_file", f"{found.uri}: the file has no bytes"))
    try:
        info = _probe_header(what, prober, folder)
        if info is None:
            with fetch_members(tar.uri, tar.version, [what.member], options, folder) as paths:
                info = prober.probe(str(paths[0]), what.member.name)
    except TerminalError as error:
        return _probed(found, error=error)
    return _probed(found, info=info)


def _probe_header(video: TarVideo, prober: HeaderProber, folder: str) -> VideoInfo | None:
    """None if only the whole file can tell."""
    if video.header is None:
        return None
    path = Path(folder) / uuid.uuid4().hex
    try:
        spool(path, video.header)
        return prober.probe_header(str(path), video.member.name, video.member.size_bytes)
    except TerminalError as error:
        if error.reason == "not_a_video":
            return None
        raise
    finally:
        path.unlink(missing_ok=True)


def _probed(found: _Found, info: VideoInfo | None = None, error: TerminalError | None = None) -> ProbedVideo:
    tar, video = found.tar, found.what if isinstance(found.what, TarVideo) else None
    return ProbedVideo(
        uri=found.uri,
        size_bytes=tar.size_bytes,
        version=tar.version,
        columns=video.columns if video else {},
        member=video.member if video else None,
        info=info,
        error=error,
    )


def _probed_tar(tar: StoredObject, error: TerminalError) -> ProbedVideo:
    """A finding about the tar as a whole."""
    return ProbedVideo(uri=tar.uri, size_bytes=tar.size_bytes, version=tar.version, error=error)
