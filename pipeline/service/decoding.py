"""From a request to its coded video: one thread drives the model, a few more code what it yields.

The model works on chunk n+1 while chunk n is coded. It waits for the coders, which bounds memory to two chunks a
video, and for nobody else: clients read from the spool.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch

from pipeline.engine import Engine, ModelInfo
from pipeline.errors import TerminalError
from pipeline.service.cache import VideoCache
from pipeline.service.coding import Coder
from pipeline.service.config import ServiceConfig
from pipeline.service.errors import RequestError
from pipeline.service.metrics import ServiceMetrics
from pipeline.service.parameters import VideoRequest
from pipeline.service.scheduler import Job, Scheduler
from pipeline.service.spool import Spool, SpooledVideo, make_private_folder

logger = logging.getLogger(__name__)

_IDLE_S = 0.5
_MIN_STALL_S = 120.0


class Order(NamedTuple):
    """One video to be made."""

    request: VideoRequest
    video: SpooledVideo


class Decoder:
    """Makes videos of latents, each once, and keeps them while somebody reads or the cache has room. Thread-safe.

    Args:
        model_name: what tells this model's videos from another's in the cache.
    """

    def __init__(self, engine: Engine, model: ModelInfo, model_name: str, config: ServiceConfig, metrics: ServiceMetrics) -> None:
        self._engine, self._model, self._model_name = engine, model, model_name
        self._metrics = metrics
        self._deadline_s = config.deadline_s
        self._scheduler: Scheduler[Order] = Scheduler(config.max_queue, config.max_batch, self._expire)
        config.disk_folder.parent.mkdir(parents=True, exist_ok=True)
        folder = make_private_folder(config.disk_folder)
        self._spool = Spool(folder / "spool", config.spool_bytes)
        self._cache = VideoCache(folder / "cache", config.cache_bytes)
        self._lock = threading.RLock()
        self._making: dict[str, Job[Order]] = {}
        self._videos: WeakValueDictionary[str, SpooledVideo] = WeakValueDictionary()
        self._coders = ThreadPoolExecutor(config.max_batch, thread_name_prefix="coder")
        self._closing: list[Future[None]] = []
        self._beat_at = time.monotonic()
        self._illness: str | None = None
        self._stopping = threading.Event()
        metrics.watch("latents_queue", "Requests that wait for the model.", lambda: len(self._scheduler))
        metrics.watch("latents_spool_bytes", "Videos being made or sent.", lambda: self._spool.used_bytes)
        metrics.watch("latents_cache_bytes", "Videos kept on this machine.", self._cache.used_bytes, of_machine=True)
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def open(self, request: VideoRequest, deadline: float) -> SpooledVideo:
        """The request's video, on its way or whole, with the caller as a reader.

        Args:
            deadline: when it must be whole, on the monotonic clock.

        Raises:
            RequestError: 429: too many wait already. 413, 503.
        """
        name = request.name(self._model_name)
        with self._lock:
            if (video := self._join(name, deadline)) is not None or (video := self._fetch(name)) is not None:
                return video
            self._metrics.count_cache("miss")
            video = self._spool.create(name, request.raw_bytes)
            job = Job(group=_group(request), deadline=deadline, work=Order(request, video))
            video.on_unread = lambda: self._abandon(job)
            try:
                self._scheduler.submit(job)
            except RequestError:
                video.leave()
                raise
            self._making[name] = job
            self._videos[name] = video
            return video

    def check_health(self) -> None:
        """Raises: RuntimeError: the model does not answer any more; a fresh process may help."""
        if self._illness is not None:
            raise RuntimeError(self._illness)
        silent_s = time.monotonic() - self._beat_at
        if silent_s > max(_MIN_STALL_S, 2 * self._deadline_s) or not self._thread.is_alive():
            raise RuntimeError(f"the decoding thread has not moved for {silent_s:.0f} s")

    def close(self) -> None:
        """Stop after the current batch; what waits is answered 503."""
        self._stopping.set()
        stopped = RequestError(503, "stopping", "the service is stopping; try again", retry_after_s=2)
        for job in self._scheduler.close():
            self._end(job, stopped)
        self._thread.join(60)
        self._coders.shutdown(wait=True)
        self._spool.close()

    def _join(self, name: str, deadline: float) -> SpooledVideo | None:
        """Read what is made for somebody else, or was and is still being read."""
        video = self._videos.get(name)
        if video is None or not video.join():
            return None
        job = self._making.get(name)
        if job is not None:
            job.deadline = max(job.deadline, deadline)
        self._metrics.count_cache("joined" if job is not None else "hit")
        return video

    def _fetch(self, name: str) -> SpooledVideo | None:
        """Read what is kept. A cache that cannot be read keeps nothing."""
        size_bytes, is_kept = None, False
        with contextlib.suppress(OSError):
            size_bytes = self._cache.size_of(name)
        if size_bytes is None:
            return None
        video = self._spool.create(name, size_bytes)
        with contextlib.suppress(OSError):
            is_kept = self._cache.fetch(name, video.path)
        if not is_kept:
            video.leave()
            return None
        video.finish()
        self._videos[name] = video
        self._metrics.count_cache("hit")
        return video

    def _abandon(self, job: Job[Order]) -> None:
        job.abandoned = True
        self._forget(job)
        self._scheduler.wake()

    def _expire(self, job: Job[Order]) -> None:
        self._end(job, too_late(self._deadline_s))

    def _end(self, job: Job[Order], error: RequestError) -> None:
        """Nothing was made of a job."""
        self._forget(job)
        job.work.video.finish(error)

    def _forget(self, job: Job[Order]) -> None:
        with self._lock:
            if self._making.get(job.work.video.name) is job:
                del self._making[job.work.video.name]

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._beat_at = time.monotonic()
            jobs = [job for job in self._scheduler.take_batch(_IDLE_S) if job.work.video.begin()]
            if jobs:
                self._make(jobs)

    def _make(self, jobs: list[Job[Order]]) -> None:
        started = time.monotonic()
        coders = [self._coder(job) for job in jobs]
        if (error := self._try_decode(coders)) is not None:
            self._decode_again(coders, error)
        # One batch's last frames may still be coded while the next is decoded, not more.
        wait(self._closing)
        self._closing = [coder.close() for coder in coders]
        seconds = time.monotonic() - started
        self._scheduler.note_time(len(jobs), seconds)
        self._metrics.count_batch(len(jobs), sum(coder.num_frames for coder in coders), seconds)

    def _coder(self, job: Job[Order]) -> Coder:
        request, video = job.work
        return Coder(
            request,
            video,
            self._coders,
            is_wanted=lambda: not job.abandoned,
            has_time=lambda: time.monotonic() < job.deadline,
            on_whole=lambda: self._keep(job),
        )

    def _decode_again(self, coders: list[Coder], error: Exception) -> None:
        """A batch failed: each of it alone, so that only who is to blame bears it."""
        if len(coders) == 1:
            return self._blame(coders[0], error)
        logger.warning("batch failed clips=%d error=%s", len(coders), type(error).__name__)
        for coder in coders:
            if coder.is_over:
                continue
            coder.rewind()
            if (alone := self._try_decode([coder])) is not None:
                self._blame(coder, alone)

    def _try_decode(self, coders: Sequence[Coder]) -> Exception | None:
        """The error if decoding failed, without its stack: that would keep alive what the model had in memory."""
        try:
            self._decode(coders)
        except Exception as error:
            if not isinstance(error, TerminalError) and not self._engine.is_out_of_memory(error):
                logger.exception("decoding failed shape=%s clips=%d", list(coders[0].request.latent.shape), len(coders))
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        return None

    def _decode(self, coders: Sequence[Coder]) -> None:
        """Give every coder the frames of its latent, chunk by chunk."""
        chunks = self._engine.decode_chunks([coder.request.latent for coder in coders])
        with contextlib.closing(cast(Any, chunks)):
            for chunk in chunks:
                self._beat_at = time.monotonic()
                for coder, frames in zip(coders, chunk, strict=True):
                    if not coder.has_time():
                        coder.fail(too_late(self._deadline_s))
                    coder.add(frames)
                if all(coder.is_over for coder in coders):
                    return

    def _blame(self, coder: Coder, error: Exception) -> None:
        if isinstance(error, TerminalError):
            return coder.fail(RequestError.unprocessable(error))
        if self._engine.is_out_of_memory(error):
            shape = f"{coder.request.num_frames}x{coder.request.height}x{coder.request.width}"
            detail = f"this server's GPU has not the memory for a video of {shape}; ask for fewer pixels"
            return coder.fail(RequestError(413, "out_of_memory", detail))
        coder.fail(RequestError(500, "internal", f"decoding failed by {type(error).__name__}; the server's log says more"))
        self._look_for_illness()

    def _look_for_illness(self) -> None:
        """After an error that nobody foresaw: does the model still decode anything at all?"""
        try:
            result = self._engine.decode([torch.zeros(self._model.latent_channels, 1, 8, 8)])[0]
        except Exception as error:
            self._illness = f"the model fails on a blank latent too: {type(error).__name__}: {error}"
            logger.error("decoder is ill error=%s", type(error).__name__)
        else:
            logger.info("decoder is well blank=%s", type(result).__name__)

    def _keep(self, job: Job[Order]) -> None:
        """A video is whole."""
        self._spool.shrink(job.work.video)
        with contextlib.suppress(OSError):  # a full disk loses a copy, not the answer
            self._cache.keep(job.work.video.name, job.work.video.path)
        self._forget(job)


def _group(request: VideoRequest) -> tuple[Any, ...]:
    return (tuple(request.latent.shape), request.latent.dtype)


def too_late(deadline_s: float) -> RequestError:
    """The deadline passed."""
    return RequestError(
        408, "deadline", f"the video was not whole within service.deadline_s = {deadline_s:g} s; try again", retry_after_s=5
    )
