"""The VAE actors of a run, as the driver sees them: started, given leases, lost and replaced.

Turns what Ray reports into a few events, so that the driver's loop reads without knowing Ray's errors.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from pipeline.actors import ActorSpec, Progress, VaeActor
from pipeline.cluster import ActorResources
from pipeline.errors import ENDS_THE_RUN, PipelineError, TransientError
from pipeline.schedule import LEASES_PER_ACTOR, Lease
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)

MAX_START_FAILURES = 3
"""Actors that may die while loading the model, one after another, before the run gives up."""
ANSWER_DEADLINE_S = 120.0
"""An actor that does not say how far it is for so long is hung. It answers beside its work, in milliseconds."""
_ACTOR_LOST = (RayActorError, OutOfMemoryError, NodeDiedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A lease ended in a committed shard."""

    lease: Lease
    summary: ShardSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A lease ended without a commit."""

    lease: Lease
    error: str
    charged: bool


Event = Committed | Failed


@dataclass(eq=False, slots=True)
class _Slot:
    """One actor and what is under way on it."""

    handle: Any
    starting: ObjectRef | None
    leases: dict[ObjectRef, Lease] = field(default_factory=dict)
    asking: ObjectRef | None = None
    asked_at: float = 0.0
    progress: Progress = field(default_factory=Progress)


class ActorPool:
    """A fixed number of actors, each replaced when it is lost."""

    def __init__(self, resources: ActorResources, spec: ActorSpec) -> None:
        self._resources = resources
        self._spec = spec
        self._start_failures = 0
        self._retired: list[Progress] = []
        self._slots = [self._start() for _ in range(resources.actors)]

    @property
    def num_leased(self) -> int:
        return sum(len(slot.leases) for slot in self._slots)

    def assign(self, next_lease: Callable[[], Lease | None], num_pending: int) -> None:
        """Hand out leases: one to each actor first, a second only while there is more work than actors.

        A second lease near the end would make one actor do what another could.
        """
        for rank in range(LEASES_PER_ACTOR):
            for slot in self._slots:
                if slot.starting is not None or len(slot.leases) != rank:
                    continue
                if rank and num_pending < len(self._slots):
                    return
                lease = next_lease()
                if lease is None:
                    return
                num_pending -= 1
                slot.leases[slot.handle.run_shard.remote(lease)] = lease

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait until something happens, at most ``timeout_s``; returns what ended.

        Raises:
            PipelineError: no actor can be started.
        """
        refs = [ref for slot in self._slots for ref in self._refs(slot)]
        done, _ = ray.wait(refs, timeout=timeout_s, fetch_local=False) if refs else ([], [])
        events: list[Event] = []
        for slot in list(self._slots):
            for ref in [ref for ref in self._refs(slot) if ref in done]:
                if slot in self._slots:  # else lost meanwhile, with all its leases
                    events += self._finish(slot, ref)
        for slot in list(self._slots):
            if slot.asking is not None and time.monotonic() - slot.asked_at > ANSWER_DEADLINE_S:
                events += self._lose(slot, TimeoutError(f"no answer for {ANSWER_DEADLINE_S:.0f} s"))
        return events

    def ask_progress(self) -> None:
        """Ask every actor how far it is; answers come in with ``poll``."""
        for slot in self._slots:
            if slot.starting is None and slot.asking is None:
                slot.asking, slot.asked_at = slot.handle.progress.remote(), time.monotonic()

    def progress(self) -> Progress:
        """Totals over all actors, the lost ones included."""
        parts = [*self._retired, *(slot.progress for slot in self._slots)]
        return Progress(
            clips=sum(part.clips for part in parts),
            frames=sum(part.frames for part in parts),
            busy_s=sum(part.busy_s for part in parts),
            waited_s=sum(part.waited_s for part in parts),
        )

    def close(self) -> None:
        """Ask for the last totals, then end the actors."""
        self.ask_progress()
        asked = [slot.asking for slot in self._slots if slot.asking is not None]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=2) if asked else ([], [])
        for slot in self._slots:
            if slot.asking in ready:
                with contextlib.suppress(RayError):
                    slot.progress = ray.get(slot.asking)
            ray.kill(slot.handle)
            self._retired.append(slot.progress)
        self._slots = []

    def _start(self) -> _Slot:
        actor: Any = VaeActor  # made an actor class by its decorator
        # Actors without a GPU ask for nothing, and would all start on one node.
        handle = actor.options(num_gpus=self._resources.num_gpus, scheduling_strategy="SPREAD").remote(self._spec)
        return _Slot(handle, handle.ready.remote())

    @staticmethod
    def _refs(slot: _Slot) -> Iterator[ObjectRef]:
        yield from (ref for ref in (slot.starting, slot.asking) if ref is not None)
        yield from slot.leases

    def _finish(self, slot: _Slot, ref: ObjectRef) -> list[Event]:
        try:
            value = ray.get(ref, timeout=30)
        except _ACTOR_LOST as error:
            return self._lose(slot, error)
        except RayTaskError as error:
            return self._fail(slot, ref, error)
        except (RayError, GetTimeoutError) as error:  # the answer is lost; the actor is not
            return self._fail(slot, ref, error)
        if ref == slot.starting:
            logger.info("actor ready pid=%d", value)
            slot.starting, self._start_failures = None, 0
        elif ref == slot.asking:
            slot.asking, slot.progress = None, value
        else:
            return [Committed(lease=slot.leases.pop(ref), summary=value)]
        return []

    def _fail(self, slot: _Slot, ref: ObjectRef, error: RayError) -> list[Event]:
        """A call raised, the actor lives."""
        if ref == slot.starting:
            return self._lose(slot, error)
        if ref == slot.asking:
            slot.asking = None
            return []
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ENDS_THE_RUN):
            raise cause
        lease = slot.leases.pop(ref)
        charged = isinstance(error, RayTaskError) and not isinstance(cause, TransientError)
        if charged:
            logger.error("shard failed shard_id=%s attempt=%d\n%s", lease.shard.shard_id, lease.attempt, error)
        return [Failed(lease=lease, error=f"{type(cause).__name__}: {cause}", charged=charged)]

    def _lose(self, slot: _Slot, error: Exception) -> list[Event]:
        """The actor is gone: replace it, and give back its leases."""
        self._slots.remove(slot)
        self._retired.append(slot.progress)
        ray.kill(slot.handle)  # where it is only out of reach
        if slot.starting is not None:
            self._start_failures += 1
            logger.error("actor failed to start failures=%d\n%s", self._start_failures, error)
            if self._start_failures >= MAX_START_FAILURES:
                raise PipelineError(f"{self._start_failures} VAE actors in a row died while starting, the last by: {error}")
        else:
            logger.warning("actor lost leases=%d error=%s", len(slot.leases), type(error).__name__)
        self._slots.append(self._start())
        blameless = isinstance(error, (OutOfMemoryError, NodeDiedError)) or getattr(error, "preempted", False)
        events: list[Event] = []
        for position, lease in enumerate(slot.leases.values()):
            # Only the shard that had the model can be to blame: the older one, unless the actor said otherwise.
            at_work = slot.progress.attempt_at_work
            is_suspect = lease.attempt_id == at_work if at_work in _attempts(slot) else position == 0
            message = f"actor lost: {type(error).__name__}"
            events.append(Failed(lease=lease, error=message, charged=is_suspect and not blameless))
        return events


def _attempts(slot: _Slot) -> set[str]:
    return {lease.attempt_id for lease in slot.leases.values()}
