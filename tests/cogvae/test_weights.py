"""Weights load and save bit for bit with diffusers, and whatever is wrong with a file is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvae import AutoencoderKLCogVideoX, resolve_weights
from cogvae.weights import load_weights

from .pairs import assert_same_state, make_pair, make_reference, make_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VAE's folder as diffusers writes it."""
    make_reference(torch.float32).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}])
@pytest.mark.parametrize("variant_shards", [False, True])
def test_weights_pass_between_ours_and_diffusers_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], variant_shards: bool
) -> None:
    options = {**options, **({"max_shard_size": 20_000} if variant_shards else {})}
    variant = options.get("variant")
    ours, reference = make_pair(torch.float32)
    reference.save_pretrained(tmp_path / "theirs", **options)
    ours.save_pretrained(tmp_path / "ours", **options)
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
    loaded = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "theirs", variant=variant)
    assert_same_state(loaded, reference)
    # low_cpu_mem_usage=False: the strict path of diffusers.
    theirs = type(reference).from_pretrained(tmp_path / "ours", variant=variant, low_cpu_mem_usage=False)
    assert_same_state(theirs, ours)
    assert not loaded.training
    assert loaded.config._name_or_path == str(tmp_path / "theirs")


def test_a_saved_config_is_the_one_diffusers_writes(tmp_path: Path, folder: Path) -> None:
    AutoencoderKLCogVideoX.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", folder))
    assert ours.pop("_name_or_path") == str(folder)
    assert ours == theirs
    assert (ours["_class_name"], ours["_diffusers_version"]) == ("AutoencoderKLCogVideoX", "0.38.0")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_the_dtype_is_float32_unless_asked_for_as_in_diffusers(tmp_path: Path, dtype: torch.dtype | None) -> None:
    make_reference(torch.float16).save_pretrained(tmp_path)
    ours = AutoencoderKLCogVideoX.from_pretrained(tmp_path, torch_dtype=dtype)
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path, torch_dtype=dtype)
    assert ours.dtype == theirs.dtype == (dtype or torch.float32)
    assert_same_state(ours, theirs)
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())


def test_a_dtype_that_is_none_is_refused(folder: Path) -> None:
    for dtype in ("float16", torch.int8):
        with pytest.raises(ValueError, match=r"torch_dtype=.*torch\.bfloat16"):
            AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=dtype)  # type: ignore[arg-type]


def test_a_loaded_model_does_not_depend_on_its_file(folder: Path) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(folder)
    before = vae.encoder.conv_in.conv.weight.clone()
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:  # overwritten in place
        file.write(bytes(size))
    assert torch.equal(vae.encoder.conv_in.conv.weight, before)


def test_saving_again_removes_what_a_reader_could_mistake(tmp_path: Path) -> None:
    vae = make_tiny()
    vae.save_pretrained(tmp_path, max_shard_size=20_000)
    vae.save_pretrained(tmp_path, variant="fp16")
    vae.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"}
    vae.save_pretrained(tmp_path, max_shard_size=20_000)
    assert WEIGHTS not in {path.name for path in tmp_path.iterdir()}
    assert_same_state(AutoencoderKLCogVideoX.from_pretrained(tmp_path), vae)


def test_saving_refuses_a_pickle_a_file_and_a_size_it_cannot_read(tmp_path: Path) -> None:
    vae = make_tiny()
    with pytest.raises(ValueError, match="pickle"):
        vae.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="'ten'"):
        vae.save_pretrained(tmp_path, max_shard_size="ten")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        vae.save_pretrained(tmp_path / "file")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, decoder__conv_in__conv__bias=None)
    with pytest.raises(ValueError, match=r"safetensors: 1 of \d+ tensors missing.*decoder\.conv_in\.conv\.bias"):
        AutoencoderKLCogVideoX.from_pretrained(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, loss__weight=torch.zeros(1))
    with pytest.raises(ValueError, match=r"safetensors: surplus tensor 'loss\.weight'"):
        AutoencoderKLCogVideoX.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edit_config(folder, latent_channels=5)
    with pytest.raises(ValueError, match=r"safetensors: tensor '\w+\.\S+' has shape \[.*\], the config asks for \["):
        AutoencoderKLCogVideoX.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, 20_000])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {size} bytes"):
        AutoencoderKLCogVideoX.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {size} bytes"):
        resolve_weights(folder).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "describes list"),
        ('{"_class_name": "AutoencoderKL"}', "describes AutoencoderKL, expected AutoencoderKLCogVideoX"),
        ('{"act_fn": "sine"}', "act_fn='sine'"),
        ('{"block_out_channels": null}', "block_out_channels=None"),
    ],
)
def test_an_invalid_config_is_named_with_its_field(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        AutoencoderKLCogVideoX.from_pretrained(folder)


def test_missing_files_are_named_with_what_to_try(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*subfolder='vae'"):
        AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert_same_state(
        AutoencoderKLCogVideoX.from_pretrained(tmp_path, subfolder="vae"),
        AutoencoderKLCogVideoX.from_pretrained(folder),
    )
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.fp16\.safetensors"):
        AutoencoderKLCogVideoX.from_pretrained(folder, variant="fp16")


@pytest.mark.parametrize("name", ["../vae.safetensors", "/etc/vae.safetensors", "a/b.safetensors", "a.bin", "..", "a\\b"])
def test_an_index_cannot_point_outside_its_folder(folder: Path, name: str) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json: shard .* is not the plain name"):
        resolve_weights(folder)


def test_a_broken_index_is_named(folder: Path) -> None:
    for content in ("{", "[]", "{}", '{"weight_map": []}'):
        (folder / f"{WEIGHTS}.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json: not a safetensors index"):
            resolve_weights(folder)


def test_a_shard_that_is_missing_or_repeats_a_tensor_is_named(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size=20_000)
    first, second, *_ = sorted(tmp_path.glob("*-of-*"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name}: tensor .* also in another shard"):
        AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {second.name}"):
        AutoencoderKLCogVideoX.from_pretrained(tmp_path)


def test_load_weights_fills_a_model_on_the_meta_device(folder: Path) -> None:
    files = resolve_weights(str(folder))
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(files.read_config())
    load_weights(files, vae, torch_dtype=torch.float64)
    assert_same_state(vae, AutoencoderKLCogVideoX.from_files(files, torch_dtype=torch.float64))


def test_the_fingerprint_depends_on_what_the_model_computes_and_on_nothing_else(tmp_path: Path, folder: Path) -> None:
    fingerprint = resolve_weights(folder).fingerprint()
    vae = AutoencoderKLCogVideoX.from_pretrained(folder)

    vae.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    assert resolve_weights(tmp_path / "sharded").fingerprint() == fingerprint
    edit_config(tmp_path / "sharded", scaling_factor=0.7, sample_height=300, _anything=1)
    assert resolve_weights(tmp_path / "sharded").fingerprint() == fingerprint

    edit_config(tmp_path / "sharded", norm_eps=1e-5)
    assert resolve_weights(tmp_path / "sharded").fingerprint() != fingerprint
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "changed")
    assert resolve_weights(tmp_path / "changed").fingerprint() != fingerprint
    vae.bfloat16().save_pretrained(tmp_path / "bf16")
    assert len({resolve_weights(tmp_path / name).fingerprint() for name in ("changed", "bf16")}) == 2
