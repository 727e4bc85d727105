"""The distribution that the encoder describes: a Gaussian without correlations."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Generator, Tensor

LOG_TWO_PI = math.log(2.0 * math.pi)


class DiagonalGaussianDistribution:
    """Mean and log variance per latent cell.

    Source: matches diffusers' class of that name, its reductions included: `kl` and `nll` sum over dimensions
    1, 2, 3, which for a video leaves batch and width.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        """`parameters`: [B, 2*C, ...], mean first. `deterministic` makes std and var zero."""
        if parameters.ndim < 2 or parameters.shape[1] % 2 == 1:
            raise ValueError(
                f"parameters of shape {list(parameters.shape)}: dimension 1 must hold the means, then as many log variances"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)

    # Computed when first asked for: whoever takes the mode, as the pipeline does, pays for neither.
    @cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @cached_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generator | list[Generator] | None = None) -> Tensor:
        """mean + std * noise.

        A CPU generator works for a posterior on any device and gives everywhere the same noise. A list gives
        every clip of the batch its own generator.
        """
        return self.mean + self.std * _noise(self.mean, generator)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Divergence from `other`, or from the standard normal: [B, W] for a video."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * torch.sum(terms, dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log likelihood of a latent: [B, W] for a video with the default `dims`."""
        if self.deterministic:
            return torch.zeros(1)
        terms = LOG_TWO_PI + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * torch.sum(terms, dim=list(dims))


def _noise(like: Tensor, generator: Generator | list[Generator] | None) -> Tensor:
    """Standard normal noise, drawn on the generator's device as diffusers' `randn_tensor` does."""
    if isinstance(generator, list):
        if len(generator) == 1:
            return _noise(like, generator[0])
        if len(generator) != like.shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {like.shape[0]}: pass one, or one per clip")
        return torch.cat([_noise(clip, g) for clip, g in zip(torch.split(like, 1), generator, strict=True)])
    if generator is None or generator.device.type == like.device.type:
        device = like.device
    elif generator.device.type == "cpu":
        device = generator.device
    else:
        raise ValueError(
            f"generator on {generator.device}, latent on {like.device}: pass a generator of the latent's "
            "device, or a CPU generator"
        )
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
