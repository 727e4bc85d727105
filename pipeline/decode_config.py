"""Every setting of the decode job, its default and its meaning."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from pipeline.config import DestinationConfig, JobConfig, WorkConfig
from pipeline.latents import LatentInputConfig
from pipeline.video_writer import MAX_FPS, MIN_FPS, Container, VideoFormat


class VideoOutputConfig(DestinationConfig):
    """Where the videos go, and in which form."""

    uri: str
    """Folder of the videos, on any fsspec URL."""
    container: Container = "mp4"
    """mp4: H.264. mkv: FFV1, lossless. png: a zip of frames. webp: an animated preview."""
    crf: int = Field(default=18, ge=1, le=51)
    """Quality of H.264: 18 is visually lossless, larger is smaller."""
    fps: float = Field(default=8, ge=MIN_FPS, le=MAX_FPS)
    """Frames a second of a latent that brings no rate of its own."""
    shard_bytes: PositiveInt = 2 << 30
    """Decoded frames of one shard, which is committed and retried as a whole."""


class LatentDecodeConfig(WorkConfig):
    """The work of one actor."""

    max_frames: PositiveInt = 1024
    """Frames of one video. A latent that would give more is quarantined."""
    max_pixels: PositiveInt = 4096 * 2304
    """Pixels of one frame. A latent that would give more is quarantined."""


class DecodeRunConfig(JobConfig):
    """Everything that one run of the decode job needs."""

    input: LatentInputConfig
    output: VideoOutputConfig
    decode: LatentDecodeConfig = LatentDecodeConfig()

    @property
    def work(self) -> WorkConfig:
        return self.decode

    @property
    def video_format(self) -> VideoFormat:
        return VideoFormat(container=self.output.container, crf=self.output.crf)

    def plan_settings(self) -> dict[str, Any]:
        limits = {f"decode.{name}": getattr(self.decode, name) for name in ("max_frames", "max_pixels")}
        return self._dotted("input") | {"output.fps": self.output.fps} | limits
