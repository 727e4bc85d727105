"""Accounts of committed shards in a few files, so that a run that resumes need not read each shard's own footer.

    account/000012-more-<id>.parquet   one row a shard that was committed since the file before
    account/000040-all-<id>.parquet    one row for every shard so far; what is before it counts no more

They are copies, never the truth: a shard is committed if its object exists. One that cannot be read costs the next start
some requests. See ``stock``.
"""

from __future__ import annotations

import io
import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.account import LeftOut, count_left_out
from pipeline.errors import DatasetError
from pipeline.storage import Storage
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "account"
MAX_FILES = 16
"""Files that a start reads before it writes one for all."""

_NAME = re.compile(r"/\d{6,}-(?:more|all)-[0-9a-f]{8}\.parquet$")
_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("num_rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("left_out", pa.list_(pa.struct([("status", pa.string()), ("reason", pa.string()), ("count", pa.int64())]))),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardAccount:
    """What the account takes from one shard."""

    shard_id: str
    num_rows: int
    size_bytes: int
    left_out: LeftOut

    @classmethod
    def of(cls, summary: ShardSummary) -> ShardAccount:
        return cls(summary.shard_id, summary.num_rows, summary.size_bytes, count_left_out(summary.rejections))


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one output."""

    storage: Storage
    _last: int = field(default=0, init=False)
    _num_files: int = field(default=0, init=False)

    @property
    def are_many(self) -> bool:
        """Whether one file for all would save the next start something."""
        return self._num_files > MAX_FILES

    def read(self) -> dict[str, ShardAccount]:
        """By shard id; of two accounts of one shard the later. Files that are damaged, or not ours, count as absent."""
        names = list_checkpoints(self.storage)
        whole = [position for position, name in enumerate(names) if "-all-" in name]
        valid = names[whole[-1] :] if whole else names
        self._num_files = len(valid)
        self._last = max(map(_number, names), default=0)
        accounts: dict[str, ShardAccount] = {}
        for name in valid:
            try:
                found = read_checkpoint(self.storage, name)
            except DatasetError as error:
                logger.warning("%s: its shards are read again", error)
                continue
            accounts.update((account.shard_id, account) for account in found)
        return accounts

    def write(self, accounts: Iterable[ShardAccount], kind: Literal["more", "all"] = "more") -> None:
        """Raises: TransientError: storage does not answer."""
        table = pa.Table.from_pylist([_to_row(account) for account in accounts], schema=_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        name = f"{CHECKPOINT_FOLDER}/{self._last + 1:06d}-{kind}-{uuid.uuid4().hex[:8]}.parquet"
        self.storage.put_if_absent(name, sink.getvalue())
        self._last += 1
        self._num_files = 1 if kind == "all" else self._num_files + 1


def list_checkpoints(storage: Storage) -> list[str]:
    """Their paths, oldest first; files that are not ours are passed over."""
    found = (stored.uri for stored in storage.walk(CHECKPOINT_FOLDER, ".parquet"))
    return sorted(path for path in found if _NAME.search(path))


def read_checkpoint(storage: Storage, path: str) -> list[ShardAccount]:
    """Raises: DatasetError: it is damaged."""
    data = storage.read(path)
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        return [_from_row(row) for row in table.cast(_SCHEMA).to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: damaged checkpoint: {error}") from error


def _number(path: str) -> int:
    return int(path.rpartition("/")[2].partition("-")[0])


def _to_row(account: ShardAccount) -> dict[str, Any]:
    left_out = [
        {"status": status, "reason": reason, "count": count} for (status, reason), count in sorted(account.left_out.items())
    ]
    return {
        "shard_id": account.shard_id,
        "num_rows": account.num_rows,
        "size_bytes": account.size_bytes,
        "left_out": left_out,
    }


def _from_row(row: Mapping[str, Any]) -> ShardAccount:
    left_out = {(entry["status"], entry["reason"]): entry["count"] for entry in row["left_out"]}
    return ShardAccount(row["shard_id"], row["num_rows"], row["size_bytes"], left_out)
