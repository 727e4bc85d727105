"""The service of the viewer's tests: the real application in a thread, without Ray, its model a painter of grey."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.engine import ModelInfo
from pipeline.errors import TerminalError
from pipeline.service.app import build_app
from pipeline.service.config import ServedDataset, ServiceConfig
from pipeline.service.core import DecoderService
from pipeline.service.datasets import ServedDatasets
from pipeline.service.gate import Gate, TokenDigests
from pipeline.service.metrics import ServiceMetrics
from pipeline.types import Frames

MODEL = ModelInfo(fingerprint="grey", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)


def grey_of(frame: int) -> int:
    """What the model paints."""
    return 40 + 10 * frame


class GreyEngine:
    """A model whose frame n is plain ``grey_of(n)``."""

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        return [self._paint(latent) for latent in latents]

    def decode_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[list[Frames]]:
        yield [self._paint(latent) for latent in latents]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    def _paint(self, latent: torch.Tensor) -> Frames:
        _, F, H, W = latent.shape
        greys = np.array([grey_of(frame) for frame in range(4 * (F - 1) + 1)], np.uint8)
        return np.broadcast_to(greys[:, None, None, None], (len(greys), 8 * H, 8 * W, 3)).copy()


@dataclass
class Refusal:
    """An answer in the service's place, so many times."""

    path_end: str
    status: int
    detail: str
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class Obstacles:
    """ASGI middleware for what the service does only on a bad day."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.clear()

    def clear(self) -> None:
        self.refusals: list[Refusal] = []
        self.held: str | None = None
        """Requests whose path ends so get no answer."""
        self.given_up: list[str] = []
        """Paths of those whose client left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        for refusal in self.refusals:
            if path.endswith(refusal.path_end) and refusal.times > 0:
                refusal.times -= 1
                body = {"error": {"reason": "test", "detail": refusal.detail}}
                return await JSONResponse(body, refusal.status, refusal.headers)(scope, receive, send)
        if self.held and path.endswith(self.held):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.given_up.append(path)
            return None
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class RunningService:
    base: str
    obstacles: Obstacles
    stop: Callable[[], None]


@contextlib.contextmanager
def run_service(datasets: Mapping[str, Path], folder: Path, *, token: str | None = None) -> Iterator[RunningService]:
    """Serve datasets on a free loopback port."""
    limits = ServiceConfig(folder=str(folder))
    served = ServedDatasets({name: ServedDataset(uri=str(uri)) for name, uri in datasets.items()}, MODEL.scaling_factor)
    gate = Gate(TokenDigests.of(token) if token else None)
    engine: Any = GreyEngine()
    service = DecoderService(engine, MODEL, "grey", limits, served, gate, ServiceMetrics("test"))
    obstacles = Obstacles(build_app(service))
    config = uvicorn.Config(obstacles, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")

    def stop() -> None:
        server.should_exit = True
        thread.join(30)

    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "uvicorn did not start; its log is above"
            assert time.monotonic() < deadline, "uvicorn did not start in time"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RunningService(f"http://127.0.0.1:{port}", obstacles, stop)
    finally:
        stop()
        service.close()
