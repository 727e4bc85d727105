"""What survives an actor's sudden death on its node's disk: the clips in hand, and the trace of a fatal signal.

Ray cannot tell a process that crashed from one that somebody killed; the trace can. No Ray.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipeline.messages import AtWork

_MOST_TRACE_BYTES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxContents:
    at_work: AtWork | None
    trace: str
    """Of the signal that ended the process; empty if it was ended from outside."""


@dataclass(slots=True)
class BlackBox:
    """The writer, in the process that may die. Two files, gone with ``close``."""

    path: Path
    _notes: int = field(init=False)
    _trace: IO[str] = field(init=False)

    def __post_init__(self) -> None:
        self._notes = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._trace = _trace_path(self.path).open("w")
        faulthandler.enable(self._trace)

    @classmethod
    def create(cls) -> BlackBox:
        """One for this process, in its folder for temporary files."""
        return cls(Path(tempfile.gettempdir()) / f"latents-{os.getpid()}-{os.urandom(4).hex()}.box")

    def note(self, at_work: AtWork) -> None:
        """Say what is in hand from now on. The kernel has it, whatever happens to the process."""
        with contextlib.suppress(OSError):  # a full disk costs the blame, not the work
            os.pwrite(self._notes, json.dumps([at_work.attempt_id, *at_work.clips]).encode() + b"\n", 0)

    def close(self) -> None:
        faulthandler.disable()
        os.close(self._notes)
        self._trace.close()
        remove_box(self.path)


def read_box(path: Path) -> BoxContents:
    """Read what a dead process left, and remove it. Raises: OSError: it is not here."""
    line = path.read_bytes().partition(b"\n")[0]
    with _trace_path(path).open(errors="replace") as file:
        trace = file.read(_MOST_TRACE_BYTES)
    remove_box(path)
    if not line:
        return BoxContents(at_work=None, trace=trace)
    attempt_id, *clips = json.loads(line)
    return BoxContents(at_work=AtWork(attempt_id=attempt_id, clips=tuple(clips)), trace=trace)


def scratch_path(path: Path, name: str) -> Path:
    """A file beside a box, for what nobody needs once the process is dead: it goes with the box."""
    return path.with_name(f"{path.stem}-{name}")


def remove_box(path: Path) -> None:
    for file in (path, _trace_path(path), *path.parent.glob(f"{path.stem}-*")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


def _trace_path(path: Path) -> Path:
    return path.with_suffix(".trace")
