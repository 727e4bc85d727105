"""Where latents come from and how they are to be read: the settings of decoding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt

from pipeline.config import SourceConfig
from pipeline.dataset.scaling import Convention, Role
from pipeline.errors import ConfigError
from pipeline.filters import Filter, parse_filter
from pipeline.latents.layout import Layout
from pipeline.latents.scale import find_multiplier

DEFAULT_NAME_COLUMN = "name"


def _number_if_it_is_one(value: Any) -> Any:
    """A command line gives numbers as text."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is no scale")
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _check_scale(value: str | float | None) -> str | float | None:
    try:
        if value is not None:
            find_multiplier(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return value


def _check_filter(text: str) -> str:
    try:
        parse_filter(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Scale = Annotated[str | float | None, BeforeValidator(_number_if_it_is_one), AfterValidator(_check_scale)]
Condition = Annotated[str, AfterValidator(_check_filter)]


class LatentInputConfig(SourceConfig):
    """Where the latents come from."""

    uri: str
    """A finished dataset, a folder, glob or file of latents, or a table of paths, on any fsspec URL."""
    format: Literal["auto", "dataset", "files", "table"] = "auto"
    """What the URI names. auto: a dataset by its manifest.json, Parquet by its columns, other tables by their extension."""
    layout: Layout | None = None
    """Order of the dimensions: channels, frames, height, width, and B for a batch. Unset: told by the channels."""
    key: str | None = None
    """The tensor of a file that holds several, or the prefix of Parquet columns KEY_bytes, KEY_shape and KEY_dtype."""
    latent_column: str = "latent"
    """Table column that holds the file's path; relative paths start at the table's folder."""
    scale: Scale = None
    """What the latents were multiplied by: none, a model such as cogvideox-5b, or a number. Of our datasets: nothing."""
    role: Role = "video"
    """first_frame: they are image latents of an image-to-video model, which some models scale in another way."""
    convention: Convention = "diffusers"
    """Whose rule made them, where trainers disagree."""
    drop_frames: Literal["auto"] | NonNegativeInt = "auto"
    """Latent frames in front that are padding. auto: one of an even number where scale names a 1.5 model, else none."""
    fps_column: str | None = None
    """Column that holds the frame rate. Unset: fps, where there is such a column."""
    name_column: str = DEFAULT_NAME_COLUMN
    """Column to name a video by. Without it: the name of the source video, or of the latent's file."""
    ids: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Only these: sample ids of a dataset, or names of files without their extension. Unset: all."""
    filters: Annotated[tuple[Condition, ...], BeforeValidator(_as_list)] = ()
    """Only rows that pass all of these, such as psnr>30 or caption~dog. Operators: = != < <= > >= and ~ (contains). One
    with a comma in it is given on the command line as a JSON list: '["caption~red, blue"]'."""
    sample: PositiveInt | None = None
    """Only so many, drawn at random but always the same ones for a seed."""
    seed: int = 0
    """Of the sample."""
    limit: PositiveInt | None = None
    """Stop after so many new ones. Also written --limit."""
    max_file_bytes: PositiveInt = 4 << 30
    """Largest file that is read whole, or row group of another program's Parquet."""

    @property
    def conditions(self) -> tuple[Filter, ...]:
        return tuple(parse_filter(text) for text in self.filters)
