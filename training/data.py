"""Batches for training, and the held-out clips. Videos come through the pipeline's own decoding.

The batch of a step is a function of seed and step, so a resumed run needs no state of any generator.

Shape legend: B clips, T frames, H/W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import DecodeConfig, InputConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.errors import TerminalError
from pipeline.geometry import available_frames, choose_bucket, cover_crop
from pipeline.types import Bucket, Clip, Crop, Frames, VideoInfo
from training.config import BatchShape, DataConfig
from training.pictures import Picture, load_photos, render_pictures
from training.scenes import filmed, render_clip

_log = logging.getLogger(__name__)

HELD_OUT_BUCKETS = ("17x144x256@8", "17x192x256@8", "17x256x144@8", "17x128x128@8")
"""Shapes that held-out clips are brought to: the nearest aspect ratio."""
_TRAINING_FPS = 25.0
_TRAINING_FRAMES = 257
_TRAINING_SIDE = 640
_PICTURE_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class NamedClip:
    """A decoded clip and the name of its file."""

    name: str
    frames: Frames
    fps: float


class TrainingData:
    """Draws the batch of any step."""

    def __init__(self, config: DataConfig, shapes: Sequence[BatchShape], seed: int) -> None:
        self._config, self._shapes, self._seed = config, shapes, seed
        self._rendered = render_pictures(seed + _PICTURE_SEED, config.num_pictures)
        self._photos = load_photos(config.photos) if config.photos else []
        self._videos = decode_for_training(config.videos) if config.videos else []
        _log.info("data ready rendered=%d photos=%d videos=%d", len(self._rendered), len(self._photos), len(self._videos))

    @property
    def video_names(self) -> list[str]:
        return [video.name for video in self._videos]

    @property
    def num_photos(self) -> int:
        return len(self._photos)

    def batch(self, step: int) -> Tensor:
        """The clips of a step, ``[B, 3, T, H, W]``, -1 to 1."""
        rng = np.random.default_rng([self._seed, step])
        shape = self._shapes[int(rng.integers(len(self._shapes)))]
        # On small tensors a second thread costs more than it gives.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            clips = [self._clip(np.random.default_rng([self._seed, step, index]), shape) for index in range(shape.clips)]
        finally:
            torch.set_num_threads(threads)
        return torch.stack(clips) * 2 - 1

    def _clip(self, rng: np.random.Generator, shape: BatchShape) -> Tensor:
        if self._videos and rng.uniform() < self._config.video_share:
            return cut_from(rng, self._videos[rng.integers(len(self._videos))].frames, shape)
        return render_clip(rng, self._pick, shape)

    def _pick(self, rng: np.random.Generator) -> Picture:
        pictures = self._photos if self._photos and rng.uniform() < self._config.photo_share else self._rendered
        return pictures[rng.integers(len(pictures))]


def cut_from(rng: np.random.Generator, frames: Frames, shape: BatchShape) -> Tensor:
    """A random window of a video at a random pace and size, ``[3, T, H, W]``, 0 to 1."""
    total, height, width = frames.shape[:3]
    pace = int(rng.integers(1, max(1, min(3, (total - 1) // (shape.num_frames - 1))) + 1))
    start = int(rng.integers(0, total - (shape.num_frames - 1) * pace))
    most = min(height / shape.height, width / shape.width)
    scale = float(np.exp(rng.uniform(0, np.log(max(most, 1.0))))) * min(1.0, most)
    rows, columns = min(height, round(shape.height * scale)), min(width, round(shape.width * scale))
    top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    window = frames[start : start + (shape.num_frames - 1) * pace + 1 : pace, top : top + rows, left : left + columns]
    clip = torch.from_numpy(np.ascontiguousarray(window)).permute(0, 3, 1, 2).float() / 255
    if (rows, columns) != (shape.height, shape.width):
        clip = F.interpolate(clip, size=(shape.height, shape.width), mode="bilinear", antialias=True)
    if rng.uniform() < 0.5:
        clip = clip.flip(3)
    return filmed(rng, clip.transpose(0, 1)) if rng.uniform() < 0.5 else clip.transpose(0, 1)


def decode_for_training(folder: str) -> list[NamedClip]:
    """The beginning of every video of a folder at its own rate and, up to 640 pixels, its own size.

    Raises:
        ValueError: none of them can be decoded.
    """

    def bucket_of(info: VideoInfo) -> Bucket | None:
        fps = min(round(info.fps, 3), _TRAINING_FPS)
        scale = min(1.0, _TRAINING_SIDE / max(info.width, info.height))
        height, width = (max(16, int(side * scale) // 16 * 16) for side in (info.height, info.width))
        one = Bucket(num_frames=1, height=height, width=width, fps=fps)
        num_frames = (min(_TRAINING_FRAMES, available_frames(info.duration_s, one)) - 1) // 8 * 8 + 1
        return Bucket(num_frames=num_frames, height=height, width=width, fps=fps) if num_frames >= 17 else None

    return _decode_folder(folder, bucket_of)


def decode_held_out(folder: str) -> list[NamedClip]:
    """The first 17 frames, 8 a second, of every video of a folder, at 128 to 256 pixels a side.

    Raises:
        ValueError: none of them can be decoded.
    """
    buckets = [Bucket.parse(key) for key in HELD_OUT_BUCKETS]
    return _decode_folder(folder, lambda info: choose_bucket(info, buckets))


def _decode_folder(folder: str, bucket_of: Callable[[VideoInfo], Bucket | None]) -> list[NamedClip]:
    suffixes = InputConfig(uri=folder).extensions
    clips = []
    with DecoderProcess(DecodeConfig()) as decoder:
        for path in sorted(p.resolve() for p in Path(folder).iterdir() if p.suffix.lower() in suffixes):
            try:
                clips.append(_decode_file(decoder, path, bucket_of))
            except TerminalError as error:
                _log.info("video left out name=%s reason=%s detail=%s", path.name, error.reason, error.detail)
    if not clips:
        raise ValueError(f"{folder}: no video there that can be decoded; expected files ending in {', '.join(suffixes)}")
    return clips


def _decode_file(decoder: DecoderProcess, path: Path, bucket_of: Callable[[VideoInfo], Bucket | None]) -> NamedClip:
    info = decoder.probe(str(path), path.name)
    bucket = bucket_of(info)
    if bucket is None:
        raise TerminalError("decode", "too_few_frames", f"{path.name}: {info.duration_s:.2f} s are too short to train on")
    [result] = decoder.decode(str(path), path.name, [_whole_picture(path, info, bucket)])
    if isinstance(result, TerminalError):
        raise result
    return NamedClip(path.name, result, bucket.fps)


def _whole_picture(path: Path, info: VideoInfo, bucket: Bucket) -> Clip:
    crop: Crop = cover_crop(info.width, info.height, bucket)
    return Clip(
        sample_id=path.name,
        uri=str(path),
        size_bytes=path.stat().st_size,
        version="",
        bucket=bucket,
        frame_start=0,
        frame_end=bucket.num_frames,
        crop=crop,
        source_fps=info.fps,
        source_width=info.width,
        source_height=info.height,
    )
