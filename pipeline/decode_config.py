"""Every setting of the decode job, its default and its meaning."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.config import DestinationConfig, JobConfig, WorkConfig
from pipeline.latents import LatentInputConfig
from pipeline.video_writer import Container, VideoFormat


class VideoOutputConfig(DestinationConfig):
    """Where the videos go, and in which form."""

    uri: str
    """Folder of the videos, on any fsspec URL."""
    container: Container = "mp4"
    """mp4: H.264. mkv: FFV1, lossless. png: a folder of frames for each video. webp: an animated preview."""
    crf: int = Field(default=18, ge=0, le=51)
    """Quality of H.264: 18 is visually lossless, larger is smaller."""
    fps: PositiveFloat = 8
    """Frames a second of a latent that brings no rate of its own."""
    shard_bytes: PositiveInt = 2 << 30
    """Decoded frames of one shard, which is committed and retried as a whole."""


class DecodeRunConfig(JobConfig):
    """Everything that one run of the decode job needs."""

    input: LatentInputConfig
    output: VideoOutputConfig
    decode: WorkConfig = WorkConfig()

    @property
    def work(self) -> WorkConfig:
        return self.decode

    @property
    def video_format(self) -> VideoFormat:
        return VideoFormat(container=self.output.container, crf=self.output.crf)

    def plan_settings(self) -> dict[str, Any]:
        return self._dotted("input") | {"output.fps": self.output.fps}
