"""A Ray cluster of several nodes on this machine, apart from the one that other tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

_NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


@contextlib.contextmanager
def two_nodes(*, is_head_used: bool) -> Iterator[Cluster]:
    """A head, to which drivers connect, and a node that may be removed. Each claims a GPU, so that it gets one actor.

    Args:
        is_head_used: else the head claims none, and the only actor is on the other.
    """
    folder = Path(f"/tmp/rn{os.getpid()}")  # short: it holds sockets
    folder.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", str(folder))
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(
            initialize_head=True, head_node_args={**_NODE, "num_gpus": int(is_head_used), "include_dashboard": False}
        )
        try:
            add_node(cluster)
            yield cluster
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # as in the fixture `cluster`
                cluster.shutdown()
                gc.collect()
            shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Cluster) -> None:
    cluster.add_node(**_NODE, num_gpus=1)


def remove_node(cluster: Cluster) -> None:
    """As a machine that loses its power."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)


def raylets(cluster: Cluster) -> list[int]:
    """Their process ids: all workers, and what these start, are below them."""
    return [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
