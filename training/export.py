"""Trained weights as others load them: config.json, bfloat16 safetensors, and a card that says what they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvae import AutoencoderKLCogVideoX
from training.config import TrainConfig
from training.evaluate import ClipScore, table

_CARD = """---
license: apache-2.0
library_name: diffusers
---

# A small CogVideoX VAE

An `AutoencoderKLCogVideoX` of {millions:.2f} million parameters with the published compression: 8×8 in space, 4 in time,
{latent_channels} latent channels. It exists so that latents can be looked at without a download: for tests, demonstrations
and reports, not for training generators.

| | |
|---|---|
| channels per level | {channels} |
| resnets per encoder level | {layers} |
| groups of a norm | {groups} |
| scaling_factor | {scaling_factor:.6g}: one over the deviation of its own latents |
| weights | bfloat16, running average (decay {decay}) |

It loads in diffusers' class of the same name, and in `cogvae`:

```python
vae = AutoencoderKLCogVideoX.from_pretrained("THIS FOLDER")
```

## Training

{steps} steps in {hours:.1f} hours on {device}, from {start}.
Batches (clips × frames × height × width), drawn at random: {shapes}.
Loss: smooth L1, + {pyramid:g} × the same on a Laplacian pyramid, + {structure:g} × (1 − SSIM), + {kl:g} × KL. No adversarial
term, no network of others. AdamW at {rate:g}, gradient norm clipped at {clip_norm:g}.

## Data

- {num_pictures} pictures rendered by `training/pictures.py`, and a virtual camera and moving things over all pictures
  (`training/scenes.py`)
- {photos}
- {videos}

{sources}
## Reconstruction of held-out clips

{held_out}

{scores}

## Licence

The weights are under the licence of this project, Apache 2.0. Pictures and videos that they were trained on keep theirs, which
are named above; none of them is contained in the weights.

## Reproduce

In one command, with the data above; it can be stopped and run again at any time:

```sh
{command}
```
"""


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
    return _CARD.format(
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
