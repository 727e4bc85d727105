from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogvae import AutoencoderKLCogVideoX
from cogvae import conv as conv_module
from cogvae.conv import CausalConv3d, Downsample, Tails, Upsample, convolve, resize_nearest

from .pairs import reference_path, relative_error


def test_a_frame_depends_on_no_later_frame() -> None:
    conv = CausalConv3d(2, 2, kernel_size=3)
    x = torch.randn(1, 2, 6, 4, 4)
    changed = x.clone()
    changed[:, :, 4:] += 1
    (before, _), (after, _) = conv(x, Tails()), conv(changed, Tails())
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_tails_are_two_frames_and_old_ones_stay_as_they_were() -> None:
    conv = CausalConv3d(2, 2, kernel_size=3)
    first, second = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 1, 4, 4)
    _, tails = conv(first, Tails())
    _, later = conv(second, tails)
    kept, kept_later = tails.of(conv), later.of(conv)
    assert kept is not None
    assert kept_later is not None
    assert torch.equal(kept, first[:, :, -2:])
    assert torch.equal(kept_later, torch.cat([first[:, :, -1:], second], dim=2))


def test_a_kernel_of_one_frame_keeps_no_tail() -> None:
    conv = CausalConv3d(2, 2, kernel_size=1)
    _, tails = conv(torch.randn(1, 2, 3, 4, 4), Tails())
    assert tails.of(conv) is None


class Convolutions(TorchDispatchMode):
    """Notes the elements of the larger of input and output of every convolution, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.elements.append(max(args[0].numel(), result.numel()))
        return result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The elements of the larger of input and output, of every call of a convolution."""
    sizes: list[int] = []
    for kind in (nn.Conv2d, nn.Conv3d):

        def forward(self: Any, x: Tensor, original: Any = kind.forward) -> Tensor:
            y: Tensor = original(self, x)
            sizes.append(max(x.numel(), y.numel()))
            return y

        monkeypatch.setattr(kind, "forward", forward)
    return sizes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "in_channels", "out_channels"), [(1, 2, 3), (3, 2, 3), (3, 1, 6), (3, 6, 1)])
@pytest.mark.parametrize("limit", [1, 40, 200, 300, 700, 1900])
@torch.no_grad()
def test_a_convolution_too_large_for_one_call_is_split_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, calls: list[int], batch: int, kernel: int, in_channels: int, out_channels: int, limit: int
) -> None:
    conv = nn.Conv3d(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2)).double()
    x = torch.randn(batch, in_channels, 10, 5, 6, dtype=torch.float64)
    whole = conv(x)
    calls.clear()
    monkeypatch.setattr(conv_module, "MAX_CONV_ELEMENTS", limit)
    assert relative_error(convolve(conv, x), whole) < 1e-14
    one_row = kernel**2 * max(in_channels, out_channels) * 6  # no call can be smaller
    assert max(calls) <= max(limit, one_row)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [1, 100, 400, 1000])
@torch.no_grad()
def test_resampling_too_large_for_one_call_is_split_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, calls: list[int], batch: int, limit: int
) -> None:
    x = torch.randn(batch, 2, 9, 5, 6, dtype=torch.float64)
    for sampler, one_frame in ((Downsample(2, True).double(), 2 * 6 * 7), (Upsample(2, True).double(), 2 * 10 * 12)):
        monkeypatch.setattr(conv_module, "MAX_CONV_ELEMENTS", 2**30)
        whole = sampler(x)
        calls.clear()
        monkeypatch.setattr(conv_module, "MAX_CONV_ELEMENTS", limit)
        assert relative_error(sampler(x), whole) < 1e-14
        assert max(calls) <= max(limit, one_frame)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("reference", [True, False])
@torch.no_grad()
def test_no_convolution_of_the_published_model_exceeds_the_bound_at_1080p(batch: int, reference: bool) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX()
        with reference_path(vae) if reference else nullcontext(), Convolutions() as convolutions:
            vae.encode(torch.empty(batch, 3, 9, 1080, 1920))
            vae.decode(torch.empty(batch, 16, 3, 135, 240))
    assert conv_module.MAX_CONV_ELEMENTS / 4 < max(convolutions.elements) <= conv_module.MAX_CONV_ELEMENTS


@pytest.mark.parametrize(("frames", "halved"), [(1, 1), (2, 1), (3, 2), (5, 3), (8, 4), (9, 5)])
def test_downsampling_leaves_the_first_of_an_odd_chunk_alone(frames: int, halved: int) -> None:
    x = torch.randn(2, 3, frames, 9, 12)
    assert Downsample(3, compress_time=True)(x).shape == (2, 3, halved, 4, 6)
    assert Downsample(3, compress_time=False)(x).shape == (2, 3, frames, 4, 6)


@pytest.mark.parametrize(("frames", "doubled"), [(1, 1), (2, 4), (3, 5), (4, 8), (5, 9)])
def test_upsampling_leaves_the_first_of_an_odd_chunk_alone(frames: int, doubled: int) -> None:
    x = torch.randn(2, 3, frames, 3, 4)
    assert Upsample(3, compress_time=True)(x).shape == (2, 3, doubled, 6, 8)
    assert Upsample(3, compress_time=False)(x).shape == (2, 3, frames, 6, 8)


def test_repeated_frames_are_copies_of_their_source() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1, 1)
    assert resize_nearest(x, 9, 1, 1).flatten().tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert resize_nearest(x[:, :, :2], 4, 1, 1).flatten().tolist() == [0, 0, 1, 1]
    assert resize_nearest(x, 3, 1, 1) is x
