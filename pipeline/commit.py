"""The one place where a shard becomes part of the dataset."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline import failpoints
from pipeline.dataset.writer import read_summary, shard_path
from pipeline.storage import Storage
from pipeline.types import ShardSummary

logger = logging.getLogger(__name__)


def commit_shard(storage: Storage, spool: Path, summary: ShardSummary) -> ShardSummary:
    """Put a finished shard under its final name unless one stands there.

    The object's existence is the commit. Losing a race is success: whichever attempt won, its account is
    returned. That also settles a put whose reply was lost, since the footer names the attempt.

    Raises:
        TransientError: storage does not answer; whether the shard is committed is not known.
    """
    path = shard_path(summary.bucket_key, summary.index, summary.shard_id)
    failpoints.reach("commit.before_put")
    if storage.put_file_if_absent(path, spool):
        failpoints.reach("commit.after_put")
        return summary
    winner = read_summary(storage, path)
    failpoints.reach("commit.after_put")
    if winner.attempt_id != summary.attempt_id:
        logger.info("commit lost path=%s attempt=%s winner=%s", path, summary.attempt_id, winner.attempt_id)
    return winner
