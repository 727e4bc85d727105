"""Running the model over a shard's items in batches, and finding who is to blame when one fails. No Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.errors import TerminalError

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
    """The out-of-memory step that the result was made under, if any."""


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
    is_out_of_memory: Callable[[BaseException], bool]
    batch_size: int
    is_retry: bool
    """On a second attempt an item that raises is found by running its batch one by one, and quarantined."""
    blame_memory: bool = False
    """Quarantine an item that alone needs more memory than there is, rather than fail with all of its shape."""

    def run(self, items: Iterable[tuple[Item, Payload | TerminalError]]) -> Iterator[list[Outcome[Item, Payload, Result]]]:
        """Yield what became of every item, batch by batch; of one that has no payload at once."""
        batch: list[tuple[Item, Payload]] = []
        for item, payload in items:
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
        failure: Exception | None = None
        degraded: str | None = None
        try:
            results = self.forward([payload for _, payload in batch])
        except Exception as error:
            # A traceback keeps the tensors of the failed pass alive, and their memory is what a retry needs.
            failure = error.with_traceback(None) if self.is_out_of_memory(error) else error
        if failure is not None:
            results = self._run_one_by_one(batch, failure)
            if self.is_out_of_memory(failure) and len(batch) > 1:
                degraded = "batch_size=1"
        return [
            Outcome(item=item, payload=payload, result=result, degraded=degraded)
            for (item, payload), result in zip(batch, results, strict=True)
        ]

    def _run_one_by_one(self, batch: list[tuple[Item, Payload]], error: Exception) -> list[Result | TerminalError]:
        """What a failed batch still gives: a smaller batch when memory ran out, blame on a second attempt."""
        may_go_on = self.is_retry or self.blame_memory or (len(batch) > 1 and self.is_out_of_memory(error))
        if not may_go_on:
            raise error
        logger.warning("batch failed size=%d error=%s; running one by one", len(batch), error)
        results: list[Result | TerminalError] = []
        for _, payload in batch:
            try:
                results += self.forward([payload])
            except Exception as alone:
                if self.is_out_of_memory(alone):
                    if not self.blame_memory:
                        raise
                    results.append(
                        TerminalError(self.stage, "out_of_memory", f"alone it needs more memory than there is: {alone}")
                    )
                    continue
                if not self.is_retry or not self._model_works(payload):
                    raise
                results.append(TerminalError.unexpected(self.stage, alone))
        return results

    def _model_works(self, payload: Payload) -> bool:
        """Whether a blank of the same shape passes. If not, the actor is ill and no item is to blame."""
        try:
            self.forward([self.blank(payload)])
        except Exception:
            logger.exception("the model fails on a blank too")
            return False
        return True
