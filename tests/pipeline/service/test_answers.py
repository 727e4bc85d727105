"""Answers that hold memory, over a client that the test plays itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.service.account import MemoryAccount
from pipeline.service.answers import GrowingVideo
from pipeline.service.errors import RequestError
from pipeline.service.spool import Spool, SpooledVideo

DATA = os.urandom(1 << 20)


@pytest.fixture
def video(tmp_path: Path) -> Iterator[SpooledVideo]:
    """A whole video of one MiB with one reader."""
    spool = Spool(tmp_path / "spool", 1 << 30)
    video = spool.create("v", len(DATA))
    assert video.begin()
    video.path.write_bytes(DATA)
    video.finish()
    yield video
    spool.close()


async def leave() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def client(parts: list[bytes], after: Callable[[], Any]) -> Callable[[Any], Any]:
    """Takes an answer; ``after`` each piece it waits for what is returned."""

    async def send(message: Any) -> None:
        if message.get("body"):
            parts.append(message["body"])
            await after()

    return send


def test_a_stream_waits_while_others_hold_the_memory_and_holds_what_it_sent(video: SpooledVideo) -> None:
    account = MemoryAccount(3 << 19)
    others, parts = account.take(5 << 18), list[bytes]()

    async def ask() -> None:
        answer = asyncio.create_task(
            GrowingVideo(video, "video/mp4", account.take(0), 60)({}, leave, client(parts, lambda: asyncio.sleep(0)))
        )
        while len(parts) < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert (len(parts), account.held_bytes) == (1, 3 << 19)
        others.release()
        await asyncio.wait_for(answer, 20)

    asyncio.run(ask())
    assert (b"".join(parts), account.held_bytes, video.path.exists()) == (DATA, 0, False)


def test_a_stream_larger_than_the_whole_memory_is_cut(video: SpooledVideo) -> None:
    account, parts = MemoryAccount(1 << 19), list[bytes]()
    with pytest.raises(RequestError, match="memory_bytes"):
        asyncio.run(GrowingVideo(video, "video/mp4", account.take(0), 60)({}, leave, client(parts, lambda: asyncio.sleep(0))))
    assert (len(b"".join(parts)), account.held_bytes) == (1 << 19, 0)


def test_a_stream_whose_client_stands_still_is_cut(video: SpooledVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.service.answers.PATIENCE_S", 0.1)
    monkeypatch.setattr("pipeline.service.answers.MIN_BYTES_PER_S", 1 << 40)
    account, parts = MemoryAccount(1 << 30), list[bytes]()
    answer = GrowingVideo(video, "video/mp4", account.take(0), 0.1)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(answer({}, leave, client(parts, lambda: asyncio.sleep(60))), 20))
    assert (len(parts), account.held_bytes, video.path.exists()) == (1, 0, False)


def test_a_client_that_keeps_the_least_rate_gets_everything(video: SpooledVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.service.answers.PATIENCE_S", 0.3)
    monkeypatch.setattr("pipeline.service.answers.MIN_BYTES_PER_S", 1 << 18)  # a piece a second
    account, parts = MemoryAccount(1 << 30), list[bytes]()
    answer = GrowingVideo(video, "video/mp4", account.take(0), 0)
    asyncio.run(answer({}, leave, client(parts, lambda: asyncio.sleep(0.2))))
    assert b"".join(parts) == DATA
