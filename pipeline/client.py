"""Decoding on request from another program: over HTTP, or from within a Ray cluster through a handle.

    client = DecoderClient("http://127.0.0.1:8477")
    mp4 = client.decode(latent, scale="cogvideox-5b", fps=8)

Requests are repeated while that may help: the service says when its queue is full, and a replica that was lost is
replaced in seconds. An answer is given out only when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import safetensors.torch
import torch

from pipeline.service.errors import RequestError

T = TypeVar("T")

_FIRST_DELAY_S, _MAX_DELAY_S = 0.25, 5.0
_REPEATABLE = (408, 425, 429, 502, 503, 504)
_PAGE = 200


class AnswerCutError(httpx.TransportError):
    """The connection ended before the answer did."""


class LatentDecoder(Protocol):
    """What decodes latents elsewhere. Parameters are those of POST /v1/decode: role, layout, fps, container, crf …"""

    def decode(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> bytes:
        """The coded video of one latent. Raises: RequestError."""
        ...

    def decode_stream(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> Iterator[bytes]:
        """Its bytes as they come, the first after the first frames. Raises: RequestError."""
        ...


class DecoderClient:
    """A client of the service over HTTP. Threads may share it.

    Args:
        url: as the service prints it at its start.
        token: that the service was started with; None: of the environment's ``LATENTS_TOKEN``, if it is set.
        timeout_s: for one answer to begin, or to go on.
        patience_s: for all tries of one request together.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8477", token: str | None = None, *, timeout_s: float = 180, patience_s: float = 120
    ) -> None:
        token = os.environ.get("LATENTS_TOKEN") if token is None else token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5))
        self._patience_s = patience_s

    def __enter__(self) -> DecoderClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def decode(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> bytes:
        """The coded video of one latent.

        Raises:
            RequestError: the service refuses it, or was too busy for ``patience_s``.
            httpx.TransportError: the service was not reached for ``patience_s``.
        """
        body = to_body(latent)
        return self._repeat(lambda: b"".join(self._stream(body, {"scale": scale, **parameters})))

    def decode_to_file(self, latent: torch.Tensor, path: str | Path, *, scale: str | float, **parameters: Any) -> None:
        """As ``decode``; the file appears under its name when it is whole."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(self.decode(latent, scale=scale, **parameters))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def decode_stream(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> Iterator[bytes]:
        """The bytes of a fragmented mp4 as they come.

        Raises:
            RequestError, httpx.TransportError: as ``decode``, before the first bytes.
            AnswerCutError: the answer ended early; what was given out is the beginning of a video.
        """
        body = to_body(latent)
        first, rest = self._repeat(lambda: _begin(self._stream(body, {"scale": scale, "stream": True, **parameters})))
        yield first
        yield from rest

    def datasets(self) -> list[dict[str, Any]]:
        """The datasets that the service shows."""
        found: list[dict[str, Any]] = self._get("/v1/datasets").json()["datasets"]
        return found

    def samples(
        self, dataset: str, *, bucket: str = "", caption: str = "", filters: tuple[str, ...] = ()
    ) -> Iterator[dict[str, Any]]:
        """The samples of a dataset that pass, such as those with ``filters=("psnr>30",)``; fetched by pages."""
        query: dict[str, Any] = {"bucket": bucket, "caption": caption, "filter": list(filters), "limit": _PAGE}
        offset, total = 0, 1
        while offset < total:
            page = self._get(f"/v1/datasets/{_quote(dataset)}/samples", {**query, "offset": offset}).json()
            yield from page["samples"]
            offset, total = offset + _PAGE, page["total"]

    def sample(self, dataset: str, sample_id: str) -> dict[str, Any]:
        """All small columns of a sample."""
        found: dict[str, Any] = self._get(_path(dataset, sample_id)).json()
        return found

    def video(self, dataset: str, sample_id: str, **parameters: Any) -> bytes:
        """A sample decoded. ``parameters``: container, crf."""
        return self._get(f"{_path(dataset, sample_id)}/video", parameters).content

    def latent(self, dataset: str, sample_id: str) -> torch.Tensor:
        """A sample's latent, unscaled ``[C, F, H, W]``."""
        tensors = safetensors.torch.load(self._get(f"{_path(dataset, sample_id)}/latent").content)
        return tensors["latent"]

    def first_frame(self, dataset: str, sample_id: str) -> bytes:
        """PNG of the source's first frame, where the dataset stores it."""
        return self._get(f"{_path(dataset, sample_id)}/frame.png").content

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> httpx.Response:
        def get() -> httpx.Response:
            answer = self._http.get(path, params=_query(query or {}))
            _check(answer)
            return answer

        return self._repeat(get)

    def _stream(self, body: bytes, parameters: Mapping[str, Any]) -> Iterator[bytes]:
        """One try. httpx itself raises where fewer bytes come than were announced."""
        headers = {"content-type": "application/octet-stream"}
        with self._http.stream("POST", "/v1/decode", params=_query(parameters), content=body, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                _check(answer)
            if "content-length" in answer.headers:
                yield from answer.iter_raw()
                return
            tail = bytearray()
            for data in answer.iter_raw():
                tail += data
                del tail[:-_TAIL_BYTES]
                yield data
            if not ends_whole(tail):
                raise AnswerCutError("the video ended without its mfra box: it was cut")

    def _repeat(self, call: Callable[[], T]) -> T:
        return repeat(call, self._patience_s)


class HandleDecoder:
    """A client within the cluster, through Ray Serve's handle: no HTTP, no token. Made by ``connect``."""

    def __init__(self, handle: Any, patience_s: float) -> None:
        self._handle = handle
        self._patience_s = patience_s

    def decode(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> bytes:
        """As ``LatentDecoder.decode``."""
        body = to_body(latent)

        def call() -> bytes:
            with _unwrapped():
                data: bytes = self._handle.decode.remote(body, {"scale": scale, **parameters}).result()
                return data

        return repeat(call, self._patience_s)

    def decode_stream(self, latent: torch.Tensor, *, scale: str | float, **parameters: Any) -> Iterator[bytes]:
        """As ``LatentDecoder.decode_stream``."""
        body = to_body(latent)

        def stream() -> Iterator[bytes]:
            with _unwrapped():
                yield from self._handle.options(stream=True).decode_stream.remote(
                    body, {"scale": scale, "stream": True, **parameters}
                )

        first, rest = repeat(lambda: _begin(stream()), self._patience_s)
        yield first
        yield from rest


def connect(app_name: str = "latents-decoder", *, patience_s: float = 120) -> HandleDecoder:
    """A running service of the cluster that this Ray program has joined, by its ``service.name``."""
    from ray import serve  # over HTTP no Ray is needed

    return HandleDecoder(serve.get_app_handle(app_name), patience_s)


def repeat(call: Callable[[], T], patience_s: float) -> T:
    """Call until it succeeds, while what fails may pass, for so long."""
    until, delay_s = time.monotonic() + patience_s, _FIRST_DELAY_S
    while True:
        try:
            return call()
        except (RequestError, httpx.TransportError) as error:
            if isinstance(error, RequestError) and error.status not in _REPEATABLE:
                raise
            asked_s = (error.retry_after_s or 0) if isinstance(error, RequestError) else 0
            # Spread, so that many clients do not come back at once.
            wait_s = max(asked_s, delay_s) * random.uniform(1.0, 1.3)
            if time.monotonic() + wait_s > until:
                raise
        time.sleep(wait_s)
        delay_s = min(_MAX_DELAY_S, 2 * delay_s)


def to_body(latent: torch.Tensor) -> bytes:
    """A latent as a request's body."""
    data: bytes = safetensors.torch.save({"latent": latent.detach().contiguous().cpu()})
    return data


_TAIL_BYTES = 1 << 20


def ends_whole(tail: bytes | bytearray) -> bool:
    """Whether the last bytes of a fragmented mp4 are those of a whole one: its mfra box ends it and says its own size."""
    if len(tail) < 24 or tail[-12:-8] != b"mfro":
        return False
    size = int.from_bytes(tail[-4:], "big")
    return 24 <= size <= _TAIL_BYTES and (size > len(tail) or tail[len(tail) - size + 4 : len(tail) - size + 8] == b"mfra")


def _begin(stream: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    return next(stream), stream


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The service's errors as it raised them; a lost replica or a full proxy as 503."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RequestError):
            raise cause from None
        if isinstance(error, RequestError):
            raise RequestError(*error.args) from None
        raise RequestError(503, "unavailable", f"no replica answered: {type(error).__name__}: {error}") from error


def _check(answer: httpx.Response) -> None:
    """Raises: RequestError: the answer is an error."""
    if not answer.is_error:
        return
    after = answer.headers.get("retry-after", "")
    retry_after_s = int(after) if after.isdigit() else None
    try:
        error = answer.json()["error"]
        reason, detail = str(error["reason"]), str(error["detail"])
    except (ValueError, KeyError, TypeError):
        # Not the service's words: its proxy had no replica to ask, or lost it on the way.
        status = 503 if answer.status_code == 500 else answer.status_code
        raise RequestError(status, "proxy", f"HTTP {answer.status_code}: {answer.text[:200]}", retry_after_s) from None
    raise RequestError(answer.status_code, reason, detail, retry_after_s)


def _query(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: str(value).lower() if isinstance(value, bool) else value if isinstance(value, list) else str(value)
        for name, value in values.items()
        if value is not None and value != "" and value != []
    }


def _path(dataset: str, sample_id: str) -> str:
    return f"/v1/datasets/{_quote(dataset)}/samples/{_quote(sample_id)}"


def _quote(part: str) -> str:
    from urllib.parse import quote

    return quote(part, safe="")
