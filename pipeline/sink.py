"""Hands decoded frames to tasks that write them, within a budget of bytes. Knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipeline.errors import ENDS_THE_RUN, PipelineError, TerminalError, TransientError
from pipeline.types import Frames

logger = logging.getLogger(__name__)

WRITE_ATTEMPTS = 3
CRASHES = 10
"""Of writers over one clip, which prove its guilt. As for actors, one alone proves little: it may be a kill from outside."""
_LONGEST_PAUSE_S = 30.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class WriterCrashedError(PipelineError):
    """A writer died, of its clip or by a kill from outside."""


@dataclass(slots=True)
class _Writing(Generic[Item]):
    """One clip on its way."""

    item: Item
    size_bytes: int
    frames: Any
    start: Callable[[Any], Any]
    task: Any


@dataclass(slots=True, kw_only=True)
class FrameSink(Generic[Item, Result]):
    """One shard's videos. Results come in the order in which clips were added.

    Args:
        put: gives frames to whoever writes them, and returns their handle.
        wait: waits for a task's result. What it raises is tried again; if it is no ``TransientError``, the clip is to
            blame in the end: of a ``WriterCrashedError`` only after many, with pauses.
        cancel: gives a task up.
        budget_bytes: of frames under way. One clip is always taken, however large.
    """

    put: Callable[[Frames], Any]
    wait: Callable[[Any], Result | TerminalError]
    cancel: Callable[[Any], None]
    budget_bytes: int
    sleep: Callable[[float], None] = time.sleep
    _writing: deque[_Writing[Item]] = field(default_factory=deque)
    _done: list[tuple[Item, Result | TerminalError]] = field(default_factory=list)
    _held_bytes: int = 0

    def add(self, item: Item, frames: Frames, start: Callable[[Any], Any]) -> None:
        """Begin writing a clip; waits for the oldest ones while the budget is used up.

        Args:
            start: begins a task on the frames' handle, and returns the task's.

        Raises:
            TransientError: an older clip could not be written.
        """
        while self._writing and self._held_bytes + frames.nbytes > self.budget_bytes:
            self._finish_oldest()
        handle = self.put(frames)
        self._writing.append(_Writing(item, frames.nbytes, handle, start, start(handle)))
        self._held_bytes += frames.nbytes

    def finish(self) -> list[tuple[Item, Result | TerminalError]]:
        """Wait for all that is under way. Raises: TransientError: a clip could not be written."""
        while self._writing:
            self._finish_oldest()
        return self._done

    def close(self) -> None:
        """Give up what is still under way."""
        while self._writing:
            self.cancel(self._writing.popleft().task)

    def _finish_oldest(self) -> None:
        writing = self._writing[0]
        self._done.append((writing.item, self._result(writing)))
        self._writing.popleft()
        self._held_bytes -= writing.size_bytes

    def _result(self, writing: _Writing[Item]) -> Result | TerminalError:
        failures = crashes = 0
        while True:
            try:
                return self.wait(writing.task)
            except ENDS_THE_RUN:
                raise
            except WriterCrashedError as error:
                crashes += 1
                logger.warning("writer crashed crashes=%d error=%s", crashes, error)
                if crashes == CRASHES:
                    return TerminalError.unexpected("write", error)
                self.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (crashes - 1)))
            except Exception as error:
                failures += 1
                if failures == WRITE_ATTEMPTS:
                    if isinstance(error, TransientError):
                        raise
                    return TerminalError.unexpected("write", error)
                logger.warning("write retry attempt=%d error=%s", failures, error)
            writing.task = writing.start(writing.frames)
