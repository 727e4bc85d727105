"""The quarantine of an output for a person: counted, shown, tried again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.requeue import read_quarantine, requeue
from pipeline.status import refuse_second_run
from pipeline.storage import Storage
from pipeline.types import Rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of what was left out is meant; an empty set means all."""

    reasons: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()
    ids: frozenset[str] = frozenset()

    def __call__(self, rejection: Rejection) -> bool:
        asked = ((self.reasons, rejection.reason), (self.stages, rejection.stage), (self.ids, rejection.sample_id))
        return all(not wanted or value in wanted for wanted, value in asked)


def list_lines(storage: Storage, choice: Choice, *, with_ids: bool = False) -> Iterator[str]:
    """A table of stages and reasons with their counts, or a line for each clip. Raises: DatasetError: no readable output."""
    chosen = [outcome.rejection for outcome in read_quarantine(storage) if choice(outcome.rejection)]
    if with_ids:
        for one in chosen:
            yield f"{one.sample_id}  {one.status}  {one.stage}/{one.reason}  {one.uri}"
        return
    counts = Counter((one.status, one.stage, one.reason) for one in chosen)
    for (status, stage, reason), count in counts.most_common():
        yield f"{count:8d}  {status:<11}  {stage:<7} {reason}"


def show_lines(storage: Storage, choice: Choice) -> Iterator[str]:
    """Every field of some rejections as JSON, and where each stands. Raises: DatasetError: no readable output."""
    for outcome in read_quarantine(storage):
        if choice(outcome.rejection):
            values = {**dataclasses.asdict(outcome.rejection), "stands_in": outcome.place}
            yield json.dumps(values, indent=2, ensure_ascii=False)


def requeue_lines(storage: Storage, choice: Choice) -> Iterator[str]:
    """Have what is quarantined tried again by the next run of the job, and say what that will be.

    Raises:
        DatasetError: no readable output.
        RunRefusedError: a run is alive on it.
    """
    refuse_second_run(storage, takeover=False)
    done = requeue(storage, choice)
    if done.generation is not None:
        to_do = f"{done.clips} clips to be tried again, {done.files} files to be looked at again"
        yield f"generation {done.generation.number}: {to_do}; run the job's usual command"
    if done.waiting:
        yield f"{done.waiting} were requeued before; run the job's usual command"
