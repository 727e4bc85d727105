"""Failpoints: at the place and the pass that a test names, once, and nowhere else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import failpoints

REACH = "from pipeline import failpoints\nfor turn in range(3):\n    print(turn, flush=True)\n    failpoints.reach('here')"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def run(armed: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "FAILPOINTS": armed, **environment}
    return subprocess.run([sys.executable, "-c", REACH], env=variables, capture_output=True, text=True, check=False)


def test_unarmed_place_does_nothing() -> None:
    failpoints.reach("here")
    failpoints.arm("there=raise")
    failpoints.reach("here")


def test_place_fails_on_the_pass_that_was_named_and_on_no_other() -> None:
    failpoints.arm("here=raise@2,there=raise")
    failpoints.reach("here")
    with pytest.raises(failpoints.FailpointError, match="failpoint here"):
        failpoints.reach("here")
    failpoints.reach("here")


def test_error_of_the_system_is_raised_by_its_name() -> None:
    failpoints.arm("here=raise:ENOSPC")
    with pytest.raises(OSError, match="No space left") as caught:
        failpoints.reach("here")
    assert caught.value.errno == errno.ENOSPC


def test_unknown_action_is_refused() -> None:
    failpoints.arm("here=explode")
    with pytest.raises(ValueError, match="here=explode: actions are kill, exit, raise, stall and freeze"):
        failpoints.reach("here")


def test_environment_arms_a_process_and_kill_is_sigkill() -> None:
    killed = run("here=kill@2")
    assert (killed.returncode, killed.stdout.split()) == (-signal.SIGKILL, ["0", "1"])
    assert run("here=exit").returncode == 1


def test_freeze_stops_the_whole_process_where_it_is() -> None:
    process = subprocess.Popen([sys.executable, "-c", REACH], env={**os.environ, "FAILPOINTS": "here=freeze"})
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        process.kill()
        process.wait()


def test_mark_lets_one_of_several_processes_die(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    codes = [run("here=kill", FAILPOINTS_MARK=mark).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL, 0]
