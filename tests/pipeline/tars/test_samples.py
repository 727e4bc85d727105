"""Samples of a tar: which member belongs to which video, and what becomes a column."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tars.headers import TarProblem
from pipeline.tars.samples import TarVideo, read_videos
from pipeline.tars.window import ReadAhead
from tests.pipeline.tars.making import make_samples, make_tar
from tests.pipeline.video_samples import write_video

EXTENSIONS = (".mp4", ".mkv")


def videos(*members: tuple[str, bytes]) -> list[TarVideo]:
    data = make_tar(members)
    found = list(read_videos(lambda offset, length: data[offset : offset + length], "t.tar", len(data), EXTENSIONS))
    assert not [problem for problem in found if isinstance(problem, TarProblem)]
    return [video for video in found if isinstance(video, TarVideo)]


def test_members_of_one_key_are_one_sample() -> None:
    a, b = videos(
        ("d/a.json", b'{"views": 3}'),
        ("d/a.mp4", b"video"),
        ("d/a.txt", b" a cat\n"),
        ("d/b.mp4", b"video"),
        ("d/b.cls", b"7"),
        ("d/b.en.txt", b"a dog"),
        ("d/b.CAPTION", b"ein Hund"),
        ("d/b.npy", b"\x93NUMPY"),
    )
    assert (a.member.name, a.columns, a.error) == ("d/a.mp4", {"views": 3, "caption": "a cat"}, None)
    assert (b.member.name, b.columns) == ("d/b.mp4", {"cls": "7", "en.txt": "a dog", "caption": "ein Hund"})


def test_key_ends_at_the_first_dot_of_the_base_name() -> None:
    found = videos(("v1.5/a.left.mp4", b"l"), ("v1.5/a.right.mp4", b"r"), ("v1.5/a.txt", b"both"), ("v1.6/a.mp4", b"other"))
    assert [(video.member.name, video.columns) for video in found] == [
        ("v1.5/a.left.mp4", {"caption": "both"}),
        ("v1.5/a.right.mp4", {"caption": "both"}),
        ("v1.6/a.mp4", {}),
    ]


def test_caption_of_the_json_wins_over_the_text_whatever_comes_first() -> None:
    for order in ((0, 1, 2), (2, 1, 0)):
        members = [("a.json", b'{"caption": "from json"}'), ("a.mp4", b"v"), ("a.txt", b"from text")]
        [video] = videos(*(members[index] for index in order))
        assert video.columns == {"caption": "from json"}


def test_only_neighbours_are_a_sample() -> None:
    found = videos(("a.txt", b"first"), ("b.mp4", b"v"), ("a.mp4", b"v"))
    assert [(video.member.name, video.columns) for video in found] == [("b.mp4", {}), ("a.mp4", {})]


def test_hidden_files_and_files_without_extension_are_left_alone() -> None:
    assert [video.member.name for video in videos(("._a.mp4", b"v"), ("README", b"r"), ("d.d/mp4", b"r"), ("a.mp4", b"v"))] == [
        "a.mp4"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "t.tar#a.json: cannot be read"),
        ("a.json", b"[1]", "holds list, expected an object"),
        ("a.txt", b"\xff", "utf-8"),
        ("a.txt", b"x" * (1 << 20), "expected 1048576 at most"),
    ],
)
def test_caption_that_cannot_be_used_is_the_error_of_its_sample_only(name: str, content: bytes, message: str) -> None:
    a, b = videos(("a.mp4", b"v"), (name, content), ("b.mp4", b"v"))
    assert a.error is not None
    assert (a.error.stage, a.error.reason) == ("probe", "bad_sidecar")
    assert message in a.error.detail
    assert b.error is None


def test_endless_sample_is_cut_in_pieces() -> None:
    assert len(videos(*((f"a.{number}.mp4", b"v") for number in range(200)))) == 200


@given(st.data())
def test_reading_ahead_gives_the_bytes_that_are_there(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=10_000))
    fetched: Counter[int] = Counter()

    def fetch(offset: int, length: int) -> bytes:
        assert 0 < length <= len(content) - offset
        fetched.update(range(offset, offset + length))
        return content[offset : offset + length]

    window = ReadAhead(fetch, len(content))
    position = 0
    while position < len(content):
        length = data.draw(st.integers(1, len(content) - position))
        assert window.read(position, length) == content[position : position + length]
        position += length + data.draw(st.integers(0, 3000))
    assert not fetched or max(fetched.values()) == 1  # no byte comes twice


def test_large_members_are_skipped(tmp_path: Path) -> None:
    """Of each sample come the headers and the captions, by about one request."""
    video = write_video(tmp_path / "a.mp4", size=(320, 192), options={"preset": "ultrafast", "qp": "0"}).read_bytes()
    data = make_tar(make_samples([video] * 40))
    requests: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        requests.append(length)
        return data[offset : offset + length]

    found = list(read_videos(ReadAhead(fetch, len(data)).read, "t.tar", len(data), EXTENSIONS))
    assert [video.columns["views"] for video in found if isinstance(video, TarVideo)] == [n * 37 for n in range(40)]
    assert len(requests) <= 50
    assert sum(requests) < 40 * 6000


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_very_many_small_members_in_a_row_take_few_requests(kind: bytes) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(2000):
            info = tarfile.TarInfo(f"{number:06d}.txt")
            info.type, info.size = kind, 100 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    data = sink.getvalue()
    requests: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        requests.append(length)
        return data[offset : offset + length]

    assert list(read_videos(ReadAhead(fetch, len(data)).read, "t.tar", len(data), EXTENSIONS)) == []
    assert len(requests) < 20
    assert sum(requests) <= len(data)


def test_one_long_stretch_does_not_make_the_next_reads_long() -> None:
    requests: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        requests.append(length)
        return bytes(length)

    window = ReadAhead(fetch, 1 << 30)
    for number in range(100):
        window.read(number << 20, 200_000 if number == 50 else 3000)
    assert sum(requests) < 200_000 + 99 * 3100


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("videos")
    videos = [write_video(folder / name, num_frames=5).read_bytes() for name in ("a.mp4", "b.mkv")]
    return make_tar([*make_samples(videos[:1]), *make_samples(videos[1:], first=1, suffix="mkv"), ("2.json", b'{"a": [1, {}]}')])


@given(data=st.data())
def test_no_mutated_tar_is_too_odd(data: st.DataObject, tar: bytes) -> None:
    mutated = bytearray(tar)
    for _ in range(data.draw(st.integers(0, 10))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(mutated[: data.draw(st.integers(0, len(mutated)))])

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(content)
        assert length <= 4 << 20
        return content[offset : offset + length]

    for found in read_videos(read, "t.tar", len(content), EXTENSIONS):
        assert isinstance(found, (TarVideo, TarProblem))
