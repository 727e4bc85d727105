"""What lies where in a tar that nobody vouches for, from its headers alone.

The numbers of a header are claims: nothing is read or allocated beyond the real end of the tar, and no more than a
megabyte for a header's own extensions. A member that is no plain file with a plain name is refused by itself; where the
headers no longer add up, the rest of the tar is.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.types import TarMember

Read = Callable[[int, int], bytes]
"""Bytes of a file by offset and length, all of which exist."""

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_MOST_EXTENSION_BYTES = 1 << 20
_MOST_NAME_BYTES = 4096
_MOST_END_BYTES = 1 << 20
"""Writers fill the last record with zeros; more than this behind the end are other members, as of a tar appended to another."""
_MAX_SIZE = 1 << 62
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_REFUSED_KINDS = {
    tarfile.LNKTYPE: ("link", "is a hard link"),
    tarfile.SYMTYPE: ("link", "is a symbolic link"),
    tarfile.CHRTYPE: ("device", "is a character device"),
    tarfile.BLKTYPE: ("device", "is a block device"),
    tarfile.FIFOTYPE: ("device", "is a FIFO"),
    tarfile.GNUTYPE_SPARSE: ("sparse", "is a sparse file, whose bytes do not lie in the tar as they are"),
}
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)

REASONS = {
    "bad_header": "A header of the tar is damaged; what follows it cannot be found.",
    "bad_name": "The member's name is absolute, climbs out of the tar, or is not printable text.",
    "device": "The member is a device or a FIFO.",
    "link": "The member is a link.",
    "sparse": "The member is a sparse file.",
    "trailing_data": "The tar goes on after its end, as when one is appended to another.",
    "truncated": "The tar ends before its end mark, or in the middle of the member.",
    "unknown_kind": "The member is of a kind that is no file.",
}
"""Every reason for which a member, or the rest of a tar, is refused."""


@dataclass(frozen=True, slots=True)
class TarProblem:
    """A member that is refused, or a place from which on the tar cannot be read."""

    name: str
    """Of the member; empty for the tar from ``offset`` on."""
    offset: int
    """Of the header, from the start of the tar."""
    reason: str
    """One of ``REASONS``."""
    problem: str
    """What is the matter, to follow a name in a message."""


class _DamagedError(Exception):
    """The headers no longer add up."""


@dataclass(slots=True)
class _Extension:
    """What the headers before a member say about it."""

    name: str | None = None
    size_bytes: int | None = None
    is_sparse: bool = False

    def add_pax(self, body: bytes) -> None:
        for key, value in _pax_records(body):
            if key == b"path":
                self.name = _text(value)
            elif key == b"size":
                if not value.isdigit() or len(value) > 19 or int(value) > _MAX_SIZE:
                    raise _DamagedError(f"a pax header gives the size {value[:40]!r}")
                self.size_bytes = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.is_sparse = True


def read_members(read: Read, tar_bytes: int) -> Iterator[TarMember | TarProblem]:
    """The plain files of a tar in order, and what is refused of it; folders are passed over.

    Args:
        read: reads of the tar.
        tar_bytes: its real size.
    """
    walk = _Walk(read, tar_bytes)
    try:
        yield from walk.run()
    except _DamagedError as error:
        yield TarProblem("", walk.header, "bad_header", f"{error}; what follows is not read")


@dataclass(slots=True)
class _Walk:
    read: Read
    tar_bytes: int
    header: int = 0
    """Offset of the header at hand."""
    _extension: _Extension = field(default_factory=_Extension)

    def run(self) -> Iterator[TarMember | TarProblem]:
        while self.header + BLOCK_BYTES <= self.tar_bytes:
            block = self.read(self.header, BLOCK_BYTES)
            if block == _ZEROS:
                yield from self._rest()
                return
            info = self._parse(block)
            data = self.header + BLOCK_BYTES
            if info.type in (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                if data + info.size > self.tar_bytes:
                    break
                self._extend(info, data)
                self.header = data + _padded(info.size)
                continue
            if info.type == tarfile.GNUTYPE_SPARSE:
                data = self._after_sparse_map(block, data)
            extension, self._extension = self._extension, _Extension()
            size_bytes = _agreed_size(info, extension)
            name = _plain(extension.name if extension.name is not None else info.name)
            end = data if info.type in _WITHOUT_DATA else data + size_bytes
            if end > self.tar_bytes:
                problem = f"needs {end - self.tar_bytes} bytes more than the tar has"
                yield TarProblem(_shown(name), self.header, "truncated", problem)
                return
            if info.type != tarfile.DIRTYPE:
                yield _judge(name, info.type, extension.is_sparse, self.header, data, size_bytes)
            self.header = _padded(end)
        yield TarProblem("", min(self.header, self.tar_bytes), "truncated", f"the tar of {self.tar_bytes} bytes has no end mark")

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        if self.header == 0 and block.startswith(b"\x1f\x8b"):
            raise _DamagedError("is compressed; unpack it: no member of a compressed tar can be read alone")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:
            raise _DamagedError(f"is no tar header ({error})") from error
        if not 0 <= info.size <= _MAX_SIZE:
            raise _DamagedError(f"claims a size of {info.size}")
        return info

    def _extend(self, info: tarfile.TarInfo, data: int) -> None:
        """Take in a header that is about the next member."""
        if info.size > _MOST_EXTENSION_BYTES:
            raise _DamagedError(f"an extended header claims {info.size} bytes")
        body = self.read(data, info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self._extension.name = _text(body.partition(b"\0")[0])
        elif info.type in _PAX:
            self._extension.add_pax(body)
        elif info.type == tarfile.XGLTYPE:
            everywhere = _Extension()
            everywhere.add_pax(body)
            if everywhere != _Extension():
                raise _DamagedError("a global header sets names or sizes of members")

    def _after_sparse_map(self, block: bytes, data: int) -> int:
        """Where the data of an old GNU sparse file begins: behind the blocks that continue its map."""
        goes_on, start = block[482], data
        while goes_on and data + BLOCK_BYTES <= self.tar_bytes:
            if data - start >= _MOST_EXTENSION_BYTES:
                raise _DamagedError(f"the map of a sparse file takes more than {_MOST_EXTENSION_BYTES} bytes")
            goes_on = self.read(data, BLOCK_BYTES)[504]
            data += BLOCK_BYTES
        return data

    def _rest(self) -> Iterator[TarProblem]:
        rest = self.tar_bytes - self.header
        if rest > _MOST_END_BYTES:
            yield TarProblem("", self.header, "trailing_data", f"{rest} bytes follow the end mark and are not read")


def _agreed_size(info: tarfile.TarInfo, extension: _Extension) -> int:
    """The member's size. An extension may give one only where the header itself gives none."""
    if extension.size_bytes is None:
        return info.size
    if info.size not in (0, extension.size_bytes):
        raise _DamagedError(f"its size is {info.size} in the header and {extension.size_bytes} in the pax header before it")
    return extension.size_bytes


def _judge(name: str, kind: bytes, is_sparse: bool, header: int, data: int, size_bytes: int) -> TarMember | TarProblem:
    if kind in _REFUSED_KINDS or is_sparse:
        reason, problem = _REFUSED_KINDS[tarfile.GNUTYPE_SPARSE if is_sparse else kind]
        return TarProblem(_shown(name), header, reason, problem)
    if kind not in tarfile.REGULAR_TYPES:
        return TarProblem(_shown(name), header, "unknown_kind", f"is of the unknown kind {kind!r}")
    bad_name = _name_problem(name)
    if bad_name is not None:
        return TarProblem(_shown(name), header, "bad_name", bad_name)
    return TarMember(name=name, offset=data, size_bytes=size_bytes)


def _name_problem(name: str) -> str | None:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if not name or len(encoded) > _MOST_NAME_BYTES:
        return f"its name has {len(encoded)} bytes, expected 1 to {_MOST_NAME_BYTES}"
    if not name.isprintable():
        return "its name has characters that cannot be printed"
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the tar"
    return None


def _pax_records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """``LENGTH KEY=VALUE\\n`` again and again; the length counts the whole record."""
    position = 0
    while position < len(body) and body[position]:
        digits, space, _ = body[position : position + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        end = position + length
        if length < len(digits) + 4 or end > len(body) or body[end - 1 : end] != b"\n":
            raise _DamagedError("a pax header does not parse")
        key, equals, value = body[position + len(digits) + 1 : end - 1].partition(b"=")
        if not equals:
            raise _DamagedError("a pax header does not parse")
        yield key, value
        position = end


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _shown(name: str) -> str:
    """A name as a message and a table can hold it."""
    escaped = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in escaped)[:_MOST_NAME_BYTES]
