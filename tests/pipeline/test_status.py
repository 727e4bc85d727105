"""``status.json``: tells people what a run does, and keeps a second run off its output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import RunRefusedError
from pipeline.status import STALE_AFTER_S, STATUS_PATH, RunStatus, _this_host, is_alive, refuse_second_run
from pipeline.storage import Storage


def write_status(output: Storage, **changes: Any) -> None:
    status = {
        "run_id": "0123456789abcdef",
        "host": "elsewhere",
        "pid": 1,
        "heartbeat_at": 100.0,
        "exit_code": None,
        "state": "encoding",
    }
    output.put_json(STATUS_PATH, status | changes)


def no_sleep(_: float) -> None:
    pytest.fail("waited for a run that is known to have ended")


class Clock:
    """Counts the seconds slept; something may happen after so many."""

    def __init__(self, after_s: float = 0, then: Callable[[], None] | None = None) -> None:
        self.slept_s = 0.0
        self._after_s, self._then = after_s, then

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        if self._then is not None and self.slept_s >= self._after_s:
            self._then()
            self._then = None


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# A second run


def test_new_output_is_free(output: Storage) -> None:
    refuse_second_run(output, takeover=False, sleep=no_sleep)


@pytest.mark.parametrize("exit_code", [0, 1, 4])
def test_output_of_a_run_that_ended_is_free(output: Storage, exit_code: int) -> None:
    write_status(output, exit_code=exit_code)
    refuse_second_run(output, takeover=False, sleep=no_sleep)


def test_run_whose_heart_beats_is_not_disturbed(output: Storage) -> None:
    write_status(output)
    clock = Clock(6, lambda: write_status(output, heartbeat_at=105.0))
    with pytest.raises(RunRefusedError) as caught:
        refuse_second_run(output, takeover=False, sleep=clock.sleep)
    assert str(caught.value) == (
        f"{output.uri}: run 01234567 (host elsewhere, pid 1) is alive. "
        "Wait for it, stop it, or pass --takeover if you know better"
    )
    assert clock.slept_s == 6


def test_run_on_another_host_whose_heart_stands_still_is_dead(output: Storage) -> None:
    write_status(output)
    clock = Clock()
    refuse_second_run(output, takeover=False, sleep=clock.sleep)
    assert clock.slept_s == STALE_AFTER_S


def test_run_of_this_host_whose_process_is_gone_is_dead_at_once(output: Storage, dead_pid: int) -> None:
    write_status(output, host=_this_host(), pid=dead_pid)
    refuse_second_run(output, takeover=False, sleep=no_sleep)


def test_run_of_this_host_whose_process_lives_is_watched(output: Storage) -> None:
    write_status(output, host=_this_host(), pid=os.getpid())
    clock = Clock()
    refuse_second_run(output, takeover=False, sleep=clock.sleep)
    assert clock.slept_s == STALE_AFTER_S


def test_run_that_ends_while_it_is_watched_leaves_the_output_free(output: Storage) -> None:
    write_status(output)
    refuse_second_run(output, takeover=False, sleep=Clock(3, lambda: write_status(output, exit_code=0)).sleep)


def test_takeover_does_not_ask(output: Storage) -> None:
    write_status(output)
    refuse_second_run(output, takeover=True, sleep=no_sleep)


def test_file_of_another_kind_refuses_nobody(output: Storage) -> None:
    for content in ([], {"state": "unknown"}):
        output.put_json(STATUS_PATH, content)
        refuse_second_run(output, takeover=False, sleep=no_sleep)


# A run's own status


def test_status_names_the_run_its_process_and_its_counts(output: Storage) -> None:
    with RunStatus(output, lambda: {"planned": 3}) as run:
        status = output.read_json(STATUS_PATH)
        assert status["run_id"] == run.run_id
        assert (status["host"], status["pid"]) == (_this_host(), os.getpid())
        assert (status["state"], status["planned"], status["exit_code"]) == ("starting", 3, None)


def test_outcome_is_written_last(output: Storage) -> None:
    with RunStatus(output, lambda: {"planned": 3}) as run:
        run.finish("complete", 0, "all is well")
    status = output.read_json(STATUS_PATH)
    assert (status["state"], status["exit_code"], status["detail"], status["planned"]) == ("complete", 0, "all is well", 3)
    refuse_second_run(output, takeover=False, sleep=no_sleep)


def test_run_that_was_not_finished_looks_alive(output: Storage) -> None:
    with RunStatus(output, dict):
        pass
    assert output.read_json(STATUS_PATH)["exit_code"] is None


def test_heart_beats_while_the_run_lasts_and_stops_with_it(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.01)
    beats = threading.Semaphore(0)

    def snapshot() -> dict[str, Any]:
        beats.release()
        return {}

    with RunStatus(output, snapshot) as run:
        for _ in range(4):
            assert beats.acquire(timeout=10)
        first = output.read_json(STATUS_PATH)["heartbeat_at"]
        run.finish("complete", 0)
    assert output.read_json(STATUS_PATH)["heartbeat_at"] > first
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_heartbeat_survives_a_store_that_fails_for_a_while(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.01)
    tries: list[int] = []
    recovered = threading.Event()
    put_json = Storage.put_json

    def put(self: Storage, path: str, value: Any) -> None:
        tries.append(1)
        if len(tries) in (2, 3):
            raise OSError("no space left")
        put_json(self, path, value)
        if len(tries) > 3:
            recovered.set()

    monkeypatch.setattr(Storage, "put_json", put)
    with RunStatus(output, dict):
        assert recovered.wait(10)


def test_run_that_was_taken_over_stops_and_writes_no_more(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.01)
    stop = threading.Event()
    with RunStatus(output, dict, stop) as run:
        write_status(output, run_id="another run")
        assert stop.wait(10)
        run.finish("stopped", 4)
    assert output.read_json(STATUS_PATH)["run_id"] == "another run"


def test_end_that_cannot_be_written_does_not_hide_the_outcome(
    output: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RunStatus(output, dict) as run:
        monkeypatch.setattr("os.replace", refuse)
        run.finish("failed", 1, "the disk is full")
    assert "status.json could not be written" in caplog.text


def refuse(source: str, target: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_is_alive_while_its_heartbeat_is_young_and_it_has_not_ended(output: Storage) -> None:
    assert not is_alive(output)
    with RunStatus(output, dict) as status:
        assert is_alive(output)
        status.finish("complete", 0)
    assert not is_alive(output)
    output.put_json("status.json", {"run_id": "r", "exit_code": None, "heartbeat_at": 1.0})
    assert not is_alive(output)
