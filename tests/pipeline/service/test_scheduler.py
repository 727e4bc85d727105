from __future__ import annotations

import threading
import time

import pytest

from pipeline.service.errors import RequestError
from pipeline.service.scheduler import Job, Scheduler


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(max_queue: int = 100, max_batch: int = 3) -> tuple[Scheduler[str], Clock, list[str]]:
    clock, expired = Clock(), list[str]()
    return Scheduler(max_queue, max_batch, lambda job: expired.append(job.work), clock), clock, expired


def job(work: str, group: str = "a", deadline: float = 1e9) -> Job[str]:
    return Job(group=group, deadline=deadline, work=work)


def take(scheduler: Scheduler[str]) -> list[str]:
    return [job.work for job in scheduler.take_batch(0)]


def test_equal_shapes_are_taken_together_oldest_first() -> None:
    scheduler, _, _ = make()
    for work, group in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "a"), ("5", "a")):
        scheduler.submit(job(work, group))
    assert [take(scheduler) for _ in range(4)] == [["1", "3", "4"], ["2"], ["5"], []]


def test_a_rare_shape_waits_for_one_batch_only_however_many_of_another_come() -> None:
    scheduler, _, _ = make(max_batch=2)
    for number in range(10):
        scheduler.submit(job(f"many-{number}", "a"))
    scheduler.submit(job("rare", "b"))
    order = []
    for number in range(30):  # they keep coming
        order.append(take(scheduler))
        for copy in range(2):
            scheduler.submit(job(f"late-{number}-{copy}", "a"))
    assert order.index(["rare"]) == 5


def test_a_full_queue_refuses_with_a_time_to_come_again_and_takes_others_later() -> None:
    scheduler, _, _ = make(max_queue=2)
    scheduler.submit(job("1"))
    scheduler.submit(job("2"))
    with pytest.raises(RequestError) as caught:
        scheduler.submit(job("3"))
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None
    assert 1 <= caught.value.retry_after_s <= 60
    take(scheduler)
    scheduler.submit(job("3"))
    assert take(scheduler) == ["3"]


def test_the_longer_a_request_takes_the_later_the_next_is_told_to_come() -> None:
    waits = []
    for seconds in (1.0, 30.0):
        scheduler, _, _ = make(max_queue=4)
        for _ in range(50):
            scheduler.note_time(1, seconds)
        for number in range(4):
            scheduler.submit(job(str(number)))
        with pytest.raises(RequestError) as caught:
            scheduler.submit(job("late"))
        waits.append(caught.value.retry_after_s)
    assert waits == [2, 60]


def test_what_its_client_abandoned_takes_no_place_and_is_not_decoded() -> None:
    scheduler, _, _ = make(max_queue=1)
    gone = job("gone")
    scheduler.submit(gone)
    gone.abandoned = True
    assert len(scheduler) == 0
    scheduler.submit(job("next"))
    assert take(scheduler) == ["next"]


def test_a_job_past_its_deadline_is_told_and_not_decoded() -> None:
    scheduler, clock, expired = make()
    scheduler.submit(job("late", deadline=101))
    scheduler.submit(job("early", deadline=200))
    clock.now = 150
    assert take(scheduler) == ["early"]
    assert expired == ["late"]


def test_a_job_that_is_put_off_while_the_queue_is_looked_at_is_not_lost() -> None:
    class PutOff(Job[str]):
        __slots__ = ("reads",)

        @property
        def deadline(self) -> float:  # type: ignore[override]
            self.reads = getattr(self, "reads", 0) + 1
            return 101 if self.reads == 2 else 1e9

        @deadline.setter
        def deadline(self, value: float) -> None: ...

    scheduler, clock, expired = make()
    scheduler.submit(PutOff(group="a", deadline=0, work="put off"))
    clock.now = 150
    assert [*take(scheduler), *expired] == ["put off"]


def test_waiting_ends_when_a_job_comes() -> None:
    scheduler: Scheduler[str] = Scheduler(4, 4, lambda job: None)
    threading.Timer(0.05, lambda: scheduler.submit(job("1", deadline=time.monotonic() + 60))).start()
    assert [found.work for found in scheduler.take_batch(30)] == ["1"]


def test_a_closed_queue_gives_back_what_waited_and_refuses_the_rest() -> None:
    scheduler, _, _ = make()
    scheduler.submit(job("1"))
    assert [found.work for found in scheduler.close()] == ["1"]
    with pytest.raises(RequestError) as caught:
        scheduler.submit(job("2"))
    assert caught.value.status == 503
    assert scheduler.take_batch(30) == []
