"""Answers that hold memory while they are sent: a file, a whole video, a part of one, or one that grows."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.service.account import Held
from pipeline.service.errors import RequestError
from pipeline.service.spool import SpooledVideo

logger = logging.getLogger(__name__)

MIN_BYTES_PER_S = 64 << 10
PATIENCE_S = 60.0
"""A client must take n bytes within ``PATIENCE_S + n / MIN_BYTES_PER_S``."""
_POLL_S = 0.05
_CHUNK_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class HeldAnswer(Response, ABC):
    """An answer whose memory is held until its client has it all, leaves, or takes it too slowly.

    Where it fails or is too slow, the connection is cut: the answer is never ended properly.

    Args:
        held: released by the answer.
        making_s: how long the body may take to be there.
    """

    def __init__(self, held: Held, status: int, headers: Mapping[str, str], media_type: str | None, making_s: float = 0) -> None:
        super().__init__(None, status, headers, media_type)
        if "content-length" not in headers:
            del self.headers["content-length"]
        self._held = held
        self._making_s = making_s

    @abstractmethod
    def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body."""

    def leave(self) -> None:
        """Give back what the answer held."""
        self._held.release()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        until, sent = clock() + self._making_s + PATIENCE_S, 0
        try:
            async with asyncio.timeout_at(until) as limit, aclosing(self.pieces()) as pieces:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for data in pieces:
                    sent += len(data)
                    limit.reschedule(until + sent / MIN_BYTES_PER_S)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                await _wait_gone(receive)
        except TimeoutError:
            logger.warning("client too slow sent_bytes=%d", sent)
            raise
        finally:
            self.leave()


class WholeFile(HeldAnswer):
    """Bytes that are all there."""

    def __init__(self, data: bytes, media_type: str, held: Held) -> None:
        super().__init__(held, 200, {"content-length": str(len(data))}, media_type)
        self._data = data

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        yield self._data


class WholeVideo(HeldAnswer):
    """A whole video with its length and a strong ETag; answers Range, If-Range and If-None-Match.

    Args:
        video: left at the end.
        held: grows by what is sent.

    Raises:
        RequestError: 416; 429 or 413: there is no memory for it.
    """

    def __init__(self, video: SpooledVideo, media_type: str, request_headers: Mapping[str, str], held: Held) -> None:
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
        held.grow(self._end - self._start)
        super().__init__(held.hand_over(), status, headers, media_type if status != 304 else None)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        with self._video.path.open("rb") as file:
            offset = self._start
            while offset < self._end:
                length = min(_CHUNK_BYTES, self._end - offset)
                data = await asyncio.to_thread(os.pread, file.fileno(), length, offset)
                offset += len(data)
                yield data

    def leave(self) -> None:
        super().leave()
        self._video.leave()


class GrowingVideo(HeldAnswer):
    """A video that is sent while it grows. Where there is no memory for the next piece, that waits.

    Args:
        video: left at the end.
        held: grows by what is sent.
        making_s: the video is whole by then.
    """

    def __init__(self, video: SpooledVideo, media_type: str, held: Held, making_s: float) -> None:
        super().__init__(held.hand_over(), 200, {"cache-control": "private, no-store"}, media_type, making_s)
        self._video = video

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._video.follow()) as pieces:
            async for data in pieces:
                while not self._has_memory(len(data)):
                    await asyncio.sleep(_POLL_S)
                yield data

    def leave(self) -> None:
        super().leave()
        self._video.leave()

    def _has_memory(self, size_bytes: int) -> bool:
        try:
            self._held.grow(size_bytes)
        except RequestError as error:
            if error.retry_after_s is None:
                raise
            return False
        return True


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
        error = RequestError(416, "range", f"the video has {size_bytes} bytes; there is none from {start} on")
        error.headers["content-range"] = f"bytes */{size_bytes}"
        raise error
    return (start, end) if start < end else None
