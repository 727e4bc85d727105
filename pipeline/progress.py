"""Telling a person how far a run is: one bar on a terminal, plain log lines everywhere else."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from pipeline.account import Account

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 120.0


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the moment, so that lines appear above a bar and not inside it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logging(level: str) -> None:
    """Our own lines at ``level``; of other packages, warnings."""
    logging.basicConfig(level="WARNING", handlers=[LogHandler()])
    for package in ("pipeline", "cogvae"):
        logging.getLogger(package).setLevel(level.upper())
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # it prints its retries by itself


@dataclass(slots=True)
class RateMeter:
    """Clips and frames a second over the last two minutes."""

    clock: Callable[[], float] = time.monotonic
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, clips: int, frames: int) -> None:
        """Note the totals so far."""
        now = self.clock()
        self._samples.append((now, clips, frames))
        while now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def rates(self) -> tuple[float, float]:
        """Clips a second and frames a second; zero until something was measured."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (start, clips, frames), (end, last_clips, last_frames) = self._samples[0], self._samples[-1]
        elapsed = max(end - start, 1e-9)
        return (last_clips - clips) / elapsed, (last_frames - frames) / elapsed


@dataclass(slots=True)
class ProgressReport:
    """Shows phase, counts, rate, time left and the reasons of what is left out.

    Args:
        mode: ``bar``, ``log``, or ``auto``: a bar where stderr is a terminal.
        every_s: seconds between log lines.
    """

    mode: str
    every_s: float
    _meter: RateMeter = field(default_factory=RateMeter)
    _bar: Progress | None = None
    _task: TaskID = field(default_factory=lambda: TaskID(0))
    _phase: str = "probing"
    _last_line_at: float = -math.inf
    _seen: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> ProgressReport:
        if self.mode == "bar" or (self.mode == "auto" and sys.stderr.isatty()):
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tail]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=None, tail="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def probed(self, done: int, total: int) -> None:
        """So many input files have been looked at, of so many."""
        self._meter.add(done, 0)
        rate, _ = self._meter.rates()
        self._show("probing", done, total, f"{rate:.1f} files/s eta {_duration(total - done, rate)}")

    def worked(self, phase: str, account: Account, clips: int, frames: int) -> None:
        """Clips and frames are the actors' totals, which run ahead of what is committed."""
        if self._phase != phase:
            self._phase, self._meter = phase, RateMeter()
        self._meter.add(clips, frames)
        clip_rate, frame_rate = self._meter.rates()
        done = account.planned - account.pending
        tail = f"{clip_rate:.2f} clips/s {frame_rate:.0f} frames/s eta {_duration(account.pending, clip_rate)}"
        self._show(phase, done, account.planned, tail)
        self._tell_reasons(account)

    def _show(self, phase: str, done: int, total: int | None, tail: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=phase, completed=done, total=total, tail=tail)
            return
        now = time.monotonic()
        if now - self._last_line_at >= self.every_s:
            self._last_line_at = now
            logger.info("%s done=%d total=%s %s", phase, done, "?" if total is None else total, tail)

    def _tell_reasons(self, account: Account) -> None:
        for reason, count in account.reasons.items():
            if count > self._seen.get(reason, 0):
                self._seen[reason] = count
                logger.warning("left out reason=%s count=%d", reason, count)


def _duration(clips: int, rate: float) -> str:
    if not rate:
        return "?"
    seconds = int(clips / rate)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
