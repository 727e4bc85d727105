"""A table with a column of paths: JSONL, CSV or Parquet. Its other columns pass through with their types."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, TerminalError
from pipeline.inputs import list_inputs, read_input
from pipeline.sources.source import SourceItem, SourceListing, resolve_address

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_BATCH_ROWS = 4096


def list_table(uri: str, column: str, noun: Literal["video", "latent"], options: dict[str, Any] | None = None) -> SourceListing:
    """The rows of one table or of a glob of tables of one schema, in order.

    Relative paths start at the table's folder; the column of paths does not pass through.

    Args:
        column: holds the paths; the setting ``input.<noun>_column`` names it.

    Raises:
        ConfigError: nothing is there, the file does not parse, or the column is missing.
    """
    files = [file.uri for file in list_inputs(uri, options)]
    tables = {file: _read_table(file, column, noun, options) for file in files if file.lower().endswith(TABLE_SUFFIXES)}
    if not tables:
        raise ConfigError(f"input.uri {uri}: no table; expected a file ending in {', '.join(TABLE_SUFFIXES)}")
    try:
        schema = pa.unify_schemas([table.schema for table in tables.values()])
    except pa.ArrowException as error:
        raise ConfigError(f"input.uri {uri}: the tables' columns do not fit together: {error}") from error
    rest = pa.schema([field for field in schema if field.name != column])
    return SourceListing(items=_rows(tables, column, noun), schema=rest)


def _read_table(uri: str, column: str, noun: str, options: dict[str, Any] | None) -> pa.Table:
    try:
        data = read_input(uri, options)
    except TerminalError as error:
        raise ConfigError(f"input.uri: {error.detail}") from error
    # One block, so that a column's type follows from all of its values and a long row is no error.
    block_bytes = min(max(len(data) + 1, 1 << 20), (1 << 31) - 1)
    try:
        if uri.lower().endswith(".parquet"):
            table = pq.ParquetFile(pa.BufferReader(data)).read()
        elif uri.lower().endswith(".csv"):
            header = next(csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig")), [])
            conversion = pa_csv.ConvertOptions(column_types={column: pa.string()}, strings_can_be_null=True, null_values=[""])
            duplicates = {name for name in header if header.count(name) > 1}
            if duplicates:
                raise ConfigError(f"{uri}: two columns are named {', '.join(sorted(duplicates))}")
            table = pa_csv.read_csv(
                io.BytesIO(data),
                read_options=pa_csv.ReadOptions(block_size=block_bytes),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
                convert_options=conversion,
            )
        else:
            table = pa_json.read_json(io.BytesIO(data), read_options=pa_json.ReadOptions(block_size=block_bytes))
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: cannot be read as a table: {error}") from error
    if column not in table.column_names:
        raise ConfigError(f"{uri}: has no column {column!r}, only {', '.join(table.column_names)}; set input.{noun}_column")
    return table


def _rows(tables: dict[str, pa.Table], column: str, noun: str) -> Iterator[SourceItem]:
    for uri, table in tables.items():
        number = 0
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in _values(batch, uri, number):
                number += 1
                path = row.pop(column)
                if not isinstance(path, str) or not path:
                    problem = f"{uri}: row {number} has {path!r:.100} for a {noun}, expected a path or URI"
                elif (address := resolve_address(path, uri)) is None:
                    problem = f"{uri}: row {number} has {path!r:.100} for a {noun}, which leaves the bucket"
                else:
                    yield SourceItem(uri=address, columns=row)
                    continue
                yield SourceItem(uri=f"{uri}#{number}", columns=row, problem=problem)


def _values(batch: pa.RecordBatch, uri: str, rows_before: int) -> list[dict[str, Any]]:
    """Raises: ConfigError: a value that Python cannot hold, as text that is not UTF-8 or a date of the year 20000."""
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except (ValueError, OverflowError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=rows_before + 1):
                try:
                    value.as_py()
                except (ValueError, OverflowError) as error:
                    raise ConfigError(f"{uri}: column {name!r}, row {number}: cannot be read: {error}") from error
        raise
