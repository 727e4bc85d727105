"""PSNR and SSIM of a VAE's reconstructions, clip by clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX
from pipeline.types import Frames
from training.data import NamedClip
from training.metrics import psnr, ssim


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipScore:
    """How one clip came back."""

    name: str
    shape: tuple[int, int, int]
    """Frames, rows and columns."""
    psnr: float
    ssim: float


@torch.inference_mode()
def reconstruct(vae: AutoencoderKLCogVideoX, frames: Frames) -> Frames:
    """Frames encoded to the posterior's mean and decoded again, uint8 ``[T, H, W, 3]``."""
    x = torch.from_numpy(frames).to(vae.device).permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5 - 1
    y = vae.decode(vae.encode(x)[0].mode())[0]
    pixels = ((y[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().contiguous().numpy()


def score_clips(vae: AutoencoderKLCogVideoX, clips: Sequence[NamedClip]) -> list[ClipScore]:
    """Scores of the reconstructions as a person would see them, rounded to 8 bits."""
    scores = []
    for clip in clips:
        source, result = _channels_first(clip.frames), _channels_first(reconstruct(vae, clip.frames))
        num_frames, height, width = clip.frames.shape[:3]
        scores.append(
            ClipScore(name=clip.name, shape=(num_frames, height, width), psnr=psnr(source, result), ssim=ssim(source, result))
        )
    return scores


def mean_scores(scores: Sequence[ClipScore]) -> tuple[float, float]:
    """Mean PSNR in dB and mean SSIM."""
    return sum(s.psnr for s in scores) / len(scores), sum(s.ssim for s in scores) / len(scores)


def table(scores: Sequence[ClipScore]) -> Iterator[str]:
    """The lines of a Markdown table, the mean last."""
    yield "| clip | shape | PSNR, dB | SSIM |"
    yield "|---|---|---|---|"
    for score in scores:
        yield f"| `{score.name}` | {'x'.join(map(str, score.shape))} | {score.psnr:.2f} | {score.ssim:.3f} |"
    yield "| **mean** | | **{:.2f}** | **{:.3f}** |".format(*mean_scores(scores))


def _channels_first(frames: Frames) -> Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


@torch.inference_mode()
def latent_deviation(vae: AutoencoderKLCogVideoX, clips: Sequence[Tensor]) -> float:
    """Standard deviation over all latent numbers (means of the posterior) of clips ``[B, 3, T, H, W]``."""
    latents = [vae.encode(clip.to(vae.device, vae.dtype))[0].mode().flatten().double().cpu() for clip in clips]
    return torch.cat(latents).std().item()
