"""What a person sees while a run lasts."""

from __future__ import annotations

import logging

import pytest

from pipeline.account import Account
from pipeline.progress import RATE_WINDOW_S, ProgressReport, RateMeter, _duration


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_rate_is_that_of_the_last_two_minutes() -> None:
    now = 0.0
    meter = RateMeter(clock=lambda: now)
    assert meter.rates() == (0.0, 0.0)
    meter.add(0, 0)
    assert meter.rates() == (0.0, 0.0)
    for now in (10.0, 20.0):
        meter.add(int(now), int(now) * 49)
    assert meter.rates() == (1.0, 49.0)
    for now in (20.0 + RATE_WINDOW_S, 30.0 + RATE_WINDOW_S):  # noqa: B007
        meter.add(20, 20 * 49)
    assert meter.rates() == (0.0, 0.0)


def test_log_lines_come_at_intervals_and_say_how_far(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    with ProgressReport("log", every_s=3600) as report:
        report.probed(32, 100)
        report.probed(64, 100)
    assert lines(caplog) == ["probing done=32 total=100 0.0 files/s eta ?"]
    with ProgressReport("log", every_s=1e-9) as report:
        report.worked("encoding", Account(planned=10, written=4), 4, 196)
    assert lines(caplog)[1] == "encoding done=4 total=10 0.00 clips/s 0 frames/s eta ?"


def test_reason_of_what_is_left_out_is_told_when_its_count_grows(caplog: pytest.LogCaptureFixture) -> None:
    account = Account(planned=10)
    with ProgressReport("log", every_s=3600) as report:
        for count in (1, 1, 3):
            account.reasons["corrupt"] = count
            report.worked("encoding", account, 0, 0)
    assert [line for line in lines(caplog) if "left out" in line] == [
        "left out reason=corrupt count=1",
        "left out reason=corrupt count=3",
    ]


def test_bar_shows_phase_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("bar", every_s=1) as report:
        report.probed(32, 100)
        report.worked("encoding", Account(planned=10, written=4), 4, 196)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "encoding" in shown.err
    assert "4/10" in shown.err


def test_auto_is_a_log_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("auto", every_s=1) as report:
        report.probed(1, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("clips", "rate", "text"), [(10, 0.0, "?"), (0, 1.0, "0m00s"), (75, 1.0, "1m15s"), (3600, 1.0, "1h00m"), (10, 0.001, "2h46m")]
)
def test_time_left_is_short(clips: int, rate: float, text: str) -> None:
    assert _duration(clips, rate) == text
