"""What the tests of the HTTP interface share: asking, and looking at answers."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import av
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.pipeline.service.conftest import TOKEN
from tests.pipeline.service.fakes import make_body

SCALE = {"scale": "cogvideox-5b"}
Make = Callable[..., httpx.Client]


def decode(client: httpx.Client, body: bytes | None = None, **parameters: Any) -> httpx.Response:
    return client.post("/v1/decode", params={**SCALE, **parameters}, content=make_body() if body is None else body)


def count_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def reason(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert error["detail"]
    found: str = error["reason"]
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
