"""The processes of a Ray cluster that a test started, found through /proc so that it kills no others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ACTOR = "ray::VaeActor"
DECODE_TASK = "ray::decode_videos"
IDLE = "ray::IDLE"
DECODER_CHILD = "pipeline.decoder_child"


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    title: str
    """The command line; Ray's workers write there what they are at."""

    def send(self, number: signal.Signals) -> bool:
        """False where it is gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False

    def is_at(self, task: str) -> bool:
        """Whether it is still there, and at this task now."""
        with contextlib.suppress(OSError):
            return _read_title(self.pid).startswith(task)
        return False


def descendants(roots: Iterable[int]) -> dict[int, Process]:
    """All living processes below these, by pid."""
    processes = {process.pid: process for process in _all_processes()}
    ours = set(roots)
    before = 0
    while len(ours) > before:
        before = len(ours)
        ours |= {process.pid for process in processes.values() if process.parent in ours}
    return {pid: process for pid, process in processes.items() if pid in ours}


def find_actors(roots: Iterable[int]) -> list[Process]:
    return [process for process in descendants(roots).values() if process.title.startswith(ACTOR)]


def find_decoders(roots: Iterable[int], task: str = "") -> list[tuple[Process, Process]]:
    """Each decoder child after its worker, if that is at this task."""
    found = descendants(roots)
    return [
        (found[process.parent], process)
        for process in found.values()
        if DECODER_CHILD in process.title and process.parent in found and found[process.parent].title.startswith(task)
    ]


def _all_processes() -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield Process(int(folder.name), int(parent), _read_title(int(folder.name)))


def _read_title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
