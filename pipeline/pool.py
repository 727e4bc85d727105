"""The VAE actors of a run as Ray has them: carries the schedule's commands out, and turns what Ray says into events.

Decides nothing. Every answer comes through one queue, so that a poll costs what has happened, not what there is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.actors import ActorSpec, Birth, Progress, VaeActor, open_black_box
from pipeline.black_box import BoxContents
from pipeline.cluster import ActorResources
from pipeline.errors import ENDS_THE_RUN, ExhaustedError, RevokedError, TransientError
from pipeline.messages import (
    ActorFailedToStart,
    ActorLost,
    ActorReady,
    Assign,
    Event,
    Failure,
    Fault,
    Heartbeat,
    KillActor,
    Lease,
    Revoke,
    ShardCommitted,
    ShardFailed,
    StartActor,
)

logger = logging.getLogger(__name__)

AUTOPSY_S = 30.0
"""A node that does not show the black box of an actor for so long is lost."""
_BEAT_S = 1.0
_BEATS_PER_S = 500
"""Of all actors together, at the most."""
_ACTOR_LOST = (RayActorError, OutOfMemoryError, NodeDiedError)


@dataclass(eq=False, slots=True)
class _Slot:
    """One actor, from the moment it is asked for to the moment its death is told."""

    number: int
    handle: Any
    nodes: frozenset[str]
    """Those that lived when it was asked for. It is on one of them, or on a later one."""
    birth: Birth | None = None
    is_asked: bool = True
    """For its birth first, then for its progress."""
    progress: Progress = field(default_factory=Progress)
    error: str = ""
    """Why it is no more."""
    autopsy_until: float = 0.0


@dataclass(frozen=True, slots=True)
class _Answer:
    slot: _Slot
    kind: Literal["birth", "beat", "shard", "autopsy"]
    lease: Lease | None
    future: Future[Any]


class ActorPool:
    """The run's actors, by the numbers that the schedule gives them."""

    def __init__(self, resources: ActorResources, spec: ActorSpec) -> None:
        self._resources = resources
        self._spec = spec
        self._slots: dict[int, _Slot] = {}
        self._dead: dict[int, _Slot] = {}
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._next_beat = 0.0
        self._retired = Progress()

    def do(self, command: StartActor | KillActor | Assign | Revoke) -> None:
        """Carry out a command. One to an actor that is gone is no error: its loss is told already."""
        if isinstance(command, StartActor):
            self._start(command.actor)
            return
        slot = self._slots.get(command.actor)
        if slot is None:
            return
        match command:
            case KillActor(reason=reason):
                logger.warning("killing actor=%d reason=%s", slot.number, reason)
                self._bury(slot, reason, "killed")
            case Assign(lease=lease):
                self._expect(slot, "shard", slot.handle.run_shard.remote(lease), lease)
            case Revoke(attempt_id=attempt_id):
                slot.handle.revoke.remote(attempt_id)

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait until something happens, at most ``timeout_s``; returns all that has.

        Raises:
            ConfigError: the settings do not work where the actors are.
        """
        self._ask_progress()
        with contextlib.suppress(queue.Empty):
            self._take(self._answers.get(timeout=0 if self._events else timeout_s))
            while True:
                self._take(self._answers.get_nowait())
        for slot in [slot for slot in self._dead.values() if time.monotonic() > slot.autopsy_until]:
            self._tell_loss(slot, "lost", None)
        events, self._events = self._events, []
        return events

    def progress(self) -> Progress:
        """Totals over all actors, the lost ones included."""
        total = Progress()
        for part in (self._retired, *(slot.progress for slot in self._slots.values())):
            _add(total, part)
        return total

    def close(self) -> None:
        """Ask for the last totals, then end the actors."""
        last = {slot.handle.retire.remote(): slot for slot in self._slots.values() if slot.birth is not None}
        ready, _ = ray.wait(list(last), num_returns=len(last), timeout=2) if last else ([], [])
        for ref in ready:
            with contextlib.suppress(RayError):
                last[ref].progress = ray.get(ref)
        for slot in self._slots.values():
            ray.kill(slot.handle)
            _add(self._retired, slot.progress)
        self._slots.clear()

    def _start(self, number: int) -> None:
        actor: Any = VaeActor  # made an actor class by its decorator
        # Actors without a GPU ask for nothing, and would all start on one node.
        handle = actor.options(num_gpus=self._resources.num_gpus, scheduling_strategy="SPREAD").remote(self._spec)
        self._slots[number] = slot = _Slot(number, handle, _living_nodes())
        self._expect(slot, "birth", handle.ready.remote())

    def _expect(
        self, slot: _Slot, kind: Literal["birth", "beat", "shard", "autopsy"], ref: ObjectRef, lease: Lease | None = None
    ) -> None:
        make_answer = functools.partial(_Answer, slot, kind, lease)
        ref.future().add_done_callback(lambda future: self._answers.put(make_answer(future)))

    def _ask_progress(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + max(_BEAT_S, len(self._slots) / _BEATS_PER_S)
        for slot in self._slots.values():
            if not slot.is_asked:
                slot.is_asked = True
                if slot.birth is None:
                    self._expect(slot, "birth", slot.handle.ready.remote())
                else:
                    self._expect(slot, "beat", slot.handle.progress.remote())

    def _take(self, answer: _Answer) -> None:
        slot, error = answer.slot, answer.future.exception()
        if answer.kind == "autopsy":
            self._conclude_autopsy(slot, answer.future)
        elif slot.number not in self._slots:
            return  # lost meanwhile, with all that it had
        elif answer.kind == "birth" and isinstance(error, ActorUnavailableError):
            slot.is_asked = False  # Ray cannot tell yet whether it is the process or its node
        elif isinstance(error, RayTaskError) and answer.kind == "birth" and isinstance(error.cause, ENDS_THE_RUN):
            raise error.cause
        elif isinstance(error, _ACTOR_LOST) or (error is not None and answer.kind == "birth"):
            is_gone_with_node = isinstance(error, NodeDiedError) or getattr(error, "preempted", False)
            if answer.kind == "birth" and not getattr(error, "actor_init_failed", False):
                is_gone_with_node |= not slot.nodes <= _living_nodes()  # Ray does not say which was its own
            self._bury(slot, f"{type(error).__name__}: {error}", "lost" if is_gone_with_node else "killed")
        elif answer.kind == "birth":
            slot.birth, slot.is_asked = answer.future.result(), False
            logger.info("actor ready actor=%d pid=%d", slot.number, slot.birth.pid)
            self._events.append(ActorReady(actor=slot.number))
        elif answer.kind == "beat":
            slot.is_asked = False
            if error is None:
                slot.progress = answer.future.result()
                progress = slot.progress
                self._events.append(Heartbeat(actor=slot.number, step=progress.step, is_at_work=progress.is_at_work))
        else:
            assert answer.lease is not None
            self._tell_result(slot, answer.lease, answer.future)

    def _tell_result(self, slot: _Slot, lease: Lease, future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            self._events.append(ShardCommitted(actor=slot.number, lease=lease, summary=future.result()))
            return
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ENDS_THE_RUN):
            raise cause
        failure: Failure
        match cause:
            case RevokedError():
                failure = "revoked"
            case ExhaustedError():
                failure = "exhausted"
            case TransientError():
                failure = "transient"
            case _:  # where it is not the task's own, the answer is lost and the actor is not
                failure = "unexpected" if isinstance(error, RayTaskError) else "transient"
        if failure == "unexpected":
            logger.error("shard failed shard_id=%s attempt=%d\n%s", lease.shard.shard_id, lease.attempt, error)
        text = f"{type(cause).__name__}: {cause}"
        self._events.append(ShardFailed(actor=slot.number, lease=lease, failure=failure, error=text))

    def _bury(self, slot: _Slot, error: str, fault: Fault) -> None:
        """Make sure that an actor is gone, and find out why, where it still matters."""
        del self._slots[slot.number]
        ray.kill(slot.handle)
        _add(self._retired, slot.progress)
        slot.error = error.partition("\n")[0]
        if slot.birth is None:
            logger.error("actor failed to start actor=%d\n%s", slot.number, error)
            self._events.append(ActorFailedToStart(actor=slot.number, error=error, is_charged=fault != "lost"))
        elif fault == "lost":
            self._tell_loss(slot, fault, None)
        else:
            self._dead[slot.number] = slot
            slot.autopsy_until = time.monotonic() + AUTOPSY_S
            there = NodeAffinitySchedulingStrategy(node_id=slot.birth.node_id, soft=False)
            self._expect(slot, "autopsy", open_black_box.options(scheduling_strategy=there).remote(slot.birth.box))

    def _conclude_autopsy(self, slot: _Slot, future: Future[Any]) -> None:
        if slot.number not in self._dead:
            return  # it came too late
        error = future.exception()
        if error is None:
            self._tell_loss(slot, "crashed" if future.result().trace else "killed", future.result())
        else:  # the task ran and found nothing, or there is no such node any more
            self._tell_loss(slot, "killed" if isinstance(error, RayTaskError) else "lost", None)

    def _tell_loss(self, slot: _Slot, fault: Fault, box: BoxContents | None) -> None:
        self._dead.pop(slot.number, None)
        at_work = box.at_work if box else None
        logger.warning(
            "actor lost actor=%d fault=%s clips=%s error=%s%s",
            *(slot.number, fault, ",".join(at_work.clips) if at_work else "?", slot.error),
            f"\n{box.trace}" if box and box.trace else "",
        )
        self._events.append(ActorLost(actor=slot.number, fault=fault, error=slot.error, at_work=at_work))


def _living_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _add(total: Progress, part: Progress) -> None:
    total.clips += part.clips
    total.frames += part.frames
    total.busy_s += part.busy_s
    total.waited_s += part.waited_s
