"""Where videos are found. A source lists; it never opens a video."""

from pipeline.config import InputConfig
from pipeline.sources.files import list_files
from pipeline.sources.source import SourceItem, SourceListing
from pipeline.sources.table import TABLE_SUFFIXES, list_table
from pipeline.sources.webdataset import list_tars, names_tars

__all__ = ["SourceItem", "SourceListing", "open_source"]


def open_source(config: InputConfig) -> SourceListing:
    """The listing that ``input`` names. Raises: ConfigError: nothing usable is there."""
    is_table = config.format == "table" or (config.format == "auto" and config.uri.lower().endswith(TABLE_SUFFIXES))
    if is_table:
        return list_table(config.uri, config.video_column, "video", config.storage_options)
    if config.format == "webdataset" or (config.format == "auto" and names_tars(config.uri)):
        return SourceListing(items=list_tars(config))
    return SourceListing(items=list_files(config))
