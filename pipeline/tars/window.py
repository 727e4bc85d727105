"""Reading the headers of a tar by few requests and few bytes.

Headers and captions stand in stretches, with video in between that is not wanted now. How long the next stretch is, nobody
knows; but in one tar they are much alike. So the first request into a stretch asks for as much as the last few
needed, but for the longest of them, and what is missing is asked for as it is found out: twice as much each time, so
that a stretch of very many small members takes few requests too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pipeline.tars.headers import BLOCK_BYTES, Read

_FIRST_BYTES = 2048
_REMEMBERED = 8
_MOST_AHEAD_BYTES = 256 << 10


@dataclass(slots=True)
class ReadAhead:
    """Forward reads of one file, each a little ahead. Holds no more than one request has brought."""

    fetch: Read
    size_bytes: int
    _data: bytes = b""
    _offset: int = 0
    _stretch_start: int = 0
    _stretch_end: int = 0
    _more: int = BLOCK_BYTES
    _needed: deque[int] = field(default_factory=lambda: deque([_FIRST_BYTES], maxlen=_REMEMBERED))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes that exist, by offset and length."""
        assert offset + length <= self.size_bytes, (offset, length, self.size_bytes)
        held_end = self._offset + len(self._data)
        # Padding, less than a block, is not asked for and does not end a stretch.
        if not self._data or not self._offset <= offset < held_end + BLOCK_BYTES:
            self._begin_stretch(offset, length)
        elif offset + length > held_end:
            start = max(offset, held_end)
            more = min(max(offset + length - start, self._more), self.size_bytes - start)
            self._more = min(2 * self._more, _MOST_AHEAD_BYTES)
            self._data = self._data[offset - self._offset :] + self.fetch(start, more)
            self._offset = offset
        self._stretch_end = max(self._stretch_end, offset + length)
        start = offset - self._offset
        return self._data[start : start + length]

    def _begin_stretch(self, offset: int, length: int) -> None:
        if self._stretch_end > self._stretch_start:
            self._needed.append(self._stretch_end - self._stretch_start)
        # The longest may be a stray: one long video among short ones.
        ahead = min(sorted(self._needed)[-2:][0], _MOST_AHEAD_BYTES)
        wanted = min(max(length, ahead), self.size_bytes - offset)
        self._data, self._offset = self.fetch(offset, wanted), offset
        self._stretch_start = self._stretch_end = offset
        self._more = BLOCK_BYTES
