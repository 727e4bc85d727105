"""Which tars an input names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import InputConfig
from pipeline.errors import ConfigError
from pipeline.sources import SourceItem, open_source
from pipeline.sources.webdataset import expand_braces
from tests.pipeline.fakes import FlakyFileSystem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (8, 9, 10):
        (tmp_path / f"s-{number:03d}.tar").write_bytes(bytes(number))
    (tmp_path / "README.md").write_text("about the tars")
    return tmp_path


def items(uri: Any, **settings: Any) -> list[SourceItem]:
    return list(open_source(InputConfig(uri=str(uri), **settings)).items)


def names(uri: Any, **settings: Any) -> list[str]:
    found = items(uri, **settings)
    assert all(item.is_tar for item in found)
    return [Path(item.uri).name for item in found]


def test_folder_glob_braces_and_single_tar_name_their_tars(folder: Path) -> None:
    every = ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert names(folder) == every
    assert names(folder / "*.tar") == every
    assert names(folder / "s-{008..010}.tar") == every
    assert names(folder / "s-{010,008}.tar") == ["s-010.tar", "s-008.tar"]
    assert names(folder / "s-009.tar") == ["s-009.tar"]
    assert names(folder / "s-{008..008}*.tar") == ["s-008.tar"]


def test_item_is_the_tar_as_the_listing_has_it(folder: Path) -> None:
    item = items(folder / "s-008.tar")[0]
    assert (item.uri, item.size_bytes, item.problem) == (str(folder / "s-008.tar"), 8, None)
    assert item.version


def test_list_names_tars_beside_it_and_elsewhere_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "t.tar"
    elsewhere.touch()
    (folder / "train.txt").write_text(f"s-010.tar\n\n  {elsewhere}\ns-{{008..010}}.tar\n")
    assert names(folder / "train.txt") == ["s-010.tar", "t.tar", "s-008.tar", "s-009.tar"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"s-008.tar\na.mp4\n", "entry 2 is 'a.mp4', expected the path or URI of a tar"),
        (b"\xff", "as a list of tars"),
        (b"", "no tar"),
    ],
)
def test_list_that_names_no_tars_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "train.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        items(folder / "train.txt")


def test_list_may_not_leave_its_bucket(flaky: type[FlakyFileSystem]) -> None:
    flaky().pipe_file("/bucket/train.txt", b"../other/a.tar")
    with pytest.raises(ConfigError, match="entry 1"):
        items("flaky://bucket/train.txt")


def test_tar_that_is_named_but_not_there_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"s-007\.tar: there is nothing there"):
        items(folder / "s-{007..010}.tar")


def test_format_says_what_a_folder_of_both_means(folder: Path) -> None:
    (folder / "a.mp4").write_bytes(b"video")
    with pytest.raises(ConfigError, match=r"1 videos and 3 tars; set input\.format"):
        items(folder)
    assert len(names(folder, format="webdataset")) == 3
    assert [Path(item.uri).name for item in items(folder, format="files")] == ["a.mp4"]


def test_single_file_is_a_tar_by_any_name_if_the_format_says_so(folder: Path) -> None:
    (folder / "shard").write_bytes(b"tar")
    assert names(folder / "shard", format="webdataset") == ["shard"]
    (folder / "empty").mkdir()
    (folder / "empty" / "a").touch()
    (folder / "empty" / "b").touch()
    with pytest.raises(ConfigError, match="no tar"):
        items(folder / "empty", format="webdataset")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{x}-{}-{1..b}", ["{x}-{}-{1..b}"]),
        ("{1..2", ["{1..2"]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(name: str, expected: list[str]) -> None:
    assert expand_braces(name) == expected


@pytest.mark.parametrize("name", ["{0..999999999999999999}", "{0..9999}{0..9999}"])
def test_braces_never_stand_for_more_than_a_million_names(name: str) -> None:
    with pytest.raises(ConfigError, match="more than 1000000 names"):
        expand_braces(name)
