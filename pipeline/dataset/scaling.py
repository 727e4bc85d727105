"""What stored latents are multiplied by before a model sees them.

The dataset keeps latents as the VAE gives them. Trainers disagree about the rest, so that a factor baked in
would be wrong for half of them:

| | video latent | first frame of image-to-video |
|---|---|---|
| ``diffusers`` | x factor | x factor; 1.5: x 1/factor (its checkpoints set ``invert_scale_latents``) |
| ``cogvideo`` (CogVideo, SAT) | x factor | x factor |

Source: vae/config.json of the published checkpoints; diffusers 0.38 ``CogVideoXImageToVideoPipeline.prepare_latents``
and ``decode_latents``; THUDM/CogVideo ``finetune/models/cogvideox_i2v/lora_trainer.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, get_args

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

Role = Literal["video", "first_frame"]
Convention = Literal["diffusers", "cogvideo"]


class Scale(TypedDict, total=False):
    """How a reader scales: for which model, in which role, by whose convention."""

    model: str | float
    """A published model, or the factor of another. Left out: what the dataset's manifest names."""
    role: Role
    """Left out: each tensor in its own role, ``first_frame_latent`` as the first frame."""
    convention: Convention
    """Left out: ``diffusers``."""


class _Model(NamedTuple):
    factor: float
    inverted: bool  # invert_scale_latents in the VAE's configuration
    pads_time: bool = False  # the transformer takes latent frames by two, and one is put in front of an odd number


MODELS = {
    "cogvideox-2b": _Model(1.15258426, False),
    "cogvideox-5b": _Model(0.7, False),
    "cogvideox-5b-i2v": _Model(0.7, False),
    "cogvideox-1.5-5b": _Model(0.7, True, True),
    "cogvideox-1.5-5b-i2v": _Model(0.7, True, True),
}


def scaling_multiplier(model: str | float, role: Role = "video", convention: Convention = "diffusers") -> float:
    """The number that a stored, unscaled latent is multiplied by.

    Args:
        model: ``cogvideox-2b``, ``5b``, a hub id such as ``zai-org/CogVideoX1.5-5B-I2V``, or a VAE's own
            ``scaling_factor`` as a number, which is taken as not inverted.
        role: ``first_frame``: the image latent of an image-to-video model.

    Raises:
        ConfigError: an unknown model, role or convention; the message names the choices.
    """
    _check("role", role, get_args(Role))
    _check("convention", convention, get_args(Convention))
    known = _find(model) if isinstance(model, str) else _Model(float(model), False)
    if not known.factor > 0:
        raise ConfigError(f"scaling factor {known.factor} must be above 0")
    inverted = known.inverted and role == "first_frame" and convention == "diffusers"
    return 1 / known.factor if inverted else known.factor


def scale_latents(
    latents: torch.Tensor, model: str | float, role: Role = "video", convention: Convention = "diffusers"
) -> torch.Tensor:
    """Stored latents as the model expects them; any shape, same dtype. Raises: ConfigError: as above."""
    return latents * scaling_multiplier(model, role, convention)


def unscale_latents(
    latents: torch.Tensor, model: str | float, role: Role = "video", convention: Convention = "diffusers"
) -> torch.Tensor:
    """A model's latents as the VAE decodes them and the dataset stores them; undoes ``scale_latents``."""
    return latents / scaling_multiplier(model, role, convention)


def pads_time(model: str) -> bool:
    """Whether a model's latents have an even number of frames, one of them put in front. Raises: ConfigError: as above."""
    return _find(model).pads_time


def _find(model: str) -> _Model:
    name = model.rpartition("/")[2].lower().replace("cogvideox1.5", "cogvideox-1.5")
    name = name if name.startswith("cogvideox-") else f"cogvideox-{name}"
    _check("model", name, tuple(MODELS), given=model)
    return MODELS[name]


def _check(what: str, value: str, choices: tuple[str, ...], given: str | None = None) -> None:
    if value not in choices:
        number = ", or a number: the scaling_factor of its VAE" if what == "model" else ""
        raise ConfigError(f"scale: {what} {given or value!r} is unknown; use one of {', '.join(choices)}{number}")
