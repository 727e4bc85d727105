"""Every container read back by another program's eyes: count, size, rate, pixels, and what a cut file looks like."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.types import Frames
from pipeline.video_writer import Container, VideoEncoder, VideoFormat, encode_video

CLIPS = Path(__file__).resolve().parents[2] / "configs/quickstart/clips"
CONTAINERS: list[Container] = ["mp4", "mkv", "png", "webp"]
NTSC = Fraction(30000, 1001)


def noise(shape: tuple[int, int, int], seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@functools.cache
def natural() -> Frames:
    """Real pictures, ``[25, 180, 320, 3]``; halved in size, so that the noise of their own codec is gone."""
    with av.open(str(CLIPS / "bunny_wakes_up.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame, _ in zip(container.decode(video=0), range(25), strict=False)]
    whole = np.stack(frames).astype(np.float32)
    return whole.reshape(25, 180, 2, 320, 2, 3).mean((2, 4)).round().astype(np.uint8)


def by_av(video: bytes) -> tuple[Frames, Fraction, av.VideoFrame]:
    """Frames as a player that believes the tags shows them, the rate, and one frame for its tags."""
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        rate = stream.average_rate
        assert rate is not None
        times = np.array([float(frame.pts * frame.time_base) for frame in frames])
        expected = np.arange(len(frames)) * rate.denominator / rate.numerator
        np.testing.assert_allclose(times - times[0], expected, atol=1e-3)
        return (
            np.stack([frame.to_ndarray(format="rgb24") for frame in frames]),
            Fraction(rate.numerator, rate.denominator),
            frames[0],
        )


def by_pillow(video: bytes) -> tuple[Frames, list[int]]:
    """Frames and milliseconds of each."""
    pictures, durations = [], []
    with Image.open(io.BytesIO(video)) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            pictures.append(np.array(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(pictures), durations


def by_zip(video: bytes) -> Frames:
    with zipfile.ZipFile(io.BytesIO(video)) as file:
        assert file.testzip() is None
        names = file.namelist()
        assert names == [f"{index:05}.png" for index in range(len(names))]
        return np.stack([np.array(Image.open(io.BytesIO(file.read(name)))) for name in names])


def psnr(a: Frames, b: Frames) -> float:
    assert a.shape == b.shape
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def boxes(video: bytes) -> list[str]:
    """Names of an mp4 file's outermost boxes, in order; the last of a cut file is left out."""
    names, start = [], 0
    while start + 8 <= len(video):
        size = int.from_bytes(video[start : start + 4], "big")
        if size < 8 or start + size > len(video):
            break
        names.append(video[start + 4 : start + 8].decode("latin1"))
        start += size
    return names


class Pipe:
    """A sink that can only be written to, as an HTTP response."""

    def __init__(self, most_writes: int = 10**9) -> None:
        self.data = b""
        self._writes_left = most_writes

    def write(self, data: bytes) -> None:
        self._writes_left -= 1
        if self._writes_left < 0:
            raise BrokenPipeError("the other end has gone")
        self.data += data


rates = pytest.mark.parametrize(
    ("fps", "exact"), [(8, 8), (29.97, NTSC), (NTSC, NTSC), (23.976, Fraction(24000, 1001)), (12.5, 12.5)]
)


@rates
@pytest.mark.parametrize("fragmented", [False, True])
def test_mp4_has_the_rate_the_size_and_the_pixels(fps: Any, exact: Fraction, fragmented: bool) -> None:
    sink = Pipe()
    with VideoEncoder(sink, VideoFormat("mp4"), fps, 180, 320, fragmented=fragmented) as encoder:
        encoder.add(natural())
    frames, rate, first = by_av(sink.data)
    assert rate == exact
    assert frames.shape == natural().shape
    assert psnr(frames, natural()) > 34
    assert first.format.name == "yuv420p"
    assert (first.colorspace, first.color_primaries, first.color_trc, first.color_range) == (1, 1, 1, 1)


@rates
@pytest.mark.parametrize("shape", [(5, 33, 47), (3, 180, 320), (1, 16, 16)])
def test_mkv_is_exact_in_rgb(fps: Any, exact: Fraction, shape: tuple[int, int, int]) -> None:
    frames, rate, first = by_av(encode_video(noise(shape), fps, VideoFormat("mkv")))
    np.testing.assert_array_equal(frames, noise(shape))
    assert rate == exact or shape[0] == 1
    assert first.format.name == "bgr0"
    assert (first.colorspace, first.color_primaries, first.color_trc, first.color_range) == (0, 1, 1, 2)


@rates
def test_webp_moves_at_the_rate_and_looks_alike(fps: Any, exact: Fraction) -> None:
    frames, durations = by_pillow(encode_video(natural(), fps, VideoFormat("webp")))
    assert psnr(frames, natural()) > 30
    np.testing.assert_allclose(np.cumsum(durations), [1000 * (index + 1) / float(exact) for index in range(25)], atol=2)


def test_odd_sizes_go_where_they_can() -> None:
    frames = noise((3, 33, 47))
    assert by_pillow(encode_video(frames, 8, VideoFormat("webp")))[0].shape == frames.shape
    with pytest.raises(ValueError, match="33x47: mp4 takes even sizes only; use mkv or png"):
        encode_video(frames, 8)


@pytest.mark.parametrize("container", ["mp4", "mkv", "webp"])
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 200), (255, 255, 255), (0, 0, 0)])
def test_colours_stay_what_they_are(container: Container, colour: tuple[int, int, int]) -> None:
    video = encode_video(np.full((2, 32, 48, 3), colour, np.uint8), 8, VideoFormat(container))
    frames = by_pillow(video)[0] if container == "webp" else by_av(video)[0]
    assert np.abs(frames.astype(int) - colour).max() <= (6 if container == "webp" else 1)


def test_equal_frames_of_a_webp_are_one_that_stays_longer() -> None:
    frames, durations = by_pillow(encode_video(np.repeat(noise((2, 32, 32)), [3, 2], axis=0), 8, VideoFormat("webp")))
    assert (len(frames), durations) == (2, [375, 250])


def test_one_frame_is_a_video_everywhere() -> None:
    frame = natural()[:1]
    assert by_av(encode_video(frame, 8))[0].shape == frame.shape
    assert len(by_pillow(encode_video(frame, 8, VideoFormat("webp")))[0]) == 1


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_frames_give_equal_bytes_however_they_come(container: Container) -> None:
    frames = natural()
    once = encode_video(frames, 8, VideoFormat(container))
    assert encode_video((frames[start : start + 8] for start in range(0, 25, 8)), 8, VideoFormat(container)) == once
    pipe = Pipe()
    with VideoEncoder(pipe, VideoFormat(container), 8, 180, 320) as encoder:
        encoder.add(frames[:, ::-1][:, ::-1])  # not contiguous
        encoder.add(frames[:0])
        assert pipe.data == b""
    assert (pipe.data, encoder.num_frames) == (once, 25)


def test_a_smaller_crf_looks_better() -> None:
    videos = [encode_video(natural(), 8, VideoFormat("mp4", crf=crf)) for crf in (1, 18, 35)]
    assert len(videos[0]) > 2 * len(videos[1]) > 4 * len(videos[2])
    quality = [psnr(by_av(video)[0], natural()) for video in videos]
    assert quality == sorted(quality, reverse=True)
    assert quality[0] > 38  # what halving the chroma leaves of it


def test_the_index_of_an_mp4_is_in_front() -> None:
    names = boxes(encode_video(natural(), 8))
    assert names.index("moov") < names.index("mdat")


def test_every_chunk_of_a_fragmented_mp4_can_be_seen_when_it_is_added() -> None:
    pipe, seen = Pipe(), []
    with VideoEncoder(pipe, VideoFormat(), 8, 180, 320, fragmented=True) as encoder:
        for start, end in ((0, 9), (9, 17), (17, 25)):
            encoder.add(natural()[start:end])
            seen.append(len(by_av(pipe.data)[0]))
            assert "mfra" not in boxes(pipe.data)
    assert seen == [8, 16, 24]  # the last frame of a chunk waits for the next to tell its duration
    assert boxes(pipe.data)[:2] == ["ftyp", "moov"]
    assert boxes(pipe.data)[-1] == "mfra"
    assert pipe.data == fragmented(natural())


def test_a_fragmented_mp4_costs_little_quality() -> None:
    streamed, whole = fragmented(natural()), encode_video(natural(), 8)
    assert len(streamed) < 1.5 * len(whole)
    assert psnr(by_av(streamed)[0], natural()) > psnr(by_av(whole)[0], natural()) - 1


def fragmented(frames: Frames) -> bytes:
    pipe = Pipe()
    with VideoEncoder(pipe, VideoFormat(), 8, *frames.shape[1:3], fragmented=True) as encoder:
        encoder.add(frames)
    return pipe.data


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_error_inside_leaves_no_file_that_looks_whole(container: Container, spool: Path) -> None:
    pipe = Pipe()
    with pytest.raises(ZeroDivisionError), VideoEncoder(pipe, VideoFormat(container), 8, 180, 320) as encoder:  # noqa: PT012
        encoder.add(natural())
        assert list(spool.iterdir()) != []
        raise ZeroDivisionError
    assert (pipe.data, list(spool.iterdir())) == (b"", [])
    encode_video(natural()[:2], 8, VideoFormat(container))
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_path_is_written_in_place_and_an_error_removes_it(container: Container, tmp_path: Path, spool: Path) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "video"
    with VideoEncoder(path, VideoFormat(container), 8, 180, 320) as encoder:
        encoder.add(natural())
        assert [found.name for found in spool.iterdir()] == ["out"]
    assert path.read_bytes() == encode_video(natural(), 8, VideoFormat(container))
    with pytest.raises(ZeroDivisionError), VideoEncoder(path, VideoFormat(container), 8, 180, 320) as encoder:  # noqa: PT012
        encoder.add(natural())
        raise ZeroDivisionError
    assert not path.exists()
    with pytest.raises(ValueError, match="goes to a sink"):
        VideoEncoder(path, VideoFormat(), 8, 180, 320, fragmented=True)


def test_an_error_inside_leaves_a_fragmented_mp4_without_its_end() -> None:
    pipe = Pipe()
    with pytest.raises(ZeroDivisionError), VideoEncoder(pipe, VideoFormat(), 8, 180, 320, fragmented=True) as encoder:  # noqa: PT012
        encoder.add(natural())
        raise ZeroDivisionError
    assert boxes(pipe.data)[-1] == "mdat"
    assert len(by_av(pipe.data)[0]) == 24


@pytest.mark.parametrize("most_writes", [0, 1, 5, 20])
def test_a_sink_that_fails_is_what_is_told(most_writes: int) -> None:
    pipe = Pipe(most_writes)
    with (
        pytest.raises(BrokenPipeError, match="other end"),
        VideoEncoder(pipe, VideoFormat(), 8, 180, 320, fragmented=True) as encoder,
    ):
        encoder.add(natural())
    assert "mfra" not in boxes(pipe.data)
    with pytest.raises(ValueError, match="closed"):
        encoder.add(natural())


def test_a_closed_video_stays_closed() -> None:
    pipe = Pipe()
    encoder = VideoEncoder(pipe, VideoFormat(), 8, 180, 320)
    encoder.add(natural()[:2])
    encoder.close()
    size = len(pipe.data)
    encoder.close()
    encoder.abort()
    assert len(pipe.data) == size
    with pytest.raises(ValueError, match="closed"):
        encoder.add(natural()[:1])


@pytest.mark.parametrize("fragmented", [False, True])
def test_a_video_without_frames_is_refused(fragmented: bool, spool: Path) -> None:
    pipe = Pipe()
    with (
        pytest.raises(ValueError, match="without frames"),
        VideoEncoder(pipe, VideoFormat(), 8, 16, 16, fragmented=fragmented),
    ):
        pass
    with pytest.raises(ValueError, match="without frames"):
        encode_video([], 8)
    assert list(spool.iterdir()) == []
    assert "mfra" not in boxes(pipe.data)


@pytest.mark.parametrize(
    "frames", [noise((2, 16, 18)), noise((2, 16, 16)).astype(np.float32), noise((2, 16, 16))[..., :1], noise((2, 16, 16))[0]]
)
def test_frames_of_another_kind_are_refused_and_the_video_goes_on(frames: Any) -> None:
    sink = io.BytesIO()
    with VideoEncoder(sink, VideoFormat(), 8, 16, 16) as encoder:
        encoder.add(noise((2, 16, 16)))
        with pytest.raises(ValueError, match=r"expected uint8 \[t, 16, 16, 3\]"):
            encoder.add(frames)
        encoder.add(noise((1, 16, 16)))
    assert len(by_av(sink.getvalue())[0]) == 3


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001, Fraction(0)])
def test_a_rate_that_no_player_shows_is_refused(fps: Any) -> None:
    with pytest.raises(ValueError, match="frames a second"):
        encode_video(noise((1, 16, 16)), fps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("avi",), "'avi': expected mp4, mkv, png, webp"), (("mp4", 0), "exact pixels use container mkv"), (("mp4", 52), "crf 52")],
)
def test_a_format_that_is_not_there_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoFormat(*arguments)


@pytest.mark.parametrize("container", ["mkv", "png", "webp"])
def test_only_mp4_is_fragmented(container: Container) -> None:
    with pytest.raises(ValueError, match=f"{container} cannot be fragmented"):
        VideoEncoder(io.BytesIO(), VideoFormat(container), 8, 16, 16, fragmented=True)


def test_formats_name_their_files() -> None:
    formats = [VideoFormat(container) for container in CONTAINERS]
    assert [format.suffix for format in formats] == [".mp4", ".mkv", ".zip", ".webp"]
    assert [format.media_type for format in formats] == ["video/mp4", "video/x-matroska", "application/zip", "image/webp"]


def test_chunks_are_taken_one_at_a_time() -> None:
    ahead = 0

    def chunks() -> Iterator[Frames]:
        nonlocal ahead
        for _ in range(4):
            ahead += 1
            yield noise((2, 16, 16))
            ahead -= 1
            assert ahead == 0

    assert len(by_av(encode_video(chunks(), 8))[0]) == 8


@pytest.mark.parametrize("shape", [(5, 33, 47), (1, 16, 16)])
def test_png_is_exact_and_numbered_from_zero(shape: tuple[int, int, int]) -> None:
    frames = noise(shape)
    data = encode_video([frames[:1], frames[1:]], 8, VideoFormat("png"))
    np.testing.assert_array_equal(by_zip(data), frames)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == [f"{index:05}.png" for index in range(shape[0])]
