from pathlib import Path

import pytest
import torch

from cogvae import AutoencoderKLCogVideoX, VAEConfig
from cogvae.sat import load_sat, sat_keys, save_sat

from .pairs import assert_same_state, make_tiny


def default_keys() -> list[str]:
    with torch.device("meta"):
        return list(AutoencoderKLCogVideoX().state_dict())


def test_the_table_of_names_runs_both_ways_over_every_key_of_the_published_shape() -> None:
    keys = default_keys()
    table = sat_keys(keys, VAEConfig())
    assert list(table) == keys
    assert len(set(table.values())) == len(keys)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.conv_in.conv.weight", "encoder.conv_in.conv.weight"),
        ("encoder.down_blocks.1.resnets.2.norm1.weight", "encoder.down.1.block.2.norm1.weight"),
        (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            "encoder.down.1.block.0.nin_shortcut.weight",
        ),
        ("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.down.0.downsample.conv.bias"),
        ("encoder.mid_block.resnets.0.conv1.conv.weight", "encoder.mid.block_1.conv1.conv.weight"),
        ("decoder.mid_block.resnets.1.norm1.conv_y.conv.bias", "decoder.mid.block_2.norm1.conv_y.conv.bias"),
        ("decoder.up_blocks.0.resnets.3.norm2.norm_layer.bias", "decoder.up.3.block.3.norm2.norm_layer.bias"),
        ("decoder.up_blocks.0.upsamplers.0.conv.weight", "decoder.up.3.upsample.conv.weight"),
        ("decoder.up_blocks.3.resnets.0.conv_shortcut.bias", "decoder.up.0.block.0.nin_shortcut.bias"),
        ("decoder.norm_out.conv_b.conv.weight", "decoder.norm_out.conv_b.conv.weight"),
    ],
)
def test_names_are_those_of_3d_vae_pt(ours: str, theirs: str) -> None:
    assert sat_keys(default_keys(), VAEConfig())[ours] == theirs


def test_a_model_survives_the_way_to_sat_and_back(tmp_path: Path) -> None:
    vae = make_tiny()
    save_sat(vae, tmp_path / "3d-vae.pt")
    assert_same_state(load_sat(tmp_path / "3d-vae.pt", vae.config), vae)
    assert load_sat(tmp_path / "3d-vae.pt", vae.config, torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model"])
def test_losses_and_wrappers_of_a_checkpoint_are_left_behind(tmp_path: Path, wrapper: str | None) -> None:
    vae = make_tiny()
    names = sat_keys(vae.state_dict(), vae.config)
    state = {names[key]: tensor for key, tensor in vae.state_dict().items()}
    state["loss.discriminator.weight"] = torch.zeros(1)
    torch.save({wrapper: state} if wrapper else state, tmp_path / "3d-vae.pt")
    assert_same_state(load_sat(tmp_path / "3d-vae.pt", vae.config), vae)


def test_a_wrong_checkpoint_is_named(tmp_path: Path) -> None:
    vae = make_tiny()
    path = tmp_path / "3d-vae.pt"
    save_sat(vae, path)
    with pytest.raises(ValueError, match=r"3d-vae\.pt: tensor '.*' has shape"):
        load_sat(path)
    torch.save({"state_dict": {"encoder.conv_in.conv.bias": torch.zeros(8)}}, path)
    with pytest.raises(ValueError, match=r"3d-vae\.pt: \d+ of \d+ tensors missing"):
        load_sat(path, vae.config)
    torch.save({"state_dict": {"wings": torch.zeros(8)}}, path)
    with pytest.raises(ValueError, match="surplus tensor 'wings'"):
        load_sat(path, vae.config)


@pytest.mark.parametrize(("content", "message"), [(Path("code"), "no checkpoint"), ([1, 2], "holds a list")])
def test_a_file_of_anything_but_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "3d-vae.pt")
    with pytest.raises(ValueError, match=rf"3d-vae\.pt: {message}"):
        load_sat(tmp_path / "3d-vae.pt")


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    save_sat(make_tiny(), tmp_path / "3d-vae.pt")
    data = (tmp_path / "3d-vae.pt").read_bytes()
    for size in (0, 100, len(data) // 2):
        (tmp_path / "3d-vae.pt").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"3d-vae\.pt: no checkpoint"):
            load_sat(tmp_path / "3d-vae.pt")
