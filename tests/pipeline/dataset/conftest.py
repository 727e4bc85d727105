from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.dataset import Manifest
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_dataset


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "dataset"))


@pytest.fixture
def published(storage: Storage, spool: Path) -> Manifest:
    """Twelve samples in two shards of ``storage``, with log-variance and first frames."""
    return make_dataset(storage, spool, first_frame=True)


@pytest.fixture
def remote() -> Iterator[Storage]:
    """An object store in memory."""
    name = uuid.uuid4().hex
    yield Storage(f"memory://{name}")
    MemoryFileSystem().rm(f"/{name}", recursive=True) if MemoryFileSystem().exists(f"/{name}") else None


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """Path, first byte and end of every read from the object store in memory."""
    seen: list[tuple[str, int | None, int | None]] = []
    read = MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **rest: object) -> bytes:
        seen.append((path, start, end))
        data: bytes = read(self, path, start=start, end=end, **rest)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    return seen
