"""``planned = written + quarantined + filtered + pending``, and when there is too much in quarantine."""

from __future__ import annotations

import pytest

from pipeline.account import Account, count_left_out
from tests.pipeline.dataset.builders import make_rejection


def make_account() -> Account:
    account = Account(planned=20)
    rejections = (make_rejection(0), make_rejection(1), make_rejection(2, "filtered"))
    account.add_counts(10, 1000, count_left_out(rejections))
    return account


def test_account_adds_up() -> None:
    account = make_account()
    account.add_rejections([make_rejection(3, "filtered")])
    assert (account.written, account.quarantined, account.filtered, account.pending) == (10, 2, 2, 6)
    assert account.size_bytes == 1000
    assert account.reasons == {"not_a_video": 4}


def test_summary_is_one_line_with_the_reasons() -> None:
    assert make_account().summary() == "planned 20 = written 10 + quarantined 2 + filtered 1 + pending 7; not_a_video 3"
    assert Account().summary() == "planned 0 = written 0 + quarantined 0 + filtered 0 + pending 0"


def test_account_as_values_for_json() -> None:
    assert make_account().as_dict() == {
        "planned": 20,
        "written": 10,
        "quarantined": 2,
        "filtered": 1,
        "pending": 7,
        "size_bytes": 1000,
        "reasons": {"not_a_video": 3},
    }


@pytest.mark.parametrize(
    ("limit", "over"), [(None, False), (2, False), (1, True), (0, True), (0.1, False), (0.09, True), (0.99, False)]
)
def test_limit_is_a_count_or_below_1_a_share_of_the_plan(limit: float | None, over: bool) -> None:
    assert make_account().is_over(limit) is over


def test_filtered_clips_count_towards_no_limit() -> None:
    account = Account(planned=2)
    account.add_rejections([make_rejection(0, "filtered")])
    assert not account.is_over(0)
