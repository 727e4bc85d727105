"""The model behind the pipeline's conventions: a small one with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cogvae import AutoencoderKLCogVideoX
from pipeline.config import VaeConfig
from pipeline.engine import Engine, VaeEngine, check_memory_budget, load_decoder, load_vae, stack_clips
from pipeline.errors import ConfigError, TerminalError
from pipeline.types import EncodedClip, StoredTensors, TensorBytes
from tests.pipeline.fakes import FakeEngine

TINY = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
NAN, INF = float("nan"), float("inf")


def make_engine(dtype: torch.dtype = torch.float32) -> VaeEngine:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX.from_config(TINY).to(dtype).eval()
    return VaeEngine(vae, StoredTensors(dtype="float32"))


def make_latents(clips: int = 2, frames: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, frames, 2, 3, generator=generator).to(dtype) for _ in range(clips)]


def with_value(latent: torch.Tensor, value: float) -> torch.Tensor:
    changed = latent.clone()
    changed[1, 1, 0, 2] = value
    return changed


engines = pytest.mark.parametrize("make", [make_engine, FakeEngine])


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_frames_are_the_model_s_own_rounded_and_clamped(frames: int) -> None:
    engine, latents = make_engine(), [4 * latent for latent in make_latents(frames=frames)]
    sample = engine._vae.decode(torch.stack(latents)).sample
    expected = ((sample + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
    decoded = engine.decode(latents)
    assert len(decoded) == 2
    for clip, own in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(clip, own)  # type: ignore[arg-type]
    assert expected.std() > 1


@engines
@pytest.mark.parametrize(("frames", "lengths"), [(1, [1]), (5, [9, 8]), (13, [9, 8, 8, 8, 8, 8]), (4, [8, 8])])
def test_chunks_are_the_decoded_clips_in_turn(make: Callable[[], Engine], frames: int, lengths: list[int]) -> None:
    engine, latents = make(), [100 + 20 * latent for latent in make_latents(frames=frames)]
    chunks = list(engine.decode_chunks(latents))
    assert [[len(frames) for frames in chunk] for chunk in chunks] == [[length, length] for length in lengths]
    for clip, pieces in zip(engine.decode(latents), zip(*chunks, strict=True), strict=True):
        assert clip.dtype == np.uint8  # type: ignore[union-attr]
        assert clip.shape == (sum(lengths), 16, 24, 3)  # type: ignore[union-attr]
        np.testing.assert_array_equal(np.concatenate(pieces), clip)  # type: ignore[arg-type]


def test_the_first_chunk_needs_none_of_the_later_ones() -> None:
    engine, calls = make_engine(), []
    engine._vae.decoder.conv_out.register_forward_hook(lambda *_: calls.append(1))
    chunks = engine.decode_chunks(make_latents(frames=13))
    assert calls == []
    next(chunks)
    assert len(calls) == 1


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_float_dtype_are_computed_in_the_model_s(model: torch.dtype, stored: torch.dtype) -> None:
    engine, latents = make_engine(model), make_latents(dtype=stored)
    for clip, own in zip(engine.decode(latents), engine.decode([latent.to(model) for latent in latents]), strict=True):
        np.testing.assert_array_equal(clip, own)  # type: ignore[arg-type]


@engines
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_latent_that_is_not_finite_is_an_error_of_its_own_clip(make: Callable[[], Engine], value: float) -> None:
    engine, latents = make(), make_latents(3)
    bad = [latents[0], with_value(latents[1], value), latents[2]]
    first, error, last = engine.decode(bad)
    assert isinstance(error, TerminalError)
    assert (error.stage, error.reason) == ("decode", "not_finite")
    for clip, own in zip((first, last), engine.decode([latents[0], latents[2]]), strict=True):
        np.testing.assert_array_equal(clip, own)  # type: ignore[arg-type]
    with pytest.raises(TerminalError, match="latent has NaN"):
        next(engine.decode_chunks(bad))
    assert [type(clip) for clip in engine.decode(bad[1:2])] == [TerminalError]


def test_frames_that_are_not_finite_are_an_error_of_their_own_clip_and_never_pixels() -> None:
    engine, (good, other) = make_engine(torch.float16), make_latents()
    bad = torch.cat([other[:, :3], other[:, 3:] * 6e4], dim=1).clamp(-6e4, 6e4)  # finite in float16, as its frames are not
    clip, error = engine.decode([good, bad])
    assert isinstance(clip, np.ndarray)
    assert isinstance(error, TerminalError)
    assert error.reason == "not_finite"
    assert "torch.float16; use float32" in error.detail
    chunks = engine.decode_chunks([good, bad])
    assert len(next(chunks)) == 2
    with pytest.raises(TerminalError, match="decoded frames have NaN"):
        next(chunks)


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_clips_wait_for_a_gpu_in_pinned_memory(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def record(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **options)  # there may be no GPU that memory could be pinned for

    monkeypatch.setattr(torch, "empty", record)
    clips = [np.random.default_rng(i).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8) for i in range(3)]
    assert np.array_equal(stack_clips(clips, torch.device(device)).numpy(), np.stack(clips))
    assert asked == [pinned]


def test_latents_of_different_shapes_are_not_one_batch() -> None:
    with pytest.raises(RuntimeError, match="equal size"):
        make_engine().decode([*make_latents(1, 5), *make_latents(1, 3)])


def test_psnr_is_that_of_the_decoded_frames() -> None:
    engine, (latent, _) = make_engine(), make_latents()

    def measure(stored: torch.Tensor, frames: np.ndarray) -> float:
        data = TensorBytes(data=stored.numpy().tobytes(), shape=tuple(stored.shape), dtype="float32")
        return engine.measure_psnr(frames, EncodedClip(latent=data))

    (frames,) = engine.decode([latent])
    assert isinstance(frames, np.ndarray)
    off = np.where(frames > 127, frames - 10, frames + 10)
    assert measure(latent, off) == pytest.approx(20 * np.log10(255 / 10))
    assert measure(latent, frames) > 100
    with pytest.raises(TerminalError, match="NaN"):
        measure(with_value(latent, NAN), frames)


def test_clips_of_the_fake_are_told_apart_by_their_brightness() -> None:
    engine = FakeEngine()
    dark, bright = engine.decode([torch.full((16, 3, 2, 2), 7.0), torch.full((16, 3, 2, 2), 200.4).bfloat16()])
    assert (set(np.unique(dark)), set(np.unique(bright))) == ({7}, {200})  # type: ignore[call-overload]
    assert engine.decoded == [[7, 200]]


def test_a_latent_that_is_not_finite_is_an_error_of_its_own_clip_and_never_stored() -> None:
    engine = make_engine(torch.float16)
    generator = np.random.default_rng(0)
    clips = [generator.integers(0, 256, (9, 16, 24, 3), dtype=np.uint8) for _ in range(2)]
    assert not any(isinstance(clip, TerminalError) for clip in engine.encode(clips))
    pixels = engine._vae.encoder.conv_in.conv.weight.data
    pixels[:] = 0
    pixels[:, :, -1, 1, 1] = 4e4  # times a white pixel's three channels: beyond float16
    clip, error = engine.encode([np.full_like(clips[0], 128), np.full_like(clips[0], 255)])
    assert isinstance(clip, EncodedClip)
    assert isinstance(error, TerminalError)
    assert (error.stage, error.reason) == ("encode", "not_finite")
    assert "computed in torch.float16 and stored in float32" in error.detail


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    make_engine()._vae.save_pretrained(folder)
    return str(folder)


def test_encoder_and_decoder_are_loaded_in_dtypes_of_their_own(weights: str) -> None:
    whole = load_vae(VaeConfig(weights=weights, dtype="float32"), None, "cpu", None)
    split = load_vae(VaeConfig(weights=weights, dtype="bfloat16", decode_dtype="float32"), None, "cpu", None)
    assert {p.dtype for p in split.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in split.decoder.parameters()} == {torch.float32}
    for ours, read in zip(split.decoder.parameters(), whole.decoder.parameters(), strict=True):
        assert torch.equal(ours, read)  # not by way of bfloat16


def test_the_decoder_s_dtype_is_what_latents_are_decoded_in(weights: str) -> None:
    split = load_decoder(VaeConfig(weights=weights, dtype="bfloat16", decode_dtype="float32"), "cpu", None)
    latents = make_latents()
    for clip, own in zip(split.decode(latents), make_engine().decode(latents), strict=True):
        np.testing.assert_array_equal(clip, own)  # type: ignore[arg-type]


def test_a_budget_bounds_every_forward_pass_and_the_plan_is_logged(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    budget = 10_000_003
    engine = load_decoder(VaeConfig(weights=weights, dtype="float32", memory_budget_bytes=budget), "cpu", None)
    latents = make_latents()
    with caplog.at_level(logging.INFO, "cogvae"):
        clips = engine.decode(latents)
        list(engine.decode_chunks(latents))
        engine.encode([clip for clip in clips if isinstance(clip, np.ndarray)])
    assert [f"network={name}" in line for name, line in zip(("Decoder", "Encoder"), caplog.messages, strict=True)] == [True, True]
    assert all(f"budget_bytes={budget}" in line for line in caplog.messages)


def test_a_batch_that_does_not_fit_the_budget_is_out_of_memory(weights: str) -> None:
    engine = load_decoder(VaeConfig(weights=weights, dtype="float32", memory_budget_bytes=1000), "cpu", None)
    with pytest.raises(ValueError, match="memory_budget_bytes=1000") as caught:
        engine.decode(make_latents())
    assert engine.is_out_of_memory(caught.value)


SHAPES: list[tuple[str, tuple[int, ...]]] = [("encode", (2, 3, 9, 64, 64)), ("decode", (2, 4, 5, 8, 8))]


@pytest.mark.parametrize(("activity", "shape"), SHAPES)
def test_a_budget_below_the_floor_is_refused_before_weights_are_read(
    weights: str, activity: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogvae.weights.load_weights", None)
    smaller = (1, *shape[1:])
    shapes: dict[str, Any] = {activity: [smaller, shape]}

    def check(budget: int | None) -> None:
        check_memory_budget(VaeConfig(weights=weights, dtype="float32", memory_budget_bytes=budget), **shapes)

    with pytest.raises(ConfigError, match=rf"vae.memory_budget_bytes is 1000, but to {activity} a batch of shape \[2,") as caught:
        check(1000)
    floor = int(str(caught.value).split("takes ")[1].split()[0])
    check(floor)
    check(None)
    with pytest.raises(ConfigError, match=f"takes {floor} at the least"):
        check(floor - 1)


def test_blend_tiling_is_what_diffusers_tiles_and_exact_is_not(weights: str) -> None:
    def tiles(**settings: Any) -> bool:
        return load_vae(VaeConfig(weights=weights, dtype="float32", **settings), None, "cpu", None).use_tiling

    assert not tiles()
    assert not tiles(tiling="exact", memory_budget_bytes=1 << 30)
    assert tiles(tiling="blend")


# Memory


def make_frames() -> list[np.ndarray]:
    return [np.random.default_rng(2).integers(0, 255, (9, 32, 48, 3), np.uint8)]


def test_tightening_halves_the_budget_and_changes_a_latent_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine._memory_bytes", lambda device: 512 << 20)
    engine = make_engine()
    (before,) = engine.encode(make_frames())
    steps = iter(engine.tighten, None)
    assert list(steps) == [f"memory_budget_bytes={megabytes << 20}" for megabytes in (256, 128, 64)]
    (after,) = engine.encode(make_frames())
    latents = [np.frombuffer(clip.latent.data, np.float32) for clip in (before, after)]  # type: ignore[union-attr]
    np.testing.assert_allclose(*latents, rtol=1e-3, atol=1e-4)


def test_a_clip_that_no_budget_holds_is_a_lack_of_memory() -> None:
    engine = make_engine()
    engine._vae.enable_tiling(mode="exact", memory_budget_bytes=1000)
    with pytest.raises(ValueError, match="memory_budget_bytes=1000") as caught:
        engine.encode(make_frames())
    assert engine.is_out_of_memory(caught.value)
    assert not engine.is_out_of_memory(ValueError("another"))


def test_blend_has_no_budget_to_halve() -> None:
    engine = make_engine()
    engine._vae.enable_tiling()
    assert engine.tighten() is None
