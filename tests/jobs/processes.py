"""A job as a process of its own, with a private folder for Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 120


def environment(tmp: Path) -> dict[str, str]:
    """Without the variables by which a process would join another test's cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "RAY_TMPDIR": str(tmp)}


def run_job(job: Path, arguments: list[str], tmp: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(job), *arguments]
    return subprocess.run(command, env=environment(tmp), capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def start_job_and_wait(job: Path, arguments: list[str], tmp: Path, until: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """Start a job and return when something has happened, while it still runs."""
    process = subprocess.Popen([sys.executable, str(job), *arguments], env=environment(tmp), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert process.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process
