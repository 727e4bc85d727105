"""Files of an input: listed, looked at and copied here; what is wrong with one of them ends that clip only."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, TerminalError, TransientError
from pipeline.inputs import fetch_input, list_inputs, read_input, stat_input
from pipeline.storage import Storage
from tests.conftest import ObjectStore
from tests.pipeline.fakes import Fault, FlakyFileSystem

NAMES = ("a.mp4", "b.mp4", "sub/c.mp4", "sub/d.txt")


@pytest.fixture(params=["disk", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of a folder with the files ``NAMES``, each of which holds its own name."""
    if request.param == "disk":
        uri = str(tmp_path / "videos")
    elif request.param == "memory":
        uri = f"memory://{uuid.uuid4().hex}"
    else:
        server: ObjectStore = request.getfixturevalue("s3")
        uri = server.uri(uuid.uuid4().hex)
    storage = Storage(uri)
    for name in NAMES:
        storage.put(name, name.encode())
    return storage.uri


def listed(uri: str, below: str) -> list[str]:
    return [file.uri.removeprefix(f"{below}/") for file in list_inputs(uri)]


def test_folder_lists_its_files_sorted_with_absolute_uris(folder: str) -> None:
    assert [file.uri for file in list_inputs(folder)] == [f"{folder}/{name}" for name in NAMES]
    assert [file.size_bytes for file in list_inputs(folder)] == [len(name) for name in NAMES]


def test_listed_version_is_the_one_that_a_look_at_the_file_gives(folder: str) -> None:
    for file in list_inputs(folder):
        found = stat_input(file.uri)
        assert (found.uri, found.size_bytes) == (file.uri, file.size_bytes)
        if not folder.startswith("memory://"):  # which writes times in two ways
            assert found.version == file.version


def test_trailing_slash_does_not_matter(folder: str) -> None:
    assert listed(f"{folder}/", folder) == list(NAMES)


def test_glob_lists_what_matches(folder: str) -> None:
    assert listed(f"{folder}/*.mp4", folder) == ["a.mp4", "b.mp4"]
    assert listed(f"{folder}/**/*.mp4", folder)[-1] == "sub/c.mp4"
    assert listed(f"{folder}/[b].mp4", folder) == ["b.mp4"]


def test_single_file_lists_itself(folder: str) -> None:
    assert listed(f"{folder}/a.mp4", folder) == ["a.mp4"]


def test_flat_listing_stays_in_the_folder(folder: str) -> None:
    assert [file.uri for file in list_inputs(folder, recursive=False)] == [f"{folder}/a.mp4", f"{folder}/b.mp4"]


def test_nothing_there_is_a_config_error_that_names_the_uri(folder: str) -> None:
    for uri in (f"{folder}/empty", f"{folder}/*.avi", f"{folder}/missing.mp4"):
        with pytest.raises(ConfigError) as caught:
            list(list_inputs(uri))
        assert str(caught.value) == f"input.uri {uri}: there is nothing there"


def test_missing_bucket_is_a_config_error(s3: ObjectStore) -> None:
    with pytest.raises(ConfigError, match="s3://no-such-bucket/x: there is nothing there"):
        list(list_inputs("s3://no-such-bucket/x"))


def test_wrong_keys_are_a_config_error(s3: ObjectStore) -> None:
    with pytest.raises(ConfigError, match="s3://lab/x: may not be listed"):
        list(list_inputs(s3.uri("x"), {"key": "wrong", "secret": "wrong-secret"}))


def test_name_with_wildcards_that_exists_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "clips [1080p]"
    folder.mkdir()
    (folder / "what? [abc].mp4").write_text("x")
    for uri in (folder, folder / "what? [abc].mp4"):
        assert [file.uri for file in list_inputs(str(uri))] == [str(folder / "what? [abc].mp4")]


def test_hidden_files_and_folders_below_the_uri_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "videos"
    for name in ("a.mp4", "._a.mp4", ".trash/b.mp4", "sub/.c.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert listed(str(folder), str(folder)) == ["a.mp4"]
    assert listed(f"{folder}/*.mp4", str(folder)) == ["a.mp4"]
    assert listed(f"{folder}/.trash/*.mp4", str(folder)) == [".trash/b.mp4"]
    assert listed(f"{folder}/.*.mp4", str(folder)) == ["._a.mp4"]
    assert listed(f"{folder}/._a.mp4", str(folder)) == ["._a.mp4"]


def test_fetched_file_is_there_for_the_block_and_gone_after(folder: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    with fetch_input(f"{folder}/a.mp4", None, spool) as (path, found):
        assert path.read_bytes() == b"a.mp4"
        assert found == stat_input(f"{folder}/a.mp4")
    assert os.listdir(spool) == []
    with pytest.raises(RuntimeError), fetch_input(f"{folder}/a.mp4", None, spool):
        raise RuntimeError
    assert os.listdir(spool) == []
    assert read_input(f"{folder}/a.mp4") == b"a.mp4"  # a local input is never the copy that is removed


def test_missing_file_is_terminal(folder: str, tmp_path: Path) -> None:
    uri = f"{folder}/gone.mp4"
    for call in (lambda: stat_input(uri), lambda: read_input(uri), fetch_input(uri, None, tmp_path).__enter__):
        with pytest.raises(TerminalError) as caught:
            call()
        assert (caught.value.stage, caught.value.reason) == ("fetch", "not_found")
        assert uri in caught.value.detail


def test_folder_in_place_of_a_file_is_terminal(folder: str, tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match=r"unreadable: .*is a folder"), fetch_input(f"{folder}/sub", None, tmp_path):
        pass


@pytest.mark.parametrize("uri", ["nowhere://x/a.mp4", "/tmp/a\0b.mp4", "/tmp/" + "long" * 100])
def test_address_that_cannot_be_used_is_terminal(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match="unreadable"), fetch_input(uri, None, tmp_path):
        pass


def test_file_that_may_not_be_read_is_terminal(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0")
    flaky.faults += [Fault("info", PermissionError("no"))]
    with pytest.raises(TerminalError, match="not_permitted"), fetch_input("flaky://in/a", None, tmp_path):
        pass


def test_refusal_of_a_web_server_is_terminal_and_not_tried_again(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0")
    flaky.calls.clear()
    request = SimpleNamespace(real_url="http://in/a")
    flaky.faults += [Fault("info", aiohttp.ClientResponseError(request, (), status=410, message="Gone"))]  # type: ignore[arg-type]
    with pytest.raises(TerminalError, match=r"unreadable: .*410.*Gone"), fetch_input("flaky://in/a", None, tmp_path):
        pass
    assert flaky.calls == ["info"]


def test_short_download_is_noticed_and_made_again(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0123456789")
    flaky.faults += [Fault("info"), Fault("get_file", cut_bytes=3)]
    with fetch_input("flaky://in/a", None, tmp_path) as (path, _):
        assert path.read_bytes() == b"0123456789"
    assert flaky.calls.count("get_file") == 2


def test_download_that_stays_short_is_transient_and_leaves_nothing(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0123456789")
    flaky.faults += [Fault("info"), *[Fault("get_file", cut_bytes=3)] * 8]
    with pytest.raises(TransientError, match="expected 10 bytes, got 7"), fetch_input("flaky://in/a", None, tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_store_that_does_not_answer_is_transient(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0")
    flaky.faults += [Fault("info", OSError(errno.EBUSY, "slow down"))] * 8
    with pytest.raises(TransientError, match="failed 8 times"), fetch_input("flaky://in/a", None, tmp_path):
        pass


def test_machine_without_room_for_a_copy_blames_no_file(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a", b"0")
    flaky.faults += [Fault("info"), Fault("get_file", OSError(errno.ENOSPC, "No space left on device"))]
    with pytest.raises(TransientError, match="no room on this machine for its copy"), fetch_input("flaky://in/a", None, tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_disk_that_fails_for_a_while_blames_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "a.mp4").write_text("0")

    def fail(self: LocalFileSystem, path: str, **rest: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(LocalFileSystem, "info", fail)
    for call in (stat_input, read_input, lambda uri: fetch_input(uri, None, tmp_path).__enter__()):
        with pytest.raises(TransientError, match=f"a.mp4: cannot be read now: .*{os.strerror(number)}"):
            call(str(tmp_path / "a.mp4"))


@pytest.mark.timeout(10)
def test_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.mp4")
    os.mkfifo(uri)
    (tmp_path / "link.mp4").symlink_to(uri)
    assert [file.uri for file in list_inputs(str(tmp_path))] == [f"{tmp_path}/link.mp4", uri]
    for path in (uri, f"{tmp_path}/link.mp4"):
        for call in (stat_input, read_input, lambda uri: fetch_input(uri, None, tmp_path).__enter__()):
            with pytest.raises(TerminalError, match=f"fetch: unreadable: {path}: is no regular file"):
                call(path)


def test_symlink_loop_is_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("a.mp4")
    assert [file.uri for file in list_inputs(str(tmp_path))] == [f"{tmp_path}/a.mp4"]
    with pytest.raises(TerminalError, match=r"fetch: unreadable: .*symbolic links"):
        stat_input(str(tmp_path / "a.mp4"))
