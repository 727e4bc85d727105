"""The VAE actor and the probe task: the process boundaries that every kind of work shares.

What an actor does with a shard is its worker's part. Everything that can be tested without Ray is elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
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

from pipeline.black_box import BlackBox, BoxContents, read_box
from pipeline.cluster import missing_paths
from pipeline.errors import ENDS_THE_RUN, RevokedError, TransientError
from pipeline.messages import AtWork, Lease
from pipeline.schedule import LEASES_PER_ACTOR
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
    step: int = 0
    """Changes with whatever begins or ends."""
    is_at_work: bool = False
    """The model runs, or something else that must not take long."""


@dataclass(slots=True)
class Meter:
    """Keeps an actor's ``Progress``, read by one thread while another works, and notes what is in hand."""

    progress: Progress = field(default_factory=Progress)
    note: Callable[[AtWork], None] = lambda at_work: None
    """Where what is in hand is written down, before it is begun."""
    box: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"latents-{os.getpid()}.box")
    """Files that are named by ``scratch_path`` of it do not outlive the process."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _in_hand: AtWork = field(default_factory=lambda: AtWork(attempt_id="", clips=()))

    def add(self, clips: int, frames: int) -> None:
        with self._lock:
            self.progress.clips += clips
            self.progress.frames += frames
            self.progress.step += 1

    @contextlib.contextmanager
    def on_shard(self, attempt_id: str) -> Iterator[None]:
        """Clips in hand are of this attempt from now on."""
        self._hold(AtWork(attempt_id=attempt_id, clips=()))
        try:
            yield
        finally:
            self._hold(AtWork(attempt_id="", clips=()))

    @contextlib.contextmanager
    def at_work(self, clips: Sequence[str]) -> Iterator[None]:
        """These clips are in hand, and nothing else; afterwards what was before."""
        before = self._in_hand
        self._hold(replace(before, clips=tuple(clips)))
        try:
            yield
        finally:
            self._hold(before)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Book the time inside as waited; a wait may be long."""
        before = self._in_hand
        self._hold(replace(before, clips=()))
        mark = time.monotonic()
        yield
        self.progress.waited_s += time.monotonic() - mark
        self._hold(before)

    def timed(self, inputs: Iterable[T]) -> Iterator[T]:
        """Pass a shard's inputs on and book the time that was waited for each."""
        mark = time.monotonic()
        for item in inputs:
            self.progress.waited_s += time.monotonic() - mark
            yield item
            mark = time.monotonic()

    def _hold(self, at_work: AtWork) -> None:
        self.note(at_work)
        self._in_hand = at_work
        with self._lock:
            self.progress.step += 1
            self.progress.is_at_work = bool(at_work.clips)


class ShardJob(Protocol):
    """One attempt at one shard, its input ordered."""

    def run(self) -> None:
        """The part that needs the model.

        Raises:
            ExhaustedError: the model needs more memory than there is, and nothing smaller is left to try.
        """
        ...

    def commit(self) -> ShardSummary:
        """Make the results part of the output. Returns the account of the attempt that was committed."""
        ...


@dataclass(frozen=True, slots=True)
class CommittedJob:
    """An attempt at a shard that an earlier one has committed: nothing to do. Implements ``ShardJob``."""

    summary: ShardSummary

    def run(self) -> None:
        pass

    def commit(self) -> ShardSummary:
        return self.summary


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
    shared: tuple[str, ...] = ()
    """Paths that its node must see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """Where an actor lives, and what it will leave behind."""

    pid: int
    node_id: str
    box: Path


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"work": LEASES_PER_ACTOR, "control": 1})
class VaeActor:
    """Holds one model. Works on one shard at a time, in the order in which they come, while the next one's input is fetched.

    Two ``run_shard`` calls may be under way: one has the model, the other has its input ordered. The model
    passes on as soon as the last batch is done, so that the commit overlaps the next shard.
    """

    def __init__(self, spec: ActorSpec) -> None:
        logging.basicConfig(level=spec.log_level.upper(), format="%(levelname)s %(name)s %(message)s")
        if missing := missing_paths(spec.shared):
            raise TransientError(f"this node does not see {', '.join(missing)}, which all nodes must share")
        self._box = BlackBox.create()
        self._meter = Meter(note=self._box.note, box=self._box.path)
        self._turn = threading.Condition()
        self._is_taken = False
        self._queue: list[str] = []
        """The attempts that are here and have not had the model, in the order in which they came."""
        self._revoked: set[str] = set()
        """May name attempts that are still on their way here, or done: a revocation overtakes, and few there are."""
        self._refusal: Exception | None = None
        try:
            self._worker = spec.make_worker(self._meter)
        except ENDS_THE_RUN as error:  # raised here it would reach the driver as text only
            self._box.close()
            self._refusal = error
        except BaseException:
            self._box.close()
            raise

    @ray.method(concurrency_group="control")
    def ready(self) -> Birth:
        """Answers once the model is loaded.

        Raises:
            ConfigError, StorageFullError: no actor could start.
        """
        if self._refusal is not None:
            raise self._refusal
        return Birth(pid=os.getpid(), node_id=ray.get_runtime_context().get_node_id(), box=self._box.path)

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return self._meter.progress

    @ray.method(concurrency_group="control")
    def revoke(self, attempt_id: str) -> None:
        """Do not begin this attempt, if it still waits for the model."""
        with self._turn:
            self._revoked.add(attempt_id)
            self._turn.notify_all()

    @ray.method(concurrency_group="control")
    def retire(self) -> Progress:
        """The last words, before this process is killed."""
        self._meter.note = lambda at_work: None
        self._box.close()
        return self._meter.progress

    @ray.method(concurrency_group="work")
    def run_shard(self, lease: Lease) -> ShardSummary:
        """Work on one shard and commit it. Returns the account of the attempt that was committed.

        Raises:
            RevokedError: the attempt was revoked before it had the model.
        """
        with self._here(lease), self._worker.open(lease) as job:
            with self._model(lease):
                progress = self._meter.progress
                start, waited_before = time.monotonic(), progress.waited_s
                job.run()
                progress.busy_s += time.monotonic() - start - (progress.waited_s - waited_before)
            return job.commit()

    @contextlib.contextmanager
    def _here(self, lease: Lease) -> Iterator[None]:
        with self._turn:
            self._queue.append(lease.attempt_id)
        try:
            yield
        finally:
            self._leave_queue(lease)

    def _leave_queue(self, lease: Lease) -> None:
        with self._turn:
            if lease.attempt_id in self._queue:
                self._queue.remove(lease.attempt_id)
                self._turn.notify_all()

    @contextlib.contextmanager
    def _model(self, lease: Lease) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(
                lambda: lease.attempt_id in self._revoked or (not self._is_taken and self._queue[0] == lease.attempt_id)
            )
            if lease.attempt_id in self._revoked:
                raise RevokedError(f"attempt {lease.attempt_id} at shard {lease.shard.shard_id} is not wanted any more")
            self._is_taken = True
            self._queue.remove(lease.attempt_id)
        try:
            with self._meter.on_shard(lease.attempt_id):
                yield
        finally:
            with self._turn:
                self._is_taken = False
                self._turn.notify_all()


@ray.remote(num_cpus=0, max_retries=0)
def open_black_box(path: Path) -> BoxContents:
    """Runs on the node of an actor that died."""
    return read_box(path)
