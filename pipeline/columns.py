"""The columns that pass through from the input to the output: their types, fixed by the first generation. Pure."""

from __future__ import annotations

import json
import logging
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)


class ColumnTypes:
    """Types of the columns that pass through, found while the items go by.

    Args:
        declared: the input's own types, where it has them; else they are inferred, text where values disagree.
        fixed: the types of the dataset so far, as its first generation fixed them.
    """

    def __init__(self, declared: pa.Schema | None, fixed: pa.Schema | None) -> None:
        self._declared = None if declared is None else pa.schema([_as_text_if_null(column) for column in declared])
        self._untyped = {column.name for column in declared or () if pa.types.is_null(column.type)}
        self._fixed = fixed
        self._kinds: dict[str, set[type]] = {}

    @property
    def declared(self) -> pa.Schema | None:
        """The input's own types; a column without a single value is text, which can take any later."""
        return self._declared

    def see(self, columns: dict[str, Any]) -> None:
        """Take note of what one file or item brings."""
        if self._declared is not None:
            return
        for name, value in columns.items():
            kinds = self._kinds.setdefault(name, set())
            if value is not None:
                kinds.add(type(value))

    def schema(self) -> pa.Schema:
        """The types of all that was seen.

        Raises:
            ConfigError: the input brings columns or types that the dataset does not have.
        """
        if self._fixed is None:
            return self._infer() if self._declared is None else self._declared
        for name in self._names() if self._declared is None else self._declared.names:
            self._check(name, self._fixed)
        return self._fixed

    def _check(self, name: str, fixed: pa.Schema) -> None:
        if name not in fixed.names:
            raise ConfigError(
                f"column {name!r} is not in this dataset (its columns: {', '.join(fixed.names) or 'none'}); "
                "leave it out of the input, or start a new dataset"
            )
        if self._declared is None or name in self._untyped:
            return
        if fixed.field(name).type != self._declared.field(name).type:
            kinds = f"{self._declared.field(name).type} here and {fixed.field(name).type} in this dataset"
            raise ConfigError(f"column {name!r} is {kinds}")

    def _names(self) -> list[str]:
        return [*self._kinds, *(["caption"] if "caption" not in self._kinds else [])]  # so that captions can be appended later

    def _infer(self) -> pa.Schema:
        fields = []
        for name in self._names():
            kinds = frozenset(self._kinds.get(name, ()))
            if len(kinds) > 1 and kinds not in _SCALARS:
                logger.warning("column %s holds %s: stored as text", name, " and ".join(sorted(kind.__name__ for kind in kinds)))
            fields.append(pa.field(name, _SCALARS.get(kinds, pa.string())))
        return pa.schema(fields)


def _as_text_if_null(column: pa.Field) -> pa.Field:
    return column.with_type(pa.string()) if pa.types.is_null(column.type) else column


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


def columns_array(rows: list[dict[str, Any]], columns: pa.Schema, uris: list[str]) -> pa.StructArray:
    """What passes through beside each item, as one Arrow column of structs.

    Args:
        uris: of the items' files, for the message.

    Raises:
        ConfigError: a value that its column cannot hold, as earlier generations or the other videos fixed it.
    """
    arrays = [_column_array(column, [cast_value(row.get(column.name), column.type) for row in rows], uris) for column in columns]
    return pa.StructArray.from_arrays(arrays, fields=list(columns))


def _column_array(column: pa.Field, values: list[Any], uris: list[str]) -> pa.Array:
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        if len(values) > 1:
            for value, uri in zip(values, uris, strict=True):
                _column_array(column, [value], [uri])
        raise ConfigError(
            f"column {column.name!r} is {column.type} in this dataset, but has another value for {uris[0]}: {error}"
        ) from error
