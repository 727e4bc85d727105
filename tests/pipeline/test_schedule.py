"""Every shard ends exactly once, after a bounded number of tries, whatever happens to its attempts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.schedule import MAX_GIVEN_UP, MAX_UNCHARGED, Lease, Schedule
from tests.pipeline.fakes import make_shard_ref


def make_schedule(count: int = 3, max_attempts: int = 3) -> Schedule:
    return Schedule([make_shard_ref(number) for number in range(count)], max_attempts)


def take(schedule: Schedule) -> Lease:
    lease = schedule.lease()
    assert lease is not None
    return lease


def test_shards_are_leased_in_plan_order() -> None:
    schedule = make_schedule()
    assert [take(schedule).shard.index for _ in range(3)] == [0, 1, 2]
    assert schedule.lease() is None
    assert not schedule.is_done


def test_failed_shard_is_next() -> None:
    schedule = make_schedule()
    first, _ = take(schedule), take(schedule)
    schedule.failed(first, "error", charged=True)
    again = take(schedule)
    assert (again.shard, again.attempt) == (first.shard, 2)
    assert again.attempt_id != first.attempt_id


def test_shard_is_given_up_after_so_many_charged_attempts_with_the_last_error() -> None:
    schedule = make_schedule(1, max_attempts=2)
    for attempt in (1, 2):
        lease = take(schedule)
        assert lease.attempt == attempt
        schedule.failed(lease, f"error {attempt}", charged=True)
    assert schedule.is_done
    assert schedule.given_up == {lease.shard.shard_id: "error 2"}


def test_fault_of_the_surroundings_is_no_attempt() -> None:
    schedule = make_schedule(1, max_attempts=2)
    for _ in range(MAX_UNCHARGED - 1):
        lease = take(schedule)
        assert lease.attempt == 1
        schedule.failed(lease, "node died", charged=False)
    schedule.committed(take(schedule))
    assert schedule.is_done
    assert schedule.given_up == {}


def test_shard_that_only_ever_meets_faults_is_given_up() -> None:
    schedule = make_schedule(1)
    for _ in range(MAX_UNCHARGED):
        schedule.failed(take(schedule), "node died", charged=False)
    assert schedule.is_done
    assert list(schedule.given_up.values()) == ["node died"]


def test_run_is_hopeless_when_many_shards_are_given_up() -> None:
    schedule = make_schedule(MAX_GIVEN_UP, max_attempts=1)
    for number in range(MAX_GIVEN_UP):
        assert not schedule.is_hopeless
        assert schedule.num_pending == MAX_GIVEN_UP - number
        schedule.failed(take(schedule), "error", charged=True)
    assert schedule.is_hopeless


def test_attempt_ends_once() -> None:
    schedule = make_schedule(1)
    lease = take(schedule)
    schedule.committed(lease)
    with pytest.raises(KeyError):
        schedule.failed(lease, "late", charged=True)
    assert schedule.is_done


class ScheduleMachine(RuleBasedStateMachine):
    """Any interleaving of leases, commits and failures."""

    @initialize(count=st.integers(1, 6), max_attempts=st.integers(1, 4))
    def begin(self, count: int, max_attempts: int) -> None:
        self.schedule = make_schedule(count, max_attempts)
        self.max_attempts = max_attempts
        self.count = count
        self.out: list[Lease] = []
        self.committed: list[str] = []
        self.attempts: Counter[str] = Counter()

    @precondition(lambda self: self.schedule.num_pending)
    @rule()
    def lease(self) -> None:
        lease = take(self.schedule)
        self.attempts[lease.shard.shard_id] += 1
        assert lease.attempt <= self.max_attempts
        assert lease.shard.shard_id not in {other.shard.shard_id for other in self.out}
        self.out.append(lease)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.schedule.committed(lease)
        self.committed.append(lease.shard.shard_id)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), charged=st.booleans())
    def fail(self, data: st.DataObject, charged: bool) -> None:
        lease = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.schedule.failed(lease, "error", charged=charged)

    @precondition(lambda self: self.schedule.is_done)
    @rule()
    def rest(self) -> None:
        assert self.schedule.lease() is None

    @invariant()
    def every_shard_is_in_one_place(self) -> None:
        ended = [*self.committed, *self.schedule.given_up]
        assert len(set(ended)) == len(ended)
        assert len(ended) + len(self.out) + self.schedule.num_pending == self.count
        assert self.schedule.is_done == (len(ended) == self.count)
        assert all(tries <= self.max_attempts + MAX_UNCHARGED - 1 for tries in self.attempts.values())

    def teardown(self) -> None:
        """From any state, failures alone bring the run to an end."""
        if not hasattr(self, "schedule"):
            return
        for lease in self.out:
            self.schedule.failed(lease, "error", charged=True)
        tries = 0
        while (lease := self.schedule.lease()) is not None:  # type: ignore[assignment]
            self.schedule.failed(lease, "error", charged=tries % 2 == 0)
            tries += 1
        assert tries <= self.count * (self.max_attempts + MAX_UNCHARGED)
        assert self.schedule.is_done
        assert len(self.committed) + len(self.schedule.given_up) == self.count


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(max_examples=60, stateful_step_count=40)
