"""A wall clock that jumps by hours, as NTP or a person may let it, during a run: nothing is decided by it."""

from __future__ import annotations

import ast
import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.driver import drive
from pipeline.errors import RunRefusedError
from pipeline.messages import ActorReady, Assign, Event, Heartbeat, Settle, ShardCommitted, StartActor
from pipeline.schedule import Limits, Schedule
from pipeline.status import STALE_AFTER_S, STATUS_PATH, RunStatus, _this_host, refuse_second_run
from pipeline.storage import Storage
from tests.pipeline.fakes import make_shard_ref
from tests.pipeline.simulation import make_summary
from tests.test_imports import FILES

HOUR_S = 3600.0
READS_WALL_CLOCK = {
    "pipeline.status": "written for people; compared for change alone",
    "pipeline.service.cache": "age of what is kept",
    "pipeline.service.gate": "expiry of a browser's session",
}


def reads_wall_clock(module: str) -> bool:
    nodes = list(ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))))
    calls = {(node.value.id, node.attr) for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    names = {(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    clocks = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "datetime")}
    return bool((calls | names) & clocks)


def test_wall_clock_is_read_where_nothing_depends_on_it() -> None:
    found = {module for module in FILES if module.startswith("pipeline.") and reads_wall_clock(module)}
    assert found == READS_WALL_CLOCK.keys()


class JumpingClock:
    """Another time of the day at each look, an hour or more away from the last, never the same twice."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return 1e9 + HOUR_S * self.looks * (-1) ** self.looks


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> JumpingClock:
    clock = JumpingClock()
    monkeypatch.setattr("pipeline.status.time", SimpleNamespace(time=clock, sleep=time.sleep))
    return clock


def test_run_whose_clock_jumps_is_seen_to_live(output: Storage, jumping: JumpingClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.05)
    with RunStatus(output, dict), pytest.raises(RunRefusedError, match="is alive"):
        refuse_second_run(output, takeover=False, sleep=lambda _: time.sleep(0.2))
    assert jumping.looks > 1


@pytest.mark.parametrize("hours", [-6, 6])
def test_dead_run_is_dead_whatever_time_it_wrote(output: Storage, hours: float) -> None:
    written = {"run_id": "0123456789", "host": "elsewhere", "pid": 1, "heartbeat_at": time.time() + hours * HOUR_S}
    output.put_json(STATUS_PATH, written | {"exit_code": None})
    slept: list[float] = []
    refuse_second_run(output, takeover=False, sleep=slept.append)
    assert sum(slept) == STALE_AFTER_S


def test_run_that_takes_over_keeps_the_output_although_its_clock_is_behind(
    output: Storage, jumping: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.status.HEARTBEAT_S", 0.01)
    late = {"run_id": "0123456789", "host": _this_host(), "pid": 1, "heartbeat_at": 1e12, "exit_code": None}
    output.put_json(STATUS_PATH, late)
    refuse_second_run(output, takeover=True)
    with RunStatus(output, dict, beats_to_insist=2) as run:
        while jumping.looks < 6:
            time.sleep(0.01)
        run.finish("complete", 0)
        assert not run.stop.is_set()
    assert (output.read_json(STATUS_PATH)["run_id"], output.read_json(STATUS_PATH)["exit_code"]) == (run.run_id, 0)


class OneActor:
    """A pool whose only actor takes a few polls for each shard, and meanwhile answers."""

    POLLS = 4

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self._events: list[Event] = []
        self._steps = itertools.count()

    def do(self, command: Any) -> None:
        self.commands.append(command)
        if isinstance(command, StartActor):
            self._events.append(ActorReady(actor=command.actor))
        elif isinstance(command, Assign):
            beats = (Heartbeat(actor=command.actor, step=next(self._steps), is_at_work=True) for _ in range(self.POLLS))
            summary = make_summary(command.lease)
            self._events += [*beats, ShardCommitted(actor=command.actor, lease=command.lease, summary=summary)]

    def poll(self, timeout_s: float) -> list[Event]:
        time.sleep(0.01)
        return [self._events.pop(0)] if self._events else []


def test_leases_run_by_another_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pool: Any = OneActor()
    schedule = Schedule(map(make_shard_ref, range(20)), Limits(), time.monotonic)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", JumpingClock())
        outcomes = list(drive(schedule, pool, lambda: 1, lambda: False))
    assert [type(outcome) for outcome in outcomes] == [Settle] * 20
    assert {type(command) for command in pool.commands} == {StartActor, Assign}
