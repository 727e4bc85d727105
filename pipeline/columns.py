"""The columns that pass through from the input to the output: their types, fixed by the first generation. Pure."""

from __future__ import annotations

import json
import logging
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)


def column_schema(values: list[dict[str, Any]], declared: pa.Schema | None, fixed: pa.Schema | None) -> pa.Schema:
    """Types of the columns that pass through, fixed by the first generation of a dataset.

    Args:
        values: the columns of every video.
        declared: the input's own types, where it has them; else they are inferred, text where values disagree.
        fixed: the types of the dataset so far.

    Raises:
        ConfigError: the input brings columns or types that the dataset does not have.
    """
    if fixed is None:
        return _infer(values) if declared is None else pa.schema([_as_text_if_null(column) for column in declared])
    for name in _names(values) if declared is None else declared.names:
        if name not in fixed.names:
            raise ConfigError(
                f"column {name!r} is not in this dataset (its columns: {', '.join(fixed.names) or 'none'}); "
                "leave it out of the input, or start a new dataset"
            )
        if declared is None or pa.types.is_null(declared.field(name).type):
            continue
        if fixed.field(name).type != declared.field(name).type:
            raise ConfigError(f"column {name!r} is {declared.field(name).type} here and {fixed.field(name).type} in this dataset")
    return fixed


def _as_text_if_null(column: pa.Field) -> pa.Field:
    """A column without a single value has no type yet; as text it can take any later."""
    return column.with_type(pa.string()) if pa.types.is_null(column.type) else column


def _names(values: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for columns in values for name in columns)
    names.setdefault("caption", None)  # always there, so that captions can be appended later
    return list(names)


def _infer(values: list[dict[str, Any]]) -> pa.Schema:
    fields = []
    for name in _names(values):
        kinds = frozenset(type(columns[name]) for columns in values if columns.get(name) is not None)
        if len(kinds) > 1 and kinds not in _SCALARS:
            logger.warning("column %s holds %s: stored as text", name, " and ".join(sorted(kind.__name__ for kind in kinds)))
        fields.append(pa.field(name, _SCALARS.get(kinds, pa.string())))
    return pa.schema(fields)


_SCALARS = {
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


def cast_value(value: Any, kind: pa.DataType) -> Any:
    """A value as its column holds it: what is no text becomes JSON text in a text column."""
    if pa.types.is_floating(kind) and type(value) is int:
        return float(value)  # Arrow refuses those that a float cannot hold exactly
    if value is None or not pa.types.is_string(kind) or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def check_values(column: pa.Field, rows: list[dict[str, Any]]) -> None:
    """Raises: ConfigError: a value that the column cannot hold, as earlier generations or the other videos fixed it."""
    try:
        pa.array([row["columns"][column.name] for row in rows], column.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        if len(rows) > 1:
            for row in rows:
                check_values(column, [row])
        raise ConfigError(
            f"column {column.name!r} is {column.type} in this dataset, but has another value for {rows[0]['uri']}: {error}"
        ) from error
