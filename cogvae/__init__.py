"""CogVideoX's video VAE in plain PyTorch: diffusers' class, weights and numbers, without diffusers."""

from cogvae.autoencoder import AutoencoderKLCogVideoX
from cogvae.config import VAEConfig
from cogvae.outputs import AutoencoderKLOutput, DecoderOutput
from cogvae.posterior import DiagonalGaussianDistribution
from cogvae.weights import WeightFiles, resolve_weights

__all__ = [
    "AutoencoderKLCogVideoX",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "VAEConfig",
    "WeightFiles",
    "resolve_weights",
]
