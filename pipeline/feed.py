"""Keeps video decoding ahead of the model, within a budget of bytes.

Decoding is ordered shard by shard, in plan order, and delivered in that order. Orders are admitted first come,
first served while the frames held or under way fit the budget; the next one needed is always admitted, so a
budget that is too small slows the model down but never stops it. Knows nothing of Ray: how a job is started
and its result fetched are given.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pipeline.errors import ENDS_THE_RUN, TerminalError, TransientError
from pipeline.plan import PlannedClip
from pipeline.tars.members import lie_together
from pipeline.types import Clip, DecodedClip

logger = logging.getLogger(__name__)

DECODE_ATTEMPTS = 3
RETRY_PAUSES_S = (1.0, 10.0)
"""Before each further attempt after a fault of the surroundings, which may pass."""
# The budget holds so many jobs at least, if they are of several clips.
_JOBS_OF_A_VIDEO = 4
_JOBS_OF_A_TAR = 16
Decoded = DecodedClip | TerminalError


@dataclass(eq=False, slots=True)
class VideoJob:
    """Consecutive clips of one video, decoded in one pass over it, or of small neighbours in a tar, read by one request."""

    clips: tuple[PlannedClip, ...]
    results: list[Any] | None = None
    """Handles of the results, one a clip, once admitted."""

    @property
    def size_bytes(self) -> int:
        return sum(planned.clip.bucket.frame_bytes for planned in self.clips)

    @property
    def targets(self) -> list[Clip]:
        return [planned.clip for planned in self.clips]


@dataclass(slots=True)
class DecodeFeed:
    """One actor's decoding.

    Args:
        start: begins decoding a job's clips and returns a handle for each.
        fetch: waits for a handle's result. What it raises is tried again; if it is no ``TransientError``, the clip
            is to blame in the end.
        budget_bytes: of decoded frames held or under way. What the caller keeps of a delivery is beyond it.
    """

    start: Callable[[list[Clip]], Sequence[Any]]
    fetch: Callable[[Any], Decoded]
    budget_bytes: int
    sleep: Callable[[float], None] = time.sleep
    _waiting: deque[VideoJob] = field(default_factory=deque)
    _held_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(self, clips: Sequence[PlannedClip]) -> DecodeOrder:
        """Order the decoding of a shard's clips; iterate the result inside a ``with`` block."""
        jobs = list(_jobs(clips, self.budget_bytes))
        with self._lock:
            self._waiting.extend(jobs)
            self._admit()
        return DecodeOrder(self, jobs)

    def need(self, job: VideoJob) -> None:
        """Admit a job out of turn, whatever the budget: its clips are wanted now."""
        with self._lock:
            if job.results is None:
                self._start(job)

    def release(self, job: VideoJob) -> None:
        """Forget a job, delivered or not."""
        with self._lock:
            if job.results is None:
                self._waiting.remove(job)
            else:
                job.results = None
                self._held_bytes -= job.size_bytes
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if self._held_bytes and self._held_bytes + job.size_bytes > self.budget_bytes:
                return
            self._start(job)

    def _start(self, job: VideoJob) -> None:
        job.results = list(self.start(job.targets))
        self._held_bytes += job.size_bytes
        self._waiting.remove(job)


class DecodeOrder:
    """The ordered clips of one shard: an iterator of (clip, its frames or why there are none)."""

    def __init__(self, feed: DecodeFeed, jobs: list[VideoJob]) -> None:
        self._feed = feed
        self._open = deque(jobs)

    def __enter__(self) -> DecodeOrder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Backwards: what waits leaves the queue before a release could start it for nobody.
        while self._open:
            self._feed.release(self._open.pop())

    def __iter__(self) -> Iterator[tuple[PlannedClip, Decoded]]:
        while self._open:
            job = self._open[0]
            self._feed.need(job)
            for position, planned in enumerate(job.clips):
                yield planned, self._result(job, position)
            self._feed.release(self._open.popleft())

    def _result(self, job: VideoJob, position: int) -> Decoded:
        for attempt in range(1, DECODE_ATTEMPTS + 1):
            assert job.results is not None
            try:
                return self._feed.fetch(job.results[position])
            except ENDS_THE_RUN:
                raise
            except Exception as error:
                if attempt == DECODE_ATTEMPTS:
                    if isinstance(error, TransientError):
                        raise
                    return TerminalError.unexpected("decode", error)
                uri = job.clips[position].clip.uri
                logger.warning("decode retry uri=%s attempt=%d error=%s", uri, attempt, error)
                if isinstance(error, TransientError):
                    self._feed.sleep(RETRY_PAUSES_S[attempt - 1])
                # Again without its neighbours, so that none is charged with what another does.
                again = [index for index, planned in enumerate(job.clips) if planned.clip.uri == uri]
                handles = self._feed.start([job.clips[index].clip for index in again])
                for index, handle in zip(again, handles, strict=True):
                    job.results[index] = handle
        raise AssertionError("unreachable")


def _jobs(clips: Sequence[PlannedClip], budget_bytes: int) -> Iterator[VideoJob]:
    """Neighbours of one video together, and of one tar, unless that would be too much of the budget at once.

    Videos of a tar get a smaller share: together they are decoded one after the other, alone at the same time.
    """
    run: list[PlannedClip] = []
    for planned in clips:
        size_bytes = planned.clip.bucket.frame_bytes * (len(run) + 1)
        if run and not _belongs(run, planned.clip, budget_bytes // size_bytes):
            yield VideoJob(tuple(run))
            run = []
        run.append(planned)
    if run:
        yield VideoJob(tuple(run))


def _belongs(run: list[PlannedClip], clip: Clip, jobs_in_budget: int) -> bool:
    if clip.uri == run[0].clip.uri:
        return jobs_in_budget >= _JOBS_OF_A_VIDEO
    return jobs_in_budget >= _JOBS_OF_A_TAR and lie_together([planned.clip for planned in run], clip)
