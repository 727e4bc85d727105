"""Folders, globs and single videos, with the caption files beside them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import InputConfig
from pipeline.errors import ConfigError
from pipeline.sources import SourceItem, open_source
from pipeline.storage import Storage
from tests.conftest import ObjectStore


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def list_items(uri: Any, **settings: Any) -> list[SourceItem]:
    return list(open_source(InputConfig(uri=str(uri), **settings)).items)


def names(items: list[SourceItem], folder: Path) -> list[str]:
    return [item.uri.removeprefix(f"{folder}/") for item in items]


def test_folder_gives_its_videos_sorted_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "b.mp4", "a.mkv", "sub/deep/c.webm", "notes.md", "mp4")
    items = list_items(tmp_path)
    assert names(items, tmp_path) == ["a.mkv", "b.mp4", "sub/deep/c.webm"]
    assert items[0].size_bytes == len("a.mkv")
    assert items[0].version == f"{(tmp_path / 'a.mkv').stat().st_mtime:.6f}"
    assert items[0].columns == {}


def test_files_have_no_types_of_their_own(tmp_path: Path) -> None:
    assert open_source(InputConfig(uri=str(write(tmp_path, "a.mp4")))).schema is None


def test_case_of_extensions_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, "a.MP4", "b.Mov")
    assert names(list_items(tmp_path), tmp_path) == ["a.MP4", "b.Mov"]
    assert names(list_items(tmp_path, extensions=("MOV", ".mP4")), tmp_path) == ["a.MP4", "b.Mov"]


def test_extension_begins_at_the_dot(tmp_path: Path) -> None:
    assert names(list_items(write(tmp_path, "notmp4", "a.mp4"), extensions=("mp4",)), tmp_path) == ["a.mp4"]


def test_caption_files_belong_to_the_video_of_their_name(tmp_path: Path) -> None:
    write(tmp_path, "a.mp4", "a.txt", "a.json", "b.v2.mp4", "b.v2.txt", "b.txt", "c.mp4", "sub/c.txt")
    sidecars = {item.uri: item.sidecars for item in list_items(tmp_path)}
    assert sidecars == {
        f"{tmp_path}/a.mp4": (f"{tmp_path}/a.txt", f"{tmp_path}/a.json"),
        f"{tmp_path}/b.v2.mp4": (f"{tmp_path}/b.v2.txt",),
        f"{tmp_path}/c.mp4": (),
    }


@pytest.mark.parametrize("pattern", ["a.mp4", "*.mp4", "?.mp4", "a.m*"])
def test_single_video_and_glob_bring_the_captions_beside_the_videos(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "a.mp4", "a.txt", "other/z.txt")
    (item,) = list_items(tmp_path / pattern)
    assert item.uri == f"{tmp_path}/a.mp4"
    assert item.sidecars == (f"{tmp_path}/a.txt",)


def test_glob_over_folders_with_brackets_in_their_names(tmp_path: Path) -> None:
    write(tmp_path, "[x]/a.mp4", "[x]/a.txt", "y/b.mp4")
    first, second = list_items(tmp_path / "*" / "*.mp4")
    assert first.sidecars == (f"{tmp_path}/[x]/a.txt",)
    assert second.uri == f"{tmp_path}/y/b.mp4"


def test_hidden_and_empty_folders_give_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.mp4", ".thumbnails/b.mp4", "._a.mp4")
    (tmp_path / "empty").mkdir()
    assert names(list_items(tmp_path), tmp_path) == ["a.mp4"]
    with pytest.raises(ConfigError, match="there is nothing there"):
        list_items(tmp_path / "empty")


def test_folder_without_videos_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 files, none of which ends in \.mp4, \.mov, .*see input.extensions"):
        list_items(write(tmp_path, "a.txt", "b.avi~"))


def test_name_that_is_no_text_is_a_problem_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "z.mp4")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))).write_text("")
    except OSError:
        pytest.skip("this filesystem takes UTF-8 only")
    bad, good = list_items(tmp_path)
    assert bad.uri == f"{tmp_path}/caf\\udce9.mp4" or bad.uri == f"{tmp_path}/caf\\xe9.mp4"
    assert bad.problem is not None
    assert "not UTF-8" in bad.problem
    assert good.problem is None


def test_folder_in_s3_gives_s3_uris_and_etags(s3: ObjectStore) -> None:
    storage = Storage(s3.uri(uuid.uuid4().hex))
    for name in ("a.mp4", "a.txt", "sub/b.MP4"):
        storage.put(name, name.encode())
    versions = {found.uri: found.version for found in storage.list("")}
    first, second = list_items(storage.uri)
    assert first == SourceItem(
        uri=f"{storage.uri}/a.mp4",
        size_bytes=5,
        version=versions["a.mp4"],
        sidecars=(f"{storage.uri}/a.txt",),
        sidecar_versions=(f"5 {versions['a.txt']}",),
    )
    assert second.uri == f"{storage.uri}/sub/b.MP4"
    assert [item.sidecars for item in list_items(f"{storage.uri}/*.mp4")] == [(f"{storage.uri}/a.txt",)]


def test_version_of_an_item_tells_its_captions_contents_apart(tmp_path: Path) -> None:
    write(tmp_path, "a.mp4", "a.txt", "a.json", "b.mp4")
    before, bare = list_items(tmp_path)
    assert [version.split()[0] for version in before.sidecar_versions] == ["5", "6"]
    assert bare.sidecar_versions == ()
    (tmp_path / "a.json").write_text("{}")
    after, _ = list_items(tmp_path)
    assert after.sidecar_versions[0] == before.sidecar_versions[0]
    assert after.sidecar_versions[1] != before.sidecar_versions[1]
    assert list_items(tmp_path / "a.mp4") == [after]
