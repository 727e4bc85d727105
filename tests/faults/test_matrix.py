"""Kill anything at any step, and let the store do its worst: the dataset comes out the same.

Every cell is a whole run of real clips on SeaweedFS while a reader watches. docs/reliability.md holds the table that
``RELIABILITY_TABLE=path pytest tests/faults/test_matrix.py`` writes.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.account import ExitCode
from pipeline.config import RunConfig
from pipeline.schedule import Limits
from pipeline.storage import Storage
from tests.conftest import ObjectStore
from tests.faults.nodes import add_node, remove_node, two_nodes
from tests.faults.proxy import FaultProxy, Kind, Rule
from tests.faults.runs import READ_TIMEOUT_S, Watcher, check_outcome, load_armed, make_config, read_rows, start_driver, wait_for
from tests.faults.victims import DECODE_TASK, IDLE, Process, find_decoders
from tests.jobs.conftest import CLIPS, GOOD_CLIPS, run_encode, save_tiny_vae

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.timeout(600)]

STORE_KINDS: tuple[Kind, ...] = ("slow_down", "reset", "truncate", "shorten", "stall", "lost_reply")
RATES = (0.05, 0.2)
ACTOR_POINTS = ("encode.after_claim", "encode.after_clip", "commit.before_put", "storage.after_put", "commit.after_put")
DRIVER_POINTS = (
    "plan.after_probe",
    "plan.before_index",
    "driver.before_acknowledge",
    "publish.before_index",
    "publish.after_index",
    "publish.before_manifest",
    "publish.after_manifest",
)
SHORT = {
    ("lost_reply", 0.2),
    ("commit.before_put", "actor"),
    ("publish.before_manifest", "driver"),
}


def cells(*pairs: tuple[Any, Any]) -> list[Any]:
    """Parameters; all but a few are slow."""
    return [pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.slow, id="-".join(map(str, pair))) for pair in pairs]


@dataclass
class Disturbed:
    """One cell: a folder of its own in the store, seen straight and by the run."""

    output: Storage
    config: RunConfig
    folder: Path
    """Local: what actors leave behind."""
    expected: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, armed: str = "") -> ExitCode:
        return run_encode(self.config, functools.partial(load_armed, self.folder, armed))

    def start_driver(self, armed: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """The same run by a driver of its own process, on the same cluster."""
        address = ray.get_runtime_context().gcs_address
        return start_driver(self.config, self.folder, armed, **{"RAY_ADDRESS": address, **environment})

    def check(self, watcher: Watcher) -> None:
        check_outcome(self.output, self.expected, self.folder / "tally", watcher)


@dataclass(frozen=True)
class Input:
    """What all cells share: clips in the store, a model, and what an undisturbed run makes of them."""

    clips: str
    vae: Path
    keys: dict[str, str]
    rows: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shared(s3: ObjectStore, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Input:
    clips, output = Storage(s3.uri("matrix/clips")), Storage(s3.uri("matrix/undisturbed"))
    for name in (*GOOD_CLIPS, "bunny_wakes_up.txt", "cockatoo_portrait.mp4", "broken.mp4"):
        clips.put(name, (CLIPS / name).read_bytes())
    keys = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"], "endpoint_url": s3.endpoint}
    vae = save_tiny_vae(tmp_path_factory.mktemp("vae"))
    folder = tmp_path_factory.mktemp("undisturbed")
    config = make_config(clips.uri, vae, output.uri, keys)
    assert run_encode(config, functools.partial(load_armed, folder, "")) == ExitCode.COMPLETE
    rows = read_rows(output)
    assert len(rows) > 6
    return Input(clips.uri, vae, keys, rows)


@pytest.fixture
def cell(shared: Input, s3: ObjectStore, proxy: FaultProxy) -> Iterator[Disturbed]:
    output = Storage(s3.uri(f"matrix/{uuid.uuid4().hex}"))
    folder = Path(f"/tmp/matrix-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    config = make_config(shared.clips, shared.vae, output.uri, {**shared.keys, "endpoint_url": proxy.endpoint})
    yield Disturbed(output, config, folder, shared.rows)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """One line a cell; written at the end where the environment says so."""
    lines: list[str] = []
    yield lines
    if path := os.environ.get("RELIABILITY_TABLE"):
        head = ["| disturbance | where | what happened | rows | seconds |", "|---|---|---|---|---|"]
        Path(path).write_text("\n".join([*head, *lines]) + "\n")


class Segfault:
    """Makes a decoder child of this process's cluster die of SIGSEGV over a clip, once.

    Children that have nothing to do are stopped, so that one cannot answer the next request before it is met.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._stopped: dict[int, Process] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._lie_in_wait, name="segfault")

    def __enter__(self) -> Segfault:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _lie_in_wait(self) -> None:
        while not self.is_done and not self._ended.wait(0.05):
            for worker, child in find_decoders([os.getpid()]):
                if worker.is_at(IDLE) and child.send(signal.SIGSTOP):
                    self._stopped[child.pid] = child
                elif worker.is_at(DECODE_TASK) and child.pid in self._stopped and not self.is_done:
                    self.is_done = child.send(signal.SIGSEGV)
                elif not worker.is_at(IDLE):
                    child.send(signal.SIGCONT)
        for child in self._stopped.values():
            child.send(signal.SIGCONT)


def watched(cell: Disturbed, table: list[str], what: str, where: str, run: Callable[[], str]) -> None:
    """Run a cell while a reader watches, and check what came out."""
    started = time.monotonic()
    with Watcher(cell.output, len(cell.expected)) as watcher:
        happened = run()
    cell.check(watcher)
    table.append(f"| {what} | {where} | {happened} | {len(cell.expected)}, equal | {time.monotonic() - started:.0f} |")


@pytest.mark.parametrize(("kind", "rate"), cells(*((kind, rate) for kind in STORE_KINDS for rate in RATES)))
def test_store_that_misbehaves_changes_nothing(
    cell: Disturbed, proxy: FaultProxy, table: list[str], kind: Kind, rate: float
) -> None:
    proxy.rules = [Rule(kind, rate, stall_s=2 * READ_TIMEOUT_S)]

    def run() -> str:
        assert cell.run() == ExitCode.COMPLETE
        assert proxy.faults[kind] > 0
        return f"{proxy.faults[kind]} of {proxy.requests} requests"

    watched(cell, table, kind, f"{rate:.0%} of requests", run)


@pytest.mark.parametrize(("point", "victim"), cells(*((point, "actor") for point in ACTOR_POINTS)))
def test_actor_killed_at_any_step_loses_nothing(cell: Disturbed, table: list[str], point: str, victim: str) -> None:
    def run() -> str:
        assert cell.run(f"{point}=kill") == ExitCode.COMPLETE
        assert (cell.folder / "reached").exists()
        return "another actor took over"

    watched(cell, table, "actor killed", point, run)


@pytest.mark.parametrize(("point", "victim"), cells(*((point, "frozen actor") for point in ACTOR_POINTS)))
def test_actor_frozen_at_any_step_is_found_and_replaced(
    cell: Disturbed, table: list[str], monkeypatch: pytest.MonkeyPatch, point: str, victim: str
) -> None:
    monkeypatch.setattr("pipeline.driver.Limits", functools.partial(Limits, answer_s=10))

    def run() -> str:
        assert cell.run(f"{point}=freeze") == ExitCode.COMPLETE
        assert (cell.folder / "reached").exists()
        return "killed for its silence"

    watched(cell, table, "actor frozen", point, run)


@pytest.mark.parametrize(("point", "victim"), cells(*((point, "node") for point in ACTOR_POINTS)))
def test_node_lost_while_its_actor_is_at_any_step_loses_nothing(
    cell: Disturbed, table: list[str], point: str, victim: str
) -> None:
    def run() -> str:
        with two_nodes(is_head_used=False) as cluster:
            driver = start_driver(cell.config, cell.folder, f"{point}=stall@2", RAY_ADDRESS=cluster.address)
            try:
                wait_for(cell.folder / "reached")
                remove_node(cluster)
                add_node(cluster)
                assert driver.wait(300) == ExitCode.COMPLETE, (cell.folder / "driver.log").read_text()
            finally:
                driver.kill()
                driver.wait()
        return "a new node took over"

    watched(cell, table, "node removed", point, run)


@pytest.mark.slow
def test_driver_starts_although_a_node_is_thought_to_live_that_is_gone(cell: Disturbed, table: list[str]) -> None:
    def run() -> str:
        with two_nodes(is_head_used=True) as cluster:
            remove_node(cluster)
            driver = start_driver(cell.config, cell.folder, RAY_ADDRESS=cluster.address)
            try:
                assert driver.wait(300) == ExitCode.COMPLETE, (cell.folder / "driver.log").read_text()
            finally:
                driver.kill()
                driver.wait()
        return "the others did the work"

    watched(cell, table, "node removed", "as the driver starts", run)


@pytest.mark.parametrize(("action", "victim"), cells(("kill", "constructor"), ("raise", "constructor")))
def test_actor_that_dies_in_its_constructor_is_made_again(cell: Disturbed, table: list[str], action: str, victim: str) -> None:
    def run() -> str:
        assert cell.run(f"load={action}") == ExitCode.COMPLETE
        assert (cell.folder / "reached").exists()
        return "another was made"

    watched(cell, table, f"constructor: {action}", "while the model loads", run)


@pytest.mark.slow
def test_decoder_that_segfaults_once_costs_nothing(cell: Disturbed, table: list[str]) -> None:
    def run() -> str:
        with Segfault() as segfault:
            assert cell.run() == ExitCode.COMPLETE
        assert segfault.is_done
        return "the video again in a fresh child"

    watched(cell, table, "decoder segfault", "at a clip", run)


@pytest.mark.parametrize(("point", "victim"), cells(*((point, "driver") for point in ACTOR_POINTS)))
def test_driver_killed_while_an_actor_is_at_any_step_resumes(cell: Disturbed, table: list[str], point: str, victim: str) -> None:
    def run() -> str:
        driver = cell.start_driver(f"{point}=stall@2")
        wait_for(cell.folder / "reached")
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        assert cell.run() == ExitCode.COMPLETE
        return "the same command resumed"

    watched(cell, table, "driver killed", point, run)


@pytest.mark.parametrize(("point", "victim"), cells(*((point, "driver") for point in DRIVER_POINTS)))
def test_driver_killed_at_any_of_its_steps_resumes(cell: Disturbed, table: list[str], point: str, victim: str) -> None:
    def run() -> str:
        driver = cell.start_driver(FAILPOINTS=f"{point}=kill")
        assert driver.wait(300) == -signal.SIGKILL, (cell.folder / "driver.log").read_text()
        assert cell.run() == ExitCode.COMPLETE
        return "the same command resumed"

    watched(cell, table, "driver killed", point, run)
