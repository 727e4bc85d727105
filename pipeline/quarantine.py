"""``quarantine.parquet``: one row per item that is not in the output, with its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage
from pipeline.types import Rejection

QUARANTINE_PATH = "quarantine.parquet"
_ROWS_PER_BATCH = 1 << 14

REJECTION_SCHEMA = pa.schema(
    [
        pa.field(f.name, pa.int64() if f.name in ("frame_start", "frame_end") else pa.string(), nullable=False)
        for f in dataclasses.fields(Rejection)
    ]
)
"""One row per clip that is left out: of the quarantine table and of the plan's own."""


def read_quarantine_table(storage: Storage) -> Iterator[Rejection]:
    """The rows of a finished output's table. Raises: FileNotFoundError; pa.ArrowException: it is damaged."""
    for batch in pq.ParquetFile(pa.BufferReader(storage.read(QUARANTINE_PATH))).iter_batches():
        yield from (Rejection(**row) for row in batch.to_pylist())


class QuarantineTable:
    """Rejections into one Parquet file on local disk, a batch at a time; ``data`` holds it after the ``with`` block."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.data = b""
        self._batch: list[Rejection] = []

    def add(self, rejection: Rejection) -> None:
        self.counts[rejection.status] += 1
        self._batch.append(rejection)
        if len(self._batch) >= _ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        rows = [{name: getattr(rejection, name) for name in REJECTION_SCHEMA.names} for rejection in self._batch]
        self._batch.clear()
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=REJECTION_SCHEMA))

    def __enter__(self) -> QuarantineTable:
        self._held = contextlib.ExitStack()
        self._file = self._held.enter_context(tempfile.TemporaryFile())
        self._writer = pq.ParquetWriter(self._file, REJECTION_SCHEMA, compression="zstd")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._held:
            if error is None:
                self._flush()
            self._writer.close()
            if error is None:
                self._file.seek(0)
                self.data = self._file.read()
