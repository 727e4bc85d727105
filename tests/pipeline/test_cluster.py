"""What a run asks of its cluster before it starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, RayError

from pipeline import cluster
from pipeline.cluster import check_shared_paths, count_actors, plan_actors, ray_cluster, stop_grace_s
from pipeline.config import RunConfig
from pipeline.errors import ConfigError


def make_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "status.json").touch()
    values: dict[str, dict[str, Any]] = {
        "input": {"uri": str(folder)},
        "output": {"uri": str(folder / "out")},
        "vae": {"weights": "THUDM/CogVideoX-5b"},
    }
    return RunConfig(**{**values, **sections})  # type: ignore[arg-type]


class FakeRay:
    """A cluster of nodes, of which some see only what is listed for them, and some are gone without its knowledge."""

    def __init__(
        self, resources: dict[str, float], blind_nodes: tuple[str, ...] = (), nodes: int = 1, lost_nodes: tuple[str, ...] = ()
    ) -> None:
        self._resources, self._blind, self._lost = resources, blind_nodes, lost_nodes
        self._nodes = [f"node{number}" for number in range(nodes)]

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def nodes(self) -> list[dict[str, Any]]:
        share = {"GPU": self._resources.get("GPU", 0) / len(self._nodes)}
        return [{"Alive": True, "NodeID": node_id(name), "NodeManagerAddress": name, "Resources": share} for name in self._nodes]

    def get(self, value: Any) -> Any:
        if isinstance(value, RayError):
            raise value
        return value

    def missing(self, scheduling_strategy: Any) -> SimpleNamespace:
        if scheduling_strategy.node_id in map(node_id, self._lost):
            return SimpleNamespace(remote=lambda paths: NodeDiedError("gone"))
        is_blind = scheduling_strategy.node_id in map(node_id, self._blind)
        return SimpleNamespace(remote=lambda paths: paths if is_blind else [])


def node_id(name: str) -> str:
    return name.encode().hex().rjust(56, "0")


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> None:
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.setattr(cluster, "_look_for", SimpleNamespace(options=fake.missing))


def test_a_node_that_does_not_see_a_local_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({}, blind_nodes=("node1",), nodes=2))
    with pytest.raises(ConfigError, match=f"node1 does not see {tmp_path}, {tmp_path}/out/status.json"):
        check_shared_paths(make_config(tmp_path))


def test_a_node_that_is_lost_meanwhile_is_not_asked_for_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({}, nodes=3, lost_nodes=("node1",)))
    check_shared_paths(make_config(tmp_path))
    use(monkeypatch, FakeRay({}, nodes=3, lost_nodes=("node1",), blind_nodes=("node2",)))
    with pytest.raises(ConfigError, match="node2 does not see"):
        check_shared_paths(make_config(tmp_path))


def test_one_node_or_object_storage_needs_no_shared_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({}, blind_nodes=("node0",)))
    check_shared_paths(make_config(tmp_path))
    use(monkeypatch, FakeRay({}, blind_nodes=("node1",), nodes=2))
    check_shared_paths(make_config(tmp_path, input={"uri": "s3://videos"}, output={"uri": "s3://latents"}))


def test_of_a_glob_the_folder_must_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({}, blind_nodes=("node1",), nodes=2))
    with pytest.raises(ConfigError, match=f"does not see {tmp_path},"):
        check_shared_paths(make_config(tmp_path, input={"uri": f"{tmp_path}/*.mp4"}))


def test_gpus_are_shared_among_actors_and_never_overbooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({"CPU": 16, "GPU": 4, "object_store_memory": 64 << 30}))
    assert plan_actors(make_config(tmp_path)).actors == 4
    halves = plan_actors(make_config(tmp_path, cluster={"gpus_per_actor": 0.5, "actors": 99}))
    assert (halves.actors, halves.num_gpus, halves.device) == (8, 0.5, "cuda")
    for share, fit in ((0.6, 4), (0.4, 8), (0.3, 12)):
        assert plan_actors(make_config(tmp_path, cluster={"gpus_per_actor": share})).actors == fit


def test_cores_are_shared_among_actors_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({"CPU": 8, "object_store_memory": 64 << 30}))
    resources = plan_actors(make_config(tmp_path, cluster={"actors": 3}))
    assert (resources.actors, resources.threads, resources.device) == (3, 2, "cpu")


def test_frames_on_order_stay_under_half_of_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({"CPU": 8, "object_store_memory": 4 << 30}))
    assert plan_actors(make_config(tmp_path, cluster={"actors": 2})).frame_budget_bytes == 1 << 30


def test_places_for_actors_follow_the_cluster_s_gpus_up_to_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, cluster={"gpus_per_actor": 0.5, "actors": 5})
    for gpus, places in ((1, 2), (4, 5), (0, 0)):
        use(monkeypatch, FakeRay({"GPU": gpus}))
        assert count_actors(config, "cuda") == places
        assert count_actors(config, "cpu") == 5


def test_inside_a_ray_job_the_grace_period_is_cut_to_what_ray_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    config = make_config(tmp_path, run={"stop_grace_s": 10})
    assert stop_grace_s(config) == 10
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert stop_grace_s(config) == 1
    for wait, grace in (("1", 0), ("8", 6), ("60", 10)):
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", wait)
        assert stop_grace_s(config) == grace


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({"CPU": 8, "object_store_memory": 4 << 30}))
    with pytest.raises(ConfigError, match=r"offer 0 GPUs; set vae\.device: cpu"):
        plan_actors(make_config(tmp_path, vae={"weights": "w", "device": "cuda"}))


def test_a_cluster_without_a_cpu_for_decoding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeRay({"GPU": 1}))
    with pytest.raises(ConfigError, match="no CPU"):
        plan_actors(make_config(tmp_path))


def test_an_address_where_no_cluster_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(cluster, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere.invalid:1")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is ray://nowhere\.invalid:1, and no Ray cluster answers"), ray_cluster():
        pass


_WAITS = """
import threading
from pipeline.cluster import stop_on_signals
stop = threading.Event()
with stop_on_signals(stop):
    print("ready", flush=True)
    stop.wait()
    print("stopped", flush=True)
    threading.Event().wait(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_many_times_at_once_is_one_and_a_later_one_ends_the_process(number: signal.Signals) -> None:
    for _ in range(3):  # whether they meet in the handler is chance
        process = subprocess.Popen([sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            for _ in range(20):
                process.send_signal(number)
            assert process.stdout.readline() == "stopped\n"
            time.sleep(0.6)
            process.send_signal(number)
            assert process.wait(10) == -number
