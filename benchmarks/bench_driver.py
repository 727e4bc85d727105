"""Shards a second through the driver, with nothing to do in them: the schedule alone, and with real Ray actors.

100,000 shards each, unless another number is given; the memory of this process is printed at intervals and must not grow.
Every shard must be settled; the clock runs from the first one, without the start of Ray. Prints one JSON line for each.

    python benchmarks/bench_driver.py [shards] [actors]
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipeline.actors import ActorSpec, Meter
from pipeline.cluster import ActorResources, ray_cluster
from pipeline.driver import drive
from pipeline.messages import ActorReady, Assign, CapacityChanged, GiveUp, Lease, Settle, ShardCommitted, StartActor
from pipeline.plan_store import ShardRef
from pipeline.pool import ActorPool
from pipeline.schedule import Limits, Schedule
from pipeline.types import ShardSummary

PRINTS = 10


def main() -> None:
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    actors = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    for name, run in (("schedule alone", run_alone), ("with Ray", run_with_ray)):
        memory: list[float] = []
        settled, first_at = 0, 0.0
        for settled, _ in enumerate(run(shards, actors), 1):
            first_at = first_at or time.perf_counter()
            if settled % (shards // PRINTS) == 0:
                memory.append(resident_mb())
                rate = settled / (time.perf_counter() - first_at)
                print(f"{name}: {settled} shards, {rate:.0f} a second, {memory[-1]:.1f} MB", flush=True)
        assert settled == shards, (settled, shards)
        line = {
            "bench": "driver",
            "what": name,
            "shards": shards,
            "actors": actors,
            "shards_per_s": round(rate),
            "rss_mb": memory,
        }
        print(json.dumps(line))


def run_alone(shards: int, actors: int) -> Iterator[Settle]:
    """Every assignment is answered by a commit."""
    schedule = Schedule(plan(shards), Limits(), time.monotonic)
    waiting = deque(schedule.handle(CapacityChanged(actors=actors)))
    while waiting:
        match waiting.popleft():
            case StartActor(actor=actor):
                waiting += schedule.handle(ActorReady(actor=actor))
            case Assign(actor=actor, lease=lease):
                waiting += schedule.handle(ShardCommitted(actor=actor, lease=lease, summary=summarise(lease)))
            case Settle() as settled:
                yield settled


def run_with_ray(shards: int, actors: int) -> Iterator[Settle]:
    with ray_cluster():
        resources = ActorResources(actors=actors, num_gpus=0, threads=1, frame_budget_bytes=1)
        pool = ActorPool(resources, ActorSpec(make_worker=StubWorker, log_level="warning"))
        schedule = Schedule(plan(shards), Limits(), time.monotonic)
        try:
            for outcome in drive(schedule, pool, lambda: actors, lambda: False):
                assert not isinstance(outcome, GiveUp), outcome
                yield outcome
        finally:
            pool.close()


class StubWorker:
    """Commits at once."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @contextlib.contextmanager
    def open(self, lease: Lease) -> Iterator[StubJob]:
        yield StubJob(lease, self._meter)


class StubJob:
    def __init__(self, lease: Lease, meter: Meter) -> None:
        self._lease, self._meter = lease, meter

    def run(self) -> None:
        with self._meter.at_work([self._lease.shard.shard_id]):
            pass
        self._meter.add(1, 0)

    def commit(self) -> ShardSummary:
        return summarise(self._lease)


def plan(shards: int) -> Iterator[ShardRef]:
    for number in range(shards):
        yield ShardRef(
            generation=0,
            shard_id=f"{number:016x}",
            index=number,
            bucket_key="49x480x720@8",
            num_clips=1,
            file="f",
            row_group=number,
        )


def summarise(lease: Lease) -> ShardSummary:
    shard = lease.shard
    return ShardSummary(
        shard_id=shard.shard_id,
        generation=0,
        index=shard.index,
        bucket_key=shard.bucket_key,
        attempt_id=lease.attempt_id,
        recipe="bench",
        num_rows=1,
        size_bytes=1,
    )


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    main()
