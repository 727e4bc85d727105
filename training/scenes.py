"""Scenes in motion: a virtual camera over a picture, things that move in front of it, changing light, film grain.

Everything is drawn from one generator, so a scene is a function of its seed.

Shape legend: T frames, H/W pixels of a frame, h/w pixels of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import BatchShape
from training.pictures import Picture

PickPicture = Callable[[np.random.Generator], Picture]
_STILL_SHARE = 0.35
"""Of cameras that stand on a tripod."""
_CUT_SHARE = 0.04
"""Of clips with a cut to another scene."""


@dataclass(frozen=True, slots=True)
class Motion:
    """Where something is, frame by frame: place in pixels, turn in radians, size as a factor; each ``[T]``."""

    x: Tensor
    y: Tensor
    turn: Tensor
    size: Tensor

    @classmethod
    def draw(cls, rng: np.random.Generator, num_frames: int, speed: float) -> Motion:
        """A smooth path that begins at 0, with some shaking; ``speed`` in pixels a frame is what is usual."""
        t = np.arange(num_frames)

        def path(scale: float, shake: float) -> Tensor:
            velocity, pull = rng.laplace(0, scale), rng.laplace(0, scale) * 0.02
            tremble = shake * rng.standard_normal(num_frames)
            return torch.from_numpy(velocity * t + pull * t**2 + tremble).float()

        shake = float(rng.choice([0.0, 0.0, 0.3, 1.0])) if speed > 0 else 0.0
        return cls(path(speed, shake), path(speed, shake), path(0.004 * speed, 0.0), torch.exp(path(0.004 * speed, 0.0)))


def render_clip(rng: np.random.Generator, pick: PickPicture, shape: BatchShape) -> Tensor:
    """One clip, ``[3, T, H, W]``, 0 to 1."""
    clip = _scene(rng, pick, shape)
    if rng.uniform() < _CUT_SHARE:
        cut = int(rng.integers(1, shape.num_frames))
        clip[:, cut:] = _scene(rng, pick, shape)[:, cut:]
    return filmed(rng, clip)


def _scene(rng: np.random.Generator, pick: PickPicture, shape: BatchShape) -> Tensor:
    camera = Motion.draw(rng, shape.num_frames, 0.0 if rng.uniform() < _STILL_SHARE else 1.0)
    clip = _view(rng, pick(rng), shape, camera)
    for _ in range(min(3, rng.poisson(0.8))):
        motion = Motion.draw(rng, shape.num_frames, 1.5)
        mask, local = _thing(rng, shape, motion)
        clip = clip + mask * (_view(rng, pick(rng), shape, local) - clip)
    return clip


def _view(rng: np.random.Generator, picture: Picture, shape: BatchShape, camera: Motion) -> Tensor:
    """What a camera sees of a picture, ``[3, T, H, W]``."""
    height, width = picture.levels[0].shape[1:]
    # Picture pixels per pixel of the frame: from about one to all of the picture.
    most = max(1.0, min(height / shape.height, width / shape.width))
    scale = math.exp(rng.uniform(0, math.log(most))) * rng.uniform(0.8, 1.0)
    level = min(max(0, math.floor(math.log2(scale) + 0.4)), len(picture.levels) - 1)
    source = picture.levels[level]
    scale /= 2**level
    reach_y, reach_x = (scale * side / 2 for side in (shape.height, shape.width))
    centre_y, centre_x = (
        rng.uniform(min(reach, side / 2), max(side - reach, side / 2))
        for reach, side in ((reach_y, source.shape[1]), (reach_x, source.shape[2]))
    )
    y, x = _pixel_grid(shape)
    zoom = scale * camera.size[:, None, None]
    turn = camera.turn[:, None, None] + float(rng.normal(0, 0.15))
    along = centre_x + zoom * (torch.cos(turn) * x - torch.sin(turn) * y + camera.x[:, None, None])
    down = centre_y + zoom * (torch.sin(turn) * x + torch.cos(turn) * y + camera.y[:, None, None])
    if rng.uniform() < 0.5:
        along = source.shape[2] - along
    return _sample(source, along, down)


def _sample(source_3hw: Tensor, x_THW: Tensor, y_THW: Tensor) -> Tensor:
    """Bicubic values at the given places; beyond its edges the picture is mirrored. ``[3, T, H, W]``."""
    height, width = source_3hw.shape[1:]
    # Only the part that is looked at becomes float; it is cut with room for the filter, unless the view leaves the picture.
    top, left = (max(0, int(places.min()) - 3) for places in (y_THW, x_THW))
    bottom, right = min(height, int(y_THW.max()) + 4), min(width, int(x_THW.max()) + 4)
    if bottom - top < 8 or right - left < 8:
        top, left, bottom, right = 0, 0, height, width
    part = source_3hw[None, :, top:bottom, left:right].float() / 255
    grid_y = (y_THW - top) * (2 / (bottom - top)) - 1
    grid_x = (x_THW - left) * (2 / (right - left)) - 1
    grid = torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1)[None]
    values = F.grid_sample(part, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return torch.unflatten(values[0], 1, x_THW.shape[:2]).clamp(0, 1)


def _thing(rng: np.random.Generator, shape: BatchShape, motion: Motion) -> tuple[Tensor, Motion]:
    """A shape between ellipse and rectangle that moves: its mask ``[T, H, W]``, and the camera that moves along with it."""
    side = min(shape.height, shape.width)
    radius_x, radius_y = side * np.exp(rng.uniform(math.log(0.06), math.log(0.4), 2))
    corner, softness = rng.choice([2.0, 2.0, 4.0, 8.0]), rng.choice([0.7, 1.0, 1.0, 3.0])
    start_x, start_y = rng.uniform(-0.5, 0.5) * shape.width, rng.uniform(-0.5, 0.5) * shape.height
    y, x = _pixel_grid(shape)
    turn = motion.turn[:, None, None] + float(rng.uniform(0, math.pi))
    dx, dy = x - start_x - motion.x[:, None, None], y - start_y - motion.y[:, None, None]
    along = (torch.cos(turn) * dx + torch.sin(turn) * dy) / (radius_x * motion.size[:, None, None])
    down = (torch.cos(turn) * dy - torch.sin(turn) * dx) / (radius_y * motion.size[:, None, None])
    distance = (along.abs() ** corner + down.abs() ** corner) ** (1 / corner) - 1
    mask = (0.5 - distance * (min(radius_x, radius_y) / softness)).clamp(0, 1)
    return mask.float(), Motion(-motion.x, -motion.y, motion.turn, 1 / motion.size)


def filmed(rng: np.random.Generator, clip_3THW: Tensor) -> Tensor:
    """The clip as a camera would record it: lens, light, colour, grain. 0 to 1."""
    frames = clip_3THW.shape[1]
    if rng.uniform() < 0.35:
        clip_3THW = _blurred(clip_3THW, float(rng.uniform(0.3, 1.3)))
    time = torch.linspace(-1, 1, frames)[:, None, None]
    gain = math.exp(rng.normal(0, 0.15)) * torch.exp(float(rng.normal(0, 0.04)) * time)
    if rng.uniform() < 0.1:  # old film flickers
        gain = gain * torch.from_numpy(1 + 0.06 * rng.standard_normal((frames, 1, 1))).float()
    clip_3THW = clip_3THW.clamp(0, 1) ** math.exp(rng.normal(0, 0.2)) * gain
    grey = clip_3THW.mean(0, keepdim=True)
    saturation = 0.0 if rng.uniform() < 0.1 else float(rng.uniform(0.6, 1.2))
    tint = torch.from_numpy(1 + rng.normal(0, 0.04, (3, 1, 1, 1))).float()
    clip_3THW = (grey + saturation * (clip_3THW - grey)) * tint + float(rng.normal(0, 0.03))
    if rng.uniform() < 0.35:
        # numpy's generator in float32 is several times as fast as in float64.
        grain = torch.from_numpy(rng.standard_normal(clip_3THW.shape[1:], dtype=np.float32))
        clip_3THW = clip_3THW + float(rng.uniform(0.003, 0.025)) * grain
    return clip_3THW.clamp(0, 1)


def _blurred(clip_3THW: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = window / window.sum()
    planes = F.pad(clip_3THW.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="reflect")
    blurred = F.conv2d(F.conv2d(planes, window[None, None, :, None]), window[None, None, None, :])
    return torch.unflatten(blurred[:, 0], 0, clip_3THW.shape[:2])


def _pixel_grid(shape: BatchShape) -> tuple[Tensor, Tensor]:
    """Places of the pixels' centres from the middle of the frame: rows ``[H, 1]`` and columns ``[W]``."""
    rows = torch.arange(shape.height, dtype=torch.float32) - (shape.height - 1) / 2
    columns = torch.arange(shape.width, dtype=torch.float32) - (shape.width - 1) / 2
    return rows[:, None], columns
