import copy
import pickle

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput as Reference
from torch.utils import _pytree as pytree

from cogvae import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution


def test_an_output_indexes_like_the_one_of_diffusers() -> None:
    sample = torch.randn(2, 3)
    ours, reference = DecoderOutput(sample=sample), Reference(sample=sample)
    for output in (ours, reference):
        assert output[0] is output["sample"] is output.sample is sample
        assert output[-1] is sample
        assert output[:1] == output.to_tuple() == (sample,)
        assert list(output) == list(output.keys()) == ["sample"]
        assert len(output) == 1
        assert "sample" in output
        assert "commit_loss" not in output
        assert output.get("commit_loss") is None
        assert dict(output.items()) == {"sample": sample}
        with pytest.raises(KeyError):
            output["commit_loss"]
        with pytest.raises(IndexError):
            output[1]


def test_a_changed_attribute_shows_by_every_index() -> None:
    output = DecoderOutput(sample=torch.zeros(1))
    output.sample = torch.ones(1)
    assert output[0] is output["sample"] is output.sample


def test_an_output_pickles_and_copies() -> None:
    output = DecoderOutput(sample=torch.randn(2, 3))
    for twin in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert torch.equal(twin.sample, output.sample)


def test_pytree_and_accelerate_rebuild_an_output() -> None:
    output = DecoderOutput(sample=torch.ones(2))
    doubled = pytree.tree_map(lambda tensor: 2 * tensor, output)
    assert isinstance(doubled, DecoderOutput)
    assert torch.equal(doubled.sample, torch.full((2,), 2.0))
    rebuilt = type(output)({"sample": output.sample})  # type: ignore[arg-type]
    assert rebuilt.sample is output.sample


def test_the_posterior_is_found_by_name() -> None:
    posterior = DiagonalGaussianDistribution(torch.randn(1, 2, 1, 1, 1))
    assert AutoencoderKLOutput(latent_dist=posterior)["latent_dist"] is posterior
