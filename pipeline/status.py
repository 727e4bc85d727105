"""``status.json``: what a run is doing and how it ended, readable by anybody who sees the output.

It also keeps two runs off one output: the file names the run and carries a heartbeat.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import PipelineError, RunRefusedError
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

STATUS_PATH = "status.json"
HEARTBEAT_S = 5.0
STALE_AFTER_S = 4 * HEARTBEAT_S


@dataclass(slots=True)
class RunStatus:
    """Writes ``status.json`` every few seconds on a thread of its own, and once more at the end.

    Args:
        storage: the run's output.
        snapshot: gives the changing part, such as counts; called from the thread.
        stop: set when another run has taken the output over; this one then writes no more.
    """

    storage: Storage
    snapshot: Callable[[], dict[str, Any]]
    stop: threading.Event = field(default_factory=threading.Event)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: str = "starting"
    beats_to_insist: int = 0
    """Heartbeats that do not ask whether the output is still this run's: after taking it over."""
    _started_at: float = field(default_factory=time.time)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def __enter__(self) -> RunStatus:
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def finish(self, state: str, exit_code: int, detail: str = "") -> None:
        """Write the outcome; no heartbeat follows it."""
        self.__exit__(None, None, None)
        self.state = state
        try:
            if self._is_ours():
                self._write({"exit_code": exit_code, "detail": detail})
        except PipelineError as error:  # the outcome stands in the log and the exit code too
            logger.error("status.json could not be written, and still says that the run is alive error=%s", error)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if self.beats_to_insist:
                    self.beats_to_insist -= 1  # a beat of the run that was taken over may have come between
                elif not self._is_ours():
                    logger.error("another run has taken over %s; this one stops", self.storage.uri)
                    self.stop.set()
                    return
                self._write()
            except Exception as error:  # the next beat tries again; the work goes on
                logger.warning("heartbeat failed error=%s", error)

    def _is_ours(self) -> bool:
        status = _read(self.storage)
        return status is None or status["run_id"] == self.run_id

    def _write(self, outcome: dict[str, Any] | None = None) -> None:
        with self._lock:
            self.storage.put_json(
                STATUS_PATH,
                {
                    "run_id": self.run_id,
                    "state": self.state,
                    "host": _this_host(),
                    "pid": os.getpid(),
                    "started_at": self._started_at,
                    "heartbeat_at": time.time(),
                    "exit_code": None,
                    **self.snapshot(),
                    **(outcome or {}),
                },
            )


def refuse_second_run(storage: Storage, *, takeover: bool, sleep: Callable[[float], None] = time.sleep) -> None:
    """Make sure that no other run is alive on this output.

    A run that died without a word is told from a live one by its process, where that is on this host, else by
    waiting for its heartbeat to move.

    Raises:
        RunRefusedError: the other run is alive, and ``takeover`` was not asked for.
    """
    last = _read(storage)
    if last is None or last.get("exit_code") is not None:
        return
    name = f"run {last['run_id'][:8]} (host {last['host']}, pid {last['pid']})"
    if takeover:
        logger.warning("taking over from %s", name)
        return
    if last["host"] == _this_host() and not _process_exists(last["pid"]):
        logger.info("%s died without finishing; resuming", name)
        return
    logger.info("%s has not ended; watching its heartbeat for %.0f s", name, STALE_AFTER_S)
    waited = 0.0
    while waited < STALE_AFTER_S:
        sleep(1.0)
        waited += 1.0
        now = _read(storage)
        if now is None or now.get("exit_code") is not None:
            return
        if now["heartbeat_at"] != last["heartbeat_at"]:
            raise RunRefusedError(f"{storage.uri}: {name} is alive. Wait for it, stop it, or pass --takeover if you know better")
    logger.info("%s shows no heartbeat; resuming", name)


def is_alive(storage: Storage) -> bool:
    """Whether ``status.json`` speaks of a run that goes on: by its heartbeat, without waiting for the next."""
    last = _read(storage)
    if last is None or last.get("exit_code") is not None:
        return False
    return time.time() - float(last["heartbeat_at"]) < STALE_AFTER_S


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        status = storage.read_json(STATUS_PATH)
    except (FileNotFoundError, ValueError):  # none yet, or cut short: it speaks for nobody
        return None
    return status if isinstance(status, dict) and "run_id" in status else None


def _this_host() -> str:
    """Host and PID namespace: containers of one host name do not see each other's processes."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace)}" if namespace.is_symlink() else socket.gethostname()


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
