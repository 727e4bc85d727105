"""What `encode`, `decode` and `forward` return: by attribute, by name, by position."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from cogvae.posterior import DiagonalGaussianDistribution


class ModelOutput(Mapping[str, Any]):
    """A dataclass that is also a mapping of its fields that are not None, and a sequence by integer or slice.

    Source: matches diffusers' BaseOutput: iteration gives names, `to_tuple()` gives values.
    """

    def __init_subclass__(cls) -> None:
        # DistributedDataParallel with a static graph, FSDP and torch.compile look for tensors through pytree.
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        # accelerate rebuilds a mapping by calling its type with a dict.
        first, *_ = (f.name for f in fields(self))  # type: ignore[arg-type]
        values = getattr(self, first)
        if isinstance(values, dict):
            for name, value in values.items():
                setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in list(self):
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(self.values())


@dataclass(eq=False)
class AutoencoderKLOutput(ModelOutput):
    """What `encode` returns."""

    latent_dist: DiagonalGaussianDistribution
    """The posterior over latents [B, latent_channels, t, h, w]."""


@dataclass(eq=False)
class DecoderOutput(ModelOutput):
    """What `decode` and `forward` return."""

    sample: Tensor
    """Frames [B, out_channels, T, H, W], about -1 to 1, not clamped."""
    commit_loss: Tensor | None = None
    """Always None; other models of diffusers use it."""
