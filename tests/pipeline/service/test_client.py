from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pipeline.client import AnswerCutError, DecoderClient, ends_whole
from pipeline.service.errors import RequestError
from tests.pipeline.service.conftest import TOKEN
from tests.pipeline.service.fakes import FakeDecoder, make_latent

JSON_ERROR = b'{"error": {"reason": "queue_full", "detail": "come again"}}'
MFRA = b"\x00\x00\x00\x18mfra" + b"\x00\x00\x00\x10mfro\x00\x00\x00\x00\x00\x00\x00\x18"


class Script:
    """A server that gives prepared answers, one a connection, and closes it."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                received = b""
                while b'"latent"' not in received and not received.startswith(b"GET"):
                    received += connection.recv(65536)
                connection.settimeout(0.2)
                try:
                    while connection.recv(65536):
                        pass
                except TimeoutError:
                    pass
                self.requests += 1
                connection.sendall(answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def reply(status: int, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"content-length: {len(body) if length is None else length}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(body: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n" + f"{len(body):x}\r\n".encode() + body + b"\r\n" + end


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def make(*answers: bytes) -> Script:
        scripts.append(Script(*answers))
        return scripts[-1]

    yield make
    for made in scripts:
        made.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited before each repetition; it does not really wait."""
    seen: list[float] = []
    monkeypatch.setattr("pipeline.client.time.sleep", seen.append)
    return seen


def decode(url: str, patience_s: float = 60, **parameters: Any) -> bytes:
    with DecoderClient(url, patience_s=patience_s) as client:
        return client.decode(make_latent(), scale="none", **parameters)


def test_it_comes_back_when_the_service_says(script: Any, waits: list[float]) -> None:
    server = script(reply(429, JSON_ERROR, "retry-after: 7"), reply(503, JSON_ERROR), reply(200, b"video"))
    assert decode(server.url) == b"video"
    assert len(waits) == 2
    assert 7 <= waits[0] < 10
    assert waits[1] < 7


@pytest.mark.parametrize("lost", [b"", reply(500, b"Internal Server Error"), reply(502), reply(200, b"vid", length=5)])
def test_a_lost_replica_or_connection_is_tried_again(script: Any, waits: list[float], lost: bytes) -> None:
    server = script(lost, reply(200, b"video"))
    assert decode(server.url) == b"video"
    assert server.requests == 2


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_what_the_service_refuses_is_not_asked_again(script: Any, waits: list[float], status: int) -> None:
    body = b'{"error": {"reason": "why", "detail": "because"}}'
    server = script(reply(status, body), reply(200, b"video"))
    with pytest.raises(RequestError, match="because") as caught:
        decode(server.url)
    assert (caught.value.status, caught.value.reason, server.requests) == (status, "why", 1)


def test_patience_ends(script: Any) -> None:
    server = script(*[reply(429, JSON_ERROR, "retry-after: 2")] * 3)
    with pytest.raises(RequestError, match="come again"):
        decode(server.url, patience_s=1)
    assert server.requests == 1


def test_a_service_that_is_not_there_is_waited_for_and_then_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(httpx.ConnectError):
        decode(url, patience_s=1)
    assert 0.2 < time.monotonic() - started < 10


@pytest.mark.parametrize("cut", [chunked(b"beginning" * 10), chunked(b"beginning" * 10, end=b"")], ids=["ended", "not ended"])
def test_a_stream_that_is_cut_is_never_taken_for_whole(script: Any, waits: list[float], cut: bytes) -> None:
    whole = b"video" * 10 + MFRA
    assert decode(script(cut, chunked(whole)).url, stream=True) == whole
    with DecoderClient(script(cut).url) as client, pytest.raises(httpx.TransportError):
        list(client.decode_stream(make_latent(), scale="none"))


def test_a_stream_is_tried_again_before_its_first_bytes_only(script: Any, waits: list[float]) -> None:
    server = script(reply(503, JSON_ERROR), chunked(b"beginning" * 10))
    with DecoderClient(server.url) as client:
        stream = client.decode_stream(make_latent(), scale="none")
        assert next(stream).startswith(b"beginning")
        with pytest.raises(AnswerCutError):
            list(stream)
    assert server.requests == 2


@pytest.mark.parametrize(
    ("tail", "is_whole"),
    [
        (b"x" * 50 + MFRA, True),
        (MFRA, True),
        (MFRA[:-1], False),
        (b"x" * 50, False),
        (b"", False),
        (b"x" * 50 + MFRA[:-4] + b"\x00\x00\x00\x19", False),
        (b"x" * 50 + MFRA[:-4] + b"\x00\x00\x00\x00", False),
    ],
)
def test_a_whole_fragmented_mp4_ends_in_a_box_that_says_its_size(tail: bytes, is_whole: bool) -> None:
    assert ends_whole(tail) is is_whole


@pytest.fixture
def service(make_client: Callable[..., httpx.Client]) -> Iterator[DecoderClient]:
    with DecoderClient(str(make_client(token=TOKEN).base_url), TOKEN, patience_s=5) as client:
        yield client


def test_a_file_appears_under_its_name_when_it_is_whole(service: DecoderClient, engine: FakeDecoder, tmp_path: Path) -> None:
    service.decode_to_file(make_latent(), tmp_path / "video.mp4", scale="none")
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    engine.fails = lambda latents: RuntimeError("broken")
    with pytest.raises(RequestError):
        service.decode_to_file(make_latent(1), tmp_path / "other.mp4", scale="none")
    assert [path.name for path in tmp_path.glob("*.mp4*")] == ["video.mp4"]


def test_bytes_of_a_real_stream_are_a_whole_video(service: DecoderClient) -> None:
    latent = make_latent(3, (16, 13, 4, 6))
    assert ends_whole(b"".join(service.decode_stream(latent, scale="cogvideox-5b", fps=12)))


def test_datasets_are_read(service: DecoderClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.client._PAGE", 5)
    assert [found["name"] for found in service.datasets()] == ["clips"]
    assert len({found["id"] for found in service.samples("clips")}) == 12
    assert [found["id"] for found in service.samples("clips", filters=("psnr>38",), caption="caption")] == ["sample-0010"]
    assert service.sample("clips", "sample-0002")["columns"]["caption"] == "caption 2"
    latent = service.latent("clips", "sample-0002")
    assert (tuple(latent.shape), latent.dtype) == ((16, 13, 8, 12), torch.bfloat16)
    assert service.video("clips", "sample-0002", crf=30)[4:8] == b"ftyp"
    assert service.first_frame("clips", "sample-0002")[:4] == b"\x89PNG"
    with pytest.raises(RequestError, match="no sample"):
        service.sample("clips", "a/b")


def test_without_the_token_nothing_is_said(service: DecoderClient) -> None:
    with (
        DecoderClient(str(service._http.base_url), "another token of some length") as stranger,
        pytest.raises(RequestError) as caught,
    ):
        stranger.datasets()
    assert caught.value.status == 401
