"""A location is a URL, a folder or a repository; whichever it is, its files arrive whole and once."""

import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from cogvae import AutoencoderKLCogVideoX, resolve_weights
from cogvae.sources import HubFolder, LocalFolder, UrlFolder, open_source

from .pairs import assert_same_state, make_tiny


@pytest.fixture
def vae(tmp_path: Path) -> AutoencoderKLCogVideoX:
    model = make_tiny()
    model.save_pretrained(tmp_path / "vae", max_shard_size=20_000)
    return model


@pytest.fixture
def url(tmp_path: Path, vae: AutoencoderKLCogVideoX) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    filesystem.put(str(tmp_path / "vae"), f"{root}/vae", recursive=True)
    yield f"memory:/{root}"
    filesystem.rm(root, recursive=True)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    original = MemoryFileSystem.get_file

    def get_file(self: Any, remote: str, local: str, **kwargs: Any) -> None:
        names.append(remote)
        original(self, remote, local, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return names


def test_a_location_is_a_url_then_a_folder_then_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "THUDM" / "local").mkdir(parents=True)
    assert isinstance(open_source("s3://bucket/vae"), UrlFolder)
    assert isinstance(open_source(f"file://{tmp_path}"), LocalFolder)
    assert isinstance(open_source("THUDM/local"), LocalFolder)
    assert isinstance(open_source("THUDM/CogVideoX-2b"), HubFolder)
    for missing in ("/no/such", "./no", "../no", "~/no-such-folder", Path("no"), "file:///no/such"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*no"):
            open_source(missing)


def test_a_url_loads_like_a_folder_and_is_downloaded_once(
    tmp_path: Path, vae: AutoencoderKLCogVideoX, url: str, downloads: list[str]
) -> None:
    for _ in range(2):
        loaded = AutoencoderKLCogVideoX.from_pretrained(url, subfolder="vae", cache_dir=tmp_path / "cache")
        assert_same_state(loaded, vae)
    assert len(downloads) == len(set(downloads)) > 3
    assert not list((tmp_path / "cache").rglob(".partial-*"))
    offline = resolve_weights(f"{url}/vae/", cache_dir=tmp_path / "cache", local_files_only=True)
    assert offline.fingerprint() == resolve_weights(tmp_path / "vae").fingerprint()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve_weights(f"{url}/vae", cache_dir=tmp_path / "empty", local_files_only=True)


def test_a_changed_url_is_downloaded_again(tmp_path: Path, url: str) -> None:
    cache = tmp_path / "cache"
    before = resolve_weights(url, subfolder="vae", cache_dir=cache).config
    with fsspec.open(f"{url}/vae/config.json", "w") as file:
        file.write("{}")
    after = resolve_weights(url, subfolder="vae", cache_dir=cache).config
    assert before != after
    assert after.read_text() == "{}"


def test_many_readers_of_one_url_download_it_once(tmp_path: Path, url: str, downloads: list[str]) -> None:
    found: list[Any] = []

    def resolve() -> None:
        found.append(resolve_weights(url, subfolder="vae", cache_dir=tmp_path / "cache"))

    threads = [threading.Thread(target=resolve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert len(downloads) == len(set(downloads))


def test_without_file_locks_a_url_loads_all_the_same(
    tmp_path: Path, vae: AutoencoderKLCogVideoX, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    loaded = AutoencoderKLCogVideoX.from_pretrained(url, subfolder="vae", cache_dir=tmp_path / "cache")
    assert_same_state(loaded, vae)


def test_a_broken_download_leaves_nothing_behind(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_half(self: Any, remote: str, local: str, **kwargs: Any) -> None:
        Path(local).write_bytes(self.cat_file(remote)[:10])

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_half)
    with pytest.raises(OSError, match=r"config\.json cannot be read: 10 of \d+ bytes arrived"):
        resolve_weights(url, subfolder="vae", cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_scheme_without_its_package_is_named(tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError), match="nosuch"):
        resolve_weights("nosuch://bucket/vae", cache_dir=tmp_path)


def test_an_unreachable_repository_says_how_to_use_a_local_copy(tmp_path: Path) -> None:
    for location in ("THUDM/CogVideoX-2b", "not a repository/at all"):
        with pytest.raises(OSError, match=r"no local folder.*from_pretrained\('/models/.*subfolder='vae'\)"):
            AutoencoderKLCogVideoX.from_pretrained(location, cache_dir=tmp_path, local_files_only=True)


def test_a_repository_loads_by_revision_subfolder_and_token(
    tmp_path: Path, vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, *, subfolder: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        path = tmp_path / subfolder / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = AutoencoderKLCogVideoX.from_pretrained(
        "THUDM/CogVideoX-2b", subfolder="vae", revision="abc", token="secret", cache_dir=tmp_path / "hub"
    )
    assert_same_state(loaded, vae)
    expected = {
        "repo_id": "THUDM/CogVideoX-2b",
        "revision": "abc",
        "token": "secret",
        "cache_dir": tmp_path / "hub",
        "local_files_only": False,
    }
    assert asked == [expected] * len(asked)
    assert "secret" not in repr(open_source("THUDM/CogVideoX-2b", token="secret"))


def test_a_cached_repository_loads_offline(tmp_path: Path) -> None:
    vae = make_tiny()
    commit = "0" * 40
    repository = tmp_path / "models--THUDM--CogVideoX-2b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    vae.save_pretrained(repository / "snapshots" / commit / "vae")
    loaded = AutoencoderKLCogVideoX.from_pretrained(
        "THUDM/CogVideoX-2b",
        subfolder="vae",
        cache_dir=tmp_path,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    assert_same_state(loaded, vae)
