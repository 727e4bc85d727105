"""Every shard ends exactly once, after a bounded number of tries, whatever happens; only the guilty pay; it always ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.messages import ActorLost, ActorReady, CapacityChanged, Fault, Heartbeat, StopAsked, Tick
from pipeline.schedule import MAX_GIVEN_UP, MAX_LOST_STARTS, MAX_START_FAILURES, MAX_UNCHARGED, Limits, Schedule
from tests.pipeline.fakes import make_shard_ref
from tests.pipeline.simulation import CLIPS_PER_SHARD, SimCluster, make_cluster


def clip(shard: int, number: int) -> str:
    return f"{make_shard_ref(shard).shard_id}/{number}"


def condemned(cluster: SimCluster) -> dict[str, Fault]:
    """Of the attempts that were committed."""
    return {name: fault for lease in cluster.settled.values() for name, fault in lease.caution.condemned.items()}


def test_shards_are_leased_in_plan_order_a_second_only_while_there_are_more_than_actors() -> None:
    cluster = make_cluster(shards=5, actors=2)
    indices = [[lease.shard.index for lease in actor.leases] for actor in cluster.actors.values()]
    assert indices == [[0, 1], [2]]  # as actors became ready
    cluster.run_to_end()
    assert len(cluster.settled) == 5


def test_the_plan_is_read_as_far_as_it_is_needed() -> None:
    read: list[int] = []

    def plan() -> Any:
        for number in itertools.count():
            read.append(number)
            yield make_shard_ref(number)

    schedule = Schedule(plan(), Limits(), lambda: 0.0)
    schedule.handle(CapacityChanged(actors=2))
    schedule.handle(ActorReady(actor=0))
    assert len(read) < 10


def test_a_plan_without_shards_ends_at_once() -> None:
    cluster = SimCluster(0)
    cluster.tell(CapacityChanged(actors=1))
    assert cluster.end is not None
    assert cluster.starts == 0


def test_shard_is_given_up_after_so_many_charged_attempts_with_the_last_error() -> None:
    cluster = make_cluster(1, limits=Limits(max_attempts=2))
    (number,) = cluster.actors
    cluster.fail(number, "unexpected")
    cluster.fail(number, "unexpected")
    assert cluster.given_up == {make_shard_ref(0).shard_id: "unexpected"}
    assert cluster.end is not None
    assert cluster.end.error is None


def test_an_actor_that_fails_twice_in_a_row_or_has_no_memory_left_is_replaced() -> None:
    cluster = make_cluster(8)
    (number,) = cluster.actors
    cluster.fail(number, "unexpected")
    assert cluster.actors[number].killed_for is None
    cluster.fail(number, "unexpected")
    assert cluster.actors[number].killed_for
    cluster.run_to_end()
    assert (len(cluster.settled), cluster.starts) == (8, 2)
    cluster = make_cluster(1)
    (number,) = cluster.actors
    cluster.fail(number, "exhausted")
    assert cluster.actors[number].killed_for == "a fresh one after: exhausted"
    cluster.run_to_end()
    lease = cluster.settled[make_shard_ref(0).shard_id]
    assert (lease.attempt, lease.is_again) == (2, True)


def test_after_a_transient_failure_a_shard_waits_longer_each_time() -> None:
    cluster = make_cluster(1)
    (number,) = cluster.actors
    waits = []
    for _ in range(8):
        cluster.fail(number, "transient")
        failed_at = cluster.now
        while not cluster.actors[number].leases:
            cluster.wait(0.5)
        waits.append(cluster.now - failed_at)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_others_do_not_wait_for_a_shard_that_failed() -> None:
    cluster = make_cluster(2)
    (number,) = cluster.actors
    cluster.fail(number, "transient")
    assert [lease.shard.index for lease in cluster.actors[number].leases] == [1]


def test_a_shard_that_only_ever_meets_faults_is_given_up() -> None:
    cluster = make_cluster(1)
    for _ in range(MAX_UNCHARGED):
        assert cluster.given_up == {}
        cluster.lose(next(iter(cluster.actors)), "lost")
        cluster.wait(1)
        for number in cluster.actors:
            cluster.start(number)
    assert len(cluster.given_up) == 1


def test_preemption_never_charges() -> None:
    cluster = make_cluster(1, limits=Limits(max_attempts=1))
    for _ in range(MAX_UNCHARGED - 1):
        cluster.lose(next(iter(cluster.actors)), "lost")
        (number,) = cluster.actors
        cluster.start(number)
    cluster.run_to_end()
    assert len(cluster.settled) == 1


def test_the_run_stops_when_many_shards_are_given_up() -> None:
    cluster = make_cluster(MAX_GIVEN_UP + 5, limits=Limits(max_attempts=1))
    while cluster.end is None:
        for number in list(cluster.actors):
            if not cluster.actors[number].is_ready:
                cluster.start(number)
            cluster.fail(number, "unexpected")
        cluster.bury()
    assert MAX_GIVEN_UP <= len(cluster.given_up) <= MAX_GIVEN_UP + 1


# Blame


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("fault", ["crashed", "hung"])
def test_a_culprit_is_condemned_after_it_did_it_alone_twice_and_nobody_else_pays(batch_size: int, fault: Fault) -> None:
    limits = Limits(has_twins=False)  # a twin would hang too
    cluster = make_cluster(6, actors=2, culprits={clip(2, 1): fault}, batch_size=batch_size, limits=limits)
    assert cluster.run_to_end().error is None
    assert len(cluster.settled) == 6
    assert condemned(cluster) == {clip(2, 1): fault}
    assert {lease.attempt for lease in cluster.settled.values()} == {1}
    assert cluster.deaths == 3


def test_all_clips_of_a_shard_may_be_culprits() -> None:
    culprits: dict[str, Fault] = {clip(0, 0): "crashed", clip(0, 1): "hung", clip(0, 2): "crashed"}
    cluster = make_cluster(1, culprits=culprits, batch_size=3)
    cluster.run_to_end()
    assert condemned(cluster) == culprits


def test_a_clip_whose_actor_is_killed_each_time_is_condemned_late() -> None:
    cluster = make_cluster(1)
    deaths = 0
    while not cluster.settled:
        (number,) = cluster.actors
        actor = cluster.actors[number]
        if not actor.is_ready:
            cluster.start(number)
        elif actor.in_hand == (clip(0, 1),):
            deaths += 1
            cluster.lose(number, "killed")
        else:
            cluster.work(number)
    assert condemned(cluster) == {clip(0, 1): "killed"}
    assert deaths == 13


def test_a_careful_shard_that_dies_with_no_clip_in_hand_is_charged() -> None:
    cluster = make_cluster(1, limits=Limits(max_attempts=2))
    while cluster.end is None:
        (number,) = cluster.actors
        if cluster.actors[number].is_ready:
            cluster.lose(number, "crashed")  # before its first clip
        else:
            cluster.start(number)
    assert list(cluster.given_up) == [make_shard_ref(0).shard_id]
    assert cluster.starts == 3


def test_an_actor_whose_black_box_is_lost_blames_nobody() -> None:
    cluster = make_cluster(1, limits=Limits(max_attempts=1))
    for _ in range(5):
        (number,) = cluster.actors
        cluster.work(number)
        cluster.lose(number, "crashed", box=False)
        (number,) = cluster.actors
        cluster.start(number)
    assert cluster.leases()[0].attempt == 1
    assert cluster.leases()[0].caution.condemned == {}


# Deadlines


def test_an_actor_that_does_not_answer_is_killed() -> None:
    cluster = make_cluster(1)
    (number,) = cluster.actors
    for _ in range(12):
        cluster.now += 10
        cluster.tell(Tick())
    assert cluster.actors[number].killed_for is None
    cluster.now += 10
    cluster.tell(Tick())
    assert cluster.actors[number].killed_for == "hung"


def test_the_model_has_less_time_than_a_wait_for_input() -> None:
    for in_hand, limit_s, reason in (((clip(0, 0),), 1800, "hung"), ((), 7200, "stalled")):
        cluster = make_cluster(1)
        (number,) = cluster.actors
        cluster.actors[number].in_hand = in_hand
        cluster.beat()
        cluster.wait(limit_s)
        assert cluster.actors[number].killed_for is None
        cluster.wait(20)
        assert cluster.actors[number].killed_for == reason


def test_progress_keeps_an_actor_alive() -> None:
    cluster = make_cluster(1)
    (number,) = cluster.actors
    for _ in range(10):
        cluster.actors[number].step += 1
        cluster.wait(1600)
    assert cluster.actors[number].killed_for is None


def test_a_driver_that_was_away_blames_no_actor() -> None:
    cluster = make_cluster(1)
    (number,) = cluster.actors
    cluster.wait(60)
    cluster.now += 5000
    cluster.tell(Tick())
    assert cluster.actors[number].killed_for is None
    cluster.wait(1600)
    assert cluster.actors[number].killed_for is None


# Actors


def test_actors_that_fail_to_start_end_the_run_with_the_last_error() -> None:
    cluster = SimCluster(3)
    cluster.tell(CapacityChanged(actors=1))
    for _ in range(MAX_START_FAILURES):
        assert cluster.end is None
        cluster.start(next(iter(cluster.actors)), ok=False)
        cluster.wait(10)
    assert cluster.end is not None
    assert cluster.end.error is not None
    assert "3 VAE actors in a row died while starting, the last by: no weights" in cluster.end.error


def test_an_actor_that_never_gets_ready_is_a_failed_start_and_one_that_lost_its_node_is_none() -> None:
    cluster = SimCluster(3)
    cluster.tell(CapacityChanged(actors=1))
    for _ in range(2 * MAX_START_FAILURES):
        cluster.start(next(iter(cluster.actors)), ok=False, charged=False)
        cluster.wait(70)
    assert cluster.end is None
    for _ in range(MAX_START_FAILURES):
        cluster.wait(3700)
        cluster.bury()
        cluster.wait(10)
    assert cluster.end is not None
    assert cluster.end.error is not None


@pytest.mark.parametrize("how", ["dies", "waits"])
def test_a_place_where_no_actor_gets_ready_is_tried_ever_more_rarely_and_the_others_go_on(how: str) -> None:
    cluster = SimCluster(50)
    cluster.tell(CapacityChanged(actors=3))
    good = list(cluster.actors)[:2]
    for number in good:
        cluster.start(number)
    for _ in range(100):
        cluster.bury()
        for number in [number for number, actor in cluster.actors.items() if not actor.is_ready]:
            if how == "dies":
                cluster.start(number, ok=False)
        for number in good:
            cluster.actors[number].step += 1
        cluster.wait(200)
    assert cluster.end is None
    assert [number for number, actor in cluster.actors.items() if actor.is_ready] == good
    assert cluster.starts <= 3 + (20000 / 600 + 10 if how == "dies" else 20000 / 3600)
    assert cluster.run_to_end().error is None
    assert len(cluster.settled) == 50


def test_while_a_place_is_bad_an_actor_that_dies_elsewhere_is_replaced_at_once() -> None:
    cluster = SimCluster(50)
    cluster.tell(CapacityChanged(actors=2))
    first, bad = cluster.actors
    cluster.start(first)
    for _ in range(6):
        cluster.start(bad, ok=False)
        cluster.wait(100)
        bad = max(cluster.actors)
    cluster.start(bad, ok=False)
    cluster.lose(first, "crashed")
    fresh = list(cluster.actors)
    assert len(fresh) == 2  # nobody can say which of them gets the good place
    cluster.start(fresh[0], ok=False)
    assert cluster.end is None
    cluster.start(fresh[1])
    assert cluster.run_to_end().error is None


def test_a_run_whose_nodes_all_go_before_an_actor_is_ready_ends_after_many_storms() -> None:
    cluster = SimCluster(8)
    cluster.tell(CapacityChanged(actors=4))
    storms = 0
    while cluster.end is None:
        storms += bool(cluster.actors)
        for number in list(cluster.actors):
            cluster.start(number, ok=False, charged=False)
        cluster.wait(10)
    assert storms == MAX_LOST_STARTS
    assert cluster.now > 60 * (MAX_LOST_STARTS - 10)
    assert cluster.end.error == f"all VAE actors were lost while starting, {MAX_LOST_STARTS} times in a row: no weights"


def test_actors_come_with_the_cluster_and_are_never_more_than_shards() -> None:
    cluster = make_cluster(6, actors=1)
    cluster.tell(CapacityChanged(actors=4))
    assert len(cluster.actors) == 4
    cluster.tell(CapacityChanged(actors=40))
    assert len(cluster.actors) == 6


def test_an_actor_that_waits_for_a_place_that_is_gone_is_called_off_and_the_others_go_on() -> None:
    cluster = make_cluster(6, actors=2)
    cluster.lose(next(iter(cluster.actors)), "lost")
    assert len(cluster.actors) == 2
    cluster.tell(CapacityChanged(actors=1))
    cluster.bury()
    assert [actor.is_ready for actor in cluster.actors.values()] == [True]
    cluster.run_to_end()
    assert len(cluster.settled) == 6


def test_a_run_whose_cluster_has_no_place_ends_after_a_while_unless_it_comes_back() -> None:
    cluster = make_cluster(3)
    cluster.tell(CapacityChanged(actors=0))
    cluster.lose(next(iter(cluster.actors)), "lost")
    cluster.wait(500)
    cluster.tell(CapacityChanged(actors=1))
    cluster.wait(20)
    cluster.tell(CapacityChanged(actors=0))
    cluster.bury()
    cluster.wait(500)
    assert cluster.end is None
    cluster.wait(200)
    assert cluster.end is not None
    assert cluster.end.error == "the cluster has had no place for a VAE actor for 600 s"


# The tail


def test_a_straggler_runs_twice_and_the_first_commit_wins() -> None:
    cluster = make_cluster(2, actors=2)
    slow, fast = cluster.actors
    while len(cluster.settled) < 1:
        cluster.work(fast)
    cluster.wait(20)
    assert cluster.actors[fast].leases == []
    cluster.wait(40)
    (twin,) = cluster.actors[fast].leases
    assert twin.shard.index == 0
    while cluster.end is None:
        cluster.work(fast)
    assert cluster.settled[twin.shard.shard_id] is twin
    assert len(cluster.actors[slow].leases) == 1  # still at it, and nobody waits


@pytest.mark.parametrize("result", ["commit", "unexpected", "exhausted", "transient"])
def test_a_loser_s_result_is_dropped_whatever_it_is(result: str) -> None:
    cluster = make_cluster(3, actors=3)
    slow, fast, third = cluster.actors
    while len(cluster.settled) < 1:
        cluster.work(fast)
    cluster.wait(60)
    while len(cluster.settled) < 2:
        cluster.work(fast)
    assert cluster.end is None  # the third still has its own
    if result == "commit":
        while cluster.actors[slow].leases:
            cluster.work(slow)
    else:
        cluster.fail(slow, result)
    while cluster.end is None:
        cluster.work(third)
    assert len(cluster.settled) == 3


def test_a_shard_whose_twin_is_still_at_it_is_not_queued_again() -> None:
    cluster = make_cluster(2, actors=2)
    slow, fast = cluster.actors
    while len(cluster.settled) < 1:
        cluster.work(fast)
    cluster.wait(60)
    cluster.fail(slow, "unexpected")
    assert [lease.shard.index for lease in cluster.leases()] == [0]
    cluster.fail(fast, "unexpected")
    assert [lease.attempt for lease in cluster.leases()] == [3]


def test_where_storage_does_not_decide_who_is_first_there_are_no_twins() -> None:
    cluster = make_cluster(2, actors=2, limits=Limits(has_twins=False))
    _, fast = cluster.actors
    while len(cluster.settled) < 1:
        cluster.work(fast)
    cluster.wait(600)
    assert cluster.actors[fast].leases == []


def test_a_shard_that_nobody_has_begun_moves_to_an_actor_that_has_nothing_to_do() -> None:
    cluster = make_cluster(4, actors=1)
    (busy,) = cluster.actors
    assert len(cluster.actors[busy].leases) == 2
    cluster.tell(CapacityChanged(actors=4))
    for number in [number for number in cluster.actors if number != busy]:
        cluster.start(number)
    assert [actor.leases[0].shard.index for actor in cluster.actors.values()] == [0, 2, 3, 1]
    cluster.work(busy)  # hears of the revocation
    assert len(cluster.actors[busy].leases) == 1
    cluster.run_to_end()
    assert len(cluster.settled) == 4


# Stopping


def test_stopping_lets_shards_under_way_finish_and_begins_no_other() -> None:
    cluster = make_cluster(5)
    (number,) = cluster.actors
    cluster.tell(StopAsked())
    while cluster.end is None:
        cluster.work(number)
    assert len(cluster.settled) == 1


def test_stopping_ends_with_the_grace_period_whatever_is_under_way() -> None:
    cluster = make_cluster(5, limits=Limits(stop_grace_s=20))
    cluster.tell(StopAsked())
    cluster.now += 20
    cluster.tell(Tick())
    assert cluster.end is None
    cluster.now += 1
    cluster.tell(Tick())
    assert cluster.end is not None
    assert cluster.schedule.handle(ActorLost(actor=0, fault="killed", error="", at_work=None)) == []


class ScheduleMachine(RuleBasedStateMachine):
    """Any interleaving of work and faults on a simulated cluster, which watches; at the end the faults stop."""

    @initialize(
        shards=st.integers(1, 8),
        actors=st.integers(1, 4),
        batch_size=st.integers(1, 3),
        max_attempts=st.integers(1, 4),
        twin_s=st.sampled_from([None, 0.0, 30.0]),
        culprits=st.dictionaries(
            st.tuples(st.integers(0, 7), st.integers(0, CLIPS_PER_SHARD - 1)), st.sampled_from(["crashed", "hung"]), max_size=3
        ),
    )
    def begin(self, shards: int, actors: int, batch_size: int, max_attempts: int, twin_s: float | None, culprits: Any) -> None:
        self.cluster = SimCluster(
            shards,
            culprits={clip(*place): fault for place, fault in culprits.items()},
            batch_size=batch_size,
            limits=Limits(max_attempts=max_attempts, has_twins=twin_s is not None, twin_s=twin_s or 0.0),
        )
        self.cluster.tell(CapacityChanged(actors=actors))
        self.num_kills = 0

    def living(self, *, ready: bool = True, busy: bool = False) -> list[int]:
        return [
            number
            for number, actor in self.cluster.actors.items()
            if actor.is_ready == ready and actor.killed_for is None and (actor.leases or not busy)
        ]

    @precondition(lambda self: self.living(ready=False))
    @rule(data=st.data(), result=st.sampled_from(["ok", "ok", "ok", "broken", "preempted"]))
    def start(self, data: st.DataObject, result: str) -> None:
        number = data.draw(st.sampled_from(self.living(ready=False)))
        self.cluster.start(number, ok=result == "ok", charged=result == "broken")

    @precondition(lambda self: self.living(busy=True))
    @rule(data=st.data(), steps=st.integers(1, 6))
    def work(self, data: st.DataObject, steps: int) -> None:
        number = data.draw(st.sampled_from(self.living(busy=True)))
        for _ in range(steps):
            if number in self.living(busy=True) and self.cluster.end is None:
                self.cluster.work(number)

    @precondition(lambda self: [n for n in self.living(busy=True) if not self.cluster.actors[n].is_stuck])
    @rule(data=st.data(), failure=st.sampled_from(["transient", "unexpected", "exhausted"]))
    def fail(self, data: st.DataObject, failure: str) -> None:
        free = [number for number in self.living(busy=True) if not self.cluster.actors[number].is_stuck]
        self.cluster.fail(data.draw(st.sampled_from(free)), failure)

    @precondition(lambda self: self.living())
    @rule(data=st.data(), fault=st.sampled_from(["killed", "lost"]), box=st.booleans())
    def lose(self, data: st.DataObject, fault: Fault, box: bool) -> None:
        self.cluster.lose(data.draw(st.sampled_from(self.living())), fault, box=box)

    @rule()
    def bury(self) -> None:
        self.cluster.bury()

    @rule(seconds=st.sampled_from([1, 10, 100, 3000]))
    def wait(self, seconds: float) -> None:
        self.cluster.wait(seconds)

    @rule(seconds=st.sampled_from([1, 50, 5000]))
    def nobody_answers_for(self, seconds: float) -> None:
        self.cluster.now += seconds
        self.cluster.tell(Tick())

    @rule(actors=st.integers(0, 5))
    def change_capacity(self, actors: int) -> None:
        self.cluster.tell(CapacityChanged(actors=actors))

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.living()))
        self.cluster.tell(Heartbeat(actor=number, step=self.cluster.actors[number].step, is_at_work=False))

    @rule(maybe=st.integers(0, 9))
    def stop(self, maybe: int) -> None:
        if maybe == 0:
            self.cluster.tell(StopAsked())

    @invariant()
    def ends_by_the_grace_period(self) -> None:
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        if cluster.stopped_at is not None and cluster.end is None:
            cluster.tell(Tick())
            assert cluster.end is not None or cluster.now - cluster.stopped_at <= cluster.limits.stop_grace_s

    def teardown(self) -> None:
        """From any state, once faults stop, it ends, and every shard is in one place."""
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.tell(CapacityChanged(actors=2))
        end = cluster.run_to_end()
        decided = len(cluster.settled) + len(cluster.given_up)
        if end.error is None and cluster.stopped_at is None and len(cluster.given_up) < MAX_GIVEN_UP:
            assert decided == len(cluster.shards)
        for lease in cluster.settled.values():
            cluster.check_condemned(lease)


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(max_examples=150, stateful_step_count=60)
