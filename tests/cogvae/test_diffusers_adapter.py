"""A pipeline of diffusers takes our model for its own, and plain diffusers reads what the pipeline saves."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from cogvae import AutoencoderKLCogVideoX
from cogvae.diffusers_adapter import AutoencoderKLCogVideoX as Adapter
from cogvae.diffusers_adapter import as_diffusers

from .pairs import assert_same_state, make_pair, make_tiny, relative_error


def make_pipeline(vae: Any) -> CogVideoXPipeline:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=4,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: CogVideoXPipeline) -> torch.Tensor:
    embeds = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)).to(pipeline.dtype)
    frames: torch.Tensor = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        height=16,
        width=16,
        num_frames=9,
        num_inference_steps=2,
        max_sequence_length=4,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).frames
    return frames


@pytest.fixture(autouse=True)
def _no_warnings_in_the_log(caplog: pytest.LogCaptureFixture) -> Any:
    diffusers.utils.logging.enable_propagation()
    yield
    diffusers.utils.logging.disable_propagation()
    messages = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    # The pipeline of these tests has no tokenizer and no text encoder.
    assert not [message for message in messages if "=None of type" not in message]


def test_it_is_diffusers_class_and_shares_our_parameters() -> None:
    vae = make_tiny()
    adapter = as_diffusers(vae)
    assert isinstance(adapter, diffusers.AutoencoderKLCogVideoX)
    assert isinstance(adapter, AutoencoderKLCogVideoX)
    assert all(a is b for a, b in zip(adapter.parameters(), vae.parameters(), strict=True))
    assert adapter.config is vae.config
    assert adapter.dtype == torch.float32
    adapter.to(torch.bfloat16)
    assert vae.dtype == adapter.dtype == torch.bfloat16
    adapter.enable_tiling()
    assert not vae.use_tiling


def test_a_pipeline_makes_the_same_video_and_plain_diffusers_reloads_it(tmp_path: Path) -> None:
    ours, reference = make_pair(torch.float32)
    expected = generate(make_pipeline(reference))
    pipeline = make_pipeline(as_diffusers(ours))
    assert relative_error(generate(pipeline), expected) < 1e-5

    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]
    no_text = {"tokenizer": None, "text_encoder": None}
    reloaded = CogVideoXPipeline.from_pretrained(tmp_path, **no_text)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.vae) is diffusers.AutoencoderKLCogVideoX
    assert_same_state(reloaded.vae, ours)

    mixed = CogVideoXPipeline.from_pretrained(tmp_path, vae=as_diffusers(ours), **no_text)
    mixed.set_progress_bar_config(disable=True)
    assert type(mixed.vae) is Adapter
    assert relative_error(generate(mixed), expected) < 1e-5
    mixed.vae.enable_tiling()
    mixed.vae.enable_slicing()
    assert mixed.to(torch.float64).vae.dtype == torch.float64


def test_offloading_moves_the_model_when_encode_or_decode_is_called() -> None:
    adapter = as_diffusers(make_tiny())
    calls: list[Any] = []

    class Hook:
        def pre_forward(self, module: Any) -> None:
            calls.append(module)

    adapter._hf_hook = Hook()
    with torch.no_grad():
        posterior = adapter.encode(torch.randn(1, 3, 1, 8, 8)).latent_dist
        adapter.decode(posterior.mode())
        adapter.encode_stream(torch.randn(1, 3, 1, 8, 8))
        adapter.decode_stream(posterior.mode())
    assert calls == [adapter] * 4


@pytest.mark.gpu
def test_model_cpu_offload_gives_the_same_video() -> None:
    ours, reference = make_pair(torch.float32)
    expected = generate(make_pipeline(reference).to("cuda"))
    pipeline = make_pipeline(as_diffusers(ours))
    pipeline.enable_model_cpu_offload()
    assert relative_error(generate(pipeline).cpu(), expected.cpu()) < 1e-3
    assert ours.device.type == "cpu"


def test_it_loads_saves_copies_and_pickles_by_itself(tmp_path: Path) -> None:
    vae = make_tiny()
    vae.save_pretrained(tmp_path)
    adapter = Adapter.from_pretrained(tmp_path)
    assert type(adapter) is Adapter
    assert_same_state(adapter, vae)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert type(twin) is Adapter
        assert_same_state(twin, vae)
        assert twin.encoder is not adapter.encoder
    assert json.loads(adapter.to_json_string())["_class_name"] == "AutoencoderKLCogVideoX"


def test_gradient_checkpointing_reaches_our_modules() -> None:
    adapter = as_diffusers(make_tiny())
    adapter.enable_gradient_checkpointing()
    assert adapter.gradient_checkpointing
    assert adapter.is_gradient_checkpointing
    adapter.disable_gradient_checkpointing()
    assert not adapter.is_gradient_checkpointing
