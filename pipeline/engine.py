"""The model as the pipeline sees it: frames to stored tensors, latents to frames. The only module that imports ``cogvae``."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from cogvae import AutoencoderKLCogVideoX
from cogvae.exact import MemoryBudgetError
from cogvae.streams import from_uint8, to_uint8
from cogvae.weights import WeightFiles, resolve_weights
from pipeline.config import JobConfig, VaeConfig
from pipeline.errors import ConfigError, TerminalError
from pipeline.storage import client_options, retry
from pipeline.types import Bucket, EncodedClip, Frames, StoredTensors, TensorBytes

_LEAST_BUDGET_BYTES = 64 << 20


class Engine(Protocol):
    """What an actor needs of a model. Tests put a small fake in its place."""

    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip | TerminalError]:
        """Encode clips of one shape in one forward pass; a clip whose latent is not finite yields an error."""
        ...

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        """dB between a clip and its reconstruction from the stored latent.

        Raises:
            TerminalError: the latent does not decode to finite frames.
        """
        ...

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        """Decode unscaled latents ``[C, F, h, w]`` of one shape and any float dtype in one forward pass.

        A clip that is not finite, as latent or as frames, yields an error.
        """
        ...

    def decode_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[list[Frames]]:
        """As ``decode``, chunk by chunk, in the memory of one: of every clip the next frames ``[t, H, W, 3]``.

        Raises:
            TerminalError: a clip is not finite; before the first chunk if it is the latent that is not.
        """
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether a smaller batch may succeed where this error was raised."""
        ...

    def tighten(self) -> str | None:
        """Take less memory from now on, at some cost in time. Returns how, or None: there is nothing left to try."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What planning must know of a model without loading its tensors."""

    fingerprint: str
    latent_channels: int
    spatial_ratio: int
    temporal_ratio: int
    scaling_factor: float

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """``[C, F, H, W]`` of a clip's latent."""
        return (
            self.latent_channels,
            (bucket.num_frames - 1) // self.temporal_ratio + 1,
            bucket.height // self.spatial_ratio,
            bucket.width // self.spatial_ratio,
        )

    def clip_bytes(self, bucket: Bucket, stored: StoredTensors) -> int:
        """Bytes of tensors that one clip adds to the dataset, without its lossless first frame."""
        channels, frames, height, width = self.latent_shape(bucket)
        tensors = frames + (1 if stored.first_frame else 0)
        values = channels * tensors * height * width * (2 if stored.logvar else 1)
        return values * int(getattr(torch, stored.dtype).itemsize)


def find_weights(config: VaeConfig) -> WeightFiles:
    """The weight files on this machine, fetched if need be.

    Raises:
        ConfigError: there are none, or they may not be read.
        TransientError: the store does not deliver them.
    """
    try:
        resolve = functools.partial(
            resolve_weights,
            config.weights,
            subfolder=config.subfolder,
            revision=config.revision,
            variant=config.variant,
            storage_options=client_options(config.weights, config.storage_options),
        )
        # The hub's own client repeats by itself.
        return retry(f"read vae.weights {config.weights}", resolve, local="://" not in config.weights)
    except (OSError, ValueError, ImportError) as error:
        hint = "A local copy is given by --vae.weights /path/to/folder, and --vae.subfolder if the VAE is inside it."
        raise ConfigError(f"vae.weights: {error} {hint}") from error


def describe_model(config: VaeConfig) -> ModelInfo:
    """Read a model's configuration and hash its weights. Raises: ConfigError: the files are not usable."""
    files = find_weights(config)
    try:
        model = files.read_config()
        return ModelInfo(
            fingerprint=files.fingerprint(),
            latent_channels=model.latent_channels,
            spatial_ratio=model.spatial_compression_ratio,
            temporal_ratio=int(model.temporal_compression_ratio),
            scaling_factor=model.scaling_factor,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"vae.weights: {error}") from error


def load_engine(config: JobConfig, fingerprint: str | None, device: str, threads: int | None) -> VaeEngine:
    """Load the model of a job on this machine.

    Args:
        fingerprint: of the weights that the run was planned with.
        device, threads: as ``load_vae``.

    Raises:
        ConfigError: the weights here are other ones.
    """
    if config.work.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return VaeEngine(load_vae(config.vae, fingerprint, device, threads), config.stored, config.vae.memory_budget_bytes)


def load_vae(config: VaeConfig, fingerprint: str | None, device: str, threads: int | None) -> AutoencoderKLCogVideoX:
    """Load a model on this machine.

    Args:
        fingerprint: what the weights must have; None: any will do.
        device: ``cpu`` or ``cuda``.
        threads: torch threads on CPU; None leaves torch's default.

    Raises:
        ConfigError: the weights here are other ones.
    """
    if threads is not None:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    files = find_weights(config)
    if fingerprint is not None and (found := files.fingerprint()) != fingerprint:
        raise ConfigError(
            f"vae.weights {config.weights}: fingerprint {found[:16]} on this node, the run was planned with "
            f"{fingerprint[:16]}; every node must see the same files"
        )
    encoder_dtype, decoder_dtype = _dtypes(config)
    # Read in the wider of the two, and rounded once.
    common = torch.promote_types(encoder_dtype, decoder_dtype)
    vae = AutoencoderKLCogVideoX.from_files(files, torch_dtype=common, device=device)
    return _apply(config, vae)


def check_memory_budget(
    config: VaeConfig, *, encode: Sequence[tuple[int, ...]] = (), decode: Sequence[tuple[int, ...]] = ()
) -> None:
    """Whether the budget holds what a run is going to do. Loads no weights.

    Args:
        encode: shapes of batches of frames, ``[B, 3, T, H, W]``.
        decode: shapes of batches of latents, ``[B, C, F, h, w]``.

    Raises:
        ConfigError: it does not; with the least that does.
    """
    if config.memory_budget_bytes is None:
        return
    with torch.device("meta"):
        vae = _apply(config, AutoencoderKLCogVideoX.from_config(find_weights(config).read_config()))
    needs = [(vae.least_encode_bytes(shape), "encode", shape) for shape in encode]
    needs += [(vae.least_decode_bytes(shape), "decode", shape) for shape in decode]
    least, activity, shape = max(needs, default=(0, "", ()))
    if config.memory_budget_bytes < least:
        raise ConfigError(
            f"vae.memory_budget_bytes is {config.memory_budget_bytes}, but to {activity} a batch of shape {list(shape)} takes "
            f"{least} at the least; give that much, or lower the batch size, the size of the frames or the dtype"
        )


def _apply(config: VaeConfig, vae: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """The model as the settings want it to run."""
    encoder_dtype, decoder_dtype = _dtypes(config)
    halves = ((encoder_dtype, (vae.encoder, vae.quant_conv)), (decoder_dtype, (vae.decoder, vae.post_quant_conv)))
    for dtype, parts in halves:
        for part in parts:
            if part is not None:
                part.to(dtype)
    if config.tiling == "blend":
        vae.enable_tiling()
    else:
        vae.enable_tiling(mode="exact", memory_budget_bytes=config.memory_budget_bytes)
    return vae


def _dtypes(config: VaeConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the encoder and of the decoder."""
    return getattr(torch, config.dtype), getattr(torch, config.decoder_dtype)


def _memory_bytes(device: torch.device) -> int:
    """All that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def best_device() -> str:
    """``cuda`` where this machine has it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class VaeEngine:
    """``cogvae``'s model with the pipeline's pixel and storage conventions. Implements ``Engine``."""

    def __init__(self, vae: AutoencoderKLCogVideoX, stored: StoredTensors, budget_bytes: int | None = None) -> None:
        self._vae = vae.requires_grad_(False)
        self._stored = stored
        self._encoder_dtype, self._decoder_dtype = (next(part.parameters()).dtype for part in (vae.encoder, vae.decoder))
        self._budget_bytes = budget_bytes

    @torch.inference_mode()
    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip | TerminalError]:
        """As ``Engine.encode``. ``clips``: uint8 RGB, each ``[T, H, W, 3]``."""
        frames = stack_clips(clips, self._vae.device)
        moments = self._stored_moments(frames)
        finite = moments.isfinite().flatten(1).all(1)
        encoded = [self._encoded(clip_moments) for clip_moments in moments.cpu()]
        if self._stored.first_frame:
            first = self._stored_moments(frames[:, :1])
            finite &= first.isfinite().flatten(1).all(1)
            encoded = [
                self._with_first_frame(clip, clip_moments, clip_frames[0])
                for clip, clip_moments, clip_frames in zip(encoded, first.cpu(), clips, strict=True)
            ]
        problem = TerminalError(
            "encode",
            "not_finite",
            f"the latent has NaN or Inf, computed in {self._encoder_dtype} and stored in {self._stored.dtype}; "
            "use float32, or bfloat16 instead of float16",
        )
        return [clip if ok else problem for clip, ok in zip(encoded, finite.tolist(), strict=True)]

    @torch.inference_mode()
    def decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        """As ``Engine.decode``."""
        usable = [bool(latent.isfinite().all()) for latent in latents]
        decoded = iter(self._decode([latent for latent, ok in zip(latents, usable, strict=True) if ok]))
        return [next(decoded) if ok else self._not_finite("latent") for ok in usable]

    @torch.inference_mode()
    def decode_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[list[Frames]]:
        """As ``Engine.decode_chunks``."""
        if not all(bool(latent.isfinite().all()) for latent in latents):
            raise self._not_finite("latent")
        for frames, finite in self._decoded_chunks(latents):
            if not all(finite):
                raise self._not_finite("frames")
            yield list(frames)

    def _decode(self, latents: Sequence[torch.Tensor]) -> list[Frames | TerminalError]:
        if not latents:
            return []
        chunks, finite = zip(*self._decoded_chunks(latents), strict=True)
        clips = np.concatenate(chunks, axis=1)
        return [
            clip if all(ok) else self._not_finite("frames") for clip, ok in zip(clips, zip(*finite, strict=True), strict=True)
        ]

    def _decoded_chunks(self, latents: Sequence[torch.Tensor]) -> Iterator[tuple[Frames, list[bool]]]:
        """Frames ``[B, t, H, W, 3]``, and of each clip whether they were finite before they became pixels."""
        z = torch.stack(tuple(latents)).to(self._vae.device, self._decoder_dtype)
        for sample in self._vae.decode_stream(z):
            finite = sample.isfinite().flatten(1).all(1)
            yield to_uint8(sample).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy(), finite.tolist()

    def _not_finite(self, what: str) -> TerminalError:
        if what == "latent":
            return TerminalError("decode", "not_finite", "the latent has NaN or Inf; nothing can be decoded from it")
        return TerminalError(
            "decode",
            "not_finite",
            f"the decoded frames have NaN or Inf, computed in {self._decoder_dtype}; use float32, or bfloat16 instead of float16",
        )

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        """As ``Engine.measure_psnr``."""
        stored = encoded.latent
        latent = torch.frombuffer(bytearray(stored.data), dtype=getattr(torch, stored.dtype)).reshape(stored.shape)
        (decoded,) = self.decode([latent])
        if isinstance(decoded, TerminalError):
            raise decoded
        error = decoded.astype(np.float32) - frames.astype(np.float32)
        mean_square = max(float(np.mean(np.square(error))), 1e-10)
        return float(10 * np.log10(255.0**2 / mean_square))

    def is_out_of_memory(self, error: BaseException) -> bool:
        """As ``Engine.is_out_of_memory``; a budget that a clip does not fit is a lack of memory too."""
        return isinstance(error, (torch.OutOfMemoryError, MemoryBudgetError))

    def tighten(self) -> str | None:
        """As ``Engine.tighten``: halve the exact engine's budget. Blend has none: it takes one tile's memory."""
        budget = (self._budget_bytes or _memory_bytes(self._vae.device)) // 2
        if self._vae.use_tiling or budget < _LEAST_BUDGET_BYTES:
            return None
        self._vae.enable_tiling(mode="exact", memory_budget_bytes=budget)
        self._budget_bytes = budget
        return f"memory_budget_bytes={budget}"

    def _stored_moments(self, frames: torch.Tensor) -> torch.Tensor:
        """Posterior parameters ``[B, 2C, F, h, w]`` of frames ``[B, T, H, W, 3]``, in the stored dtype."""
        pixels = frames.to(self._vae.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        posterior = self._vae.encode(from_uint8(pixels, self._encoder_dtype), return_dict=False)[0]
        return posterior.parameters.to(getattr(torch, self._stored.dtype))

    def _encoded(self, moments: torch.Tensor) -> EncodedClip:
        mean, logvar = moments.chunk(2)
        return EncodedClip(latent=self._tensor(mean), logvar=self._tensor(logvar) if self._stored.logvar else None)

    def _with_first_frame(self, clip: EncodedClip, moments: torch.Tensor, frame: Frames) -> EncodedClip:
        alone = self._encoded(moments)
        png = io.BytesIO()
        Image.fromarray(frame).save(png, format="PNG")
        return replace(
            clip,
            first_frame_latent=alone.latent,
            first_frame_logvar=alone.logvar,
            first_frame_png=png.getvalue(),
        )

    def _tensor(self, tensor: torch.Tensor) -> TensorBytes:
        data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
        return TensorBytes(data=data, shape=tuple(tensor.shape), dtype=self._stored.dtype)


def stack_clips(clips: Sequence[Frames], device: torch.device) -> torch.Tensor:
    """uint8 ``[B, T, H, W, 3]`` on this machine, in pinned memory where a GPU is to copy it while the processor goes on."""
    stacked = torch.empty((len(clips), *clips[0].shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(clips, out=stacked.numpy())
    return stacked


def load_decoder(config: VaeConfig, device: str, threads: int | None) -> VaeEngine:
    """Load a model to decode with. Raises: ConfigError: as ``load_vae``."""
    stored = StoredTensors(dtype=config.decoder_dtype)
    return VaeEngine(load_vae(config, None, device, threads), stored, config.memory_budget_bytes)
