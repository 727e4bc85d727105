"""What a CogVideoX VAE is made of: the constructor arguments, checked, and their JSON form."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cogvae.blocks import ACTIVATIONS

logger = logging.getLogger(__name__)

CLASS_NAME = "AutoencoderKLCogVideoX"
# The diffusers release whose class and file layout this package matches.
DIFFUSERS_VERSION = "0.38.0"
DOWN_BLOCK = "CogVideoXDownBlock3D"
UP_BLOCK = "CogVideoXUpBlock3D"

# Fields that tell users about the model and change nothing that it computes. The sample size only sets
# the default blend tile.
ANNOTATIONS = frozenset(
    {
        "sample_height",
        "sample_width",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
        "invert_scale_latents",
    }
)
# Bookkeeping that diffusers keeps in memory and leaves out of config.json.
_NEVER_SAVED = frozenset({"_ignore_files", "_use_default_values", "_pre_quantization_dtype"})


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Mapping[str, Any]):
    """The arguments of `AutoencoderKLCogVideoX`, readable by attribute and by key.

    As a mapping it also holds the `hidden` keys, so that `dict(config)` is what diffusers calls a config.

    Raises: ValueError that names the field, its value, and what was expected.
    """

    in_channels: int = 3
    """Channels of a video frame that is encoded."""
    out_channels: int = 3
    """Channels of a decoded frame."""
    down_block_types: tuple[str, ...] = (DOWN_BLOCK,) * 4
    """One name per encoder level; only `CogVideoXDownBlock3D` exists."""
    up_block_types: tuple[str, ...] = (UP_BLOCK,) * 4
    """One name per decoder level; only `CogVideoXUpBlock3D` exists."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    """Channels per level, full resolution first; multiples of `norm_num_groups`."""
    latent_channels: int = 16
    """Channels of a latent. The encoder yields twice as many: mean and log variance."""
    layers_per_block: int = 3
    """Resnets per encoder level; a decoder level has one more."""
    act_fn: str = "silu"
    """Activation inside the resnets: swish, silu, mish, gelu or relu."""
    norm_eps: float = 1e-6
    """Epsilon of the encoder's resnet norms. Every other norm uses 1e-6."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    temporal_compression_ratio: int = 4
    """Frames per latent frame: a power of two, at most 2 per level that resamples."""
    sample_height: int = 480
    """Frame height in pixels that the model was trained for; the default blend tile is half of it."""
    sample_width: int = 720
    """Frame width in pixels that the model was trained for; the default blend tile is half of it."""
    scaling_factor: float = 1.15258426
    """What a diffusion model multiplies a latent by. Nothing in this package applies it."""
    shift_factor: float | None = None
    """Kept for readers of the config. Nothing in this package applies it."""
    latents_mean: tuple[float, ...] | None = None
    """Kept for readers of the config. Nothing in this package applies it."""
    latents_std: tuple[float, ...] | None = None
    """Kept for readers of the config. Nothing in this package applies it."""
    force_upcast: bool = True
    """Kept for readers of the config. Nothing in this package applies it."""
    use_quant_conv: bool = False
    """Whether a 1x1x1 convolution follows the encoder."""
    use_post_quant_conv: bool = False
    """Whether a 1x1x1 convolution precedes the decoder."""
    invert_scale_latents: bool = False
    """Kept for readers of the config. Nothing in this package applies it."""

    hidden: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Keys that begin with `_`, such as `_name_or_path`: kept, never interpreted. Not part of equality."""

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            _require(_is_int(self[name]) and self[name] > 0, name, self[name], "a positive integer")
        for name in _BOOLS:
            _require(isinstance(self[name], bool), name, self[name], "true or false")
        _require(_is_finite(self.norm_eps) and self.norm_eps > 0, "norm_eps", self.norm_eps, "a number above zero")
        _require(
            _is_finite(self.scaling_factor) and self.scaling_factor != 0,
            "scaling_factor",
            self.scaling_factor,
            "a number other than zero",
        )
        _require(
            self.shift_factor is None or _is_finite(self.shift_factor),
            "shift_factor",
            self.shift_factor,
            "a number or null",
        )
        _require(
            isinstance(self.act_fn, str) and self.act_fn.lower() in ACTIVATIONS,
            "act_fn",
            self.act_fn,
            f"one of {', '.join(ACTIVATIONS)}",
        )
        self._check_levels()
        self._check_statistics()

    def _check_levels(self) -> None:
        channels = self._as_tuple("block_out_channels")
        groups = self.norm_num_groups
        _require(
            len(channels) > 0 and all(_is_int(c) and c > 0 and c % groups == 0 for c in channels),
            "block_out_channels",
            channels,
            f"a list of positive multiples of norm_num_groups={groups}",
        )
        for name, only in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            expected = (only,) * len(channels)
            _require(
                self._as_tuple(name) == expected,
                name,
                self[name],
                f"'{only}' for each of the {len(channels)} entries of block_out_channels",
            )
        ratio, largest = self.temporal_compression_ratio, 2 ** (len(channels) - 1)
        _require(
            _is_finite(ratio) and ratio in [2**level for level in range(len(channels))],
            "temporal_compression_ratio",
            ratio,
            f"a power of two from 1 to {largest} ({len(channels)} levels resample {len(channels) - 1} times)",
        )
        object.__setattr__(self, "temporal_compression_ratio", int(ratio))

    def _check_statistics(self) -> None:
        for name in ("latents_mean", "latents_std"):
            if self[name] is None:
                continue
            values = self._as_tuple(name)
            _require(
                len(values) == self.latent_channels and all(map(_is_finite, values)),
                name,
                values,
                f"null or {self.latent_channels} numbers, one per latent channel",
            )

    def _as_tuple(self, name: str) -> tuple[Any, ...]:
        """JSON has lists; a frozen config holds tuples."""
        value = self[name]
        _require(isinstance(value, list | tuple), name, value, "a list")
        object.__setattr__(self, name, tuple(value))
        return tuple(value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Reads a config of any origin. Keys beginning with `_` are kept as hidden; unknown others warn."""
        hidden = {key: value for key, value in values.items() if key.startswith("_")}
        unknown = sorted(values.keys() - hidden.keys() - set(FIELD_NAMES))
        if unknown:
            logger.warning("config keys ignored keys=%s reason=not an argument of %s", unknown, CLASS_NAME)
        return cls(**{name: values[name] for name in FIELD_NAMES if name in values}, hidden=hidden)

    def to_json_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        kept = {key: value for key, value in self.items() if key not in _NEVER_SAVED}
        return {**kept, "_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION}

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return 1 << (len(self.block_out_channels) - 1)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key) if key in FIELD_NAMES else self.hidden[key]

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no field. Unpickling asks before `hidden` is there.
        try:
            return self.__dict__["hidden"][name]
        except KeyError:
            raise AttributeError(f"the VAE's config has no field '{name}'") from None

    def __iter__(self) -> Iterator[str]:
        yield from FIELD_NAMES
        yield from self.hidden

    def __len__(self) -> int:
        return len(FIELD_NAMES) + len(self.hidden)


FIELD_NAMES = tuple(f.name for f in fields(VAEConfig) if f.name != "hidden")
_POSITIVE_INTS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_height",
    "sample_width",
)
_BOOLS = ("force_upcast", "use_quant_conv", "use_post_quant_conv", "invert_scale_latents")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}. Correct it in config.json or in the call.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
