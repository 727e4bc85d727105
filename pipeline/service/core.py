"""One replica's service: from a request's bytes to the answer, over HTTP or through a handle."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pipeline.engine import Engine, ModelInfo
from pipeline.service.account import Held, MemoryAccount
from pipeline.service.answers import GrowingVideo, WholeFile, WholeVideo
from pipeline.service.config import UPLOAD_COPIES, ServiceConfig
from pipeline.service.datasets import ServedDatasets
from pipeline.service.decoding import Decoder, too_late
from pipeline.service.edge import client_headers
from pipeline.service.errors import RequestError
from pipeline.service.gate import Gate
from pipeline.service.metrics import ServiceMetrics, merge_texts
from pipeline.service.parameters import DecodeParameters, VideoParameters, VideoRequest, make_request, read_request
from pipeline.service.spool import SpooledVideo

T = TypeVar("T")
_THREADS = 8
_UPLOAD_S = 60.0
_BYTES_PER_VALUE = 12  # of a stored latent that is read: three copies, none above float32


class DecoderService:
    """What the routes and the handle's methods share."""

    def __init__(
        self,
        engine: Engine,
        model: ModelInfo,
        model_name: str,
        limits: ServiceConfig,
        datasets: ServedDatasets,
        gate: Gate,
        metrics: ServiceMetrics,
    ) -> None:
        self.limits, self.datasets, self.gate, self.metrics = limits, datasets, gate, metrics
        self.decoder = Decoder(engine, model, model_name, limits, metrics)
        self.ask_replicas: Callable[[], Awaitable[list[str]]] | None = None
        """Asks every replica, this one too, for its metrics. None: there is no other."""
        self._model = model
        self._account = MemoryAccount(limits.memory_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="request")
        metrics.watch("latents_held_bytes", "Bodies, latents and answers.", lambda: self._account.held_bytes)

    async def run(self, call: Callable[[], T]) -> T:
        """Run what blocks in a thread of the service."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def answer_upload(self, request: Request, wanted: DecodeParameters) -> Response:
        """The answer to a body with a latent."""
        deadline = self._deadline()
        headers = client_headers(request.scope)
        with self._account.take(UPLOAD_COPIES * _declared_length(headers, self.limits.max_body_bytes)) as held:
            asked = await self._parse(await self._read_body(request, deadline), wanted)
            return await self._answer(asked, headers, held, deadline)

    async def answer_sample(self, request: Request, name: str, sample_id: str, wanted: VideoParameters) -> Response:
        """The answer with a dataset's sample, decoded."""
        deadline = self._deadline()
        shown = self.datasets.find(name)

        def ask() -> VideoRequest:
            return make_request(shown.read_latent(sample_id), shown.read_fps(sample_id), wanted, self._model, self.limits)

        with await self._take_for_sample(name, sample_id) as held:
            return await self._answer(await self.run(ask), client_headers(request.scope), held, deadline)

    async def answer_latent(self, name: str, sample_id: str) -> Response:
        """The answer with a dataset's latent, as it is stored."""
        with await self._take_for_sample(name, sample_id) as held:
            data = await self.run(lambda: self.datasets.find(name).read_latent_file(sample_id))
            held.shrink(len(data))
            return WholeFile(data, "application/octet-stream", held.hand_over())

    async def decode(self, body: bytes, wanted: DecodeParameters) -> bytes:
        """The whole video of a body. Raises: RequestError."""
        return b"".join([data async for data in self.decode_stream(body, wanted)])

    async def decode_stream(self, body: bytes, wanted: DecodeParameters) -> AsyncIterator[bytes]:
        """The video of a body as its bytes come. Raises: RequestError."""
        if len(body) > self.limits.max_body_bytes:
            raise _too_large(len(body), self.limits.max_body_bytes)
        deadline = self._deadline()
        with self._account.take(UPLOAD_COPIES * len(body)) as held:
            asked = await self._parse(body, wanted)
            held.shrink(len(body) + asked.latent.nbytes)
            video = await self._open(asked, deadline)
            try:
                async for data in video.follow():
                    yield data
            finally:
                video.leave()

    async def collect_metrics(self) -> str:
        """Of all replicas that answer in time."""
        if self.ask_replicas is None:
            return await asyncio.to_thread(self.metrics.to_text)
        return await asyncio.to_thread(merge_texts, await self.ask_replicas())

    def close(self) -> None:
        self.decoder.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _parse(self, body: bytes, wanted: DecodeParameters) -> VideoRequest:
        return await self.run(lambda: read_request(body, wanted, self._model, self.limits))

    async def _take_for_sample(self, name: str, sample_id: str) -> Held:
        shape = (await self.run(lambda: self.datasets.find(name).show_sample(sample_id)))["latent"]["shape"]
        return self._account.take(_BYTES_PER_VALUE * math.prod(shape or (0,)))

    async def _answer(self, asked: VideoRequest, headers: dict[str, str], held: Held, deadline: float) -> Response:
        held.shrink(asked.latent.nbytes)
        video = await self._open(asked, deadline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await (video.wait_begun() if asked.stream else video.wait_whole())
            media_type = asked.format.media_type
            if not video.is_whole:
                return GrowingVideo(video, media_type, held, max(0.0, deadline - time.monotonic()))
            held.release()  # the latent is past the model
            return WholeVideo(video, media_type, headers, held)
        except TimeoutError:
            video.leave()
            raise too_late(self.limits.deadline_s) from None
        except BaseException:  # a client that left is one of them
            video.leave()
            raise

    def _deadline(self) -> float:
        """Of a request that arrives now."""
        return time.monotonic() + self.limits.deadline_s

    async def _open(self, asked: VideoRequest, deadline: float) -> SpooledVideo:
        opening = asyncio.get_running_loop().run_in_executor(self._threads, self.decoder.open, asked, deadline)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:  # the client left; the thread opens the video all the same
            opening.add_done_callback(_leave_opened)
            raise

    async def _read_body(self, request: Request, deadline: float) -> bytes:
        limit, time_s = self.limits.max_body_bytes, min(_UPLOAD_S, deadline - time.monotonic())
        body = bytearray()
        try:
            async with asyncio.timeout(time_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise _too_large(len(body), limit)
        except TimeoutError:
            raise RequestError(408, "slow_body", f"the body did not come within {time_s:g} s; {len(body)} bytes came") from None
        except ClientDisconnect:
            raise RequestError(400, "cut_body", "the connection ended before the body did") from None
        return bytes(body)


def _leave_opened(opening: asyncio.Future[SpooledVideo]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().leave()


def _declared_length(headers: dict[str, str], limit: int) -> int:
    """Bytes to expect. Raises: RequestError: 413, 400."""
    length = headers.get("content-length")
    if length is None:
        return limit
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise RequestError(400, "bad_length", f"content-length {length[:40]!r} is no number")
    if int(length) > limit:
        raise _too_large(int(length), limit)
    return int(length)


def _too_large(size_bytes: int, limit: int) -> RequestError:
    return RequestError(413, "body_too_large", f"the body has {size_bytes} bytes or more, service.max_body_bytes is {limit}")
