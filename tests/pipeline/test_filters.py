"""Conditions as text: how they are read, and what passes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.filters import Filter, parse_filter

ROW = {
    "psnr": 31.5,
    "views": 7,
    "caption": "A Dog runs",
    "good": True,
    "bucket_key": "17x96x160@8",
    "none": None,
    "nan": math.nan,
}


@pytest.mark.parametrize(
    ("text", "column", "operator", "value"),
    [
        ("psnr>30", "psnr", ">", "30"),
        (" psnr >= 30 ", "psnr", ">=", "30"),
        ("caption~dog = cat", "caption", "~", "dog = cat"),
        ("bucket_key=17x96x160@8", "bucket_key", "=", "17x96x160@8"),
        ("a b!=c", "a b", "!=", "c"),
        ("n==3", "n", "=", "3"),
        ("caption=", "caption", "=", ""),
        ("caption~two\nlines", "caption", "~", "two\nlines"),
    ],
)
def test_text_is_column_operator_value(text: str, column: str, operator: str, value: str) -> None:
    assert parse_filter(text) == Filter(column, operator, value)


@pytest.mark.parametrize("text", ["", "psnr", ">30", "psnr 30", "  =3", "psnr>", "caption~"])
def test_another_form_is_an_error_that_shows_the_text(text: str) -> None:
    with pytest.raises(ConfigError, match="filter"):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("psnr>30", True),
        ("psnr>31.5", False),
        ("psnr>=31.5", True),
        ("psnr<1e3", True),
        ("psnr<inf", True),
        ("views<=7", True),
        ("views<10", True),  # as text, "7" is above "10"
        ("views=7.0", True),
        ("views!=7", False),
        ("caption~dog", True),
        ("caption~DOG R", True),
        ("caption~cat", False),
        ("caption=A Dog runs", True),
        ("caption=a dog runs", False),
        ("caption>A", True),
        ("bucket_key=17x96x160@8", True),
        ("bucket_key!=17x96x160@8", False),
        ("good=true", True),
        ("good!=True", False),
        ("views~7", True),
    ],
)
def test_numbers_compare_as_numbers_and_text_as_text(text: str, passes: bool) -> None:
    assert parse_filter(text).match(ROW) is passes


@pytest.mark.parametrize("column", ["none", "nan", "absent"])
@pytest.mark.parametrize("operator", ["=", "!=", "<", "<=", ">", ">=", "~"])
def test_nothing_is_true_of_a_missing_value(column: str, operator: str) -> None:
    assert parse_filter(f"{column}{operator}1").match(ROW) is False


@pytest.mark.parametrize("text", ["psnr>high", "psnr=nan", "good=1"])
def test_value_of_another_kind_than_the_column_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("=")[0].split(">")[0]):
        parse_filter(text).match(ROW)


@given(st.text(max_size=40), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans()))
def test_any_text_is_a_filter_or_a_config_error(text: str, value: Any) -> None:
    try:
        condition = parse_filter(text)
        assert isinstance(condition.match({condition.column: value}), bool)
        assert parse_filter(str(condition)) == condition
    except ConfigError:
        pass
