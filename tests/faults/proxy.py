"""A proxy on loopback between a client and an object store, which does to requests what networks and stores do.

Requests are forwarded byte for byte, the Host header included, since it is part of what S3 clients sign. Without
rules it only counts: ``requests`` and ``bytes_out`` say what a program has read at the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["slow_down", "reset", "truncate", "stall", "lost_reply", "shorten", "flip", "refuse"]
KINDS: tuple[Kind, ...] = ("slow_down", "reset", "truncate", "stall", "lost_reply", "shorten", "flip")
"""What a network or a store may do by itself; ``refuse`` is a store's deliberate answer.

    slow_down    503 SlowDown, not forwarded
    reset        the connection is reset before the request is forwarded
    truncate     half of the answer, then the connection is reset
    stall        half of the answer, then nothing for ``stall_s``; a request without an answer's body hangs before it is sent
    lost_reply   the request takes effect; its reply is lost with the connection
    shorten      half of the answer, under headers that say that this is all
    flip         one bit of the answer's body is another
    refuse       ``status`` and ``code`` as S3 words an error, not forwarded
"""


@dataclass(slots=True)
class Rule:
    """One kind of fault, and the requests that meet it."""

    kind: Kind
    rate: float = 1.0
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    path: str = ""
    """Part of the address, query included."""
    after: int = 0
    """So many requests of this kind pass first."""
    times: int | None = None
    """So often, then no more. None: for ever."""
    status: int = 403
    code: str = "AccessDenied"
    stall_s: float = 60.0

    def matches(self, request: Request, dice: random.Random) -> bool:
        if self.times == 0 or request.method not in self.methods or self.path not in request.target:
            return False
        if self.kind in ("truncate", "shorten", "flip") and request.method != "GET":
            return False
        if dice.random() >= self.rate:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    head: bytes
    body: bytes


@dataclass(slots=True)
class Reply:
    head: bytes
    body: bytes


@dataclass(slots=True)
class FaultProxy:
    """Serves on ``endpoint`` while its context lasts. Rules may be replaced meanwhile; the first that matches applies."""

    upstream: str
    rules: Sequence[Rule] = ()
    seed: int = 0
    requests: int = 0
    """Requests seen, those that met a fault included."""
    bytes_out: int = 0
    """Bytes of bodies sent to clients."""
    bytes_in: int = 0
    """Bytes of bodies that clients sent."""
    methods: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """How often each kind was done."""
    port: int = 0
    _dice: random.Random = field(init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset_counts(self) -> None:
        self.requests = self.bytes_out = self.bytes_in = 0
        self.methods.clear()
        self.faults.clear()

    def __enter__(self) -> FaultProxy:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="fault-proxy", daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while (request := await _read_request(reader, writer)) is not None and await self._serve(request, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. False where the connection is over."""
        self.requests += 1
        self.methods[request.method] += 1
        self.bytes_in += len(request.body)
        rule = next((rule for rule in self.rules if rule.matches(request, self._dice)), None)
        if rule is None:
            return await self._send(await self._forward(request), writer)
        self.faults[rule.kind] += 1
        if rule.kind == "slow_down":
            return await self._send(_error(503, "SlowDown", request), writer)
        if rule.kind == "refuse":
            return await self._send(_error(rule.status, rule.code, request), writer)
        if rule.kind == "reset":
            return _reset(writer)
        if rule.kind == "stall" and request.method != "GET":
            await asyncio.sleep(rule.stall_s)
            return _reset(writer)
        return await self._spoil(rule, await self._forward(request), writer)

    async def _spoil(self, rule: Rule, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        half = reply.body[: len(reply.body) // 2]
        if rule.kind == "lost_reply":
            return _reset(writer)
        if rule.kind == "flip":
            flipped = bytearray(reply.body)
            if flipped:
                flipped[self._dice.randrange(len(flipped))] ^= 1
            return await self._send(Reply(reply.head, bytes(flipped)), writer)
        if rule.kind == "shorten":
            return await self._send(Reply(_with_length(reply.head, len(half)), half), writer)
        await self._send(Reply(reply.head, half), writer)
        if rule.kind == "stall":
            await asyncio.sleep(rule.stall_s)
        return _reset(writer)

    async def _send(self, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        writer.write(reply.head + reply.body)
        self.bytes_out += len(reply.body)
        await writer.drain()
        return True

    async def _forward(self, request: Request) -> Reply:
        """One connection a request: what the store does with connections is no part of a test."""
        address = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            has_body = request.method != "HEAD" and b" 204 " not in head[:16] and b" 304 " not in head[:16]
            body = await _read_body(reader, head) if has_body else b""
            return Reply(_with_length(head, len(body)) if has_body else head, body)
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    if _header(head, b"expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    body = await _read_body(reader, head)
    return Request(
        method, target, _with_length(_without(head, b"expect"), len(body)) if body else _without(head, b"expect"), body
    )


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    if _header(head, b"transfer-encoding").lower() == b"chunked":
        pieces = []
        while length := int((await reader.readline()).split(b";")[0], 16):
            pieces.append(await reader.readexactly(length))
            await reader.readline()
        while (await reader.readline()).strip():
            pass
        return b"".join(pieces)
    return await reader.readexactly(int(_header(head, b"content-length") or 0))


def _lines(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in head.split(b"\r\n")[1:]:
        yield line.partition(b":")[0].strip().lower(), line


def _header(head: bytes, name: bytes) -> bytes:
    return next((line.partition(b":")[2].strip() for found, line in _lines(head) if found == name), b"")


def _without(head: bytes, *names: bytes) -> bytes:
    first = head.split(b"\r\n", 1)[0]
    return b"\r\n".join([first, *(line for found, line in _lines(head) if found not in names)])


def _with_length(head: bytes, length: int) -> bytes:
    """The same headers for a body that is sent whole."""
    kept = _without(head, b"content-length", b"transfer-encoding").removesuffix(b"\r\n\r\n")
    return kept + b"\r\nContent-Length: %d\r\n\r\n" % length


def _error(status: int, code: str, request: Request) -> Reply:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, says the proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return Reply(head, b"" if request.method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> bool:
    """End a connection as a crash does: with RST, not with FIN."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
