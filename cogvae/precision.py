"""Each half of the model computes in the dtype of its own weights, whatever comes in."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cogvae.chunks import ChunkFunction


def weights_of(network: nn.Module) -> Iterator[Tensor]:
    """The tensors that the modules compute with: parameters or, where torch has replaced these, plain tensors.

    The replicas of DataParallel and the modules inside FSDP hold no parameters of their own.
    """
    yield from network.parameters()
    for module in network.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def find_dtype(network: nn.Module) -> torch.dtype | None:
    """What a network computes in. None where its weights do not say: they may be stored in 8 bits, or as integers."""
    dtype = next(weights_of(network)).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else None


def cast(x: Tensor, network: nn.Module) -> Tensor:
    """`x` in what the network computes in; as it is where its weights do not say."""
    dtype = find_dtype(network)
    return x if dtype is None else x.to(dtype)


def cast_chunks(loop: ChunkFunction, network: nn.Module) -> ChunkFunction:
    """A frame loop that takes chunks of any float dtype."""
    return lambda chunk, is_last: loop(cast(chunk, network), is_last)
