"""The queue before the model: bounded, in order of arrival, taken in batches of one shape.

The request that has waited longest always leads the next batch, and later ones of its shape join it. So no shape
starves, however many requests of another come.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pipeline.service.errors import RequestError

T = TypeVar("T")
_MAX_RETRY_AFTER_S = 60
_MEAN_OF = 8
"""The mean time of a request is taken over about so many."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job(Generic[T]):
    """One request in the queue."""

    group: Hashable
    """Requests of one group can be decoded together."""
    deadline: float
    """On the scheduler's clock."""
    work: T
    abandoned: bool = field(default=False)
    """Nobody waits for the result any more. Set from any thread."""


class Scheduler(Generic[T]):
    """A bounded queue of jobs. Thread-safe.

    Args:
        max_queue: jobs that may wait.
        max_batch: jobs that are taken together.
        on_expired: told of every job whose deadline passed while it waited.
    """

    def __init__(
        self,
        max_queue: int,
        max_batch: int,
        on_expired: Callable[[Job[T]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_queue = max_queue
        self._max_batch = max_batch
        self._on_expired = on_expired
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Job[T]] = deque()
        self._mean_s = 1.0
        self._closed = False

    def __len__(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(not job.abandoned for job in self._waiting)

    def submit(self, job: Job[T]) -> None:
        """Put a job at the end of the queue.

        Raises:
            RequestError: 429: the queue is full; it says when to come again. 503: the service is stopping.
        """
        with self._changed:
            if self._closed:
                raise RequestError(503, "stopping", "the service is stopping; try again", retry_after_s=2)
            expired = self._drop_dead()
            is_full = len(self._waiting) >= self._max_queue
            if not is_full:
                self._waiting.append(job)
                self._changed.notify()
            wait_s = self._estimate_wait_s()
        for dead in expired:
            self._on_expired(dead)
        if is_full:
            raise RequestError(
                429,
                "queue_full",
                f"{self._max_queue} requests are waiting already; try again in about {wait_s} s",
                retry_after_s=wait_s,
            )

    def take_batch(self, timeout_s: float) -> list[Job[T]]:
        """The job that has waited longest and those of its group, oldest first; empty if none came in time."""
        until = self._clock() + timeout_s
        with self._changed:
            expired = self._drop_dead()
            while not self._waiting and not self._closed and not expired and (left := until - self._clock()) > 0:
                self._changed.wait(left)
                expired = self._drop_dead()
            batch: list[Job[T]] = []
            rest: deque[Job[T]] = deque()
            for job in self._waiting:
                joins = len(batch) < self._max_batch and (not batch or job.group == batch[0].group)
                (batch if joins else rest).append(job)
            self._waiting = rest
        for dead in expired:
            self._on_expired(dead)
        return batch

    def note_time(self, jobs: int, seconds: float) -> None:
        """Learn from a finished batch how long a request takes."""
        with self._changed:
            self._mean_s += (seconds / max(1, jobs) - self._mean_s) / _MEAN_OF

    def wake(self) -> None:
        """Look at the queue again: a job was abandoned."""
        with self._changed:
            self._changed.notify()

    def close(self) -> list[Job[T]]:
        """Refuse what comes from now on. Returns the jobs that were still waiting."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
            return waiting

    def _drop_dead(self) -> list[Job[T]]:
        """Take out jobs that nobody waits for, and return those whose time is over."""
        now = self._clock()
        expired: list[Job[T]] = []
        alive: deque[Job[T]] = deque()
        for job in self._waiting:
            if not job.abandoned:
                # Read once: it may be put off from another thread meanwhile.
                (alive if job.deadline > now else expired).append(job)
        self._waiting = alive
        return expired

    def _estimate_wait_s(self) -> int:
        return min(_MAX_RETRY_AFTER_S, max(1, round(self._mean_s * len(self._waiting) / 2)))
