import pickle
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Reference

from cogvae import DiagonalGaussianDistribution


def make_both(*, deterministic: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    parameters = 30 * torch.randn(2, 8, 3, 4, 5, dtype=dtype)  # wide enough to meet both clamps
    return DiagonalGaussianDistribution(parameters, deterministic), Reference(parameters, deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_statistic_is_the_one_of_diffusers(deterministic: bool) -> None:
    ours, reference = make_both(deterministic=deterministic)
    for name in ("mean", "logvar", "std", "var", "parameters"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name
    assert ours.deterministic == reference.deterministic
    assert torch.equal(ours.mode(), reference.mode())
    assert (ours.logvar.min(), ours.logvar.max()) == (-30, 20)


@pytest.mark.parametrize("deterministic", [True, False])
def test_kl_and_nll_sum_over_the_dimensions_of_diffusers(deterministic: bool) -> None:
    (ours, reference), (other, other_reference) = make_both(deterministic=deterministic), make_both()
    sample = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.kl(), reference.kl(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.kl(other), reference.kl(other_reference), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.nll(sample), reference.nll(sample), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.nll(sample, dims=(1, 2, 3, 4)), reference.nll(sample, dims=[1, 2, 3, 4]), rtol=1e-12, atol=0)
    assert deterministic or ours.kl().shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("generators", [0, 1, 2])
def test_a_seed_draws_the_sample_of_diffusers(dtype: torch.dtype, generators: int) -> None:
    ours, reference = make_both(dtype=dtype)
    samples = []
    for posterior in (ours, reference):
        torch.manual_seed(1)
        seeded = [torch.Generator().manual_seed(seed) for seed in range(generators)]
        samples.append(posterior.sample(seeded or None))
        samples.append(posterior.sample(torch.Generator().manual_seed(7)))
    assert torch.equal(samples[0], samples[2])
    assert torch.equal(samples[1], samples[3])
    assert samples[0].dtype == dtype


def test_as_many_generators_as_clips_are_needed() -> None:
    ours, _ = make_both()
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        ours.sample([torch.Generator() for _ in range(3)])


def test_a_cpu_generator_serves_a_latent_on_any_device() -> None:
    posterior = DiagonalGaussianDistribution(torch.empty(2, 8, 1, 4, 5, device="meta"))
    assert posterior.sample(torch.Generator()).device.type == "meta"


@pytest.mark.gpu
def test_a_cpu_generator_draws_the_same_noise_for_a_gpu_latent() -> None:
    parameters = torch.randn(2, 8, 3, 4, 5)
    samples = [
        DiagonalGaussianDistribution(parameters.to(device)).sample(torch.Generator().manual_seed(0)).cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*samples)
    with pytest.raises(ValueError, match="generator on cuda"):
        DiagonalGaussianDistribution(parameters).sample(torch.Generator("cuda"))


def test_an_odd_channel_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 7, 3\]"):
        DiagonalGaussianDistribution(torch.randn(2, 7, 3))


def test_a_posterior_pickles() -> None:
    ours, _ = make_both()
    assert torch.equal(pickle.loads(pickle.dumps(ours)).std, ours.std)
