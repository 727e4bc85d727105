from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from pipeline.service.app import build_app
from pipeline.service.config import ServedDataset, ServiceConfig
from pipeline.service.core import DecoderService
from pipeline.service.datasets import ServedDatasets
from pipeline.service.gate import Gate, TokenDigests
from pipeline.service.metrics import ServiceMetrics
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_dataset
from tests.pipeline.service.fakes import MODEL, FakeDecoder

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples with captions and first frames."""
    folder = tmp_path_factory.mktemp("latents")
    make_dataset(Storage(str(folder / "dataset")), folder, first_frame=True)
    return folder / "dataset"


@pytest.fixture
def engine() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def make_service(engine: FakeDecoder, dataset: Path, tmp_path: Path) -> Iterator[Callable[..., DecoderService]]:
    """One replica's service over the fake model; keyword arguments are settings."""
    services: list[DecoderService] = []

    def make(token: str | None = None, datasets: dict[str, str] | None = None, **settings: Any) -> DecoderService:
        limits = ServiceConfig(**{"folder": str(tmp_path / "disk"), "deadline_s": 20, **settings})
        shown = {name: ServedDataset(uri=uri) for name, uri in (datasets or {"clips": str(dataset)}).items()}
        gate = Gate(TokenDigests.of(token) if token else None)
        served = ServedDatasets(shown, MODEL.scaling_factor)
        services.append(DecoderService(engine, MODEL, "model", limits, served, gate, ServiceMetrics("replica-1")))
        return services[-1]

    yield make
    engine.gate.set()
    for service in services:
        service.close()


@pytest.fixture
def make_client(make_service: Callable[..., DecoderService]) -> Iterator[Callable[..., httpx.Client]]:
    """An HTTP client of a service with these settings, over a socket."""
    with contextlib.ExitStack() as open_servers:

        def make(**settings: Any) -> httpx.Client:
            url = open_servers.enter_context(running(build_app(make_service(**settings))))
            return open_servers.enter_context(httpx.Client(base_url=url, timeout=30))

        yield make


@pytest.fixture
def client(make_client: Callable[..., httpx.Client]) -> httpx.Client:
    return make_client()


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """A server of an application in a thread; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
