"""Every setting of a training run, its default and its meaning.

The docstring under a field is what ``--help`` prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config import Section, Settings, StorageOptions

_SHAPE_KEY = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Clips, frames and pixels of one step, written ``4x9x64x64``."""

    clips: int
    num_frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, key: str) -> BatchShape:
        """Read ``CLIPSxFRAMESxHEIGHTxWIDTH``. Raises: ValueError: another form, or a shape that does not round-trip."""
        match = _SHAPE_KEY.fullmatch(key.strip())
        if match is None:
            raise ValueError(f"shape {key!r} is not of the form CLIPSxFRAMESxHEIGHTxWIDTH, such as 4x9x64x64")
        clips, num_frames, height, width = map(int, match.groups())
        if clips < 1 or num_frames % 8 != 1:
            raise ValueError(f"shape {key}: expected at least 1 clip of 8k+1 frames")
        if height % 16 or width % 16 or min(height, width) < 16:
            raise ValueError(f"shape {key}: height and width must be positive multiples of 16")
        return cls(clips=clips, num_frames=num_frames, height=height, width=width)

    @property
    def key(self) -> str:
        return f"{self.clips}x{self.num_frames}x{self.height}x{self.width}"


def _shape_key(value: str) -> str:
    return BatchShape.parse(value).key


def _split_keys(value: Any) -> Any:
    """One key, or several with commas between them, may stand without brackets."""
    return value.split(",") if isinstance(value, str) else value


ShapeKey = Annotated[str, AfterValidator(_shape_key)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    """The VAE that is trained."""

    init: str | None = None
    """Folder, fsspec URL or hub id of weights to start from; the settings of the architecture then have no effect."""
    subfolder: str | None = None
    """Folder of the VAE inside `init`, usually vae for a whole pipeline."""
    storage_options: StorageOptions = Field(default_factory=dict)
    """Passed to fsspec for `init`."""
    block_out_channels: tuple[PositiveInt, ...] = (16, 32, 48, 64)
    """Channels per level, full resolution first."""
    layers_per_block: PositiveInt = 1
    """Resnets per encoder level; a decoder level has one more."""
    norm_num_groups: PositiveInt = 8
    """Groups of every norm."""
    latent_channels: PositiveInt = 16
    """Channels of a latent."""


class DataConfig(Section):
    """What it sees. Without folders it trains on rendered scenes alone."""

    photos: str | None = None
    """Folder of pictures that a virtual camera moves over."""
    videos: str | None = None
    """Folder of videos to train on."""
    held_out: str | None = None
    """Folder of videos that are only ever evaluated on."""
    num_pictures: PositiveInt = 128
    """Procedural pictures that are rendered at the start."""
    photo_share: Share = 0.65
    """Share of pictures in a scene that are photos, where there are photos."""
    video_share: Share = 0.15
    """Share of clips cut out of videos, where there are videos."""
    shapes: Annotated[tuple[ShapeKey, ...], BeforeValidator(_split_keys), Field(min_length=1)] = (
        "4x9x64x64",
        "4x9x64x64",
        "4x9x64x64",
        "2x17x64x64",
        "2x9x96x96",
        "2x9x64x128",
    )
    """Shapes CLIPSxFRAMESxHEIGHTxWIDTH, one drawn a step. On a CPU at least 2 clips: single ones miss the fast kernels."""


class LossConfig(Section):
    """Weights of the terms; the pixel term has weight 1."""

    pyramid: NonNegativeFloat = 0.5
    """Of the error of each level of a Laplacian pyramid: edges count as much as areas."""
    structure: NonNegativeFloat = 0.1
    """Of 1 - SSIM of the brightness."""
    kl: NonNegativeFloat = 1e-5
    """Of the posterior's divergence from the standard normal, in nats a latent number."""


class OptimizerConfig(Section):
    """How it learns."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: for the kernels inside the networks, and AdamW for the rest. adamw: for all."""
    learning_rate: PositiveFloat = 2e-3
    """Between warm-up and decay."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear growth at the start."""
    decay_steps: NonNegativeInt = 0
    """Last steps before `run.steps`, over which the rate falls to a fiftieth."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled, of every weight with more than one dimension."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    ema_decay: Share = 0.999
    """Of the running average of the weights, which is what is evaluated and exported."""


class RunSettings(Section):
    """One training run; the same command resumes it."""

    output: str
    """Local folder of checkpoint, log and exported weights."""
    steps: PositiveInt = 10_000
    """Step after which it is done."""
    seed: int = 0
    """With the step, decides batch and noise: what a resumed run sees is what an uninterrupted one would have seen."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the convolutions; weights and optimizer stay float32."""
    threads: PositiveInt | None = None
    """torch threads. Unset: torch's choice."""
    log_every: PositiveInt = 20
    """Steps a line of the log."""
    checkpoint_every_s: PositiveFloat = 300
    """Seconds between checkpoints."""
    evaluate_every: PositiveInt = 500
    """Steps between evaluations on the held-out clips, each followed by an export."""


class TrainConfig(Settings):
    """Everything that one training run needs."""

    run: RunSettings
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        return tuple(BatchShape.parse(key) for key in self.data.shapes)
