"""A store that can be disturbed: SeaweedFS behind a proxy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from pipeline.storage import Storage
from tests.conftest import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.pipeline.fakes import FlakyFileSystem


@pytest.fixture
def proxy(s3: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def direct(s3: ObjectStore) -> Storage:
    """A folder of its own, by the straight way."""
    return Storage(s3.uri(uuid.uuid4().hex))


@pytest.fixture
def disturbed(direct: Storage, proxy: FaultProxy) -> Storage:
    """The same folder through the proxy."""
    return Storage(direct.uri, {"endpoint_url": proxy.endpoint})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without pauses, short clocks, small pieces."""
    monkeypatch.setattr("pipeline.storage.faults._FIRST_DELAY_S", 0.0)
    monkeypatch.setattr("pipeline.storage.client.REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr("pipeline.storage.client._SLOWEST_BYTES_PER_S", 1 << 40)
    monkeypatch.setattr("pipeline.storage.client.PIECE_BYTES", 64 << 10)


@pytest.fixture
def flaky() -> Iterator[type[FlakyFileSystem]]:
    """The ``flaky://`` store, empty and without faults."""
    FlakyFileSystem.reset()
    yield FlakyFileSystem
    FlakyFileSystem.reset()
