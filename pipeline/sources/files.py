"""A folder, a glob or a single video, with caption files beside the videos."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import InputConfig
from pipeline.errors import ConfigError
from pipeline.inputs import list_inputs
from pipeline.sources.source import SourceItem, as_unnamable
from pipeline.sources.webdataset import is_tar, tar_item

SIDECAR_SUFFIXES = (".txt", ".json")


def list_files(config: InputConfig) -> Iterator[SourceItem]:
    """The videos that ``input.uri`` names, sorted; ``a.txt`` and ``a.json`` belong to ``a.mp4``.

    A folder or glob of tars is listed as such, unless ``input.format`` says otherwise.

    Raises:
        ConfigError: nothing is there, or nothing with one of ``input.extensions``.
    """
    found = list(list_inputs(config.uri, config.storage_options))
    videos = [file for file in found if file.uri.lower().endswith(config.extensions)]
    tars = [file for file in found if is_tar(file.uri)] if config.format == "auto" else []
    if tars and videos:
        raise ConfigError(
            f"input.uri {config.uri}: {len(videos)} videos and {len(tars)} tars; set input.format to files or webdataset"
        )
    if tars:
        yield from map(tar_item, tars)
        return
    if not videos:
        raise ConfigError(
            f"input.uri {config.uri}: {len(found)} files, none of which ends in {', '.join(config.extensions)}; "
            "see input.extensions"
        )
    files = {file.uri: file for file in found}
    if any(character in config.uri for character in "*?[") or len(found) == 1:
        # A glob or a single file names the videos only; their captions lie beside them all the same.
        for folder in sorted({video.uri.rpartition("/")[0] for video in videos}):
            files.update((file.uri, file) for file in list_inputs(folder, config.storage_options, recursive=False))
    for video in videos:
        if (unnamable := as_unnamable(video.uri)) is not None:
            yield unnamable
            continue
        stem = video.uri[: video.uri.rindex(".")]
        sidecars = [files[stem + suffix] for suffix in SIDECAR_SUFFIXES if stem + suffix in files]
        yield SourceItem(
            uri=video.uri,
            size_bytes=video.size_bytes,
            version=video.version,
            sidecars=tuple(file.uri for file in sidecars),
            sidecar_versions=tuple(f"{file.size_bytes} {file.version}" for file in sidecars),
        )
