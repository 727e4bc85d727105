"""A table with a video column: JSONL, CSV or Parquet. Its other columns pass through with their types."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipeline.config import InputConfig
from pipeline.errors import ConfigError, TerminalError
from pipeline.inputs import list_inputs, read_input
from pipeline.sources.source import SourceItem, SourceListing

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_BATCH_ROWS = 4096


def list_table(config: InputConfig) -> SourceListing:
    """The rows of one table or of a glob of tables of one schema, in order.

    Relative video paths start at the table's folder; columns named by ``input.video_column`` and what the
    pipeline makes itself do not pass through.

    Raises:
        ConfigError: nothing is there, the file does not parse, or the video column is missing.
    """
    files = [file.uri for file in list_inputs(config.uri, config.storage_options)]
    tables = {uri: _read_table(uri, config) for uri in files if uri.lower().endswith(TABLE_SUFFIXES)}
    if not tables:
        raise ConfigError(f"input.uri {config.uri}: no table; expected a file ending in {', '.join(TABLE_SUFFIXES)}")
    try:
        schema = pa.unify_schemas([table.schema for table in tables.values()])
    except pa.ArrowException as error:
        raise ConfigError(f"input.uri {config.uri}: the tables' columns do not fit together: {error}") from error
    columns = pa.schema([column for column in schema if column.name != config.video_column])
    return SourceListing(items=_rows(tables, config.video_column), schema=columns)


def _read_table(uri: str, config: InputConfig) -> pa.Table:
    try:
        data = read_input(uri, config.storage_options)
    except TerminalError as error:
        raise ConfigError(f"input.uri: {error.detail}") from error
    # One block, so that a column's type follows from all of its values and a long row is no error.
    block_bytes = min(max(len(data) + 1, 1 << 20), (1 << 31) - 1)
    try:
        if uri.lower().endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
        elif uri.lower().endswith(".csv"):
            header = next(csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig")), [])
            options = pa_csv.ConvertOptions(
                column_types={config.video_column: pa.string()}, strings_can_be_null=True, null_values=[""]
            )
            duplicates = {name for name in header if header.count(name) > 1}
            if duplicates:
                raise ConfigError(f"{uri}: two columns are named {', '.join(sorted(duplicates))}")
            table = pa_csv.read_csv(
                io.BytesIO(data),
                read_options=pa_csv.ReadOptions(block_size=block_bytes),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
                convert_options=options,
            )
        else:
            table = pa_json.read_json(io.BytesIO(data), read_options=pa_json.ReadOptions(block_size=block_bytes))
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: cannot be read as a table: {error}") from error
    if config.video_column not in table.column_names:
        raise ConfigError(
            f"{uri}: has no column {config.video_column!r}, only {', '.join(table.column_names)}; set input.video_column"
        )
    return table


def _rows(tables: dict[str, pa.Table], video_column: str) -> Iterator[SourceItem]:
    for uri, table in tables.items():
        number = 0
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in _values(batch, uri, number):
                number += 1
                video = row.pop(video_column)
                if not isinstance(video, str) or not video:
                    problem = f"{uri}: row {number} has {video!r:.100} for a video, expected a path or URI"
                elif (address := _resolve(video, uri)) is None:
                    problem = f"{uri}: row {number} has {video!r:.100} for a video, which leaves the bucket"
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


def _resolve(video: str, table_uri: str) -> str | None:
    """The address of a row's video; None if it climbs above the table's bucket, which would name another one."""
    is_absolute = "://" in video or video.startswith("/")
    if is_absolute:
        return video
    folder = table_uri.rpartition("/")[0]
    scheme, separator, place = folder.rpartition("://")
    if not separator:
        return posixpath.normpath(f"{folder}/{video}")
    bucket, _, prefix = place.partition("/")
    key = posixpath.normpath(posixpath.join(prefix, video))  # an object store knows no "./" and "../"
    return None if key.split("/")[0] == ".." else f"{scheme}://{bucket}/{key}"
