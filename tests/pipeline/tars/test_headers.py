"""What lies where in a tar, however odd the tar is."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tars.headers import REASONS, TarProblem, read_members
from pipeline.types import TarMember
from tests.pipeline.tars.making import make_tar

MOST_AT_ONCE = 1 << 20
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def walk(data: bytes) -> list[TarMember | TarProblem]:
    """All that is found, by reads that refuse what does not exist or is too much at once."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        assert length <= MOST_AT_ONCE
        return data[offset : offset + length]

    return list(read_members(read, len(data)))


def contents(data: bytes) -> dict[str, bytes]:
    members = walk(data)
    assert all(isinstance(member, TarMember) for member in members), members
    return {member.name: data[member.offset : member.end] for member in members if isinstance(member, TarMember)}


def refusals(data: bytes) -> list[tuple[str, str]]:
    return [(found.name, found.reason) for found in walk(data) if isinstance(found, TarProblem)]


def add(info: tarfile.TarInfo, data: bytes = b"", *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of one odd member and a plain one."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        after = tarfile.TarInfo("after.mp4")
        after.size = 5
        tar.addfile(after, io.BytesIO(b"after"))
    return sink.getvalue()


def odd(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@given(
    st.lists(st.tuples(st.text("abc é漢", min_size=1, max_size=150), st.binary(max_size=2000)), max_size=8),
    st.sampled_from(FORMATS[1:]),
)
def test_plain_files_are_found_as_tarfile_wrote_them(members: list[tuple[str, bytes]], format: int) -> None:
    assert [found for found in walk(make_tar(members, format=format)) if isinstance(found, TarProblem)] == []
    assert contents(make_tar(members, format=format)) == dict(members)


@pytest.mark.parametrize("format", FORMATS)
def test_folders_are_passed_over_and_a_leading_dot_means_nothing(format: int) -> None:
    folder = odd("./clips", type=tarfile.DIRTYPE)
    assert contents(add(folder, format=format)) == {"after.mp4": b"after"}
    assert contents(make_tar([("./clips/a.mp4", b"a")], format=format)) == {"clips/a.mp4": b"a"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (odd("a.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
        (odd("a.mp4", type=tarfile.LNKTYPE, linkname="after.mp4"), "link"),
        (odd("a.mp4", type=tarfile.FIFOTYPE), "device"),
        (odd("a.mp4", type=tarfile.CHRTYPE), "device"),
        (odd("a.mp4", type=tarfile.BLKTYPE), "device"),
        (odd("a.mp4", type=b"Z"), "unknown_kind"),
        (odd("/etc/a.mp4"), "bad_name"),
        (odd("x/../../a.mp4"), "bad_name"),
        (odd("a\nb.mp4"), "bad_name"),
        (odd("a\udcff.mp4"), "bad_name"),
        (odd(""), "bad_name"),
    ],
)
def test_what_is_no_plain_file_is_refused_alone(info: tarfile.TarInfo, reason: str, format: int) -> None:
    data = add(info, format=format)
    [(name, found)] = refusals(data)
    assert found == reason
    assert name.encode().decode() == name  # can be written down, whatever it was
    assert [member.name for member in walk(data) if isinstance(member, TarMember)] == ["after.mp4"]


def test_name_with_a_nul_in_a_pax_header_is_refused() -> None:
    assert refusals(add(odd("a.mp4", pax_headers={"path": "a\0b.mp4"}))) == [("a\\x00b.mp4", "bad_name")]


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99"},
        {"GNU.sparse.map": "0,5", "GNU.sparse.size": "5"},
    ],
)
def test_sparse_members_of_pax_are_refused(headers: dict[str, str]) -> None:
    assert refusals(add(odd("a.mp4", pax_headers=headers), b"bytes")) == [("a.mp4", "sparse")]


def test_old_gnu_sparse_member_is_refused_and_its_map_skipped() -> None:
    plain = make_tar([("a.mp4", b"12345"), ("after.mp4", b"after")], format=tarfile.GNU_FORMAT)
    header = bytearray(plain[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[482] = 1
    sum_header(header)
    more, last = bytearray(512), bytearray(512)
    more[504] = 1
    data = bytes(header + more + last) + plain[512:]
    assert refusals(data) == [("a.mp4", "sparse")]
    assert walk(data)[1] == TarMember(name="after.mp4", offset=512 * 5, size_bytes=5)


def test_map_of_a_sparse_member_that_never_ends_is_not_followed() -> None:
    header = bytearray(make_tar([("a.mp4", b"12345")], format=tarfile.GNU_FORMAT)[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[482] = 1
    sum_header(header)
    [problem] = walk(bytes(header) + b"\x01" * (4 << 20))
    assert isinstance(problem, TarProblem)
    assert problem.reason == "bad_header"
    assert "the map of a sparse file takes more than 1048576 bytes" in problem.problem


def sum_header(header: bytearray) -> None:
    """Make a header's checksum right."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def with_header(data: bytes, start: int, value: bytes) -> bytes:
    """A tar whose first header has other bytes at ``start``, and a checksum that is right."""
    header = bytearray(data[:512])
    header[start : start + len(value)] = value
    sum_header(header)
    return bytes(header) + data[512:]


def test_size_that_two_headers_tell_differently_ends_the_tar() -> None:
    data = add(odd("a.mp4", pax_headers={"size": "512"}), bytes(1000))
    [problem] = walk(data)
    assert isinstance(problem, TarProblem)
    assert (problem.name, problem.reason) == ("", "bad_header")
    assert "1000 in the header and 512 in the pax header" in problem.problem


def test_size_from_a_pax_header_counts_where_the_header_has_none() -> None:
    data = add(odd("a.mp4", pax_headers={"size": "1000"}), bytes(1000))
    start = data.index(b"a.mp4\0")
    header = bytearray(data[start : start + 512])
    header[124:136] = b"00000000000\0"
    sum_header(header)
    assert contents(data[:start] + bytes(header) + data[start + 512 :]) == {"a.mp4": bytes(1000), "after.mp4": b"after"}


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" * 8, b"\xff" * 12, b"00000009000 ", b"99999999999\0"],
    ids=["8 GB", "base 256", "negative", "no octal", "no octal at all"],
)
def test_claimed_size_is_never_believed(size: bytes) -> None:
    found = walk(with_header(make_tar([("a.mp4", b"12345"), ("b.mp4", b"b")]), 124, size))
    assert [type(problem) for problem in found] == [TarProblem]
    assert isinstance(found[0], TarProblem)
    assert found[0].reason in ("truncated", "bad_header")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize(("claim", "reason"), [(b"10000000000\0", "truncated"), (b"00010000000\0", "bad_header")])
def test_extended_header_that_claims_too_much_is_not_read(kind: bytes, claim: bytes, reason: str) -> None:
    data = with_header(with_header(make_tar([("a", b"x" * 2000)]), 124, claim), 156, kind)
    assert [found.reason for found in walk(data + bytes(4 << 20)) if isinstance(found, TarProblem)] == [reason]


def test_global_header_may_say_what_is_no_member_of_ours() -> None:
    for headers, expected in (({"comment": "made by git"}, []), ({"path": "all.mp4"}, [("", "bad_header")])):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            tar.addfile(tarfile.TarInfo("a.mp4"))
        assert refusals(sink.getvalue()) == expected


def test_truncated_tar_gives_what_is_whole_and_says_where_it_breaks_off() -> None:
    data = make_tar([("a.mp4", b"a" * 700), ("b.mp4", b"b" * 700)])
    whole = contents(data)
    for length in range(len(data)):
        found = walk(data[:length])
        members = {item.name: data[item.offset : item.end] for item in found if isinstance(item, TarMember)}
        assert members.items() <= whole.items()
        assert ("a.mp4" in members) == (length >= 512 + 700)
        assert ("b.mp4" in members) == (length >= 512 + 1024 + 512 + 700)
        problems = [item for item in found if isinstance(item, TarProblem)]
        if length < 512 * 6 + 512:
            assert [problem.reason for problem in problems] == ["truncated"]
            assert 0 <= problems[0].offset <= length
        else:
            assert problems == []


def test_second_tar_behind_the_first_is_not_lost_in_silence() -> None:
    first = make_tar([("a.mp4", b"a")])
    assert refusals(first + make_tar([("b.mp4", bytes(2 << 20))])) == [("", "trailing_data")]


def test_compressed_tar_says_that_it_is_compressed() -> None:
    [problem] = walk(b"\x1f\x8b" + bytes(2000))
    assert isinstance(problem, TarProblem)
    assert "is compressed; unpack it" in problem.problem


@given(st.binary(max_size=3000))
def test_no_bytes_are_too_odd(data: bytes) -> None:
    check_odd(data)


@settings(max_examples=300)
@given(data=st.data())
def test_no_mutated_tar_is_too_odd(data: st.DataObject, tar: bytes) -> None:
    mutated = bytearray(tar)
    for _ in range(data.draw(st.integers(0, 6))):
        block = data.draw(st.integers(0, len(mutated) // 512 - 1)) * 512
        at = block + data.draw(st.sampled_from([0, 100, 124, 125, 130, 148, 156, 157, 257, 345, 482, 504, 511]))
        mutated[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            header = mutated[block : block + 512]
            sum_header(header)
            mutated[block : block + 512] = header
    check_odd(bytes(mutated[: data.draw(st.integers(0, len(mutated)))]))


@pytest.fixture(scope="module")
def tar() -> bytes:
    """One of everything."""
    plain = make_tar([("a.mp4", b"a" * 600), ("a.txt", b"text")], format=tarfile.GNU_FORMAT)[:-10240]
    long = make_tar([("x" * 300 + ".mp4", b"b")], format=tarfile.GNU_FORMAT)
    pax = add(odd("é" * 200, pax_headers={"size": "3", "comment": "c", "GNU.sparse.map": "0,3"}), b"abc")
    return plain + long[: 512 * 4] + pax


def check_odd(data: bytes) -> None:
    """Every finding is inside the tar, has its reason, and can be written down; no two overlap."""
    end = 0
    for found in walk(data):
        if isinstance(found, TarProblem):
            assert found.reason in REASONS
            assert 0 <= found.offset <= len(data)
            assert (found.name + found.problem).encode()
        else:
            assert end <= found.offset <= found.end <= len(data)
            assert found.name.isprintable()
            end = found.end
