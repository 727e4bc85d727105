"""Stand-ins for what the pipeline talks to: an object store that fails on request, a model, a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import TerminalError
from pipeline.plan import PlannedClip, ProbedVideo
from pipeline.plan_store import ShardRef
from pipeline.recipe import digest
from pipeline.types import Bucket, Clip, Crop, DecodedClip, EncodedClip, Frames, TensorBytes, VideoInfo

SMALL = Bucket.parse("9x16x16@8")


@dataclass
class Fault:
    """What a store does wrong, once."""

    call: str
    """The filesystem's method: cat_file, pipe_file, get_file, info or find."""
    error: Exception | None = None
    after: bool = False
    """The call takes effect before it fails: its reply is lost."""
    cut_bytes: int = 0
    """So much is missing at the end of what is delivered."""


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """An object store in memory, ``flaky://``, that fails as ``faults`` say, first fault first."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[Fault]] = []
    calls: ClassVar[list[str]] = []
    delivered: ClassVar[list[int]] = []
    """Bytes of each answer that held content."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky://")))

    @classmethod
    def reset(cls) -> None:
        for values in (cls.store, cls.faults, cls.calls, cls.delivered):
            values.clear()
        cls.pseudo_dirs[:] = [""]

    @contextmanager
    def _fault(self, call: str) -> Iterator[Fault]:
        self.calls.append(call)
        fault = self.faults.pop(0) if self.faults and self.faults[0].call == call else Fault(call)
        if fault.error is not None and not fault.after:
            raise fault.error
        yield fault
        if fault.error is not None:
            raise fault.error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **rest: Any) -> bytes:
        with self._fault("cat_file") as fault:
            data: bytes = super().cat_file(path, start=start, end=end, **rest)
            self.delivered.append(len(data))
            return data[: len(data) - fault.cut_bytes]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **rest: Any) -> None:
        with self._fault("pipe_file"):
            super().pipe_file(path, value, mode=mode, **rest)

    def get_file(self, rpath: str, lpath: str, **rest: Any) -> None:
        with self._fault("get_file") as fault:
            super().get_file(rpath, lpath, **rest)
            self.delivered.append(self.size(rpath))
            if fault.cut_bytes:
                with open(lpath, "r+b") as file:
                    file.truncate(self.size(rpath) - fault.cut_bytes)

    def info(self, path: str, **rest: Any) -> dict[str, Any]:
        with self._fault("info"):
            found: dict[str, Any] = super().info(path, **rest)
            return found

    def find(self, path: str, **rest: Any) -> Any:
        with self._fault("find"):
            return super().find(path, **rest)


register_implementation("flaky", FlakyFileSystem)


class ExhaustedError(Exception):
    """What ``FakeEngine`` takes for an exhausted GPU."""


@dataclass
class FakeEngine:
    """A model whose latent of a clip is the first pixel of each frame, and whose frames are as bright as their latent.

    Clips are told apart by the brightness that ``make_frames`` gives them; latents by the mean of their first frame.
    Decoding gives the size and the number of frames that the published models give.
    """

    fails: Callable[[list[int]], Exception | None] = lambda clips: None
    """The error of a batch with clips, or latents, of this brightness, if any."""
    not_finite: frozenset[int] = frozenset()
    psnr_error: Exception | None = None
    batches: list[list[int]] = field(default_factory=list)
    tighter: list[str] = field(default_factory=list)
    """The steps by which it can take less memory."""
    decoded: list[list[int]] = field(default_factory=list)
    """The brightness of what each call to ``decode`` or ``decode_chunks`` was given."""

    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip | TerminalError]:
        values = [int(clip[0, 0, 0, 0]) for clip in clips]
        self.batches.append(values)
        error = self.fails(values)
        if error is not None:
            raise error
        return [self._encode(value, clip) for value, clip in zip(values, clips, strict=True)]

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        if self.psnr_error is not None:
            raise self.psnr_error
        return 30.0

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        self._begin_decoding(latents)
        return [self._decode(latent) for latent in latents]

    def decode_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[list[Frames]]:
        self._begin_decoding(latents)
        clips = [self._decode(latent) for latent in latents]
        for clip in clips:
            if isinstance(clip, TerminalError):
                raise clip
        whole = [clip for clip in clips if not isinstance(clip, TerminalError)]
        ends = [end for end in range(len(whole[0]), 0, -8) if end >= 8 or end == len(whole[0])][::-1]
        for start, end in pairwise([0, *ends]):
            yield [clip[start:end] for clip in whole]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, ExhaustedError)

    def tighten(self) -> str | None:
        return self.tighter.pop(0) if self.tighter else None

    def _begin_decoding(self, latents: Sequence[torch.Tensor]) -> None:
        values = [int(latent[:, 0].float().mean().nan_to_num()) for latent in latents]
        self.decoded.append(values)
        error = self.fails(values)
        if error is not None:
            raise error

    def _decode(self, latent: torch.Tensor) -> Frames | TerminalError:
        if not latent.isfinite().all():
            return TerminalError("decode", "not_finite", "the latent has NaN")
        frames, height, width = latent.shape[1:]
        brightness = latent.float().mean(dim=(0, 2, 3)).round().clamp(0, 255).byte().numpy()
        brightness = np.repeat(brightness, 4)[3 if frames % 2 else 0 :]
        return np.broadcast_to(brightness[:, None, None, None], (len(brightness), 8 * height, 8 * width, 3)).copy()

    def _encode(self, value: int, clip: Frames) -> EncodedClip | TerminalError:
        if value in self.not_finite:
            return TerminalError("encode", "not_finite", "the latent has NaN")
        data = clip[:, 0, 0, 0].astype(np.float32).tobytes()
        return EncodedClip(latent=TensorBytes(data=data, shape=(1, len(clip), 1, 1), dtype="float32"))


def make_frames(value: int, bucket: Bucket = SMALL) -> DecodedClip:
    """A clip of one brightness; 0 is what a blank clip has."""
    return DecodedClip(
        frames=np.full((bucket.num_frames, bucket.height, bucket.width, 3), value, np.uint8), source_hash=f"{value:032x}"
    )


def make_clip(number: int, *, uri: str | None = None, bucket: Bucket = SMALL, **columns: Any) -> PlannedClip:
    """A planned clip whose id follows from its number and URI."""
    uri = f"videos/{number}.mp4" if uri is None else uri
    clip = Clip(
        sample_id=digest("clip", number, uri, bucket.key),
        uri=uri,
        size_bytes=1000 + number,
        version=f"v{number}",
        bucket=bucket,
        frame_start=0,
        frame_end=bucket.num_frames,
        crop=Crop(x=0, y=2, w=64, h=62),
        source_fps=29.97,
        source_width=64,
        source_height=66,
    )
    return PlannedClip(clip=clip, columns=columns)


def make_video(name: str = "a.mp4", *, error: TerminalError | None = None, **info: Any) -> ProbedVideo:
    """A probed video of 640x480 pixels, 30 frames a second and 20 seconds, but for what ``info`` says."""
    known: dict[str, Any] = {
        "width": 640,
        "height": 480,
        "fps": 30.0,
        "duration_s": 20.0,
        "container": "mp4",
        "codec": "h264",
    } | info
    return ProbedVideo(
        uri=name,
        size_bytes=1000,
        version="v1",
        columns={"caption": f"about {name}"},
        info=None if error else VideoInfo(**known),
        error=error,
    )


def make_shard_ref(number: int) -> ShardRef:
    return ShardRef(
        generation=0,
        shard_id=f"{number:016x}",
        index=number,
        bucket_key=SMALL.key,
        num_clips=1,
        file="clips.parquet",
        row_group=number,
    )
