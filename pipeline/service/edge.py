"""What every request passes first and every answer last: the gate, headers that browsers obey, counting."""

from __future__ import annotations

import logging
import time
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service.errors import RequestError

if TYPE_CHECKING:
    from pipeline.service.core import DecoderService

logger = logging.getLogger(__name__)

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_BROWSER_HEADERS = {
    b"content-security-policy": _CSP.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
# Probes of the machinery around the service, pages without data, and the door itself.
_OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json", "/v1/session", "/"}


class Edge:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, service: DecoderService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in _BROWSER_HEADERS.items() if name not in there]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check(scope)
        except RequestError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await JSONResponse(error.to_dict(), error.status, headers)(scope, receive, send_with_headers)
            self._service.metrics.count_refused(error.reason)
        else:
            await self._app(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # never the address itself: it has no bound
            self._service.metrics.count_request(route, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = client_headers(scope)
        path = scope["path"]
        if path in _OPEN or ("/" not in path[1:] and path != "/metrics"):
            return self._service.gate.check_origin(headers)
        self._service.gate.check(headers, read_cookies(headers.get("cookie", "")))


def client_headers(scope: Scope) -> dict[str, str]:
    """The request's headers, names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def read_cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}
