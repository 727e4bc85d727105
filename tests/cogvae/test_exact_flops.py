"""How many multiplications the published model takes, counted on the meta device, and that none escapes the counter."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cogvae import AutoencoderKLCogVideoX

# FLOP of diffusers 0.38 for 49x480x720, untiled.
DIFFUSERS = {"encode": 149.0e12, "decode": 315.0e12}
COUNTED = {"aten.convolution", "aten.addmm", "aten.mm", "aten.bmm"}
# Operations of the engine that multiply no matrices.
ELEMENTWISE = {
    *("aten._to_copy", "aten.add", "aten.add_", "aten.addcmul", "aten.cat", "aten.clone", "aten.copy_", "aten.detach"),
    *("aten.empty", "aten.expand", "aten.fill_", "aten.index_select", "aten.mean", "aten.mul", "aten.mul_", "aten.neg"),
    *("aten.permute", "aten.pow", "aten.pow_", "aten.repeat_interleave", "aten.rsqrt", "aten.select", "aten.silu_"),
    *("aten.slice", "aten.split", "aten.split_with_sizes", "aten.stack", "aten.sub", "aten.sub_", "aten.sum", "aten.t"),
    *("aten.transpose", "aten.unbind", "aten.unsqueeze", "aten.view", "aten._unsafe_view", "aten.div", "aten.zero_"),
    *(
        "aten.arange",
        "aten.scalar_tensor",
        "aten.clamp",
        "aten.promote_types",
        "aten.new_empty",
        "aten.empty_like",
        "aten.alias",
        "aten.squeeze",
        "aten.as_strided",
    ),
}


class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "encode", "decode"), [(torch.float32, 98.2e12, 199.1e12), (torch.bfloat16, 147.5e12, 288.0e12)]
)
@torch.no_grad()
def test_a_clip_of_49_frames_takes_fewer_multiplications(dtype: torch.dtype, encode: float, decode: float) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX().to(dtype)

    def count(latent_frames: int) -> tuple[int, int]:
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, 4 * latent_frames - 3, 480, 720, dtype=dtype, device="meta"))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(1, 16, latent_frames, 60, 90, dtype=dtype, device="meta"))
        return encoding.get_total_flops(), decoding.get_total_flops()

    # 49 frames are the first chunk and five times the second.
    encoded, decoded = (first + 5 * (both - first) for first, both in zip(count(3), count(5), strict=True))
    assert 0.97 * encode < encoded < encode < DIFFUSERS["encode"]
    assert 0.97 * decode < decoded < decode < min(291e12, DIFFUSERS["decode"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_counter_knows_every_operation_that_multiplies(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX().to(dtype)
        with Operations() as operations:
            vae.decode(torch.empty(1, 16, 5, 40, 40, dtype=dtype))
            vae.encode(torch.empty(1, 3, 17, 320, 320, dtype=dtype))
    assert operations.names - ELEMENTWISE <= COUNTED
    assert "aten.convolution" in operations.names
