"""Trained weights as others load them: config.json, bfloat16 safetensors, and a card that says what they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvae import AutoencoderKLCogVideoX
from training.config import TrainConfig
from training.evaluate import ClipScore, table

_CARD = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What the model card tells."""

    config: TrainConfig
    step: int
    seconds: float
    device: str
    num_photos: int
    video_names: tuple[str, ...]
    scores: tuple[ClipScore, ...]


def export(vae: AutoencoderKLCogVideoX, folder: Path, deviation: float, provenance: Provenance) -> None:
    """Write config.json, bfloat16 weights and README.md.

    Args:
        deviation: standard deviation of the latents; its inverse becomes ``scaling_factor``.
    """
    scaled = AutoencoderKLCogVideoX.from_config(vae.config, scaling_factor=1 / deviation)
    scaled.load_state_dict(vae.state_dict())
    scaled.to(torch.bfloat16).save_pretrained(folder)
    partial = folder / ".README.md.partial"
    partial.write_text(model_card(scaled, provenance), encoding="utf-8")
    os.replace(partial, folder / "README.md")


def model_card(vae: AutoencoderKLCogVideoX, provenance: Provenance) -> str:
    config = provenance.config
    photos = f"{provenance.num_photos} photos, listed below" if provenance.num_photos else "no photos"
    videos = "videos: " + ", ".join(provenance.video_names) if provenance.video_names else "no videos"
    return _CARD.read_text(encoding="utf-8").format(
        millions=vae.num_parameters() / 1e6,
        latent_channels=vae.config.latent_channels,
        channels=", ".join(map(str, vae.config.block_out_channels)),
        layers=vae.config.layers_per_block,
        groups=vae.config.norm_num_groups,
        scaling_factor=vae.config.scaling_factor,
        decay=config.optimizer.ema_decay,
        steps=provenance.step,
        hours=provenance.seconds / 3600,
        device={"cpu": f"{torch.get_num_threads()} CPU threads", "cuda": "one GPU"}[provenance.device],
        start=f"the weights of {config.model.init}" if config.model.init else "random weights",
        shapes=", ".join(config.data.shapes),
        pyramid=config.loss.pyramid,
        structure=config.loss.structure,
        kl=config.loss.kl,
        optimizer={"muon": "Muon (AdamW for the pixel ends, norms and biases)", "adamw": "AdamW"}[config.optimizer.name],
        rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
        num_pictures=config.data.num_pictures,
        photos=photos,
        videos=videos,
        sources=_sources(config.data.photos) + _sources(config.data.videos),
        held_out="None of these clips, nor another part of their films, was trained on."
        if provenance.scores
        else "Not measured.",
        scores="\n".join(table(provenance.scores)) if provenance.scores else "",
        command=_command(config),
    )


def _sources(folder: str | None) -> str:
    """What a data folder says about itself, in its SOURCES.md."""
    path = Path(folder) / "SOURCES.md" if folder else None
    return path.read_text(encoding="utf-8").strip() + "\n\n" if path and path.exists() else ""


def _command(config: TrainConfig) -> str:
    """The command line that says what this run was told, folders by their last name alone."""
    options = []
    for section, values in config.model_dump(mode="json", exclude_unset=True).items():
        for name, value in values.items():
            if name in ("output", "photos", "videos", "held_out") and value is not None:
                value = Path(value).name if Path(value).is_absolute() else value
            if value is not None and name != "storage_options":
                options.append(f"--{section}.{name} {','.join(map(str, value)) if isinstance(value, list) else value}")
    return " \\\n  ".join(["python jobs/train_vae.py", *options])
