"""What a request asks for, checked; the same over HTTP and through a handle.

C latent channels, F latent frames, H/W latent cells.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.engine import ModelInfo
from pipeline.errors import ConfigError, TerminalError
from pipeline.latents.file import choose_tensor, parse_tensors
from pipeline.latents.layout import Layout, find_layout, to_clips
from pipeline.latents.scale import drop_pad, find_multiplier, unscale
from pipeline.service.config import ServiceConfig
from pipeline.service.errors import RequestError
from pipeline.types import exact_fps
from pipeline.video_writer import Container, VideoFormat

CACHE_VERSION = "1"
"""Changes when the same request gives another video."""
_MAX_SIDE = 8192  # beyond it codecs give up, each at its own size
_FPS = re.compile(r"(\d{1,7})(?:\.(\d{1,6})|/(\d{1,7}))?")
_MIN_FPS, _MAX_FPS = Fraction(1, 10), Fraction(240)


def parse_fps(value: str) -> Fraction:
    """``8``, ``29.97`` (means 30000/1001) or ``30000/1001``. Raises: ValueError: another form, or not 0.1 to 240."""
    match = _FPS.fullmatch(value)
    if match is None or (match[3] is not None and int(match[3]) == 0):
        raise ValueError(f"fps {value[:40]!r}: expected a number or a fraction, such as 8, 29.97 or 30000/1001")
    fps = Fraction(value)
    if not _MIN_FPS <= fps <= _MAX_FPS:
        raise ValueError(f"fps {value}: expected 0.1 to 240")
    return exact_fps(float(fps)) if match[2] else fps


def parse_scale(value: str) -> str | float:
    """A model's name, ``none``, or the factor. Raises: ValueError: a factor that is not above 0."""
    try:
        factor = float(value)
    except ValueError:
        return value
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"scale {value[:40]!r}: expected a finite number above 0, a model such as cogvideox-5b, or none")
    return factor


def _check_fps(value: str) -> str:
    parse_fps(value)
    return value


def _check_scale(value: str) -> str:
    parse_scale(value)
    return value


class VideoParameters(BaseModel):
    """The form of the video."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    container: Container = "mp4"
    """mp4: H.264. mkv: FFV1, lossless. webp: an animated preview. png: a zip of lossless frames."""
    crf: int = Field(default=18, ge=1, le=51)
    """Quality of mp4: 18 is visually lossless, larger is smaller."""
    stream: bool = False
    """Send the video while it is decoded, as fragmented mp4 that ends in an mfra box; otherwise whole, with its length."""

    @model_validator(mode="after")
    def _only_mp4_streams(self) -> VideoParameters:
        if self.stream and self.container != "mp4":
            raise ValueError(f"stream goes with container=mp4 only, not {self.container}")
        return self


class DecodeParameters(VideoParameters):
    """What the body's latent is, and the form of its video."""

    scale: Annotated[str, AfterValidator(_check_scale), Field(max_length=200)]
    """How the latent was scaled: a model such as cogvideox-5b, a scaling factor, or none."""
    role: Literal["video", "first_frame"] = "video"
    """first_frame: an image-to-video condition, which some models scale differently."""
    convention: Literal["diffusers", "cogvideo"] = "diffusers"
    """Whose rule of scaling a first frame follows."""
    layout: Layout | None = None
    """Order of the dimensions. Unset: found from the number of channels."""
    key: Annotated[str, Field(max_length=1000)] | None = None
    """Tensor of the file to decode. Unset: the only one that can be a latent."""
    drop_frames: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Latent frames in front that are padding. auto: as CogVideoX 1.5 pads, if scale names it."""
    fps: Annotated[str, AfterValidator(_check_fps)] = "8"
    """Frames a second, such as 8, 29.97 or 30000/1001."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """A latent to decode and the video to make of it."""

    latent: torch.Tensor
    """Unscaled ``[C, F, H, W]``, finite."""
    fps: Fraction
    container: Container
    crf: int
    stream: bool
    num_frames: int
    """Frames that decoding gives."""
    height: int
    width: int

    @property
    def format(self) -> VideoFormat:
        return VideoFormat(container=self.container, crf=self.crf)

    @property
    def raw_bytes(self) -> int:
        """Of the decoded frames; a coded video is hardly ever larger."""
        return self.num_frames * self.height * self.width * 3

    def name(self, model: str) -> str:
        """File name of its video: the same for the same latent, form and model, and for nothing else."""
        digest = hashlib.blake2b(digest_size=20)
        values = self.latent.contiguous()
        form = (CACHE_VERSION, model, tuple(values.shape), values.dtype, self.fps, self.container, self.crf, self.stream)
        digest.update(repr(form).encode())
        digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest() + self.format.suffix


def read_request(body: bytes, wanted: DecodeParameters, model: ModelInfo, limits: ServiceConfig) -> VideoRequest:
    """A body of safetensors as a request.

    Raises:
        RequestError: 4xx: damaged, not one latent of this model, not finite, or over a limit.
    """
    try:
        tensors = parse_tensors(body, ".safetensors")
        tensor = tensors[choose_tensor(tensors, wanted.key)]
        layout = find_layout(tensor.shape, model.latent_channels, wanted.layout)
        if layout.startswith("B") and len(tensor) != 1:
            raise RequestError(422, "several_clips", f"the tensor holds {len(tensor)} clips; send one clip a request")
        scale = parse_scale(wanted.scale)
        _check_model(scale, model)
        latent = drop_pad(to_clips(tensor, layout)[0], scale, wanted.drop_frames)
        # Before anything of the latent's size is computed.
        check_limits(tuple(latent.shape), model, limits)
        latent = unscale(latent, scale, role=wanted.role, convention=wanted.convention)
    except TerminalError as error:
        raise RequestError.unprocessable(error) from error
    except ConfigError as error:
        raise RequestError(422, "bad_scale", str(error)) from error
    return make_request(latent, parse_fps(wanted.fps), wanted, model, limits)


def _check_model(scale: str | float, model: ModelInfo) -> None:
    """A scale that names a model means latents of its VAE; one that is a number says what it means itself."""
    factor = find_multiplier(scale) if isinstance(scale, str) else None
    if factor is not None and not math.isclose(factor, model.scaling_factor, rel_tol=1e-6):
        raise RequestError(
            422,
            "other_model",
            f"scale {scale}: its VAE has scaling factor {factor:g}, and this service decodes with one of "
            f"{model.scaling_factor:g}; ask a service that has that VAE, or give the factor as a number if this is the right one",
        )


def make_request(
    latent: torch.Tensor, fps: Fraction, wanted: VideoParameters, model: ModelInfo, limits: ServiceConfig
) -> VideoRequest:
    """A request for an unscaled latent's video. Raises: RequestError: over a limit, or not finite."""
    num_frames, height, width = check_limits(tuple(latent.shape), model, limits)
    if not bool(latent.isfinite().all()):
        raise RequestError(422, "not_finite", "the latent has NaN or infinite values; nothing can be decoded from those")
    return VideoRequest(
        latent=latent,
        fps=fps,
        container=wanted.container,
        crf=wanted.crf,
        stream=wanted.stream,
        num_frames=num_frames,
        height=height,
        width=width,
    )


def check_limits(shape: tuple[int, ...], model: ModelInfo, limits: ServiceConfig) -> tuple[int, int, int]:
    """Frames, height and width of a latent's video. Raises: RequestError: empty, or larger than is allowed."""
    channels, latent_frames, cells_high, cells_wide = shape
    if channels != model.latent_channels or min(shape) < 1:
        raise RequestError(
            422, "bad_shape", f"a latent of shape {list(shape)}: expected [{model.latent_channels}, F, H, W], each at least 1"
        )
    ratio = model.temporal_ratio
    num_frames = ratio * (latent_frames - 1) + 1 if latent_frames % 2 else ratio * latent_frames
    height, width = cells_high * model.spatial_ratio, cells_wide * model.spatial_ratio
    if num_frames > limits.max_frames:
        raise RequestError(
            413, "too_many_frames", f"the video has {num_frames} frames, service.max_frames is {limits.max_frames}"
        )
    if height * width > limits.max_pixels or max(height, width) > _MAX_SIDE:
        raise RequestError(
            413,
            "too_many_pixels",
            f"the video has {height}x{width} pixels; service.max_pixels is {limits.max_pixels}, and a side at most {_MAX_SIDE}",
        )
    return num_frames, height, width


def parse_parameters(values: Mapping[str, Any]) -> DecodeParameters:
    """Parameters that came without HTTP. Raises: RequestError: 422."""
    try:
        texts = {name: str(value) if name in ("scale", "fps") else value for name, value in values.items()}
        return DecodeParameters.model_validate(texts)
    except ValidationError as error:
        raise RequestError(422, "bad_parameter", describe_problems(error.errors())) from error


def describe_problems(problems: Sequence[Any]) -> str:
    """What is wrong with parameters, in words."""
    return "; ".join(_describe(problem) for problem in problems[:5])


def _describe(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part not in ("query", "path", "body"))[:100]
    if problem["type"] == "missing":
        return f"{where}: is required"
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such parameter"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
