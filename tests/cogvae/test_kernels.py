"""The Triton kernels give what their plain twins do: odd sizes, any strides, every split, each dtype.

They run on a GPU; without one, `test_kernels_without_gpu` runs this file under Triton's interpreter.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cogvae.kernels import Operations, Spread, find_operations, twins

from .pairs import make_tiny, reference_path, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    pytestmark = pytest.mark.gpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of a sum, in the dtype that it is formed in.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SILU = nn.SiLU()

layouts = st.sampled_from(["dense", "channels_last", "inside"])
shapes = st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3, 5]), *(st.integers(1, most) for most in (5, 7, 9)))


@pytest.fixture(scope="module")
def launch() -> Any:
    return find_operations(triton=True)


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last", mean: float = 0.0) -> Tensor:
    """Random values; `inside`: as the engine's buffers are, a view that begins and ends within other frames and rows."""
    batch, channels, frames, height, width = shape
    if layout == "inside":
        outer = make((batch, channels, frames + 2, height + 2, width), dtype, mean=mean)
        return outer[:, :, 2:, 1:-1]
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last" else x


def assert_same_spread(actual: Spread, expected: Spread, dtype: torch.dtype) -> None:
    assert actual.count == expected.count
    assert actual.mean_BG.dtype == expected.mean_BG.dtype
    deviation = (expected.squares_BG / expected.count).sqrt()
    assert ((actual.mean_BG - expected.mean_BG).abs() <= ROUNDING[dtype] * (expected.mean_BG.abs() + deviation)).all()
    assert torch.allclose(actual.squares_BG, expected.squares_BG, rtol=20 * ROUNDING[dtype], atol=1e-30)


def assert_rounds_to(actual: Tensor, expected: Tensor, given_dtype: torch.dtype) -> None:
    """`expected` in float64. The interpreter cuts bfloat16 off where a GPU rounds it."""
    steps = 1.01 if INTERPRETED and given_dtype == torch.bfloat16 else 0.51
    step = torch.finfo(given_dtype).eps * expected.abs().clamp_min(torch.finfo(given_dtype).tiny)
    slack = ROUNDING[given_dtype] * (1 + expected.abs())
    assert ((actual.double() - expected).abs() <= steps * step + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(shape=shapes, each=st.integers(1, 3), layout=layouts, programs=st.sampled_from([1, 2, 3, 1024]), mean=st.floats(-9, 9))
def test_statistics_of_any_piece_in_any_number_of_splits(
    launch: Any, dtype: torch.dtype, shape: tuple[int, ...], each: int, layout: str, programs: int, mean: float
) -> None:
    batch, groups, *rest = shape
    x = make((batch, groups * each, *rest), dtype, layout, mean)
    before = x.clone()
    assert_same_spread(launch.finish_in_splits(x, groups, None, None, programs), twins.finish(x, groups, None, None), dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("programs", [1, 5, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_more_channels_and_cells_than_a_tile_has(launch: Any, dtype: torch.dtype, programs: int) -> None:
    x = make((2, 192, 3, 7, 9), dtype, "inside", mean=3.0)
    assert_same_spread(launch.finish_in_splits(x, 32, None, None, programs), twins.finish(x, 32, None, None), dtype)


@pytest.mark.parametrize("programs", [1, 7, 1024])
def test_a_mean_far_above_the_spread_does_not_cancel(launch: Any, programs: int) -> None:
    x = make((1, 4, 5, 31, 33), torch.float32, mean=3000.0)
    found = launch.finish_in_splits(x, 2, None, None, programs)
    whole = x.double().reshape(1, 2, -1)
    assert torch.allclose(found.squares_BG.double() / found.count, whole.var(2, correction=0), rtol=1e-4)
    assert torch.allclose(found.mean_BG.double(), whole.mean(2), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(
    shape=shapes,
    layout=layouts,
    residual_layout=layouts,
    has=st.sampled_from([(True, False), (False, True), (True, True)]),
    repeat=st.integers(1, 2),
    programs=st.sampled_from([1, 3, 1024]),
)
def test_bias_and_residual_are_added_in_place_rounded_once_and_measured(
    launch: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    residual_layout: str,
    has: tuple[bool, bool],
    repeat: int,
    programs: int,
) -> None:
    batch, channels, frames, height, width = shape
    x = make((batch, channels, frames * repeat, height, width), dtype, layout)
    bias = make((1, channels, 1, 1, 1), dtype).flatten() if has[0] else None
    residual = make(shape, dtype, residual_layout) if has[1] else None
    expected = x.double()
    if bias is not None:
        expected = expected + bias.double()[:, None, None, None]
    if residual is not None:
        expected = expected + residual.double().repeat_interleave(repeat, dim=2)
    twin = x.clone()
    spread = launch.finish_in_splits(x, 1, bias, residual, programs)
    assert_rounds_to(x, expected, dtype)
    assert_same_spread(spread, twins.finish(x, 1, None, None), dtype)
    twins.finish(twin, 1, bias, residual)
    assert (twin.double() - expected).abs().le(0.51 * torch.finfo(dtype).eps * expected.abs() + ROUNDING[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 6), *(st.integers(1, 4) for _ in range(3))),
    cell=st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 5])),
    layout=layouts,
)
def test_scale_and_shift_are_read_where_the_latent_cell_is(
    launch: Any, dtype: torch.dtype, shape: tuple[int, ...], cell: tuple[int, int], layout: str
) -> None:
    batch, channels, frames, rows, columns = shape
    x = make((batch, channels, frames, rows * cell[0], columns * cell[1]), dtype, layout)
    scale, shift = make((2, batch, rows, columns, channels), twins.wide(dtype), "dense")
    check_scale_shift(launch, x, scale, shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale_and_shift_for_a_whole_clip_of_many_channels(launch: Any, dtype: torch.dtype) -> None:
    scale, shift = make((2, 2, 1, 1, 192), twins.wide(dtype), "dense")
    check_scale_shift(launch, make((2, 192, 3, 7, 9), dtype), scale, shift)


def check_scale_shift(launch: Operations, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Into the middle of a buffer, whose other frames and rows stay as they are."""
    batch, channels, frames, height, width = x.shape
    cell = height // scale.shape[1], width // scale.shape[2]
    scales, shifts = (part.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2) for part in (scale, shift))
    moved = x.double() * scales.permute(0, 3, 1, 2)[:, :, None].double() + shifts.permute(0, 3, 1, 2)[:, :, None].double()
    results = []
    for operations in (launch, twins):
        buffer = make((batch, channels, frames + 2, height + 2, width), x.dtype)
        before, inner = buffer.clone(), buffer[:, :, 2:, 1:-1]
        operations.scale_shift_act(x, scale, shift, SILU, inner)
        results.append(inner.clone())
        inner.copy_(before[:, :, 2:, 1:-1])
        assert torch.equal(buffer, before)
    assert_rounds_to(results[0], nn.functional.silu(moved), x.dtype)
    rounding = max(torch.finfo(x.dtype).eps, ROUNDING[x.dtype])
    assert torch.allclose(results[0].double(), results[1].double(), rtol=1.01 * rounding, atol=ROUNDING[x.dtype] * 20)


@pytest.mark.parametrize("act", [nn.Mish(), nn.GELU(), nn.ReLU()])
def test_other_activations_are_the_twins(launch: Any, act: nn.Module) -> None:
    x, scale, shift = make((1, 4, 2, 4, 6), torch.float32), *make((2, 1, 2, 3, 4), torch.float32, "dense")
    found, expected = torch.empty_like(x), torch.empty_like(x)
    launch.scale_shift_act(x, scale, shift, act, found)
    twins.scale_shift_act(x, scale, shift, act, expected)
    assert torch.equal(found, expected)


def test_offsets_beyond_32_bits(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last frames of a piece of more than 2^31 elements, of which only the pages that are touched take memory."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        # Else it copies the whole storage onto itself after every launch.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 1024, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((1, 4, 3, 2, 3), (storage.numel(), 1, stride, 12, 4))
    values = make((1, 4, 3, 2, 3), torch.float16)
    x.copy_(values)
    bias, scale, shift = values[0, :, 0, 0, 0].contiguous(), *make((2, 1, 1, 1, 4), torch.float32, "dense")
    spread = launch.finish(x, 2, bias, None)
    expected = values.clone()
    assert_same_spread(spread, twins.finish(expected, 2, bias, None), torch.float16)
    assert torch.equal(x, expected)
    launch.scale_shift_act(x, scale, shift, SILU, x)
    twins.scale_shift_act(expected, scale, shift, SILU, expected)
    assert torch.allclose(x.float(), expected.float(), rtol=2e-3, atol=1e-5)


@torch.no_grad()
def test_a_model_that_runs_on_the_kernels_computes_what_its_modules_do() -> None:
    vae, tolerance = make_tiny(torch.float64).to(DEVICE), 1e-12
    x = torch.randn(1, 3, 17, 8, 17, dtype=torch.float64, device=DEVICE)
    with reference_path(vae):
        moments = vae.encode(x).latent_dist.parameters
        frames = vae.decode(moments[:, :4].contiguous()).sample
    vae.use_triton = True
    assert relative_error(vae.encode(x).latent_dist.parameters, moments) < tolerance
    assert relative_error(vae.decode(moments[:, :4].contiguous()).sample, frames) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_16_bits_a_model_errs_no_more_than_with_the_twins(dtype: torch.dtype) -> None:
    vae = make_tiny(torch.float64).to(DEVICE, dtype)
    truth = make_tiny(torch.float64).to(DEVICE)
    truth.load_state_dict(vae.state_dict())
    errors = [0.0, 0.0]
    for _ in range(4):  # of one latent the error is a matter of luck
        z = torch.randn(1, 4, 3, 1, 2, device=DEVICE).to(dtype)
        expected = truth.decode(z.double()).sample
        for i, vae.use_triton in enumerate((True, False)):  # type: ignore[assignment]
            errors[i] += relative_error(vae.decode(z).sample, expected)
    # The interpreter cuts bfloat16 off where a GPU rounds it: twice the error of a value.
    assert errors[0] < (3.0 if INTERPRETED and dtype == torch.bfloat16 else 1.3) * errors[1]
