"""Planning from tars: every member is a clip or a reason, and what is known is not read again."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DecodeConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.errors import TransientError
from pipeline.plan import PlannedClip
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, read_items, read_rejections, read_shards
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.tars.probing import probe_tar
from tests.pipeline.fakes import Fault, FlakyFileSystem
from tests.pipeline.tars.making import make_samples, make_tar, plan_tars
from tests.pipeline.video_samples import write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=17).read_bytes()


@pytest.fixture(scope="module")
def gif(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video whose header does not tell everything."""
    settings: dict[str, Any] = {"codec": "gif", "pix_fmt": "rgb8", "options": {}}
    return write_video(tmp_path_factory.mktemp("video") / "a.gif", num_frames=17, **settings).read_bytes()


def planned(output: Storage, generation: Generation | None) -> dict[str, PlannedClip]:
    assert generation is not None
    items = [item for shard in read_shards(output, generation) for item in read_items(output, shard, CLIP_ROWS)]
    assert len({item.sample_id for item in items}) == len(items)
    return {item.clip.uri.rpartition("/")[2]: item for item in items}


def refused(output: Storage, generation: Generation | None) -> dict[str, str]:
    assert generation is not None
    return {rejection.uri.rpartition("/")[2]: rejection.reason for rejection in read_rejections(output, generation)}


def test_plan_says_where_each_video_lies_and_what_stands_beside_it(tmp_path: Path, output: Storage, video: bytes) -> None:
    tars = {name: make_tar(make_samples([video] * 2)) for name in ("s-0.tar", "s-1.tar")}
    for name, data in tars.items():
        (tmp_path / name).write_bytes(data)
    generation, _ = plan_tars(str(tmp_path / "s-{0..1}.tar"), output)
    clips = planned(output, generation)
    # Keys of two tars are equal, their samples are not.
    assert sorted(clips) == ["s-0.tar#000000.mp4", "s-0.tar#000001.mp4", "s-1.tar#000000.mp4", "s-1.tar#000001.mp4"]
    for name, item in clips.items():
        clip, data = item.clip, tars[name[:7]]
        assert clip.member is not None
        assert data[clip.member.offset : clip.member.end] == video
        assert clip.file_uri == str(tmp_path / name[:7])
        assert (clip.size_bytes, clip.source_width, clip.source_height) == (len(data), 160, 96)
    assert clips["s-1.tar#000001.mp4"].columns == {
        "url": "https://example.org/1.mp4",
        "views": 37,
        "tags": '["a", "1"]',
        "caption": "clip number 1, of something that moves",
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video whose header can be told apart, and does not tell its length."""
    return write_video(tmp_path_factory.mktemp("video") / "a.mkv", num_frames=17, audio=True).read_bytes()


def test_what_cannot_be_used_is_refused_member_by_member(
    tmp_path: Path, output: Storage, video: bytes, gif: bytes, sound: bytes
) -> None:
    link, climber = tarfile.TarInfo("link.mp4"), tarfile.TarInfo("../up.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "a.mp4"
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for info, data in [
            *((tarfile.TarInfo(name), data) for name, data in make_samples([video])),
            (link, b""),
            (climber, video),
            (tarfile.TarInfo("empty.mp4"), b""),
            (tarfile.TarInfo("letter.mp4"), b"Dear reader, this is no video.\n" * 50),
            (tarfile.TarInfo("words.mp4"), video),
            (tarfile.TarInfo("words.json"), b"[1]"),
            (tarfile.TarInfo("moves.gif"), gif),
            (tarfile.TarInfo("sound.mkv"), sound),
            (tarfile.TarInfo("half.mp4"), video[: len(video) // 2]),
            (tarfile.TarInfo("cut.mp4"), video),
        ]:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    (tmp_path / "odd.tar").write_bytes(sink.getvalue()[: end - len(video)])
    generation, _ = plan_tars(str(tmp_path / "odd.tar"), output)
    assert sorted(planned(output, generation)) == ["odd.tar#000000.mp4", "odd.tar#moves.gif", "odd.tar#sound.mkv"]
    assert refused(output, generation) == {
        "odd.tar#link.mp4": "link",
        "up.mp4": "bad_name",
        "odd.tar#empty.mp4": "empty_file",
        "odd.tar#letter.mp4": "not_a_video",
        "odd.tar#words.mp4": "bad_sidecar",
        "odd.tar#half.mp4": "not_a_video",
        "odd.tar#cut.mp4": "truncated",
    }


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "truncated", "at byte 0: the tar of 0 bytes has no end mark"),
        (b"no tar at all" * 100, "bad_header", "at byte 0: is no tar header"),
        (make_tar([("a.txt", b"text")]), "no_video", "no member ends in .mp4"),
    ],
)
def test_tar_that_gives_nothing_is_refused_by_its_name(
    tmp_path: Path, output: Storage, data: bytes, reason: str, message: str
) -> None:
    (tmp_path / "odd.tar").write_bytes(data)
    generation, _ = plan_tars(str(tmp_path / "odd.tar"), output)
    assert generation is not None
    [rejection] = read_rejections(output, generation)
    assert (rejection.uri, rejection.reason) == (str(tmp_path / "odd.tar"), reason)
    assert message in rejection.detail
    assert plan_tars(str(tmp_path), output) == (None, [])  # and is known from now on


def test_known_tars_are_not_read_again(tmp_path: Path, output: Storage, video: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar(make_samples([video] * 2)))
    plan_tars(str(tmp_path), output)
    (tmp_path / "b.tar").write_bytes(make_tar(make_samples([video])))
    generation, probed = plan_tars(str(tmp_path), output)
    assert probed == [str(tmp_path / "b.tar")]
    assert list(planned(output, generation)) == ["b.tar#000000.mp4"]
    (tmp_path / "a.tar").write_bytes(make_tar(make_samples([video] * 3)))
    generation, probed = plan_tars(str(tmp_path), output)
    assert probed == [str(tmp_path / "a.tar")]
    assert len(planned(output, generation)) == 3  # another tar, by its size


def test_limit_cuts_a_tar_and_the_rest_of_it_comes_later(tmp_path: Path, output: Storage, video: bytes) -> None:
    for name in ("a.tar", "b.tar", "c.tar"):
        (tmp_path / name).write_bytes(make_tar(make_samples([video] * 4)))
    generation, probed = plan_tars(str(tmp_path), output, limit=5)
    assert len(planned(output, generation)) == 5
    assert len(probed) == 2
    generation, probed = plan_tars(str(tmp_path), output)
    assert Counter(name[0] for name in planned(output, generation)) == {"b": 3, "c": 4}


def test_append_with_more_extensions_finds_more_in_the_same_tars(tmp_path: Path, output: Storage, video: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("a.mp4", video), ("b.m4v", video)]))
    (tmp_path / "b.tar").write_bytes(make_tar([("c.m4v", video)]))
    assert list(planned(output, plan_tars(str(tmp_path), output, extensions=[".mp4"])[0])) == ["a.tar#a.mp4"]
    assert plan_tars(str(tmp_path), output, extensions=[".mp4"]) == (None, [])
    generation, probed = plan_tars(str(tmp_path), output, extensions=[".mp4", ".m4v"])
    assert sorted(planned(output, generation)) == ["a.tar#b.m4v", "b.tar#c.m4v"]
    assert len(probed) == 2
    assert plan_tars(str(tmp_path), output, extensions=[".m4v"]) == (None, [])


def test_interrupted_planning_keeps_the_tars_that_were_read(
    tmp_path: Path, output: Storage, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(make_tar(make_samples([video])))

    def fail(found: Iterable[Any], *_: Any) -> None:
        list(found)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.clip_planning.plan_clips", fail)
    with pytest.raises(KeyboardInterrupt):
        plan_tars(str(tmp_path), output)
    monkeypatch.undo()
    generation, probed = plan_tars(str(tmp_path), output)
    assert probed == []
    assert len(planned(output, generation)) == 2


def probe(uri: str, folder: Path) -> Any:
    with DecoderProcess(DecodeConfig()) as decoder:
        return probe_tar(SourceItem(uri=uri, is_tar=True), (".mp4",), decoder, {}, str(folder))


def test_tar_that_is_replaced_while_it_is_read_blames_no_member(
    tmp_path: Path, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(make_samples([video])))

    mixed = []

    def replace(read: Any, *_: Any) -> Any:
        monkeypatch.undo()
        os.utime(path, (1, 1))
        mixed.append(read(0, 512))
        return iter(())

    monkeypatch.setattr("pipeline.tars.probing.read_videos", replace)
    with pytest.raises(TransientError, match="replaced while it was read"):
        probe(str(path), tmp_path)
    assert mixed == []


def test_store_that_is_down_blames_no_tar(flaky: type[FlakyFileSystem], tmp_path: Path, video: bytes) -> None:
    flaky().pipe_file("/in/a.tar", make_tar(make_samples([video])))
    flaky.faults[:] = [Fault("info"), *(Fault("cat_file", OSError("reset by peer")) for _ in range(100))]
    with pytest.raises(TransientError, match="reset by peer"):
        probe("flaky://in/a.tar", tmp_path)


def test_tar_that_is_gone_is_a_finding(tmp_path: Path) -> None:
    [found] = probe(str(tmp_path / "gone.tar"), tmp_path)
    assert found.error is not None
    assert (found.uri, found.error.reason) == (str(tmp_path / "gone.tar"), "not_found")
