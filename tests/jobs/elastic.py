"""A run on a cluster of three nodes on this machine, one of which goes or comes in the middle. Prints what happened.

python -m tests.jobs.elastic remove|add
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator

import ray
from ray.cluster_utils import Cluster

from pipeline.actors import ActorSpec, Meter
from pipeline.cluster import ActorResources, count_actors
from pipeline.config import RunConfig
from pipeline.driver import drive
from pipeline.messages import Lease, Settle
from pipeline.pool import ActorPool
from pipeline.schedule import Limits, Schedule
from pipeline.types import ShardSummary
from tests.jobs.conftest import ROOT
from tests.pipeline.fakes import make_shard_ref
from tests.pipeline.simulation import make_summary

SHARDS = 60
SHARD_S = 0.5


class NodeWorker:
    """Sleeps, and signs its commits with its node."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[NodeJob]:
        yield NodeJob(lease, self._meter)


class NodeJob:
    def __init__(self, lease: Lease, meter: Meter) -> None:
        self._lease, self._meter = lease, meter

    def run(self) -> None:
        with self._meter.at_work(["clip"]):
            time.sleep(SHARD_S)

    def commit(self) -> ShardSummary:
        summary = make_summary(self._lease)
        return ShardSummary(**{name: getattr(summary, name) for name in summary.__slots__} | {"recipe": node_id()})


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def main(action: str) -> None:
    logging.basicConfig(level="INFO")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False)
    config = RunConfig(input={"uri": "in"}, output={"uri": "out"}, vae={"weights": "w"})  # type: ignore[arg-type]
    pool = ActorPool(
        ActorResources(actors=2, num_gpus=1, threads=1, frame_budget_bytes=1),
        ActorSpec(make_worker=NodeWorker, log_level="warning"),
    )
    schedule = Schedule(map(make_shard_ref, range(SHARDS)), Limits(), time.monotonic)
    by_node: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    try:
        for outcome in drive(schedule, pool, functools.partial(count_actors, config, "cuda"), lambda: False):
            assert isinstance(outcome, Settle), outcome
            by_node[outcome.summary.recipe] += 1
            attempts[outcome.lease.attempt] += 1
            if by_node.total() == 8:
                if action == "add":
                    nodes.append(cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20))
                else:
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
    finally:
        pool.close()
    print(json.dumps({"shards": by_node.total(), "nodes": sorted(by_node.values()), "attempts": attempts}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
