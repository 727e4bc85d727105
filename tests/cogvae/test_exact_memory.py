"""What the engine holds, what it says it needs, and what a budget makes of it. Bytes of tensors are counted, not guessed."""

import logging

import pytest
import torch

from cogvae import AutoencoderKLCogVideoX
from cogvae.chunks import FrameLoop, run_in_chunks
from cogvae.exact import Limits, MemoryBudgetError, memory
from cogvae.exact.causal import Past
from cogvae.exact.memory import estimate_bytes, find_plan
from cogvae.exact.network import ExactDecoder, ExactEncoder
from cogvae.exact.plan import Plan

from .live import LiveBytes
from .pairs import make_tiny, relative_error

PLANS = [
    Plan(piece_bytes=1 << 40),
    Plan(piece_bytes=1),
    Plan(piece_bytes=1, strip_rows=4),
    Plan(piece_bytes=1, strip_rows=4, single_frames=True),
]
SIZE = 64
# One activation of the first level's channels for nine frames at full resolution: the unit of the issue.
UNIT = 16 * 9 * SIZE * SIZE * 4


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLCogVideoX:
    """The published proportions, with an eighth of the channels."""
    return make_tiny(block_out_channels=(16, 32, 32, 64), latent_channels=4, layers_per_block=3, norm_num_groups=8)


def most_live(vae: AutoencoderKLCogVideoX, plan: Plan, num_frames: int) -> tuple[int, int]:
    """Bytes at the peak of an encode and of a decode."""
    x, z = torch.randn(1, 3, num_frames, SIZE, SIZE), torch.randn(1, 4, (num_frames + 3) // 4, SIZE // 8, SIZE // 8)
    with torch.no_grad():
        with LiveBytes() as encode:
            run_in_chunks(FrameLoop(ExactEncoder(vae.encoder, plan), Past()), x, 8)
        with LiveBytes() as decode:
            run_in_chunks(FrameLoop(ExactDecoder(vae.decoder, plan), Past()), z, 2)
    return encode.peak, decode.peak


@pytest.mark.parametrize("num_frames", [9, 17])
@pytest.mark.parametrize("plan", PLANS)
def test_the_estimate_is_above_what_is_held_and_not_far(
    vae: AutoencoderKLCogVideoX, plan: Plan, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_OVERHEAD", 1.0)
    inputs = torch.empty(1, 3, 9, SIZE, SIZE), torch.empty(1, 4, 3, SIZE // 8, SIZE // 8)
    for network, first, held in zip((vae.encoder, vae.decoder), inputs, most_live(vae, plan, num_frames), strict=True):
        estimate = estimate_bytes(list(memory._layers(network, first)), plan, first, keeps_past=num_frames > 9)
        assert 0.95 * held <= estimate <= 1.6 * held, (type(network), estimate / UNIT, held / UNIT)


def test_two_frames_at_once_hold_what_the_issue_allows(vae: AutoencoderKLCogVideoX) -> None:
    (encode, decode), (encode_two, decode_two) = (most_live(vae, PLANS[1], n) for n in (9, 17))
    assert encode <= 3 * UNIT
    assert decode <= 5 * UNIT
    assert encode_two <= 5.3 * UNIT
    assert decode_two <= 8 * UNIT


@torch.no_grad()
def test_a_stream_holds_as_much_for_a_long_clip_as_for_a_short_one(vae: AutoencoderKLCogVideoX) -> None:
    peaks = []
    for latent_frames in (5, 25):
        with LiveBytes() as live:
            for frames in vae.decode_stream(torch.randn(1, 4, 1, 4, 4) for _ in range(latent_frames)):
                del frames
        peaks.append(live.peak)
    assert peaks[1] <= 1.02 * peaks[0]


@torch.no_grad()
def test_a_smaller_budget_gives_the_same_numbers_from_less_memory(
    vae: AutoencoderKLCogVideoX, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_STRIP_BYTES", (1 << 16,))  # these frames are smaller than strips are elsewhere
    z = torch.randn(1, 4, 5, SIZE // 8, SIZE // 8)
    peaks, results = [], []
    layers = list(memory._layers(vae.decoder, z[:, :, :3]))
    leanest = Plan(piece_bytes=1, single_frames=True, strip_bytes=1 << 16)
    for plan in (PLANS[0], PLANS[1], leanest):
        budget = estimate_bytes(layers, plan, z, keeps_past=True)
        vae.enable_tiling(mode="exact", memory_budget_bytes=budget)
        with caplog.at_level(logging.INFO, "cogvae"), LiveBytes() as live:
            results.append(vae.decode(z).sample)
        assert live.peak - results[-1].nbytes <= budget
        peaks.append(live.peak)
    assert peaks[0] > peaks[1] > peaks[2]
    assert all(relative_error(result, results[0]) < 1e-5 for result in results)
    assert [record.message.count("plan chosen network=Decoder") for record in caplog.records] == [1, 1, 1]
    vae.disable_tiling()


@torch.no_grad()
def test_an_impossible_budget_is_refused_with_the_least_that_is_possible(vae: AutoencoderKLCogVideoX) -> None:
    z = torch.randn(1, 4, 3, 8, 8)
    vae.enable_tiling(mode="exact", memory_budget_bytes=1000)
    with pytest.raises(
        ValueError, match=r"memory_budget_bytes=1000: a chunk of shape \[1, 4, 3, 8, 8\].* takes (\d+) bytes"
    ) as error:
        vae.decode(z)
    with pytest.raises(ValueError, match="memory_budget_bytes=1000"):
        next(vae.decode_stream(z))
    floor = int(str(error.value).split("takes ")[1].split()[0])
    vae.enable_tiling(mode="exact", memory_budget_bytes=floor)
    vae.decode(z)
    vae.enable_tiling(mode="exact", memory_budget_bytes=floor - 1)
    with pytest.raises(ValueError, match="at the least"):
        vae.decode(z)
    vae.disable_tiling()
    vae.decode(z)


@pytest.mark.parametrize("num_frames", [1, 9, 17])
@torch.no_grad()
def test_the_least_budget_is_told_without_running(vae: AutoencoderKLCogVideoX, num_frames: int) -> None:
    x, z = torch.randn(2, 3, num_frames, 32, 40), torch.randn(2, 4, (num_frames + 3) // 4, 4, 5)
    for least, run in (
        (vae.least_encode_bytes(x.shape), lambda: vae.encode(x)),
        (vae.least_decode_bytes(z.shape), lambda: vae.decode(z)),
    ):
        vae.enable_tiling(mode="exact", memory_budget_bytes=least)
        run()
        vae.enable_tiling(mode="exact", memory_budget_bytes=least - 1)
        with pytest.raises(MemoryBudgetError, match=f"takes {least} bytes at the least"):
            run()
    vae.disable_tiling()


def test_without_a_budget_the_fastest_plan_is_taken_and_logged_once(
    vae: AutoencoderKLCogVideoX, caplog: pytest.LogCaptureFixture
) -> None:
    z = torch.empty(1, 4, 3, 8, 7)
    with caplog.at_level(logging.INFO, "cogvae"):
        plans = [find_plan(Limits(strip_rows=5), vae.decoder, z, True) for _ in range(3)]
        find_plan(Limits(strip_rows=6), vae.decoder, z, True)
    assert plans[0] == plans[2] == Plan(piece_bytes=memory._PIECE_BYTES["cpu"], strip_rows=5)
    assert ["strip_rows=5" in record.getMessage() for record in caplog.records] == [True, False]
    assert "network=Decoder chunk=[1, 4, 3, 8, 7] dtype=torch.float32 budget_bytes=None" in caplog.text
