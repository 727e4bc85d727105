"""Still pictures for the virtual camera: rendered ones, and photos from a folder.

Rendered pictures follow what is known of natural ones: objects that cover each other with sizes of a power law ("dead
leaves"), textures whose spectrum falls as 1/f, sharp edges, smooth shading, text.

Source: Lee, Mumford, Huang 2001 (dead leaves); Field 1987 (spectrum).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.floating[Any]]
"""RGB, 0 to 1, ``[H, W, 3]``."""

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_PHOTO_SIDE = 1600
"""Longer sides are reduced: nothing finer is ever shown."""
_SMALLEST_SIDE = 48
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()&%"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its halvings, uint8 ``[3, H, W]``, largest first: the camera reads the level that suits its zoom."""

    name: str
    levels: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, pixels: Tensor) -> Picture:
        levels = [pixels.contiguous()]
        while min(levels[-1].shape[1:]) >= 2 * _SMALLEST_SIDE:
            half = F.avg_pool2d(levels[-1][None].float(), 2)[0]
            levels.append(half.round().to(torch.uint8))
        return cls(name, tuple(levels))


def load_photos(folder: str) -> list[Picture]:
    """Every picture of a folder, reduced to at most 1600 pixels, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise ValueError(f"data.photos={folder}: no file ending in {', '.join(PHOTO_SUFFIXES)} there")
    photos = []
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (2 * _PHOTO_SIDE, 2 * _PHOTO_SIDE))
            rgb = image.convert("RGB")
        rgb.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
        if min(rgb.size) < 2 * _SMALLEST_SIDE:
            _log.warning("photo left out name=%s size=%s reason=too small", path.name, rgb.size)
            continue
        photos.append(Picture.of(path.name, torch.from_numpy(np.array(rgb)).permute(2, 0, 1)))
    return photos


def render_pictures(seed: int, count: int, side: int = 384) -> list[Picture]:
    """Procedural pictures, the same for the same seed."""
    pictures = []
    for index in range(count):
        pixels = render_picture(np.random.default_rng([seed, index]), side)
        levels = torch.from_numpy((pixels * 255).round().astype(np.uint8)).permute(2, 0, 1)
        pictures.append(Picture.of(f"rendered {index}", levels))
    return pictures


def render_picture(rng: np.random.Generator, side: int) -> Pixels:
    """One picture of a random kind, ``[side, side, 3]``."""
    kind = rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])
    if kind == 0:
        base = dead_leaves(rng, side)
    elif kind == 1:
        base = shading(rng, side) + rng.uniform(0.05, 0.25) * spectral_noise(rng, side, rng.uniform(0.8, 1.6))[..., None]
    elif kind == 2:
        base = page_of_text(rng, side)
    else:
        base = stripes(rng, side)
    # Surfaces have grain, and light falls unevenly on them.
    grain = 1 + rng.uniform(0, 0.15) * spectral_noise(rng, side, rng.uniform(0.6, 1.4))[..., None]
    light = 1 + rng.uniform(0, 0.3) * spectral_noise(rng, side, 2.0)[..., None]
    lit: Pixels = np.clip(base * grain * light, 0, 1)
    return lit


def spectral_noise(rng: np.random.Generator, side: int, exponent: float) -> npt.NDArray[np.floating[Any]]:
    """Noise whose amplitude falls as 1/f^exponent, of mean 0 and deviation 1, ``[side, side]``."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency**exponent
    noise = np.fft.irfft2(spectrum, s=(side, side))
    normed: npt.NDArray[np.floating[Any]] = (noise / noise.std()).astype(np.float32)
    return normed


def shading(rng: np.random.Generator, side: int) -> Pixels:
    """A smooth passage between two to four colours."""
    place = 0.5 + 0.25 * spectral_noise(rng, side, 2.0)
    colours = np.stack([_colour(rng) for _ in range(rng.integers(2, 5))])
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(place, stops, colours[:, c]) for c in range(3)], axis=-1)


def dead_leaves(rng: np.random.Generator, side: int) -> Pixels:
    """Shapes that cover each other, of one palette, drawn twice as large and halved so that edges are smooth."""
    image = Image.fromarray((shading(rng, side) * 255).astype(np.uint8)).resize((2 * side, 2 * side))
    draw = ImageDraw.Draw(image)
    palette = [_colour(rng) for _ in range(rng.integers(3, 9))]
    smallest, largest = rng.uniform(6, 30), side * rng.uniform(0.3, 1.0)
    for _ in range(rng.integers(100, 600)):
        # The density of radii falls as r^-3: pictures of things look alike from near and far.
        u = rng.uniform()
        radius = 1 / math.sqrt(u / smallest**2 + (1 - u) / largest**2)
        x, y = rng.uniform(0, 2 * side, 2)
        colour = palette[rng.integers(len(palette))] + rng.normal(0, 0.08, 3)
        fill = tuple(int(v) for v in np.clip(colour * 255, 0, 255))
        if rng.uniform() < 0.5:
            stretch = rng.uniform(0.3, 1)
            draw.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill=fill)
        else:
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 8)))
            draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)
    return _halved(image)


def page_of_text(rng: np.random.Generator, side: int) -> Pixels:
    """Lines of letters and digits in several sizes on a shaded ground."""
    image = Image.fromarray((shading(rng, side) * 255).astype(np.uint8)).resize((2 * side, 2 * side))
    draw = ImageDraw.Draw(image)
    fill = tuple(int(v * 255) for v in _colour(rng))
    y = 0.0
    while y < 2 * side:
        size = float(rng.uniform(16, 90))
        line = "".join(rng.choice(list(_LETTERS + "     "), rng.integers(4, 60)))
        draw.text((float(rng.uniform(-20, side)), y), line, fill=fill, font=ImageFont.load_default(size))
        y += size * rng.uniform(1.0, 2.0)
    return _halved(image)


def stripes(rng: np.random.Generator, side: int) -> Pixels:
    """Bars or checks of two colours, bent a little."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    bend = rng.uniform(0, 20) * spectral_noise(rng, side, 2.0)
    planes = []
    for _ in range(rng.integers(1, 3)):
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 60)
        phase = (math.cos(angle) * x + math.sin(angle) * y + bend) * (2 * math.pi / period)
        planes.append(np.clip(np.sin(phase) * rng.uniform(0.7, 6), -1, 1))
    mask = (0.5 + 0.5 * np.prod(planes, axis=0))[..., None]
    bars: Pixels = mask * _colour(rng) + (1 - mask) * shading(rng, side)
    return bars


def _halved(image: Image.Image) -> Pixels:
    side = image.width // 2
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _colour(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Brightness of any kind, mostly weak in colour, as the world is."""
    colour: npt.NDArray[np.float64] = np.clip(rng.uniform(0.02, 0.98) + rng.normal(0, rng.choice([0.03, 0.1, 0.3]), 3), 0, 1)
    return colour
