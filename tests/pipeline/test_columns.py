"""Types of the columns that pass through: declared, inferred, and fixed by the first generation."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.columns import ColumnTypes
from pipeline.errors import ConfigError

CAPTION = pa.schema([("caption", pa.string())])


def schema_of(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema(list(fields))


def column_schema(values: list[dict[str, Any]], declared: pa.Schema | None, fixed: pa.Schema | None) -> pa.Schema:
    types = ColumnTypes(declared, fixed)
    for columns in values:
        types.see(columns)
    return types.schema()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([True, None], pa.bool_()),
        (["a", "b"], pa.string()),
        ([1, "a"], pa.string()),
        ([True, 1], pa.string()),
        ([{"a": 1}], pa.string()),
        ([None], pa.string()),
    ],
)
def test_type_of_a_column_without_one_is_that_of_its_values_or_text(values: list[Any], kind: pa.DataType) -> None:
    found = column_schema([{"x": value} for value in values], None, None)
    assert found == schema_of(("x", kind), ("caption", pa.string()))


def test_caption_is_always_a_column_of_files() -> None:
    assert column_schema([{}], None, None) == CAPTION
    assert column_schema([], None, None) == CAPTION


def test_declared_types_count_and_a_column_of_nothing_is_text() -> None:
    declared = schema_of(("a", pa.int8()), ("b", pa.null()))
    assert column_schema([{"a": 1.5}], declared, None) == schema_of(("a", pa.int8()), ("b", pa.string()))


def test_first_generation_fixes_the_types() -> None:
    fixed = schema_of(("caption", pa.string()), ("views", pa.int64()))
    assert column_schema([{"caption": "x"}], None, fixed) is fixed
    assert column_schema([], schema_of(("views", pa.int64())), fixed) is fixed
    assert column_schema([], schema_of(("views", pa.null())), fixed) is fixed


def test_column_that_the_dataset_has_not_is_an_error_that_names_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"column 'tags' is not in this dataset \(its columns: caption\)"):
        column_schema([{"tags": "x"}], None, CAPTION)


def test_declared_type_that_the_dataset_has_not_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="column 'caption' is int64 here and string in this dataset"):
        column_schema([], schema_of(("caption", pa.int64())), CAPTION)


def test_values_of_several_kinds_are_told_once_a_column(caplog: pytest.LogCaptureFixture) -> None:
    column_schema([{"score": 1, "n": 1}, {"score": "high", "n": 2.5}, {"score": None, "n": None}, {"score": 2}], None, None)
    assert caplog.messages == ["column score holds int and str: stored as text"]
