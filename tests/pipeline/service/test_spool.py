from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.service.cache import VideoCache
from pipeline.service.errors import RequestError
from pipeline.service.spool import Spool, SpooledVideo, make_private_folder


@pytest.fixture
def make_spool(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    spools: list[Spool] = []

    def make(limit_bytes: int = 1000) -> Spool:
        spools.append(Spool(tmp_path / "spool", limit_bytes))
        return spools[-1]

    yield make
    for spool in spools:
        spool.close()


def write_whole(video: SpooledVideo, data: bytes) -> None:
    assert video.begin()
    video.path.write_bytes(data)
    video.finish()


async def read(video: SpooledVideo) -> bytes:
    return b"".join([data async for data in video.follow()])


def test_several_readers_follow_a_file_while_it_grows(make_spool: Callable[..., Spool]) -> None:
    spool = make_spool(1 << 30)
    video = spool.create("v", 100)
    assert video.join()
    assert video.begin()
    parts = [os.urandom(300_000) for _ in range(5)]

    def write() -> None:
        with video.open_growing() as file:
            for part in parts:
                file.write(part)
        video.finish()

    async def follow() -> list[bytes]:
        readers = [asyncio.create_task(read(video)) for _ in range(2)]
        await asyncio.sleep(0.01)
        threading.Thread(target=write).start()
        return await asyncio.wait_for(asyncio.gather(*readers), 20)

    assert asyncio.run(follow()) == [b"".join(parts)] * 2


def test_a_failure_reaches_readers_after_the_bytes_that_were_written(make_spool: Callable[..., Spool]) -> None:
    video = make_spool().create("v", 100)
    assert video.begin()
    file = video.open_growing()
    file.write(b"beginning")
    file.close()
    video.finish(RequestError(500, "internal", "broken"))

    seen: list[bytes] = []

    async def follow() -> None:
        async for data in video.follow():
            seen.append(data)

    with pytest.raises(RequestError, match="broken"):
        asyncio.run(follow())
    assert b"".join(seen) == b"beginning"


def test_a_failure_before_the_first_byte_is_raised_before_the_answer_begins(make_spool: Callable[..., Spool]) -> None:
    video = make_spool().create("v", 100)
    video.finish(RequestError(422, "bad", "no good"))
    for wait in (video.wait_begun, video.wait_whole):
        with pytest.raises(RequestError, match="no good"):
            asyncio.run(wait())


def test_the_budget_counts_what_is_promised_then_what_is_written_then_nothing(make_spool: Callable[..., Spool]) -> None:
    spool = make_spool()
    video = spool.create("v", 600)
    with pytest.raises(RequestError) as full:
        spool.create("w", 600)
    assert full.value.status == 429
    assert video.begin()
    video.path.write_bytes(b"x" * 100)
    spool.shrink(video)
    video.finish()
    assert spool.used_bytes == 100
    spool.create("w", 600)
    video.leave()
    assert (spool.used_bytes, video.path.exists()) == (600, False)


def test_a_video_larger_than_the_whole_budget_never_fits(make_spool: Callable[..., Spool]) -> None:
    with pytest.raises(RequestError) as caught:
        make_spool().create("v", 1001)
    assert caught.value.status == 413


def test_a_video_that_its_last_reader_left_is_not_begun_and_cannot_be_joined(make_spool: Callable[..., Spool]) -> None:
    spool = make_spool()
    video = spool.create("v", 600)
    left = []
    video.on_unread = lambda: left.append("v")
    video.leave()
    assert (left, video.begin(), video.join(), spool.used_bytes) == (["v"], False, False, 0)


def test_a_video_left_while_it_is_written_is_removed_when_its_writer_ends(make_spool: Callable[..., Spool]) -> None:
    spool = make_spool()
    video = spool.create("v", 600)
    assert video.begin()
    video.path.write_bytes(b"x")
    video.leave()
    assert video.path.exists()
    video.finish(RequestError(408, "abandoned", "nobody waits"))
    assert (video.path.exists(), spool.used_bytes) == (False, 0)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(make_spool: Callable[..., Spool]) -> None:
    living = make_spool()
    write_whole(kept := living.create("v", 10), b"kept")
    dead = make_spool()
    write_whole(dead.create("v", 10), b"gone")
    dead._owner.close()  # as the kernel does at the end of a process
    make_spool()
    assert kept.path.read_bytes() == b"kept"
    assert not dead._folder.exists()


def test_a_folder_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"service\.folder"):
        make_private_folder(folder)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"service\.folder"):
        make_private_folder(tmp_path / "link")


def source(tmp_path: Path, size: int, name: str = "source") -> Path:
    path = tmp_path / name
    path.write_bytes(os.urandom(size))
    return path


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


def test_the_cache_gives_up_what_was_used_longest_ago_and_stays_within_its_limit(tmp_path: Path) -> None:
    cache = VideoCache(tmp_path / "cache", 340)
    for name in ("a", "b", "c"):
        cache.keep(name, source(tmp_path, 100, name))
    assert cache.fetch("a", tmp_path / "reader")  # now b is the oldest
    cache.keep("d", source(tmp_path, 100, "d"))
    assert [name for name in "abcd" if cache.size_of(name) is not None] == ["a", "c", "d"]
    assert cache.used_bytes() == kept_bytes(tmp_path / "cache") == 300


def test_the_cache_looks_through_its_folder_only_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = VideoCache(tmp_path / "cache", 1000)
    scans = []
    files = VideoCache._files
    monkeypatch.setattr(VideoCache, "_files", lambda self: scans.append(None) or files(self))
    for number in range(10):
        cache.keep(f"k{number}", source(tmp_path, 100, f"s{number}"))
        cache.keep(f"k{number}", source(tmp_path, 100, f"s{number}"))  # counted once
        assert cache.used_bytes() == 100 * (number + 1)
    assert scans == []
    cache.keep("full", source(tmp_path, 50, "full"))
    assert len(scans) == 1
    assert cache.used_bytes() == kept_bytes(tmp_path / "cache") == 850


def test_a_reader_keeps_what_the_cache_gives_up(tmp_path: Path) -> None:
    cache = VideoCache(tmp_path / "cache", 100)
    data = (first := source(tmp_path, 100)).read_bytes()
    cache.keep("a", first)
    assert cache.fetch("a", tmp_path / "reader")
    cache.keep("b", source(tmp_path, 100, "other"))
    assert cache.size_of("a") is None
    assert (tmp_path / "reader").read_bytes() == data


def test_a_video_larger_than_the_cache_is_not_kept_and_pushes_nothing_out(tmp_path: Path) -> None:
    cache = VideoCache(tmp_path / "cache", 100)
    cache.keep("a", source(tmp_path, 90, "a"))
    cache.keep("b", source(tmp_path, 101, "b"))
    assert (cache.size_of("a"), cache.size_of("b")) == (90, None)


def test_two_processes_share_a_cache_within_its_limit(tmp_path: Path) -> None:
    caches = [VideoCache(tmp_path / "cache", 1000) for _ in range(2)]
    paths = [source(tmp_path, 100, f"s{number}") for number in range(40)]

    def keep(cache: VideoCache, start: int) -> None:
        for number in range(start, 40, 2):
            cache.keep(f"k{number}", paths[number])
            cache.fetch(f"k{number}", tmp_path / f"r{number}")

    threads = [threading.Thread(target=keep, args=(cache, start)) for start, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 900 <= caches[0].used_bytes() == caches[1].used_bytes() == kept_bytes(tmp_path / "cache") <= 1000


def test_a_lower_limit_holds_from_the_start(tmp_path: Path) -> None:
    VideoCache(tmp_path / "cache", 1000).keep("a", source(tmp_path, 500))
    assert VideoCache(tmp_path / "cache", 400).used_bytes() == 0
