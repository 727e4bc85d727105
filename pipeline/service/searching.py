"""Conditions on whole columns: as ``Filter.match`` says for one row, in Arrow's time and without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filters import Filter
from pipeline.latents.types import plain_columns

Rows = npt.NDArray[np.bool_]

_COMPARE: dict[str, Callable[[Any, Any], pa.ChunkedArray]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def match_rows(table: pa.Table, conditions: Sequence[Filter]) -> Rows:
    """Which rows pass all conditions: bool ``[N]``.

    Raises:
        ConfigError: a column holds numbers, or truth values, and its condition's value is none.
    """
    passes = np.ones(len(table), np.bool_)
    for condition in conditions:
        passes &= _match_column(table[condition.column], condition)
    return passes


def _match_column(column: pa.ChunkedArray, condition: Filter) -> Rows:
    found = None
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if condition.operator == "~":
            return _contain(column, condition)
        found = _COMPARE[condition.operator](column, condition.value)
    elif condition.operator != "~" and pa.types.is_boolean(column.type):
        found = _COMPARE[condition.operator](column.cast(pa.int8()), int(condition.truth()))
    elif condition.operator != "~" and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        found = _compare_numbers(column, condition)
    return _match_each(column, condition) if found is None else _to_rows(found)


def _contain(column: pa.ChunkedArray, condition: Filter) -> Rows:
    found = _to_rows(pc.match_substring(pc.utf8_lower(column), condition.value.casefold()))
    # Only of ASCII is lower case all that casefold does: it makes "ss" of "ß".
    others = _to_rows(pc.invert(pc.string_is_ascii(column)))
    found[others] = _match_each(column.filter(pa.array(others)), condition)
    return found


def _compare_numbers(column: pa.ChunkedArray, condition: Filter) -> pa.ChunkedArray | None:
    """None: the numbers are too large for Arrow to compare them exactly, as Python does."""
    number, is_float = condition.number(), pa.types.is_floating(column.type)
    kind = pa.float64() if is_float or isinstance(number, float) else pa.int64()
    try:
        values, value = column.cast(kind), pa.scalar(number, kind)
    except (pa.ArrowException, OverflowError):
        return None
    if value.as_py() != number:
        return None
    found = _COMPARE[condition.operator](values, value)
    return pc.and_(found, pc.is_finite(values)) if is_float else found


def _match_each(column: pa.ChunkedArray, condition: Filter) -> Rows:
    name = condition.column
    return np.array([condition.match(plain_columns({name: value})) for value in column.to_pylist()], np.bool_)


def _to_rows(found: pa.ChunkedArray) -> Rows:
    rows: Rows = np.array(pc.fill_null(found, False).to_numpy(), np.bool_)
    return rows
