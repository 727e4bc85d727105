"""Who may ask: a bearer token, a session cookie made from it, or, without a token, this machine alone.

Replicas are given a digest of the token, to compare with, and a random key, to sign session cookies with, that is another
at each start. Who can read what the cluster keeps about its actors can forge a session with that key, though not say the
token: such people must be trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.service.errors import RequestError

SESSION_COOKIE = "latents_session"
SESSION_S = 12 * 3600
MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDigests:
    """What recognises a token and its sessions without being able to say it."""

    bearer: bytes
    session_key: bytes

    def __repr__(self) -> str:
        return "TokenDigests(***)"

    @classmethod
    def of(cls, token: str) -> TokenDigests:
        return cls(bearer=_digest("bearer", token), session_key=secrets.token_bytes(32))


def read_token(variable: str, environment: Mapping[str, str], *, required: bool) -> TokenDigests | None:
    """The digests of the token that an environment variable holds.

    Raises:
        ConfigError: it is required and not set, or too short to be a secret.
    """
    token = environment.get(variable, "").strip()
    if not token:
        if required:
            raise ConfigError(
                f"service.host is not a loopback address, so that others can reach the service: set {variable} to a secret of "
                f"at least {MIN_TOKEN_LENGTH} characters, or use service.host: 127.0.0.1"
            )
        return None
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{variable}: has {len(token)} characters; expected at least {MIN_TOKEN_LENGTH} printable ASCII ones")
    return TokenDigests.of(token)


class Gate:
    """Decides whether a request is let in.

    Args:
        digests: of the token; None: only this machine can reach the service, and no token is asked for.
    """

    def __init__(self, digests: TokenDigests | None, clock: Callable[[], float] = time.time) -> None:
        self._digests = digests
        self._clock = clock

    @property
    def needs_token(self) -> bool:
        return self._digests is not None

    def check(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> None:
        """Let a request in. Names of headers are in lower case.

        Raises:
            RequestError: 401: no valid token or session. 403: another site's page, or another name for this machine.
        """
        self.check_origin(headers)
        # Images and videos of a page are asked for without Origin, and on the open loopback with no cookie to withhold.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RequestError(403, "other_site", "a page of another site may not use this service")
        if self._digests is None:
            self._check_host(headers.get("host", ""))
        elif "authorization" in headers:
            self.check_bearer(headers["authorization"])
        elif not self._is_session(cookies.get(SESSION_COOKIE, "")):
            raise RequestError(401, "not_authorised", "send the service's token as 'Authorization: Bearer TOKEN'")

    def check_bearer(self, authorization: str) -> None:
        """Raises: RequestError: 401: another token, or none."""
        scheme, _, token = authorization.partition(" ")
        given = _digest("bearer", token.strip())
        expected = self._digests.bearer if self._digests else b""
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
            raise RequestError(401, "not_authorised", "the token is not the service's; send 'Authorization: Bearer TOKEN'")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Pages of other sites may not make a browser work for them. Raises: RequestError: 403."""
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise RequestError(403, "other_site", f"a page of {origin[:100]} may not use this service")

    def open_session(self) -> str:
        """The value of a new session cookie."""
        expires = str(int(self._clock()) + SESSION_S)
        return f"{expires}.{self._sign(expires)}"

    def _is_session(self, cookie: str) -> bool:
        expires, _, signature = cookie.partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) < 16 and signature.isascii()):
            return False
        return hmac.compare_digest(signature, self._sign(expires)) and int(expires) > self._clock()

    def _sign(self, expires: str) -> str:
        assert self._digests is not None
        return hmac.new(self._digests.session_key, expires.encode(), hashlib.sha256).hexdigest()

    def _check_host(self, host: str) -> None:
        """A name that some other machine's DNS points at this one would let its pages read the answers."""
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        try:
            is_loopback = ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            is_loopback = name.lower() == "localhost"
        if not is_loopback:
            raise RequestError(403, "other_host", f"host {host[:100]!r}: without a token the service answers to localhost only")


def _digest(purpose: str, token: str) -> bytes:
    return hashlib.sha256(f"latents {purpose}:{token}".encode("utf-8", "surrogateescape")).digest()
