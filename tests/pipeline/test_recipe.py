"""The fingerprint covers what changes a latent, and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from pipeline.decode_config import DecodeRunConfig
from pipeline.recipe import LatentRecipe, digest
from pipeline.videos.recipe import VideoRecipe
from tests.pipeline.test_config import make_config


def fingerprint(weights: str = "weights", **sections: dict[str, Any]) -> str:
    return LatentRecipe.from_config(make_config(**sections), weights).fingerprint


@pytest.mark.parametrize(
    "sections",
    [
        {"vae": {"weights": "w", "dtype": "float32"}},
        {"vae": {"weights": "w", "tiling": "blend"}},
        {"output": {"uri": "out", "dtype": "float32"}},
        {"output": {"uri": "out", "logvar": False}},
        {"output": {"uri": "out", "first_frame": True}},
    ],
    ids=lambda sections: str(sections),
)
def test_what_changes_a_tensor_changes_the_fingerprint(sections: dict[str, Any]) -> None:
    assert fingerprint(**sections) != fingerprint()


def test_a_video_is_decided_by_the_decoder_s_dtype() -> None:
    def video(**vae: str) -> str:
        config = DecodeRunConfig(input={"uri": "i"}, output={"uri": "o"}, vae={"weights": "w", **vae})  # type: ignore[arg-type]
        return VideoRecipe.from_config(config, "weights").fingerprint

    assert video(dtype="bfloat16", decode_dtype="float32") == video(dtype="float32") != video(dtype="bfloat16")


def test_other_weights_change_the_fingerprint() -> None:
    assert fingerprint("others") != fingerprint()


@pytest.mark.parametrize(
    "sections",
    [
        {"input": {"uri": "elsewhere", "limit": 3}},
        {"output": {"uri": "elsewhere", "compression": "zstd", "shard_bytes": 1, "row_group_bytes": 1}},
        {"output": {"uri": "out", "dtype": "bfloat16"}},
        {"vae": {"weights": "copy", "device": "cpu", "model": "cogvideox-5b", "revision": "main"}},
        {"vae": {"weights": "w", "decode_dtype": "float32", "memory_budget_bytes": 1 << 30}},
        {"clip": {"buckets": ["9x16x16@8"], "windows": "all"}},
        {"decode": {"timeout_s": 1}},
        {"encode": {"batch_size": 4, "deterministic": True, "qa_share": 1}},
        {"cluster": {"actors": 3}},
        {"run": {"append": True}},
    ],
    ids=lambda sections: str(sections),
)
def test_what_changes_no_tensor_leaves_the_fingerprint(sections: dict[str, Any]) -> None:
    assert fingerprint(**sections) == fingerprint()


def test_differences_name_both_sides() -> None:
    ours = LatentRecipe.from_config(make_config(), "weights")
    theirs: dict[str, object] = asdict(ours) | {"dtype": "float32", "older_field": 1}
    assert ours.differences(theirs) == "dtype: 'float32' there, 'bfloat16' here, older_field: 1 there, None here"
    assert ours.differences(dict(asdict(ours))) == ""


def test_digest_tells_where_one_part_ends() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a", 1) == digest("a", 1)
    assert len(digest()) == 32
