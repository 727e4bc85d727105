from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import Storage
from pipeline.validation import Finding, Validation
from tests.pipeline.outputs import make_output

FAILED_CLIP = "videos/3.mp4"


def find(storage: Storage, sample: int | None = None) -> list[Finding]:
    """Everything that validation says; nothing of it may raise."""
    return list(Validation(storage=storage, threads=2, sample=sample).findings())


def kinds(storage: Storage, sample: int | None = None) -> list[str]:
    return [finding.what for finding in find(storage, sample)]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def dataset(output: Storage, spool: Path) -> Storage:
    """Twelve clips in three shards, one of them rejected in its shard, and two files that planning left out."""
    make_output(output, spool, failing={FAILED_CLIP})
    return output
