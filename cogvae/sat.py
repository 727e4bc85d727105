"""The original checkpoints of CogVideoX (THUDM's SAT code, `3d-vae.pt`): read them, write them.

load_sat("3d-vae.pt").save_pretrained("vae")
"""

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvae.autoencoder import AutoencoderKLCogVideoX
from cogvae.config import VAEConfig
from cogvae.weights import assign_tensors

# Pieces of a key here, and in SAT, in the order in which they are replaced.
_RENAMES = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("down_blocks.", "down."),
    ("resnets.", "block."),
    ("downsamplers.0.", "downsample."),
    ("upsamplers.0.", "upsample."),
    ("conv_shortcut.", "nin_shortcut."),
)
# The discriminator and the perceptual loss of the training run.
_NOT_THE_MODEL = "loss."
# Where training frameworks put the state dict inside a checkpoint.
_WRAPPERS = ("model", "module", "state_dict")


def sat_keys(keys: Iterable[str], config: VAEConfig) -> dict[str, str]:
    """The table of names: key of this package to key of SAT. Inverted, it converts the other way.

    Source: SAT counts the decoder's levels from full resolution, diffusers from the latent.
    """
    last = len(config.block_out_channels) - 1
    levels = tuple((f"up_blocks.{level}.", f"up.{last - level}.") for level in range(last + 1))
    table = {}
    for key in keys:
        renamed = key
        for ours, theirs in (*levels, *_RENAMES):
            renamed = renamed.replace(ours, theirs)
        table[key] = renamed
    return table


def load_sat(
    path: str | os.PathLike[str], config: VAEConfig | None = None, *, torch_dtype: torch.dtype | None = None
) -> AutoencoderKLCogVideoX:
    """Loads a SAT checkpoint, which brings no config: the default is that of the published models.

    CogVideoX-5b and 1.5 need `VAEConfig(scaling_factor=0.7)`, and 1.5 `invert_scale_latents=True` besides.
    Without `torch_dtype` the weights become float32.

    Raises: ValueError that names the key if one is missing, surplus or of another shape.
    """
    path, config = Path(path), config or VAEConfig()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path}: no checkpoint that is safe to load: {error}. Expected a file of tensors such as "
            "3d-vae.pt; fetch it again if it is one."
        ) from error
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX.from_config(config)
    ours = {theirs: key for key, theirs in sat_keys(model.state_dict(), config).items()}
    tensors = ((path, ours.get(key, key), tensor) for key, tensor in _state_dict(path, checkpoint).items())
    assign_tensors(model, tensors, torch_dtype=torch_dtype)
    return model.eval()


def save_sat(model: AutoencoderKLCogVideoX, path: str | os.PathLike[str]) -> None:
    """Writes the model as SAT's code reads it."""
    state = model.state_dict()
    names = sat_keys(state, model.config)
    torch.save({"state_dict": {names[key]: tensor for key, tensor in state.items()}}, path)


def _state_dict(path: Path, checkpoint: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint, Mapping):
            checkpoint = checkpoint.get(wrapper, checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a state dict such as 3d-vae.pt's")
    return {key: tensor for key, tensor in checkpoint.items() if not key.startswith(_NOT_THE_MODEL)}
