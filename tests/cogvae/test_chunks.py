import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cogvae.chunks import FrameLoop, partition, run_in_chunks
from cogvae.conv import CausalConv3d, Tails

from .pairs import relative_error


@pytest.mark.parametrize(
    ("num_frames", "chunk_frames", "lengths"),
    [
        (49, 8, [9, 8, 8, 8, 8, 8]),
        (13, 8, [13]),
        (13, 2, [3, 2, 2, 2, 2, 2]),
        (16, 8, [8, 8]),
        (1, 8, [1]),
        (7, 8, [7]),
    ],
)
def test_the_first_chunk_takes_the_remainder(num_frames: int, chunk_frames: int, lengths: list[int]) -> None:
    assert [len(chunk) for chunk in partition(num_frames, chunk_frames)] == lengths


@given(st.integers(1, 500), st.integers(1, 32))
def test_chunks_cover_every_frame_once_and_in_order(num_frames: int, chunk_frames: int) -> None:
    chunks = partition(num_frames, chunk_frames)
    assert [frame for chunk in chunks for frame in chunk] == list(range(num_frames))
    assert all(len(chunk) == chunk_frames for chunk in chunks[1:])


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        partition(0, 8)


@torch.no_grad()
def test_a_causal_convolution_by_chunks_equals_the_whole() -> None:
    conv = CausalConv3d(2, 3, kernel_size=3).double()
    x = torch.randn(2, 2, 21, 5, 6, dtype=torch.float64)
    whole, _ = conv(x, Tails())
    assert relative_error(run_in_chunks(FrameLoop(conv, Tails()), x, 4), whole) < 1e-14


def test_the_last_chunk_leaves_no_tails() -> None:
    conv = CausalConv3d(1, 1, kernel_size=3)
    left: list[Tensor | None] = []

    def network(x: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        before = tails.of(conv)
        y, tails = conv(x, tails)
        left.append(None if tails.of(conv) is before else tails.of(conv))
        return y, tails

    run_in_chunks(FrameLoop(network, Tails()), torch.randn(1, 1, 9, 4, 4), 3)
    assert [tail is None for tail in left] == [False, False, True]
