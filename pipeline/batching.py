"""Running the model over a shard's items in batches, and finding who is to blame when one fails. No Ray."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.errors import ExhaustedError, TerminalError
from pipeline.messages import Caution

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Payload = TypeVar("Payload")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[Item, Payload, Result]):
    """What became of one item."""

    item: Item
    payload: Payload | None
    """What the model was given; None where there was nothing to give."""
    result: Result | TerminalError
    degraded: str | None = None
    """The out-of-memory steps that the result was made under, if any."""


@dataclass(slots=True)
class MemoryLadder:
    """What an actor has done so far to need less memory. A step holds until the actor ends."""

    tighten: Callable[[], str | None]
    """Makes the model leaner, and names how; None: it cannot."""
    is_out_of_memory: Callable[[BaseException], bool]
    step: str | None = None

    def climb(self) -> bool:
        """Take the next step. Returns whether there was one."""
        step = self.tighten()
        if step is not None:
            self.step = step
            logger.warning("out of memory: going on with %s", step)
        return step is not None


@dataclass(slots=True, kw_only=True)
class BatchRunner(Generic[Item, Payload, Result]):
    """Runs a model over items of one shape.

    Batches form in plan order from what is there, never from what has arrived, so that the same settings give
    the same batches and the same bytes.
    """

    stage: str
    """Named when an item is blamed: ``encode`` or ``decode``."""
    forward: Callable[[list[Payload]], list[Result | TerminalError]]
    """One forward pass."""
    blank: Callable[[Payload], Payload]
    """An innocent payload of the same shape."""
    name: Callable[[Item], str]
    """The id of an item."""
    at_work: Callable[[Sequence[str]], AbstractContextManager[None]]
    """Entered around each forward pass, with the ids of its items."""
    memory: MemoryLadder
    batch_size: int
    is_retry: bool
    """On a second attempt an item that raises is found by running its batch one by one, and quarantined."""
    caution: Caution
    """What made earlier actors crash or hang, or may have."""
    blame_memory: bool = False
    """Quarantine an item that alone needs more memory than there is, rather than fail with all of its shape."""

    def run(self, items: Iterable[tuple[Item, Payload | TerminalError]]) -> Iterator[list[Outcome[Item, Payload, Result]]]:
        """Yield what became of every item, batch by batch; of one that has no payload at once.

        Raises:
            ExhaustedError: an item alone needs more memory than there is.
        """
        batch: list[tuple[Item, Payload]] = []
        for item, payload in items:
            payload = self.caution.verdict(self.name(item), self.stage) or payload
            if isinstance(payload, TerminalError):
                yield [Outcome(item=item, payload=None, result=payload)]
                continue
            batch.append((item, payload))
            if len(batch) == self.batch_size:
                yield self._run_batch(batch)
                batch = []
        if batch:
            yield self._run_batch(batch)

    def _run_batch(self, batch: list[tuple[Item, Payload]]) -> list[Outcome[Item, Payload, Result]]:
        if len(batch) > 1:
            self._try_suspects(batch)
        failure: Exception | None = None
        degraded: str | None = None
        try:
            results = self._forward(batch)
        except Exception as error:
            # A traceback keeps the tensors of the failed pass alive, and their memory is what a retry needs.
            failure = error.with_traceback(None) if self.memory.is_out_of_memory(error) else error
        if failure is not None:
            results = self._run_one_by_one(batch, failure)
            if self.memory.is_out_of_memory(failure) and len(batch) > 1:
                degraded = "batch_size=1"
        degraded = ", ".join(step for step in (degraded, self.memory.step) if step) or None
        return [
            Outcome(item=item, payload=payload, result=result, degraded=degraded)
            for (item, payload), result in zip(batch, results, strict=True)
        ]

    def _forward(self, batch: Sequence[tuple[Item, Payload]]) -> list[Result | TerminalError]:
        with self.at_work([self.name(item) for item, _ in batch]):
            return self.forward([payload for _, payload in batch])

    def _try_suspects(self, batch: list[tuple[Item, Payload]]) -> None:
        """Let whoever kills its actor do it alone. What they give otherwise comes from their batch, as for all."""
        for item, payload in batch:
            if self.name(item) in self.caution.suspects:
                with contextlib.suppress(Exception):
                    self._forward([(item, payload)])

    def _run_one_by_one(self, batch: list[tuple[Item, Payload]], error: Exception) -> list[Result | TerminalError]:
        """What a failed batch still gives: less memory at once when it ran out, blame on a second attempt."""
        is_out_of_memory = self.memory.is_out_of_memory(error)
        if not (self.is_retry or is_out_of_memory):
            raise error
        logger.warning("batch failed size=%d error=%s; running one by one", len(batch), error)
        results: list[Result | TerminalError] = []
        for item, payload in batch:
            try:
                results += self._run_alone(item, payload, has_failed=is_out_of_memory and len(batch) == 1)
            except ExhaustedError as alone:
                if not self.blame_memory:
                    raise
                results.append(TerminalError(self.stage, "out_of_memory", str(alone)))
            except Exception as alone:
                if not self.is_retry or not self._model_works(item, payload):
                    raise
                results.append(TerminalError.unexpected(self.stage, alone))
        return results

    def _run_alone(self, item: Item, payload: Payload, *, has_failed: bool) -> list[Result | TerminalError]:
        """One item, leaner and leaner. Raises: ExhaustedError: not even so."""
        detail = "out of memory"
        while True:
            if has_failed and not self.memory.climb():
                raise ExhaustedError(f"alone it needs more memory than there is: {detail}")
            try:
                return self._forward([(item, payload)])
            except Exception as error:
                if not self.memory.is_out_of_memory(error):
                    raise
                detail, has_failed = str(error), True

    def _model_works(self, item: Item, payload: Payload) -> bool:
        """Whether a blank of the same shape passes. If not, the actor is ill and no item is to blame."""
        try:
            self._forward([(item, self.blank(payload))])
        except Exception:
            logger.exception("the model fails on a blank too")
            return False
        return True
