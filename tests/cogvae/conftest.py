import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from cogvae.exact.network import ExactDecoder, ExactEncoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    # The models here are tiny: on a busy machine, threads that wait for each other take ten times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test during which the exact engine did not run: it would have held the modules against themselves."""
    chunks: Counter[type] = Counter()

    def count(kind: type) -> None:
        original = kind.__call__

        def call(self: object, *args: object) -> object:
            chunks[kind] += 1
            return original(self, *args)

        monkeypatch.setattr(kind, "__call__", call)

    count(ExactEncoder)
    count(ExactDecoder)
    yield
    assert chunks, "the exact engine did not run"
