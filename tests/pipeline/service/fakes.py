"""A model for the service's tests: the colour of a frame is the latent's mean, and time passes only when asked to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch

from pipeline.engine import ModelInfo
from pipeline.errors import TerminalError
from pipeline.types import EncodedClip, Frames
from tests.pipeline.fakes import ExhaustedError

MODEL = ModelInfo(fingerprint="f" * 64, latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)


@dataclass
class FakeDecoder:
    """Decodes two latent frames a chunk. Implements ``Engine`` as far as the service needs it."""

    chunk_s: float = 0.0
    """Time that one chunk takes."""
    fails: Callable[[Sequence[torch.Tensor]], Exception | None] = lambda latents: None
    """The error of a batch, if any; raised after its first chunk."""
    gate: threading.Event = field(default_factory=threading.Event)
    """While cleared, the model stands still before a chunk."""
    batches: list[list[tuple[int, ...]]] = field(default_factory=list)
    chunks: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def decode_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[list[Frames]]:
        assert len({tuple(latent.shape) for latent in latents}) == 1
        self.batches.append([tuple(latent.shape) for latent in latents])
        error = self.fails(latents)
        for number, start in enumerate(_chunk_starts(latents[0].shape[1])):
            self.gate.wait(60)
            time.sleep(self.chunk_s)
            self.chunks += 1
            if error is not None and number == 1:
                raise error
            yield [_frames(latent, start) for latent in latents]
        if error is not None:
            raise error

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        chunks = list(self.decode_chunks(latents))
        return [np.concatenate([chunk[index] for chunk in chunks]) for index in range(len(latents))]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, ExhaustedError)

    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip | TerminalError]:
        raise NotImplementedError

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        raise NotImplementedError


def _chunk_starts(num_latent_frames: int) -> list[tuple[int, int]]:
    first = num_latent_frames % 2 + 2 if num_latent_frames > 2 else num_latent_frames
    bounds = [0, *range(first, num_latent_frames + 1, 2)]
    return list(itertools.pairwise(bounds))


def _frames(latent: torch.Tensor, span: tuple[int, int]) -> Frames:
    """The pixel frames of some latent frames: the first of an odd number stands alone."""
    start, end = span
    count = 4 * (end - start) - (3 if start == 0 and latent.shape[1] % 2 else 0)
    grey = int(latent.float().mean().mul(20).add(128).clamp(0, 255))
    height, width = latent.shape[2] * 8, latent.shape[3] * 8
    frames = np.full((count, height, width, 3), grey, np.uint8)
    rng = np.random.default_rng([start, int(latent.float().abs().sum() * 1000) % 2**32])
    frames[:, ::2] ^= rng.integers(0, 64, frames[:, ::2].shape, np.uint8)  # some detail, so that videos have a size
    return frames


def make_latent(seed: int = 0, shape: tuple[int, ...] = (16, 3, 4, 6), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_body(seed: int = 0, shape: tuple[int, ...] = (16, 3, 4, 6), **tensors: Any) -> bytes:
    data: bytes = safetensors.torch.save(tensors or {"latent": make_latent(seed, shape)})
    return data


def load_fake(config: Any, resources: Any) -> Any:
    """In place of ``deployment.load_model``: 20 ms a chunk."""
    from pipeline.service.deployment import LoadedModel

    return LoadedModel(engine=FakeDecoder(chunk_s=0.02), info=MODEL, name="fake")


def load_nothing(config: Any, resources: Any) -> Any:
    """A model that does not load."""
    raise ValueError("the weights are sour")
