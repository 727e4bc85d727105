from __future__ import annotations

import pickle

import pytest

from pipeline.errors import ConfigError
from pipeline.service.edge import read_cookies
from pipeline.service.errors import RequestError
from pipeline.service.gate import SESSION_COOKIE, SESSION_S, Gate, TokenDigests, read_token

TOKEN = "correct horse battery"
DIGESTS = TokenDigests.of(TOKEN)


def refused(gate: Gate, headers: dict[str, str], cookies: dict[str, str] | None = None) -> int:
    """The status that a request is refused with; 0: it is let in."""
    try:
        gate.check(headers, cookies or {})
    except RequestError as error:
        return error.status
    return 0


def gate(clock: float = 1000.0) -> Gate:
    return Gate(DIGESTS, lambda: clock)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}", 0),
        (f"bearer {TOKEN}", 0),
        ("Bearer wrong", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer ", 401),
        ("", 401),
        ("Bearer \xff\udc80", 401),
    ],
)
def test_only_the_token_is_let_in(authorization: str, status: int) -> None:
    assert refused(gate(), {"authorization": authorization, "host": "any.example"}) == status


def test_without_a_token_there_is_no_way_in() -> None:
    assert refused(gate(), {"host": "localhost"}) == 401


def test_a_session_is_let_in_until_it_ends() -> None:
    cookies = {SESSION_COOKIE: gate().open_session()}
    assert refused(gate(1000 + SESSION_S - 1), {}, cookies) == 0
    assert refused(gate(1000 + SESSION_S), {}, cookies) == 401


@pytest.mark.parametrize(
    "cookie", ["", ".", "9999999999.", "9999999999.00", "x.y", "²." + "0" * 64, "9" * 30 + ".ff", "9999999999.\xff"]
)
def test_a_forged_session_is_not(cookie: str) -> None:
    assert refused(gate(), {}, {SESSION_COOKIE: cookie}) == 401


def test_a_session_of_another_token_is_not() -> None:
    other = Gate(TokenDigests.of("another token, long enough"), lambda: 1000.0)
    assert refused(gate(), {}, {SESSION_COOKIE: other.open_session()}) == 401


def test_a_session_of_another_start_is_not() -> None:
    before = Gate(TokenDigests.of(TOKEN), lambda: 1000.0)
    assert refused(gate(), {}, {SESSION_COOKIE: before.open_session()}) == 401


def test_a_wrong_token_is_not_helped_by_a_session() -> None:
    assert refused(gate(), {"authorization": "Bearer wrong"}, {SESSION_COOKIE: gate().open_session()}) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8477", 0),
        ("127.0.0.1:8477", 0),
        ("127.0.0.1", 0),
        ("[::1]:8477", 0),
        ("[::1]", 0),
        ("evil.example:8477", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_without_a_token_only_this_machine_by_its_own_names_is_let_in(host: str, status: int) -> None:
    assert refused(Gate(None), {"host": host}) == status


@pytest.mark.parametrize("with_token", [False, True])
def test_a_page_of_another_site_is_not_let_in(with_token: bool) -> None:
    headers = {"host": "localhost:8477", "authorization": f"Bearer {TOKEN}"}
    chosen = gate() if with_token else Gate(None)
    assert refused(chosen, {**headers, "origin": "http://localhost:8477"}) == 0
    for origin in ("http://evil.example", "null", "http://localhost:8478"):
        assert refused(chosen, {**headers, "origin": origin}) == 403


@pytest.mark.parametrize(("site", "status"), [("none", 0), ("same-origin", 0), ("same-site", 403), ("cross-site", 403)])
def test_what_a_page_of_another_site_embeds_is_not_let_in(site: str, status: int) -> None:
    assert refused(Gate(None), {"host": "localhost:8477", "sec-fetch-site": site}) == status


def test_an_address_open_to_others_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="LATENTS_TOKEN"):
        read_token("LATENTS_TOKEN", {}, required=True)
    assert read_token("LATENTS_TOKEN", {}, required=False) is None


@pytest.mark.parametrize("token", ["short", "x" * 15, "ünïcödé token, long enough"])
def test_a_token_that_is_no_secret_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_token("LATENTS_TOKEN", {"LATENTS_TOKEN": token}, required=False)
    assert token not in str(caught.value)


def test_replicas_are_not_told_the_token() -> None:
    digests = TokenDigests.of(TOKEN)
    assert TOKEN.encode() not in pickle.dumps(digests)
    assert digests.bearer.hex() not in repr(digests)


def test_cookies_that_cannot_be_read_are_none() -> None:
    assert read_cookies('a=1; latents_session="x.y"') == {"a": "1", "latents_session": "x.y"}
    assert read_cookies("\x00;;==;") == {}
