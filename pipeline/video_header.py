"""The part of a video file that says what it is, found without reading the rest.

What is found is a small file of its own: FFmpeg opens it like the whole one, and finds no frames in it. Only containers
whose header holds size, rate and length are looked into, and of them only files whose picture is certainly upright; all
others have to be read whole. Pure: how bytes are read is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

_MOST_HEADER_BYTES = 4 << 20
_MOST_PARTS = 64
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_EBML, _SEGMENT, _CLUSTER, _TRACKS = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B
_PROJECTION = b"\x76\x70"
_CLUSTER_START_BYTES = 16

Read = Callable[[int, int], bytes]


def find_video_header(read: Read, size_bytes: int) -> bytes | None:
    """The header of an MP4, QuickTime, Matroska or WebM file; None if the whole file is needed.

    Args:
        read: reads of the video, never beyond its end.
        size_bytes: its size. No more than 4 MiB is read, and nothing twice.
    """
    if size_bytes < 16:
        return None
    start = read(0, 16)
    if start[4:8] in _FIRST_BOXES:
        return _find_moov(read, size_bytes)
    if start.startswith(_EBML.to_bytes(4, "big")):
        return _find_tracks(read, size_bytes)
    return None


def _find_moov(read: Read, size_bytes: int) -> bytes | None:
    position, kept = 0, b""
    for _ in range(_MOST_PARTS):
        if position + 16 > size_bytes:
            return None
        length, kind, long_length = struct.unpack(">I4sQ", read(position, 16))
        if length == 1:
            length = long_length
        if length < 8 or position + length > size_bytes:
            return None
        if kind in (b"ftyp", b"moov"):
            if len(kept) + length > _MOST_HEADER_BYTES:
                return None
            kept += read(position, length)
        if kind == b"moov":
            return kept if _is_plain(kept[-length:]) else None
        position += length
    return None


def _is_plain(moov: bytes) -> bool:
    """Whether the samples are listed here, not in fragments, and no track is turned or mirrored."""
    for kind, body in _boxes(moov[8:]):
        if kind in (b"mvex", b"cmov"):
            return False
        for inner, header in _boxes(body) if kind == b"trak" else ():
            matrix = 52 if header[:1] == b"\1" else 40
            if inner == b"tkhd" and header[matrix : matrix + len(_UPRIGHT)] != _UPRIGHT:
                return False
    return True


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length < 8:
            break
        found.append((kind, data[position + 8 : position + length]))
        position += length
    return found


def _find_tracks(read: Read, size_bytes: int) -> bytes | None:
    position, kept, has_tracks = 0, b"", False
    for _ in range(_MOST_PARTS):
        element, data, length = _element(read(position, max(0, min(12, size_bytes - position))))
        if element == _SEGMENT:
            kept += read(position, data)
            position += data
            continue
        if element == _CLUSTER and has_tracks:
            # The start of a cluster tells FFmpeg that the header is over.
            return kept + read(position, min(_CLUSTER_START_BYTES, size_bytes - position))
        end = position + data + length
        if not element or length < 0 or end > size_bytes or len(kept) + end - position > _MOST_HEADER_BYTES:
            return None
        part = read(position, end - position)
        if element == _TRACKS:
            if _PROJECTION in part:  # may turn the picture
                return None
            has_tracks = True
        kept += part
        position = end
    return None


def _element(head: bytes) -> tuple[int, int, int]:
    """An EBML element's id, where its data begins, and the length of the data; an id of 0 if that is none.

    The length is -1 where the writer did not know it.
    """
    widths = [9 - byte.bit_length() if byte else 0 for byte in head[:1]]
    if not widths or not 0 < widths[0] < 5 or len(head) <= widths[0]:
        return 0, 0, 0
    start = widths[0]
    width = 9 - head[start].bit_length() if head[start] else 0
    data = start + width
    if not width or len(head) < data:
        return 0, 0, 0
    most = (1 << 7 * width) - 1
    length = int.from_bytes(head[start:data], "big") & most
    return int.from_bytes(head[:start], "big"), data, -1 if length == most else length
