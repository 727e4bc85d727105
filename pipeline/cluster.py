"""Joining a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.status import STATUS_PATH

logger = logging.getLogger(__name__)

_SAME_SIGNAL_S = 0.5
"""A signal to a group of processes may come twice, directly and from a parent that passes it on: that is one wish."""
_JOB_STOP_WAIT_S = 3.0
"""Ray's default between SIGTERM and SIGKILL of a job."""
_SUMMARY_S = 2.0
"""What ending the actors and writing the summary may take."""
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorResources:
    """How many actors a run gets, and what each holds."""

    actors: int
    num_gpus: float
    threads: int | None
    """torch threads of an actor without a GPU."""
    frame_budget_bytes: int
    """Decoded frames that one actor may hold: what was asked for, within half of the object store."""

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Join the cluster named by ``RAY_ADDRESS`` (set inside a Ray job), else start one on this machine.

    Without an explicit address ``ray.init`` would follow a stale address file of some other cluster.
    """
    if ray.is_initialized():  # the caller's own cluster, as in tests: theirs to close
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    runtime_env = {"env_vars": {"PYTHONPATH": _PACKAGE_ROOT}}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not sys.stderr.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape codes in log files
        # Ray listens on every interface and asks callers for a token. One of this run alone, given here, is not left in
        # the home folder for later clusters to trip over, as one that Ray makes would be.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel("ERROR")  # it warns that all is as it should be
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=True,
            runtime_env=runtime_env,
        )
    else:
        # A job with a working_dir has its own runtime environment, which may not be given twice.
        in_job = '"working_dir"' in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
        logger.info("joining cluster address=%s", address)  # Ray tries for minutes where none answers
        try:
            ray.init(address=address, logging_level="warning", runtime_env=None if in_job else runtime_env)
        except (ConnectionError, TimeoutError, RuntimeError) as error:
            raise ConfigError(
                f"RAY_ADDRESS is {address}, and no Ray cluster answers there: {error}; unset it to start one on this machine"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


class ClusterSession(contextlib.ExitStack):
    """Joins the cluster when it is first needed and leaves it at the end: who has nothing to do starts no Ray."""

    def __init__(self, config: JobConfig, stop: threading.Event) -> None:
        super().__init__()
        self._config = config
        self._stop = stop
        self._joined = False

    def join(self) -> None:
        """Have a cluster from now on."""
        if not self._joined:
            self._joined = True
            self.enter_context(ray_cluster())
            self.enter_context(stop_on_signals(self._stop))  # once more: ray.init puts its own handlers in place
            check_shared_paths(self._config)


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event, after: str = "the same command resumes") -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to stop; a second one ends it at once and says what comes ``after``.

    The handler only sets a flag: an exception raised in it would be swallowed inside ``ray.get``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_at: float | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            # On a thread of its own: here it would wait for a lock that this very thread may hold, inside stop.wait().
            _thread.start_new_thread(stop.set, ())
        elif time.monotonic() - asked_at > _SAME_SIGNAL_S:
            os.write(2, f"stopping at once; {after}\n".encode())
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_shared_paths(config: JobConfig) -> None:
    """Make sure that every node sees the run's local files, which lie on a shared disk or are no use.

    Otherwise each video that another node should probe would be quarantined as not found.

    Raises:
        ConfigError: a node does not see them; names the node and the paths.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    paths = shared_paths(config)
    if len(nodes) < 2 or not paths:
        return
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        try:
            missing = ray.get(_look_for.options(scheduling_strategy=here).remote(paths))
        except RayError as error:  # a lost node is thought to live for a while
            logger.warning("node %s does not answer; going on without it error=%s", node["NodeManagerAddress"], error)
            continue
        if missing:
            raise ConfigError(
                f"node {node['NodeManagerAddress']} does not see {', '.join(missing)}: on a cluster of {len(nodes)} nodes "
                "local paths must be on a disk that all nodes share; use one, or object storage"
            )


@ray.remote(num_cpus=0)
def _look_for(paths: Sequence[str]) -> list[str]:
    return missing_paths(paths)


def shared_paths(config: JobConfig) -> tuple[str, ...]:
    """The run's local files that are here, on the driver's node, and so must be on every other."""
    return tuple(path for path in _local_paths(config) if os.path.exists(path))


def missing_paths(paths: Sequence[str]) -> list[str]:
    """Which of the run's shared paths this node does not see. A node may join when all others are checked already."""
    return [path for path in paths if not os.path.exists(path)]


def _local_paths(config: JobConfig) -> Iterator[str]:
    """What the run reads and writes on disk; of the output a file that the driver has just written."""
    for uri in (config.input.uri, f"{config.output.uri}/{STATUS_PATH}", config.vae.weights):
        if "://" not in uri or uri.startswith("file://"):
            pattern = os.path.expanduser(uri.removeprefix("file://"))
            wildcard = re.search(r"[*?\[{]", pattern)
            folder = pattern[: wildcard.start()].rpartition("/")[0] if wildcard and not os.path.exists(pattern) else pattern
            yield os.path.abspath(folder)


def stop_grace_s(config: JobConfig) -> float:
    """How long shards may go on once the run is to stop. ``ray job stop`` ends the process itself after a while."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return config.run.stop_grace_s
    until_sigkill_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", _JOB_STOP_WAIT_S))
    return max(0.0, min(config.run.stop_grace_s, until_sigkill_s - _SUMMARY_S))


def plan_actors(config: JobConfig) -> ActorResources:
    """Share the cluster's GPUs, or its cores, among the actors.

    Raises:
        ConfigError: the cluster has no CPU for decoding, or no GPU although the run asks for one.
    """
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise ConfigError("the cluster offers no CPU, but decoding needs num_cpus=1; start a node with --num-cpus")
    share = config.cluster.gpus_per_actor
    slots = count_gpu_slots(config.vae.device, share)
    if slots is None:
        actors = config.cluster.actors or 1
        threads = config.cluster.threads_per_actor or max(1, cpus // actors)
        return ActorResources(actors=actors, num_gpus=0, threads=threads, frame_budget_bytes=_frame_budget(config, actors))
    actors = min(config.cluster.actors or slots, slots)
    if config.cluster.actors and config.cluster.actors > slots:
        logger.warning("only %d of %d actors fit the cluster's GPUs", slots, config.cluster.actors)
    return ActorResources(
        actors=actors,
        num_gpus=share,
        threads=config.cluster.threads_per_actor,
        frame_budget_bytes=_frame_budget(config, actors),
    )


def count_actors(config: JobConfig, device: str) -> int:
    """How many actors fit the cluster now: more when nodes have come, none when all GPUs have gone.

    Args:
        device: of the actors that the run was planned with.
    """
    if device == "cpu":
        return config.cluster.actors or 1
    slots = _gpu_slots(config.cluster.gpus_per_actor)
    return min(config.cluster.actors or slots, slots)


def count_gpu_slots(device: str, share: float) -> int | None:
    """How many models fit the cluster's GPUs, each on a share of one; None: they work on CPU.

    Raises:
        ConfigError: the device is cuda, and there is no GPU.
    """
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if not (device == "cuda" or (device == "auto" and gpus > 0)):
        return None
    slots = _gpu_slots(share)
    if slots < 1:
        raise ConfigError(f"vae.device is cuda, but the cluster's nodes offer {gpus:g} GPUs; set vae.device: cpu")
    return slots


def _gpu_slots(share: float) -> int:
    per_gpu = int(1 / share + 1e-9)  # what is left over of two GPUs does not make a third
    return sum(int(node["Resources"].get("GPU", 0)) * per_gpu for node in ray.nodes() if node["Alive"])


def _frame_budget(config: JobConfig, actors: int) -> int:
    """Frames beyond half of the object store would spill to disk."""
    asked = config.cluster.frame_budget_bytes
    share = int(ray.cluster_resources().get("object_store_memory", 0) / 2 / actors)
    if share < asked:
        logger.info("frame budget lowered asked=%d got=%d: half of the object store, shared by actors", asked, share)
    return min(asked, share)
