"""Which files hold latents: the shards of a dataset, the files of a folder, or those that a table names."""

from __future__ import annotations

from dataclasses import replace

from pipeline.dataset.catalog import open_catalog
from pipeline.dataset.manifest import MANIFEST_PATH, Manifest, read_manifest
from pipeline.dataset.writer import DATA_FOLDER
from pipeline.errors import ConfigError, DatasetError, TerminalError
from pipeline.inputs import list_inputs
from pipeline.latents.config import LatentInputConfig
from pipeline.latents.file import SUFFIXES
from pipeline.latents.scale import NO_SCALE, SCALE_CHOICES
from pipeline.latents.table_file import has_latents
from pipeline.latents.types import plain_columns
from pipeline.sources.source import SourceItem, SourceListing, as_unnamable
from pipeline.sources.table import TABLE_SUFFIXES, list_table
from pipeline.storage import Storage, StoredObject


def list_latents(config: LatentInputConfig) -> SourceListing:
    """The files that ``input`` names, in order; of a table, with their columns.

    Raises:
        ConfigError: nothing usable is there, or the scale of the latents must be said.
    """
    if config.format == "table" or (config.format == "auto" and _is_text_table(config.uri)):
        return _list_table(config)
    found = list(list_inputs(config.uri, config.storage_options))
    if not found:
        raise ConfigError(f"input.uri {config.uri}: there is no file that is not hidden")
    manifest = _find_manifest(config, found)
    if manifest is not None:
        check_scale(config, is_shard=True)
        return SourceListing(items=iter(_list_shards(config, manifest)))
    if config.format == "auto" and _is_table_of_paths(config, found):
        return _list_table(config)
    check_scale(config, is_shard=False)
    files = [file for file in found if file.uri.lower().endswith(SUFFIXES)]
    if not files:
        raise ConfigError(f"input.uri {config.uri}: {len(found)} files, none of which ends in {', '.join(SUFFIXES)}")
    return SourceListing(items=map(_as_item, files))


def check_scale(config: LatentInputConfig, *, is_shard: bool) -> str | float:
    """What latents were multiplied by, if the settings and the kind of file say it.

    Args:
        is_shard: the file is one of our own, whose latents are unscaled.

    Raises:
        ConfigError: they do not say, or contradict each other.
    """
    if is_shard:
        if config.scale not in (None, NO_SCALE, 1.0):
            raise ConfigError(f"input.scale is {config.scale}, but the latents of our datasets are stored unscaled; leave it out")
        return NO_SCALE
    if config.scale is None:
        raise ConfigError(
            f"input.uri {config.uri}: say in input.scale what these latents were multiplied by: {SCALE_CHOICES}. A diffusers "
            "pipeline with output_type='latent' gives latents scaled for its model. A wrong scale makes dark or burnt videos"
        )
    return config.scale


def _list_table(config: LatentInputConfig) -> SourceListing:
    check_scale(config, is_shard=False)
    listing = list_table(config.uri, config.latent_column, "latent", config.storage_options)
    return SourceListing(items=(replace(item, columns=plain_columns(item.columns)) for item in listing.items))


def _is_text_table(uri: str) -> bool:
    return uri.lower().endswith(tuple(suffix for suffix in TABLE_SUFFIXES if suffix != ".parquet"))


def _is_table_of_paths(config: LatentInputConfig, found: list[StoredObject]) -> bool:
    """Whether Parquet files hold paths: told by the first of them, where the URI names nothing else."""
    if not all(file.uri.lower().endswith(".parquet") for file in found):
        return False
    try:
        return not has_latents(found[0].uri, found[0].size_bytes, config.storage_options)
    except TerminalError as error:
        if len(found) > 1:
            return False  # the others may be sound; this one is accounted for when it is probed
        raise ConfigError(f"input.uri {found[0].uri}: {error.detail}") from error


def _find_manifest(config: LatentInputConfig, found: list[StoredObject]) -> Manifest | None:
    """The manifest of a finished dataset of ours; None where files are to be read one by one.

    Raises:
        ConfigError: it is a dataset, but not finished, or damaged.
    """
    if config.format == "files":
        return None
    storage = Storage(config.uri, config.storage_options)
    has_shards = any(file.uri.startswith(f"{storage.uri}/{DATA_FOLDER}/bucket=") for file in found)
    if not any(file.uri == f"{storage.uri}/{MANIFEST_PATH}" for file in found):
        if config.format == "dataset" or has_shards:
            raise ConfigError(
                f"input.uri {config.uri}: not a finished dataset: there is no {MANIFEST_PATH}. Let its run finish, or start it "
                f"again: it resumes. Or read what is there: {config.uri.rstrip('/')}/{DATA_FOLDER} with input.scale: none"
            )
        return None
    try:
        return read_manifest(storage)
    except DatasetError as error:
        if config.format == "auto" and not has_shards:
            return None  # another program's manifest.json
        raise ConfigError(f"input.uri {error}") from error


def _list_shards(config: LatentInputConfig, manifest: Manifest) -> list[SourceItem]:
    """The shards that the manifest's index names, in its order; one that is committed but not published is passed over."""
    storage = Storage(config.uri, config.storage_options)
    shards = {shard.uri: shard for shard in storage.list(DATA_FOLDER, ".parquet")}
    try:
        files = open_catalog(storage, manifest).files
    except DatasetError as error:
        raise ConfigError(f"input.uri {error}") from error
    if missing := [path for path in files if path not in shards]:
        raise ConfigError(
            f"input.uri {config.uri}: {len(missing)} shards are missing that the dataset's index names, the first "
            f"{missing[0]}; copy them again"
        )
    return [_as_item(replace(shards[path], uri=f"{storage.uri}/{path}")) for path in files]


def _as_item(file: StoredObject) -> SourceItem:
    return as_unnamable(file.uri) or SourceItem(uri=file.uri, size_bytes=file.size_bytes, version=file.version)
