"""Evidence from death to death: who is a suspect, who is condemned, and who pays."""

from __future__ import annotations

import pytest

from pipeline.blame import KILLS_BEFORE_CARE, STRIKES, Trouble
from pipeline.messages import Caution, Fault


def counts(trouble: Trouble) -> tuple[int, int]:
    return trouble.charged, trouble.uncharged


@pytest.mark.parametrize("fault", ["crashed", "hung"])
def test_the_first_death_accuses_nobody(fault: Fault) -> None:
    trouble = Trouble()
    trouble.accuse(("a",), fault, was_careful=False)
    assert trouble.caution() == Caution(is_careful=True, suspects=frozenset("a"))
    assert counts(trouble) == (0, 1)


def test_deaths_of_attempts_without_care_are_no_strikes_however_many() -> None:
    trouble = Trouble()
    for _ in range(20):  # such as twins, or what was beside another shard
        trouble.accuse(("a",), "crashed", was_careful=False)
        trouble.accuse((), "crashed", was_careful=False)
        trouble.accuse(None, "hung", was_careful=True)
    assert trouble.condemned == {}
    assert trouble.charged == 0


@pytest.mark.parametrize(("fault", "strikes"), STRIKES.items())
def test_a_clip_is_condemned_after_so_many_deaths_alone_and_for_what_it_did(fault: Fault, strikes: int) -> None:
    trouble = Trouble()
    for _ in range(strikes - 1):
        trouble.accuse(("a",), fault, was_careful=True)
        trouble.accuse(("b",), fault, was_careful=True)
    assert trouble.condemned == {}
    trouble.accuse(("a",), fault, was_careful=True)
    assert trouble.condemned == {"a": fault}
    assert trouble.charged == 0


def test_clips_that_died_together_are_suspects_and_get_no_strike() -> None:
    trouble = Trouble()
    for _ in range(5):
        trouble.accuse(("a", "b"), "crashed", was_careful=True)
    assert trouble.caution().suspects == {"a", "b"}
    assert trouble.condemned == {}


def test_kills_from_outside_bring_care_late_and_are_never_charged() -> None:
    trouble = Trouble()
    for number in range(1, KILLS_BEFORE_CARE + 1):
        assert not trouble.is_careful
        trouble.accuse(("a",), "killed", was_careful=False)
        assert trouble.uncharged == number
    assert trouble.is_careful
    trouble.accuse((), "killed", was_careful=True)
    assert trouble.charged == 0


def test_a_crash_alone_with_no_clip_in_hand_is_the_shard_s() -> None:
    trouble = Trouble()
    trouble.accuse((), "crashed", was_careful=True)
    assert counts(trouble) == (1, 0)


def test_a_verdict_names_stage_and_fault() -> None:
    caution = Caution(is_careful=True, condemned={"a": "hung", "b": "crashed", "c": "killed"})
    assert caution.verdict("d", "encode") is None
    for name, reason in (("a", "hung_actor"), ("b", "crashed_actor"), ("c", "crashed_actor")):
        verdict = caution.verdict(name, "encode")
        assert verdict is not None
        assert (verdict.stage, verdict.reason) == ("encode", reason)
