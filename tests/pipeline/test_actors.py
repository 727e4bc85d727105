"""The order in which an actor takes its leases, without Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.actors import ActorSpec, Meter, VaeActor
from pipeline.errors import RevokedError
from pipeline.messages import Lease
from pipeline.types import ShardSummary
from tests.pipeline.fakes import make_shard_ref
from tests.pipeline.simulation import make_summary

MakeActor: Any = VaeActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class GatedWorker:
    """Its shards are open as soon as their gates are."""

    def __init__(self, meter: Meter) -> None:
        self.gates = [threading.Event() for _ in range(2)]
        self.opening = [threading.Event() for _ in range(2)]
        self.ran: list[int] = []

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[Any]:
        index = lease.shard.index
        self.opening[index].set()
        assert self.gates[index].wait(10)
        yield GatedJob(lease, self)


class GatedJob:
    def __init__(self, lease: Lease, worker: GatedWorker) -> None:
        self._lease, self._worker = lease, worker

    def run(self) -> None:
        self._worker.ran.append(self._lease.shard.index)

    def commit(self) -> ShardSummary:
        return make_summary(self._lease)


@pytest.fixture
def actor() -> Iterator[Any]:
    made = MakeActor(ActorSpec(make_worker=GatedWorker, log_level="info"))
    yield made
    made.retire()


def test_the_model_goes_to_the_lease_that_came_first_though_another_is_open_before(actor: Any) -> None:
    worker = actor._worker
    threads = []
    for index in range(2):
        threads.append(threading.Thread(target=actor.run_shard, args=[Lease(shard=make_shard_ref(index), attempt=1)]))
        threads[-1].start()
        assert worker.opening[index].wait(10)
    worker.gates[1].set()
    threads[1].join(0.2)
    assert worker.ran == []
    worker.gates[0].set()
    for thread in threads:
        thread.join(10)
    assert worker.ran == [0, 1]


def test_a_first_lease_that_cannot_be_opened_lets_the_next_pass(actor: Any) -> None:
    actor._worker.gates[1].set()
    with pytest.raises(IndexError):
        actor.run_shard(Lease(shard=make_shard_ref(2), attempt=1))
    actor.run_shard(Lease(shard=make_shard_ref(1), attempt=1))
    assert actor._worker.ran == [1]


def test_a_revocation_that_comes_before_its_lease_holds(actor: Any) -> None:
    lease = Lease(shard=make_shard_ref(0), attempt=1)
    actor._worker.gates[0].set()
    actor.revoke(lease.attempt_id)
    with pytest.raises(RevokedError):
        actor.run_shard(lease)
    assert actor._worker.ran == []
