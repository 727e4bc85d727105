"""Decoded frames to one coded video, in the threads of a pool, so that the model need not wait for the codec."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.service.errors import RequestError
from pipeline.service.parameters import VideoRequest
from pipeline.service.spool import SpooledVideo
from pipeline.types import Frames
from pipeline.video_writer import VideoEncoder

logger = logging.getLogger(__name__)


class Coder:
    """Codes the frames of one request into its video, one chunk at a time.

    Args:
        is_wanted: whether anybody still waits for the video.
        has_time: whether its deadline has not passed.
        on_whole: called in the pool when every byte is written, before readers are told.
    """

    def __init__(
        self,
        request: VideoRequest,
        video: SpooledVideo,
        pool: ThreadPoolExecutor,
        is_wanted: Callable[[], bool],
        has_time: Callable[[], bool],
        on_whole: Callable[[], None],
    ) -> None:
        self.request = request
        self.num_frames = 0
        """Frames given so far."""
        self._video = video
        self._pool = pool
        self.has_time = has_time
        self._is_wanted = is_wanted
        self._on_whole = on_whole
        self._skip = 0
        self._last: Future[None] | None = None
        self._sink: io.RawIOBase | None = None
        self._encoder: VideoEncoder | None = None
        self._error: RequestError | None = None

    @property
    def is_over(self) -> bool:
        """No more frames are wanted."""
        return self._error is not None or not self._is_wanted()

    def add(self, frames: Frames) -> None:
        """Code frames ``[t, H, W, 3]`` after those before; waits until those before are coded."""
        already = min(self._skip, len(frames))
        self._skip -= already
        frames = frames[already:]
        self._settle()
        if len(frames) and not self.is_over:
            self.num_frames += len(frames)
            self._last = self._pool.submit(self._code, frames)

    def rewind(self) -> None:
        """The same frames come once more from the first on; those that were coded are passed over."""
        self._skip = self.num_frames

    def fail(self, error: RequestError) -> None:
        """The video will not be whole. The first reason stands."""
        self._error = self._error or error

    def close(self) -> Future[None]:
        """End the video, in the pool."""
        self._settle()
        return self._pool.submit(self._close)

    def _settle(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            with self._blamed():
                last.result()

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("video not written error=%s", error)
            self.fail(RequestError(503, "disk", f"the video could not be written: {error.strerror}", retry_after_s=10))
        except Exception as error:
            logger.error("video not coded shape=%s", list(self.request.latent.shape), exc_info=error)
            self.fail(RequestError(500, "internal", f"coding failed by {type(error).__name__}; the server's log says more"))

    def _code(self, frames: Frames) -> None:
        if self._encoder is None:
            request = self.request
            if request.stream:
                self._sink = self._video.open_growing()
            self._encoder = VideoEncoder(
                self._sink or self._video.path,
                request.format,
                request.fps,
                request.height,
                request.width,
                fragmented=request.stream,
            )
        self._encoder.add(frames)

    def _close(self) -> None:
        with self._blamed():
            if self.num_frames != self.request.num_frames and not self.is_over:
                raise ValueError(f"decoding gave {self.num_frames} frames, expected {self.request.num_frames}")
            if not self.is_over and self._encoder is not None:
                self._encoder.close()
        with self._blamed():
            if self._encoder is not None:
                self._encoder.abort()  # of what is not whole: it must look cut
            if self._sink is not None:
                self._sink.close()
        with self._blamed():
            if not self.is_over:
                self._on_whole()
        nobody = None if self._is_wanted() else RequestError(408, "abandoned", "nobody waited for the video any more")
        self._video.finish(self._error or nobody)
