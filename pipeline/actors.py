"""The VAE actor and the probe task: the process boundaries that every kind of work shares.

What an actor does with a shard is its worker's part. Everything that can be tested without Ray is elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.errors import ENDS_THE_RUN, TransientError
from pipeline.schedule import Lease
from pipeline.sources import SourceItem
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The surroundings failed, not the item. A crash of a decoder is no such case: it happens in a child
# process of the task, whose exit status tells.
LOST_TASK = (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RaySystemError)


@ray.remote(num_cpus=1, max_retries=0)
def probe_batch(probe: Callable[[list[SourceItem]], T], items: list[SourceItem]) -> T:
    """Look at a few input files, on any node."""
    return probe(items)


def get_result(ref: ObjectRef) -> Any:
    """Wait for a task's result. Raises: TransientError: it is lost with its worker or node."""
    try:
        return ray.get(ref)
    except (*LOST_TASK, RayTaskError) as error:
        raise as_own_error(error) from None


def as_own_error(error: Exception) -> Exception:
    """What a task's failure means: ``TransientError`` where the surroundings failed, what ends the run as it is."""
    if isinstance(error, LOST_TASK):
        return TransientError(f"a task was interrupted: {type(error).__name__}: {error}")
    if isinstance(error, RayTaskError) and isinstance(error.cause, (TransientError, *ENDS_THE_RUN)):
        return error.cause
    return error


@dataclass(slots=True, kw_only=True)
class Progress:
    """What an actor has done since it started. Clips of failed attempts count too: this is work, not results."""

    clips: int = 0
    frames: int = 0
    busy_s: float = 0.0
    """Time the model was at work."""
    waited_s: float = 0.0
    """Time the model stood idle although a shard was there: its input was not here yet, or its output not taken."""
    attempt_at_work: str | None = None


@dataclass(slots=True)
class Meter:
    """Keeps an actor's ``Progress``; read by one thread while another works."""

    progress: Progress = field(default_factory=Progress)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, clips: int, frames: int) -> None:
        with self._lock:
            self.progress.clips += clips
            self.progress.frames += frames

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Book the time inside as waited."""
        mark = time.monotonic()
        yield
        self.progress.waited_s += time.monotonic() - mark

    def timed(self, inputs: Iterable[T]) -> Iterator[T]:
        """Pass a shard's inputs on and book the time that was waited for each."""
        mark = time.monotonic()
        for item in inputs:
            self.progress.waited_s += time.monotonic() - mark
            yield item
            mark = time.monotonic()


class ShardJob(Protocol):
    """One attempt at one shard, its input ordered."""

    def run(self) -> None:
        """The part that needs the model."""
        ...

    def commit(self) -> ShardSummary:
        """Make the results part of the output. Returns the account of the attempt that was committed."""
        ...


class Worker(Protocol):
    """What an actor does with shards; holds the model."""

    def open(self, lease: Lease) -> AbstractContextManager[ShardJob]:
        """Order a shard's input. On leaving, whatever the attempt still holds is given up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """How an actor is made."""

    make_worker: Callable[[Meter], Worker]
    log_level: str


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"work": 2, "control": 1})
class VaeActor:
    """Holds one model. Works on one shard at a time, while the next one's input is fetched.

    Two ``run_shard`` calls may be under way: one has the model, the other has its input ordered. The model
    passes on as soon as the last batch is done, so that the commit overlaps the next shard.
    """

    def __init__(self, spec: ActorSpec) -> None:
        logging.basicConfig(level=spec.log_level.upper(), format="%(levelname)s %(name)s %(message)s")
        self._meter = Meter()
        self._worker = spec.make_worker(self._meter)
        self._model = threading.Lock()

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """Answers once the model is loaded. Returns the process id."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return self._meter.progress

    @ray.method(concurrency_group="work")
    def run_shard(self, lease: Lease) -> ShardSummary:
        """Work on one shard and commit it. Returns the account of the attempt that was committed."""
        with self._worker.open(lease) as job:
            with self._model:
                progress = self._meter.progress
                progress.attempt_at_work = lease.attempt_id
                start, waited_before = time.monotonic(), progress.waited_s
                job.run()
                progress.busy_s += time.monotonic() - start - (progress.waited_s - waited_before)
            return job.commit()
