from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.pipeline.fakes import FlakyFileSystem


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    """A dataset folder on the local disk."""
    return Storage(str(tmp_path / "output"))


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """The ``flaky://`` store, empty and without faults; retries do not wait."""
    monkeypatch.setattr("pipeline.storage.faults._FIRST_DELAY_S", 0.0)
    FlakyFileSystem.reset()
    yield FlakyFileSystem
    FlakyFileSystem.reset()
