"""Where weight files come from: a local folder, an fsspec URL, or a repository of the Hugging Face Hub.

Each source answers one question: `fetch(name)` gives a local path of that file, or None where it has none.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Source(Protocol):
    """A folder of files, wherever it is. `str(source)` names it in errors."""

    def fetch(self, name: str) -> Path | None: ...


def open_source(
    location: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """Interprets a location: a URL if it has a scheme, else an existing folder, else a hub repository.

    Raises: FileNotFoundError where it is spelled like a path and no folder is there.
    """
    text = os.fspath(location)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    scheme, has_scheme, path = text.partition("://")
    if has_scheme and scheme not in ("file", "local"):
        url = text.rstrip("/") + (f"/{subfolder}" if subfolder else "")
        return UrlFolder(url, cache or _default_cache(), local_files_only, dict(storage_options or {}))
    folder = Path(path if has_scheme else text).expanduser()
    if folder.is_dir():
        return LocalFolder(folder / (subfolder or ""))
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1  # a hub id is owner/name
    if has_scheme or isinstance(location, os.PathLike) or is_path:
        raise FileNotFoundError(f"no folder {folder} (absolute: {folder.absolute()}). Check the path.")
    return HubFolder(text, subfolder, revision, cache, token, local_files_only)


@dataclass(frozen=True)
class LocalFolder:
    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def fetch(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None


@dataclass(frozen=True)
class UrlFolder:
    """A folder that fsspec can read. Files are copied into `cache`, once per version of the file."""

    url: str
    cache: Path
    local_files_only: bool = False
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.url

    def fetch(self, name: str) -> Path | None:
        versions = self.cache / hashlib.sha256(self.url.encode()).hexdigest()[:32]
        if self.local_files_only:
            cached = sorted(versions.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
            return cached[-1] if cached else None
        # Imported here: most users never open a URL, and `import cogvae` needs torch alone.
        from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

        try:
            filesystem, root = url_to_fs(self.url, **self.storage_options)
            remote = f"{root.rstrip('/')}/{name}"
            size = filesystem.info(remote)["size"]
            version = hashlib.sha256(str(filesystem.ukey(remote)).encode()).hexdigest()[:32]
            return _download_once(filesystem, remote, size, versions / version / name)
        except FileNotFoundError:
            return None
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            raise ImportError(f"{self.url}: reading {scheme}:// needs another package. {error}") from error
        except OSError as error:
            raise OSError(f"{self.url}/{name} cannot be read: {error}. Check the credentials and the URL.") from error


@dataclass(frozen=True)
class HubFolder:
    """A repository of the Hugging Face Hub, in the hub's own cache."""

    repo_id: str
    subfolder: str | None
    revision: str | None
    cache_dir: Path | None
    token: str | bool | None = field(repr=False)
    local_files_only: bool

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo_id, self.subfolder)))

    def fetch(self, name: str) -> Path | None:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
        except ImportError as error:
            raise ImportError(f"{self._problem('the package huggingface_hub is not installed')}") from error
        try:
            path = hf_hub_download(
                self.repo_id,
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.local_files_only,
            )
        except LocalEntryNotFoundError as error:
            if self._has_cached("config.json") and name != "config.json":
                return None
            raise OSError(self._problem("the hub cannot be reached and nothing is cached")) from error
        except EntryNotFoundError:
            return None
        except (HFValidationError, OSError) as error:
            raise OSError(self._problem(str(error).strip())) from error
        return Path(path)

    def _has_cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        path = "/".join(filter(None, (self.subfolder, name)))
        found = try_to_load_from_cache(self.repo_id, path, cache_dir=self.cache_dir, revision=self.revision)
        return isinstance(found, str)

    def _problem(self, what: str) -> str:
        return (
            f"'{self.repo_id}' is no local folder, and as a hub repository it failed: {what}. For a local "
            "copy give its folder as the first argument of from_pretrained, for example "
            f"from_pretrained('/models/{self.repo_id.rpartition('/')[2]}', subfolder='vae'). A private "
            "repository needs `token`."
        )


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogvae"


def _download_once(filesystem: Any, remote: str, size: int | None, target: Path) -> Path:
    """Copies a file unless it is there. Processes of a node wait for the first; none sees half a file."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target
        descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
        os.close(descriptor)
        try:
            filesystem.get_file(remote, partial)
            received = os.path.getsize(partial)
            if size is not None and received != size:
                raise OSError(f"{received} of {size} bytes arrived")
            os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        # Windows: processes may download the same bytes twice, and each puts them in place whole.
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield
