"""Which systems are warned of, what is avoided, and that memory lies as the convolution libraries want it."""

import logging
from typing import Any

import pytest
import torch

from cogvae.exact import causal, hazards, pieces
from cogvae.exact.hazards import find_hazard, is_slow_volume, warn_of_hazards
from cogvae.kernels import Spread, twins

from .pairs import make_tiny, reference_path, relative_error


@pytest.mark.parametrize(
    ("dtype", "torch_version", "cudnn_version", "word"),
    [
        (torch.bfloat16, "2.7.1+cu126", 90501, None),
        (torch.bfloat16, "2.8.0+cu128", 91002, "wrong results"),
        (torch.bfloat16, "2.8.0", 90800, "wrong results"),
        (torch.float16, "2.8.0", 91002, None),
        (torch.bfloat16, "2.8.0", 91300, None),
        (torch.bfloat16, "2.9.0+cu128", 91002, "does not use cuDNN"),
        (torch.float16, "2.9.0", 91600, "does not use cuDNN"),
        (torch.bfloat16, "2.9.1", 91002, "does not use cuDNN"),
        (torch.bfloat16, "2.9.1", 91500, None),
        (torch.bfloat16, "2.10.0a0+git1234", 91501, None),
        (torch.bfloat16, "2.13.0+cu130", 92000, None),
        (torch.float32, "2.8.0", 91002, None),
        (torch.bfloat16, "2.13.0", None, None),
    ],
)
def test_what_is_known_of_a_system(dtype: torch.dtype, torch_version: str, cudnn_version: int | None, word: str | None) -> None:
    found = find_hazard("cuda", dtype, torch_version, cudnn_version)
    assert (found is None) if word is None else (found is not None and word in found and torch_version in found)
    assert find_hazard("cpu", dtype, torch_version, cudnn_version) is None


def test_a_hazard_names_the_version_of_cudnn() -> None:
    assert "cuDNN 9.10.2" in str(find_hazard("cuda", torch.bfloat16, "2.8.0", 91002))


def test_a_hazard_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hazards, "find_hazard", lambda *system: asked.append(system) or "all is lost")
    hazards._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "cogvae"):
        for _ in range(3):
            warn_of_hazards(torch.empty(1))
    hazards._warn_once.cache_clear()
    assert [record.getMessage() for record in caplog.records] == ["convolutions at risk: all is lost"]
    assert asked == [("cpu", torch.float32, torch.__version__, None)] * 3


def test_small_volumes_are_slow_in_float32_on_a_processor_only() -> None:
    shape = torch.Size([1, 512, 4, 10, 9])
    assert is_slow_volume("cpu", torch.float32, shape)
    assert not is_slow_volume("cpu", torch.float32, torch.Size([2, *shape[1:]]))
    assert not is_slow_volume("cpu", torch.float32, torch.Size([1, 512, 4, 11, 9]))
    assert not is_slow_volume("cpu", torch.bfloat16, shape)
    assert not is_slow_volume("cuda", torch.float32, shape)


@torch.no_grad()
def test_frames_of_every_size_are_the_same_by_taps_and_by_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x = make_tiny(), torch.randn(1, 3, 17, 16, 24)
    with reference_path(vae):
        expected = vae(x).sample
    calls: list[int] = []
    by_taps = causal.convolve_by_taps
    monkeypatch.setattr(causal, "convolve_by_taps", lambda *window: calls.append(1) or by_taps(*window))
    assert relative_error(vae(x).sample, expected) < 1e-5
    assert calls
    calls.clear()
    monkeypatch.setattr(causal, "is_slow_volume", lambda *_: False)
    assert relative_error(vae(x).sample, expected) < 1e-5
    assert not calls


# torch has no fast float16 for a processor, hence no layout for it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_piece_and_every_buffer_is_channels_last(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_tiny(dtype)
    seen: list[int] = []

    def finish(x: torch.Tensor, *rest: Any) -> Spread:
        seen.append(x.stride(1))
        return original(x, *rest)

    def scale_shift_act(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, act: Any, out: torch.Tensor) -> None:
        seen.extend((x.stride(1), out.stride(1), scale.stride(3), shift.stride(3)))
        moved(x, scale, shift, act, out)

    original, moved = twins.finish, twins.scale_shift_act
    monkeypatch.setattr(twins, "finish", finish)
    monkeypatch.setattr(twins, "scale_shift_act", scale_shift_act)
    moments = vae.encode(torch.randn(1, 3, 17, 16, 24).to(dtype)).latent_dist.parameters
    vae.decode(moments[:, :4])
    assert len(seen) > 100
    assert set(seen) == {1}
    assert pieces.empty((2, 3, 4, 5, 6), moments).stride(1) == 1
