"""Files of an output: written whole or not at all, by one of many, on a disk and on a real S3."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from s3fs import S3FileSystem

from pipeline.errors import ConfigError, StorageFullError, TransientError
from pipeline.storage import Storage, is_lost_race, is_transient, object_version, open_filesystem
from tests.conftest import ObjectStore
from tests.pipeline.fakes import Fault, FlakyFileSystem

RACERS = 8


@pytest.fixture(params=["disk", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(str(tmp_path / "output"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}")
    server: ObjectStore = request.getfixturevalue("s3")
    return Storage(server.uri(uuid.uuid4().hex))


@pytest.fixture
def on_s3(s3: ObjectStore) -> Storage:
    return Storage(s3.uri(uuid.uuid4().hex))


@pytest.fixture
def s3_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Method and arguments of every request to S3."""
    seen: list[tuple[str, dict[str, Any]]] = []
    call_s3 = S3FileSystem._call_s3

    async def spy(self: S3FileSystem, method: str, *others: Any, **arguments: Any) -> Any:
        seen.append((method, arguments))
        return await call_s3(self, method, *others, **arguments)

    monkeypatch.setattr(S3FileSystem, "_call_s3", spy)
    return seen


def race(count: int, run: Callable[[int], bool]) -> list[bool]:
    """The results of calls that start at the same time."""
    start = threading.Barrier(count)

    def racer(number: int) -> bool:
        start.wait(10)
        return run(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(racer, range(count)))


# Contract of every store


def test_what_is_put_is_read_back(storage: Storage) -> None:
    storage.put("folder/a.bin", b"0123456789")
    assert storage.read("folder/a.bin") == b"0123456789"
    assert storage.read_range("folder/a.bin", 2, 3) == b"234"
    assert storage.size("folder/a.bin") == 10
    assert storage.exists("folder/a.bin")
    assert not storage.exists("folder/b.bin")


def test_put_replaces_and_put_if_absent_does_not(storage: Storage) -> None:
    storage.put("a", b"1")
    storage.put("a", b"2")
    assert storage.read("a") == b"2"
    assert storage.put_if_absent("a", b"3") is False
    assert storage.read("a") == b"2"
    assert storage.put_if_absent("b", b"3") is True
    assert storage.read("b") == b"3"


def test_file_is_put_if_absent_with_its_bytes(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"shard")
    assert storage.put_file_if_absent("data/part.parquet", tmp_path / "spool") is True
    assert storage.put_file_if_absent("data/part.parquet", tmp_path / "spool") is False
    assert storage.read("data/part.parquet") == b"shard"


def test_missing_file_is_file_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("missing")
    with pytest.raises(FileNotFoundError):
        storage.size("missing")


def test_range_beyond_the_end_is_no_short_answer(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.faults._FIRST_DELAY_S", 0.0)
    storage.put("a", b"0123")
    with pytest.raises((TransientError, OSError), match="asked for 4 bytes at 2, got 2"):
        storage.read_range("a", 2, 4)


def test_listing_is_sorted_and_relative_and_of_files_only(storage: Storage) -> None:
    for name in ("data/b/2.parquet", "data/a/1.parquet", "data/a/notes.txt", "other/3.parquet"):
        storage.put(name, name.encode())
    found = storage.list("data", ".parquet")
    assert [file.uri for file in found] == ["data/a/1.parquet", "data/b/2.parquet"]
    assert [file.size_bytes for file in found] == [16, 16]
    assert all(file.version for file in found)
    assert storage.list("empty") == []


def test_walk_finds_what_a_listing_finds(storage: Storage) -> None:
    for name in ("data/b/2.parquet", "data/a/1.parquet", "data/notes.txt", "other/3.parquet"):
        storage.put(name, name.encode())
    for suffix in ("", ".parquet"):
        found = sorted(storage.walk("data", suffix), key=lambda file: file.uri)
        assert [(file.uri, file.size_bytes) for file in found] == [
            (file.uri, file.size_bytes) for file in storage.list("data", suffix)
        ]
    assert list(storage.walk("empty")) == []


def test_moved_file_is_whole_under_its_other_name_and_takes_no_one_elses(storage: Storage) -> None:
    storage.put("a", b"1")
    storage.put("taken", b"2")
    storage.move("a", "trash/a")
    assert storage.read("trash/a") == b"1"
    assert not storage.exists("a")
    with pytest.raises(FileExistsError, match="taken: exists"):
        storage.move("trash/a", "taken")
    assert storage.read("taken") == b"2"


def test_listing_sees_what_was_put_a_moment_ago(storage: Storage) -> None:
    for number in range(3):
        storage.put(f"data/{number}", b"x")
        assert len(storage.list("data")) == number + 1


def test_json_survives(storage: Storage) -> None:
    storage.put_json("status.json", {"state": "läuft", "counts": [1, 2]})
    assert storage.read_json("status.json") == {"state": "läuft", "counts": [1, 2]}


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "data/../../other"])
def test_path_that_leaves_the_folder_is_refused(storage: Storage, path: str) -> None:
    for call in (storage.read, storage.list, storage.exists, lambda path: storage.put(path, b"")):
        with pytest.raises(ValueError, match="does not stay inside"):
            call(path)


def test_pickled_storage_is_the_same_folder(storage: Storage) -> None:
    storage.put("a", b"1")
    copy: Storage = pickle.loads(pickle.dumps(storage))
    assert copy.uri == storage.uri
    assert copy.read("a") == b"1"


def test_one_of_eight_threads_wins_and_its_bytes_stand(storage: Storage) -> None:
    payloads = [bytes([number]) * 10_000 for number in range(RACERS)]
    rounds = 2 if storage.uri.startswith("s3://") else 20  # SeaweedFS keeps losers waiting for seconds
    for round_number in range(rounds):
        won = race(RACERS, lambda number, name=f"race-{round_number}": storage.put_if_absent(name, payloads[number]))  # type: ignore[misc]
        assert won.count(True) == 1
        assert storage.read(f"race-{round_number}") == payloads[won.index(True)]


def test_reader_never_sees_part_of_a_file(storage: Storage) -> None:
    old, new = b"o" * 1_000_000, b"n" * 1_500_000
    storage.put("replaced", old)
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.read("replaced"))
            if storage.exists("absent"):
                seen.add(storage.read("absent"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        storage.put("replaced", new)
        storage.put("replaced", old)
    storage.put_if_absent("absent", new)
    done.set()
    reader.join()
    assert seen <= {old, new}


# Local disk


RACER = """
import json, sys
from pipeline.storage import Storage
storage = Storage(sys.argv[1])
print("ready", flush=True)
input()
print(json.dumps([storage.put_if_absent(f"race/{turn}", sys.argv[2].encode()) for turn in range(50)]))
"""


def test_one_of_several_processes_wins_each_file(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "output"), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    for turn in range(50):
        winners = [number for number in range(3) if won[number][turn]]
        assert len(winners) == 1
        assert (tmp_path / "output" / "race" / str(turn)).read_text() == str(winners[0])


def test_temporary_files_are_gone_and_never_in_a_listed_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("data/a", b"1")
    storage.put_if_absent("data/a", b"2")
    storage.put_if_absent("data/b", b"2")
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]
    assert os.listdir(tmp_path / ".tmp") == []


def test_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("output/")
    assert storage.uri == str(tmp_path / "output")
    assert storage.local_path("a") == str(tmp_path / "output" / "a")


def test_remote_storage_has_no_local_path() -> None:
    with pytest.raises(ValueError, match="not on a local disk"):
        Storage("memory://x").local_path("a")


def test_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("")
    with pytest.raises(ConfigError, match=r"output: cannot be written: .*Not a directory"):
        Storage(str(tmp_path / "output")).put("a", b"")


# S3


def test_one_of_several_connections_wins_a_conditional_put_on_s3(s3: ObjectStore) -> None:
    uri = s3.uri(uuid.uuid4().hex)
    # An option that differs gives each racer a client of its own.
    racers = [Storage(uri, {"default_block_size": (50 << 20) + number}) for number in range(4)]
    for turn in range(3):
        won = race(4, lambda number, turn=turn: racers[number].put_if_absent(f"{turn}", str(number).encode()))  # type: ignore[misc]
        assert won.count(True) == 1
        assert racers[0].read(f"{turn}") == str(won.index(True)).encode()


def test_conditional_put_is_one_request_even_above_100_mb(
    on_s3: Storage, s3_calls: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    size_bytes = 101 << 20
    with (tmp_path / "spool").open("wb") as file:
        file.truncate(size_bytes)
    assert on_s3.put_file_if_absent("data/part.parquet", tmp_path / "spool")
    assert [method for method, _ in s3_calls] == ["put_object"]
    assert s3_calls[0][1]["IfNoneMatch"] == "*"
    assert on_s3.size("data/part.parquet") == size_bytes


def test_missing_bucket_is_explained(s3: ObjectStore) -> None:
    for put in (Storage("s3://no-such-bucket/x").put, Storage("s3://no-such-bucket/x").put_if_absent):
        with pytest.raises(ConfigError, match=r"s3://no-such-bucket/x: cannot be written: .*create the bucket first"):
            put("a", b"")


def test_wrong_keys_are_explained_at_once(s3: ObjectStore, s3_calls: list[Any]) -> None:
    storage = Storage(s3.uri("x"), {"key": "wrong", "secret": "wrong-secret"})
    calls: tuple[Callable[[], Any], ...] = (
        lambda: storage.list("plan"),
        lambda: storage.read("a"),
        lambda: storage.put("a", b""),
        lambda: storage.put_if_absent("a", b""),
    )
    for number, call in enumerate(calls, start=1):
        with pytest.raises(ConfigError, match=r"s3://lab/x: .*(access key ID you provided does not exist|Forbidden)"):
            call()
        assert len(s3_calls) <= 2 * number  # no retry


def test_storage_options_reach_the_client_and_no_repr(s3: ObjectStore) -> None:
    storage = Storage(s3.uri("x"), {"key": "test", "secret": "test-secret", "endpoint_url": s3.endpoint})
    storage.put("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"
    assert "secret" not in repr(storage)
    assert "secret" not in str(storage)


# Faults


TRANSIENT = (
    OSError(errno.EBUSY, "slow down"),
    TimeoutError(),
    ConnectionResetError(),
    aiohttp.ServerDisconnectedError(),
)


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
def test_transient_fault_is_tried_again(flaky: type[FlakyFileSystem], error: Exception) -> None:
    storage = Storage("flaky://out")
    storage.put("a", b"1")
    flaky.faults += [Fault("cat_file", error), Fault("cat_file", error)]
    assert storage.read("a") == b"1"


def test_fault_that_stays_ends_as_transient_error_with_its_cause(flaky: type[FlakyFileSystem]) -> None:
    flaky.faults += [Fault("cat_file", ConnectionResetError("gone"))] * 9
    with pytest.raises(
        TransientError, match=r"read flaky:///?out/a: failed 8 times, last by ConnectionResetError: gone"
    ) as caught:
        Storage("flaky://out").read("a")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert flaky.calls.count("cat_file") == 8


@pytest.mark.parametrize("error", [FileNotFoundError("a"), IsADirectoryError("a"), KeyError("a")], ids=repr)
def test_permanent_fault_is_raised_at_once(flaky: type[FlakyFileSystem], error: Exception) -> None:
    flaky.faults += [Fault("cat_file", error)]
    with pytest.raises(type(error)):
        Storage("flaky://out").read("a")
    assert flaky.calls == ["cat_file"]


def test_short_range_is_read_again(flaky: type[FlakyFileSystem]) -> None:
    storage = Storage("flaky://out")
    storage.put("a", b"0123456789")
    flaky.faults += [Fault("cat_file", cut_bytes=2)]
    assert storage.read_range("a", 0, 10) == b"0123456789"


def test_put_whose_reply_was_lost_is_not_known_to_have_won(flaky: type[FlakyFileSystem]) -> None:
    storage = Storage("flaky://out")
    flaky.faults += [Fault("pipe_file", TimeoutError(), after=True)]
    assert storage.put_if_absent("a", b"ours") is False
    assert storage.read("a") == b"ours"


def test_local_faults_are_raised_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        Storage(str(tmp_path)).read("folder")


@pytest.mark.parametrize(
    ("status", "transient"), [(400, False), (403, False), (404, False), (408, True), (429, True), (503, True)]
)
def test_http_status_tells_whether_to_try_again(status: int, transient: bool) -> None:
    error = aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]
    assert is_transient(error) is transient


def test_lost_race_is_found_behind_other_errors() -> None:
    lost = OSError(errno.EINVAL, "Invalid argument")
    assert not is_lost_race(lost)
    lost.__cause__ = RuntimeError("An error occurred (PreconditionFailed) when calling the PutObject operation")
    assert is_lost_race(lost)
    assert is_lost_race(FileExistsError())


def test_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nowhere://bucket/x: no filesystem for nowhere://"):
        open_filesystem("nowhere://bucket/x")


def test_s3_has_bounded_retries_and_no_listing_cache(s3: ObjectStore) -> None:
    fs, path = open_filesystem(s3.uri("a/b"))
    assert path == "lab/a/b"
    assert fs.retries == 1
    assert fs.dircache.use_listings_cache is False
    assert fs.config_kwargs["read_timeout"] == 20


def test_version_is_the_etag_or_the_modification_time(tmp_path: Path) -> None:
    assert object_version({"ETag": '"abc"', "LastModified": "now"}) == "abc"
    assert object_version({"mtime": 1.5}) == "1.500000"
    assert object_version({}) == ""


# Folders of very many files


def test_walking_gives_what_listing_gives(storage: Storage) -> None:
    for path in ("data/b=1/2.x", "data/b=1/1.x", "data/0.x", "data/b=2/3.y", "other/4.x", "database/5.x"):
        storage.put(path, path.encode())
    for folder, suffix in (("data", ""), ("data", ".x"), ("data/b=1", ""), ("", ""), ("nowhere", "")):
        walked = sorted(storage.walk(folder, suffix), key=lambda stored: stored.uri)
        assert walked == storage.list(folder, suffix), folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_said_so_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    storage = Storage(str(tmp_path))
    storage.put("a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    for put in (storage.put, storage.put_if_absent):
        with pytest.raises(StorageFullError, match=f"{tmp_path}: cannot be written: it is full .*Make room and run the same"):
            put("b", b"new")
    assert storage.read("a") == b"old"
    assert [found.uri for found in storage.list("")] == ["a"]


def test_disk_that_is_mounted_read_only_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.link", fail)
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be written: .*; the disk is mounted read-only"):
        Storage(str(tmp_path)).put_if_absent("a", b"")


@pytest.mark.parametrize("put", ["put", "put_if_absent"])
def test_folders_that_a_put_makes_are_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: str) -> None:
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    getattr(Storage(str(tmp_path / "new" / "output")), put)("a/b/file", b"")
    holders = [tmp_path, *(tmp_path / path for path in ("new", "new/output", "new/output/a", "new/output/a/b"))]
    assert {folder.stat().st_ino for folder in holders} <= synced


# Moving


def test_in_an_object_store_the_original_goes_only_when_the_copy_is_whole(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage("flaky://bucket")
    storage.put("a", b"123")
    monkeypatch.setattr(FlakyFileSystem, "cp_file", lambda self, path, target, **rest: self.pipe_file(target, b"12"))
    with pytest.raises(TransientError, match="is not a whole copy of a, which was left where it is"):
        storage.move("a", "trash/a")
    assert storage.read("a") == b"123"
    monkeypatch.undo()
    storage.move("a", "trash/b")
    assert (storage.read("trash/b"), storage.exists("a")) == (b"123", False)
