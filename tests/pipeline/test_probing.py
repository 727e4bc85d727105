"""Looking at one listed video and the captions beside it; what is wrong with it is a finding, not a failure."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TerminalError, TransientError
from pipeline.inputs import stat_input
from pipeline.plan import ProbedVideo
from pipeline.probing import probe_item, probe_items
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
    flaky.faults += [Fault("info", OSError(errno.EBUSY, "slow down"))] * 8
    with pytest.raises(TransientError):
        probe_item(SourceItem(uri="flaky://in/a.mp4"), FakeProber(), {}, str(tmp_path))


def test_remote_video_is_probed_from_a_copy_that_is_removed(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    Storage("flaky://in").put("a.mp4", b"video")
    Storage("flaky://in").put("a.txt", b"a cat")
    item = SourceItem(uri="flaky://in/a.mp4", sidecars=("flaky://in/a.txt",))
    video = probe_item(item, FakeProber(), {}, str(tmp_path))
    assert (video.info, video.columns) == (INFO, {"caption": "a cat"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (r'{"caption": "\ud83d"}', "surrogates"),
        (r'{"tags": [{"\ud83d": 1}]}', "surrogates"),
        ('{"n": 123456789012345678901234567890}', "'n' is 123456789012345678901234567890, which does not fit 64 bits"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_sidecar_value_that_no_column_can_hold_is_a_finding(folder: Path, content: str, message: str) -> None:
    (folder / "a.json").write_text(content)
    stage, reason, detail = error_of(probe(folder / "a.mp4", folder / "a.json"))
    assert (stage, reason) == ("probe", "bad_sidecar")
    assert f"{folder}/a.json" in detail
    assert message in detail


def test_numbers_inside_of_other_values_may_have_any_size(folder: Path) -> None:
    (folder / "a.json").write_text('{"box": {"n": 123456789012345678901234567890}, "least": -9223372036854775808}')
    assert probe(folder / "a.mp4", folder / "a.json").columns == {"box": {"n": 123456789012345678901234567890}, "least": -(2**63)}


# Several videos


@dataclass
class OddProber:
    """Raises what is given for a file's name, one error a call, and takes every other file for a video."""

    errors: dict[str, list[Exception]]

    def probe(self, path: str, name: str) -> VideoInfo:
        if self.errors.get(name):
            raise self.errors[name].pop(0)
        return INFO


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceItem]:
    """Seven videos, ``0.mp4`` to ``6.mp4``."""
    monkeypatch.setattr("pipeline.probing._PAUSE_S", 0.0)
    for number in range(7):
        (tmp_path / f"{number}.mp4").write_text("video")
    return [SourceItem(uri=f"{tmp_path}/{number}.mp4", size_bytes=5, version="v") for number in range(7)]


def probe_all(items: list[SourceItem], **errors: list[Exception]) -> list[ProbedVideo]:
    return probe_items(items, OddProber({f"{name[1:]}.mp4": found for name, found in errors.items()}), {}, "/tmp")


def io_errors(count: int) -> list[Exception]:
    return [OSError(errno.EIO, "bad sector") for _ in range(count)]


def test_video_that_answers_late_is_probed_in_its_place(items: list[SourceItem]) -> None:
    videos = probe_all(items, _2=[TransientError("busy"), OSError(errno.ESTALE, "stale")], _4=[RuntimeError("once")])
    assert [video.uri for video in videos] == [item.uri for item in items]
    assert [video.info for video in videos] == [INFO] * 7


def test_video_that_never_answers_is_a_finding_beside_those_that_do(items: list[SourceItem]) -> None:
    videos = probe_all(items, _0=io_errors(9))
    stage, reason, detail = error_of(videos[0])
    assert (stage, reason) == ("fetch", "unreachable")
    assert items[0].uri in detail
    assert "bad sector" in detail
    assert (videos[0].size_bytes, videos[0].version) == (5, "v")
    assert [video.info for video in videos[1:]] == [INFO] * 6


def test_unforeseen_error_is_a_finding_with_its_traceback(items: list[SourceItem]) -> None:
    for batch in (items, items[3:4]):  # alone in its batch too
        video = next(video for video in probe_all(batch, _3=[KeyError("surprise")] * 9) if video.info is None)
        assert error_of(video)[:2] == ("probe", "unexpected")
        assert "KeyError: 'surprise'" in error_of(video)[2]
        assert "test_probing.py" in error_of(video)[2]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_storage_that_answers_for_no_video_is_no_finding(items: list[SourceItem], count: int) -> None:
    bad = SourceItem(uri="table.csv#3", problem="row 3 has None")  # which nothing is asked about
    with pytest.raises(TransientError, match=r"0\.mp4: OSError.*bad sector"):
        probe_all([bad, *items[:count]], **{f"_{number}": io_errors(9) for number in range(count)})


def test_long_outage_is_not_waited_for_with_every_video(items: list[SourceItem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.probing._OUTAGE_S", 0.0)
    errors = {f"_{number}": io_errors(1) for number in range(7)}
    with pytest.raises(TransientError):
        probe_all(items, **errors)
    assert [len(found) for found in errors.values()] == [0, 0, 0, 0, 0, 1, 1]


def test_storage_that_goes_down_midway_is_no_finding(items: list[SourceItem]) -> None:
    class Down(FakeProber):
        calls = 0

        def probe(self, path: str, name: str) -> VideoInfo:
            self.calls += 1
            if self.calls > 3:
                raise TransientError("storage does not answer")
            return INFO

    with pytest.raises(TransientError, match="does not answer"):
        probe_items(items, Down(), {}, "/tmp")


def test_unforeseen_error_for_every_one_of_several_videos_is_no_finding(items: list[SourceItem]) -> None:
    with pytest.raises(KeyError):
        probe_all(items, **{f"_{number}": [KeyError("broken")] * 9 for number in range(7)})
