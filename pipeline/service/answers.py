"""Spooled videos as HTTP answers: whole, a part of one, or while it grows."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.service.account import Held
from pipeline.service.errors import RequestError
from pipeline.service.spool import SpooledVideo

_CHUNK_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class WholeVideo(Response):
    """A whole video with its length and a strong ETag; answers Range, If-Range and If-None-Match.

    The video is left, and its memory given back, when the client has it all, or leaves.

    Raises:
        RequestError: 416; 429 or 413: there is no memory for it.
    """

    def __init__(
        self, video: SpooledVideo, media_type: str, request_headers: Mapping[str, str], take_memory: Callable[[int], Held]
    ) -> None:
        self._video = video
        found = video.path.stat()
        # The name says latent, form and model; the time tells two makings of it apart, which may differ in bits.
        etag = f'"{video.name[:16]}-{found.st_mtime_ns:x}-{found.st_size:x}"'
        self._start, self._end = 0, found.st_size
        headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
        status = 200
        if etag in _tags(request_headers.get("if-none-match", "")):
            status, self._end = 304, 0
        elif request_headers.get("if-range", etag) == etag and (
            span := _parse_range(request_headers.get("range", ""), self._end)
        ):
            self._start, self._end = span
            headers["content-range"] = f"bytes {self._start}-{self._end - 1}/{found.st_size}"
            status = 206
        if status != 304:
            headers["content-length"] = str(self._end - self._start)
        super().__init__(None, status, headers, media_type if status != 304 else None)
        self._held = take_memory(self._end - self._start)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        if self.status_code == 304:
            del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with self._video.path.open("rb") as file:
                offset = self._start
                while offset < self._end:
                    length = min(_CHUNK_BYTES, self._end - offset)
                    data = await asyncio.to_thread(os.pread, file.fileno(), length, offset)
                    offset += len(data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            await _wait_gone(receive)
        finally:
            self._held.release()
            self._video.leave()


class GrowingVideo(Response):
    """A video that is sent while it grows. Where it fails, the connection is cut: the answer is never ended properly."""

    def __init__(self, video: SpooledVideo, media_type: str, held: Held) -> None:
        self._video = video
        self._held = held
        super().__init__(None, 200, {"cache-control": "private, no-store"}, media_type)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._video.follow():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            await _wait_gone(receive)
        finally:
            self._held.release()
            self._video.leave()


async def _wait_gone(receive: Receive) -> None:
    """Until the client has everything, which a server says by the same word as that it left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _tags(value: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in value.split(",")]


def _parse_range(value: str, size_bytes: int) -> tuple[int, int] | None:
    """First byte and end of a single range; None: send everything, as several ranges or none that can be read ask for.

    Raises:
        RequestError: 416: it begins after the end.
    """
    match = _RANGE.fullmatch(value.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, size_bytes - int(match[2])), size_bytes
    else:
        start, end = int(match[1]), min(size_bytes, int(match[2]) + 1 if match[2] else size_bytes)
    if start >= size_bytes:
        raise RequestError(416, "range", f"the video has {size_bytes} bytes; there is none from {start} on")
    return (start, end) if start < end else None
