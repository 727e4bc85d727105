"""A stream computes what the whole clip does, whatever its pieces are, and holds a chunk of it."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvae import AutoencoderKLCogVideoX
from cogvae.chunks import split_in_chunks
from cogvae.streams import from_uint8, to_uint8

from .pairs import make_tiny, relative_error

EXACT = 1e-12


@functools.cache
def shared_model() -> AutoencoderKLCogVideoX:
    """One small fp64 model for all tests that leave its settings alone."""
    return make_tiny(torch.float64, block_out_channels=(4, 4, 4, 4), norm_num_groups=2)


def pieces_of(x: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """The clip in pieces of these lengths, the last repeated to its end."""
    start, lengths = 0, list(lengths)
    while start < x.shape[2]:
        length = lengths.pop(0) if len(lengths) > 1 else max(1, lengths[0])
        yield x[:, :, start : start + length]
        start += length


def join(stream: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(stream), dim=2)


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([*range(1, 18), 49]), lengths, st.sampled_from([(8, 8), (9, 15), (17, 8)]))
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_an_encode_stream_equals_the_whole(num_frames: int, lengths: list[int], size: tuple[int, int]) -> None:
    vae = shared_model()
    x = torch.randn(1, 3, num_frames, *size, dtype=torch.float64)
    expected = vae.encode(x).latent_dist.parameters
    assert relative_error(join(vae.encode_stream(pieces_of(x, lengths), num_frames)), expected) < EXACT
    assert relative_error(join(vae.encode_stream(x)), expected) < EXACT
    if num_frames % 8 == 1:
        assert relative_error(join(vae.encode_stream(pieces_of(x, lengths))), expected) < EXACT


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([*range(1, 18), 49]), lengths, st.sampled_from([(1, 1), (1, 3), (3, 2)]))
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_a_decode_stream_equals_the_whole(num_frames: int, lengths: list[int], size: tuple[int, int]) -> None:
    vae = shared_model()
    z = torch.randn(1, 4, num_frames, *size, dtype=torch.float64)
    expected = vae.decode(z).sample
    assert relative_error(join(vae.decode_stream(pieces_of(z, lengths), num_frames)), expected) < EXACT
    assert relative_error(join(vae.decode_stream(z)), expected) < EXACT
    if num_frames % 2 == 1:
        assert relative_error(join(vae.decode_stream(pieces_of(z, lengths))), expected) < EXACT


@torch.no_grad()
def test_a_result_comes_as_soon_as_its_chunk_is_there() -> None:
    vae = shared_model()
    taken: list[int] = []

    def one_by_one(x: Tensor) -> Iterator[Tensor]:
        for t in range(x.shape[2]):
            taken.append(t)
            yield x[:, :, t : t + 1]

    stream = vae.encode_stream(one_by_one(torch.randn(1, 3, 17, 8, 8, dtype=torch.float64)))
    assert taken == []
    assert [(moments.shape[2], len(taken)) for moments in stream] == [(3, 9), (2, 17)]
    taken.clear()
    stream = vae.decode_stream(one_by_one(torch.randn(1, 4, 4, 1, 1, dtype=torch.float64)), 4)
    assert [(frames.shape[2], len(taken)) for frames in stream] == [(8, 2), (8, 4)]


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_tiles_and_clips_of_a_stream_go_in_step(slicing: bool) -> None:
    vae = make_tiny(torch.float64)
    vae.enable_tiling(16, 24, 1 / 2, 1 / 3)
    vae.use_slicing = slicing
    x = torch.randn(2, 3, 17, 24, 40, dtype=torch.float64)
    moments = vae.encode(x).latent_dist.parameters
    assert relative_error(join(vae.encode_stream(pieces_of(x, [5]))), moments) < EXACT
    z = moments[:, :4].contiguous()
    frames = vae.decode(z).sample
    assert relative_error(join(vae.decode_stream(pieces_of(z, [2]))), frames) < EXACT
    vae.disable_tiling()
    assert relative_error(vae.decode(z).sample, frames) > 1e-3


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_settings_that_change_in_mid_stream_hold_for_the_next_one() -> None:
    vae = make_tiny(torch.float64)
    z = torch.randn(1, 4, 5, 3, 3, dtype=torch.float64)
    expected = vae.decode(z).sample
    stream = vae.decode_stream(z)
    first = next(stream)
    vae.enable_tiling(16, 16, 1 / 2, 1 / 2)
    assert relative_error(torch.cat([first, *stream], dim=2), expected) < EXACT


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_streams_of_one_model_do_not_see_each_other() -> None:
    vae = shared_model()
    latents = [torch.randn(1, 4, 5, 1, 2, dtype=torch.float64) for _ in range(2)]
    in_turn = zip(*(vae.decode_stream(z) for z in latents), strict=True)
    for z, frames in zip(latents, zip(*in_turn, strict=True), strict=True):
        assert relative_error(torch.cat(frames, dim=2), vae.decode(z).sample) < EXACT


@torch.no_grad()
def test_memory_does_not_grow_with_the_clip() -> None:
    vae = make_tiny()

    def most_alive(num_frames: int) -> int:
        """Input pieces and results that are alive at once, seen at every chunk."""
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

        def watched(tensor: Tensor) -> Tensor:
            alive.add(tensor)
            return tensor

        pieces = (watched(torch.randn(1, 3, 1, 8, 8)) for _ in range(num_frames))
        most = 0
        for moments in vae.encode_stream(pieces):
            for frames in vae.decode_stream(watched(moments[:, :4].contiguous())):
                watched(frames)
                most = max(most, len(alive))
        return most

    assert most_alive(41) == most_alive(81) < 20


@torch.no_grad()
def test_results_are_let_go_before_the_next_is_computed() -> None:
    vae = shared_model()
    stream = vae.decode_stream(torch.randn(1, 4, 5, 1, 1, dtype=torch.float64))
    result = weakref.ref(next(stream))
    assert result() is None


@pytest.mark.usefixtures("by_engine")
@torch.no_grad()
def test_uint8_goes_in_and_comes_out_by_argument() -> None:
    vae = make_tiny()
    pixels = torch.randint(0, 256, (1, 3, 9, 8, 16), dtype=torch.uint8)
    moments = join(vae.encode_stream(pieces_of(pixels, [4]), uint8=True))
    assert torch.equal(moments, vae.encode(pixels.float() / 127.5 - 1).latent_dist.parameters)
    z = 3 * torch.randn(1, 4, 3, 1, 2)
    frames = join(vae.decode_stream(z, uint8=True))
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, ((vae.decode(z).sample + 1) * 127.5).round().clamp(0, 255).byte())
    assert {0, 255} <= set(frames.flatten().tolist())
    with pytest.raises(ValueError, match="float32 with uint8=True"):
        next(vae.encode_stream(pixels.float(), uint8=True))
    with pytest.raises(ValueError, match=r"torch\.uint8: expected floats"):
        next(vae.encode_stream(pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_survive_the_way_to_the_model_s_range_and_back(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = from_uint8(pixels, dtype)
    assert (floats.dtype, floats.min(), floats.max()) == (dtype, -1, 1)
    off = (to_uint8(floats).int() - pixels.int()).abs().max()
    assert off <= (1 if dtype == torch.bfloat16 else 0)  # bfloat16 has 8 bits for 256 values of either sign
    assert to_uint8(torch.tensor([-9.0, 9.0], dtype=dtype)).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("lengths", "num_frames", "message"),
    [
        ([12], None, "ended after 12 frames.*1, 9 or 17.*num_frames"),
        ([4, 4], None, "ended after 8 frames"),
        ([], None, "ended after 0 frames"),
        ([9, 3], 13, "ended after 12 frames where num_frames=13"),
        ([9, 5], 13, "14 frames or more where num_frames=13"),
        ([9, 4, 1], 13, "14 frames or more where num_frames=13"),
        ([9], 0, "0 frames in chunks of 8"),
    ],
)
def test_a_stream_that_ends_elsewhere_is_refused(lengths: list[int], num_frames: int | None, message: str) -> None:
    pieces = [torch.randn(1, 3, length, 8, 8) for length in lengths]
    with pytest.raises(ValueError, match=message):
        list(make_tiny().encode_stream(pieces, num_frames))


@pytest.mark.parametrize("other", [{"size": (1, 3, 4, 8, 16)}, {"size": (2, 3, 4, 8, 8)}, {"dtype": torch.float64}])
def test_pieces_that_differ_are_refused(other: dict[str, Any]) -> None:
    pieces = [torch.randn(1, 3, 4, 8, 8), torch.randn(**{"size": (1, 3, 5, 8, 8), **other})]
    with pytest.raises(ValueError, match="only the number of frames may differ"):
        list(make_tiny().encode_stream(pieces))


def test_pieces_of_a_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"latents of shape \[1, 16, 1, 2, 2\]: expected \[batch, 4"):
        list(make_tiny().decode_stream([torch.randn(1, 16, 1, 2, 2)]))
    with pytest.raises(ValueError, match="expected floats"):
        list(make_tiny().decode_stream(torch.zeros(1, 4, 1, 2, 2, dtype=torch.int64)))


@given(st.integers(1, 60), st.integers(1, 9), lengths)
def test_chunks_of_a_stream_are_those_of_the_whole(num_frames: int, chunk_frames: int, lengths: list[int]) -> None:
    x = torch.arange(num_frames).view(1, 1, -1, 1, 1)
    known = list(split_in_chunks(pieces_of(x, lengths), chunk_frames, num_frames))
    assert torch.equal(torch.cat([chunk for chunk, _ in known], dim=2), x)
    assert [is_last for _, is_last in known] == [False] * (len(known) - 1) + [True]
    if num_frames % chunk_frames == 1 % chunk_frames:
        unknown = split_in_chunks(pieces_of(x, lengths), chunk_frames, None)
        assert [chunk.shape[2] for chunk, _ in unknown] == [chunk.shape[2] for chunk, _ in known]


def test_gradients_pass_through_a_stream() -> None:
    vae = shared_model()
    grads = []
    z = torch.randn(1, 4, 3, 1, 1, dtype=torch.float64)
    for decode in (lambda leaf: vae.decode(leaf).sample, lambda leaf: join(vae.decode_stream(leaf))):
        leaf = z.clone().requires_grad_()
        decode(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert relative_error(*grads) < EXACT


def test_a_stream_that_begins_without_gradients_goes_on_without() -> None:
    vae = make_tiny(torch.float64)
    z = torch.randn(1, 4, 5, 1, 2, dtype=torch.float64)
    expected = vae.decode(z).sample.detach()
    stream = vae.decode_stream(z)
    with torch.no_grad():
        first = next(stream)
    rest = torch.cat(list(stream), dim=2)
    assert not rest.requires_grad
    assert relative_error(torch.cat([first, rest], dim=2), expected) < EXACT


def test_a_later_piece_that_requires_gradients_is_refused() -> None:
    vae = make_tiny().requires_grad_(False)
    pieces = torch.randn(1, 4, 3, 1, 2), torch.randn(1, 4, 2, 1, 2, requires_grad=True)
    stream = vae.decode_stream(pieces)
    next(stream)
    with pytest.raises(ValueError, match=r"decode_stream: a chunk requires gradients.*detach"):
        next(stream)
    frames = torch.randn(1, 3, 9, 8, 8), torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="encode_stream: a chunk requires gradients"):
        list(vae.encode_stream(frames))
