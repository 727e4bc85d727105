"""The model as diffusers' pipelines accept it. Of this package, only this module imports diffusers."""

from typing import Any, TypeVar

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

import cogvae

Model = TypeVar("Model", bound=nn.Module)


class AutoencoderKLCogVideoX(cogvae.AutoencoderKLCogVideoX, diffusers.AutoencoderKLCogVideoX):
    """Our model, and an instance of diffusers' class of the same name, hence a `ModelMixin`.

    Every method of the model is ours; diffusers' class stands behind it for `isinstance`, `.to`, offloading
    and the like.
    """

    # Pipelines write module and name into model_index.json, from which plain diffusers loads its own class.
    __module__ = diffusers.AutoencoderKLCogVideoX.__module__
    _no_split_modules = ("ResnetBlock",)

    # Offloading moves a model to its device when these are called.
    encode = apply_forward_hook(cogvae.AutoencoderKLCogVideoX.encode)  # type: ignore[no-untyped-call]
    decode = apply_forward_hook(cogvae.AutoencoderKLCogVideoX.decode)  # type: ignore[no-untyped-call]
    encode_stream = apply_forward_hook(cogvae.AutoencoderKLCogVideoX.encode_stream)  # type: ignore[no-untyped-call]
    decode_stream = apply_forward_hook(cogvae.AutoencoderKLCogVideoX.decode_stream)  # type: ignore[no-untyped-call]

    @property
    def _internal_dict(self) -> FrozenDict:
        """Where diffusers' own methods look for the config."""
        return FrozenDict(self.config)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the module name above, pickle and deepcopy would find diffusers' class.
        return as_diffusers, (_share(self, cogvae.AutoencoderKLCogVideoX),)


def as_diffusers(vae: cogvae.AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """The same model for `CogVideoXPipeline(vae=...)` or `CogVideoXPipeline.from_pretrained(..., vae=...)`.

    Parameters and submodules are shared; slicing and tiling are switched on each of the two by itself.
    """
    return _share(vae, AutoencoderKLCogVideoX)


def _share(vae: nn.Module, cls: type[Model]) -> Model:
    """A second face of one model: another class over the same submodules and settings."""
    twin = cls.__new__(cls)
    twin.__dict__.update(vae.__dict__)
    return twin
