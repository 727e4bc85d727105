from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.dataset import Manifest
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    """Twelve samples in two shards, as the encode job leaves them."""
    (tmp_path / "spool").mkdir()
    storage = Storage(str(tmp_path / "dataset"))
    assert isinstance(make_dataset(storage, tmp_path / "spool", first_frame=True), Manifest)
    return storage
