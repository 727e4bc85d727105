"""Looking at one listed video and the captions beside it; what is wrong with it is a finding, not a failure."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TerminalError, TransientError
from pipeline.inputs import stat_input
from pipeline.plan import ProbedVideo
from pipeline.probing import probe_item
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import VideoInfo
from tests.pipeline.fakes import Fault, FlakyFileSystem

INFO = VideoInfo(width=64, height=64, fps=30.0, duration_s=2.0, container="mp4", codec="h264")


class FakeProber:
    """Takes every file whose content is ``video`` for one."""

    def probe(self, path: str, name: str) -> VideoInfo:
        if Path(path).read_text() != "video":
            raise TerminalError("probe", "not_a_video", f"{name}: no video")
        return INFO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"a.mp4": "video", "b.mp4": "text", "a.txt": " a cat\n", "a.json": '{"views": 3}'}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def probe(uri: Any, *sidecars: Any, **fields: Any) -> ProbedVideo:
    item = SourceItem(uri=str(uri), sidecars=tuple(map(str, sidecars)), **fields)
    return probe_item(item, FakeProber(), {}, os.path.dirname(str(uri)))


def error_of(video: ProbedVideo) -> tuple[str, str, str]:
    assert video.info is None
    assert video.error is not None
    return video.error.stage, video.error.reason, video.error.detail


def test_video_is_what_the_file_is_now(folder: Path) -> None:
    video = probe(folder / "a.mp4", size_bytes=99, version="old")
    found = stat_input(str(folder / "a.mp4"))
    assert (video.size_bytes, video.version) == (found.size_bytes, found.version)
    assert (video.info, video.error, video.columns) == (INFO, None, {})


def test_text_file_is_the_caption_and_json_brings_columns(folder: Path) -> None:
    assert probe(folder / "a.mp4", folder / "a.txt", folder / "a.json").columns == {"caption": "a cat", "views": 3}


def test_caption_in_json_wins_over_the_text_file(folder: Path) -> None:
    (folder / "a.json").write_text('\ufeff{"caption": "from json"}')
    assert probe(folder / "a.mp4", folder / "a.txt", folder / "a.json").columns == {"caption": "from json"}


@pytest.mark.parametrize(
    ("content", "message"), [(b"[1]", "holds list, expected an object"), (b"{", "cannot be read"), (b"\xff", "utf-8")]
)
def test_caption_file_that_cannot_be_used_is_a_finding_that_names_it(folder: Path, content: bytes, message: str) -> None:
    (folder / "a.json").write_bytes(content)
    stage, reason, detail = error_of(probe(folder / "a.mp4", folder / "a.json"))
    assert (stage, reason) == ("probe", "bad_sidecar")
    assert f"{folder}/a.json" in detail
    assert message in detail


def test_file_that_is_no_video_keeps_its_captions(folder: Path) -> None:
    video = probe(folder / "b.mp4", folder / "a.txt")
    assert error_of(video) == ("probe", "not_a_video", "b.mp4: no video")
    assert video.columns == {"caption": "a cat"}
    assert video.version == stat_input(str(folder / "b.mp4")).version


def test_missing_file_is_a_finding_under_the_listed_identity(folder: Path) -> None:
    video = probe(folder / "c.mp4", size_bytes=3, version="v")
    assert error_of(video) == ("fetch", "not_found", f"{folder}/c.mp4: no such file")
    assert (video.uri, video.size_bytes, video.version) == (f"{folder}/c.mp4", 3, "v")
    assert probe(folder / "c.mp4").version == ""


@pytest.mark.parametrize("uri", ["", "sub", "nowhere://x/a.mp4"])
def test_address_that_is_no_file_is_a_finding(folder: Path, uri: str) -> None:
    (folder / "sub").mkdir()
    assert error_of(probe(uri if "://" in uri else folder / uri))[:2] == ("fetch", "unreadable")


def test_listed_problem_is_a_finding(folder: Path) -> None:
    assert error_of(probe("table.csv#3", problem="row 3 has None")) == ("plan", "no_video", "row 3 has None")


def test_store_that_does_not_answer_is_no_finding(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a.mp4", b"video")
    flaky.faults += [Fault("info", OSError(errno.EBUSY, "slow down"))] * 5
    with pytest.raises(TransientError):
        probe_item(SourceItem(uri="flaky://in/a.mp4"), FakeProber(), {}, str(tmp_path))


def test_remote_video_is_probed_from_a_copy_that_is_removed(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a.mp4", b"video")
    Storage("flaky://in").put("a.txt", b"a cat")
    item = SourceItem(uri="flaky://in/a.mp4", sidecars=("flaky://in/a.txt",))
    video = probe_item(item, FakeProber(), {}, str(tmp_path))
    assert (video.info, video.columns) == (INFO, {"caption": "a cat"})
    assert os.listdir(tmp_path) == []
