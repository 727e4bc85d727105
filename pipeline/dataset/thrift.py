"""Thrift's compact protocol, reading only: enough for a Parquet footer, page index and page header.

A struct becomes ``{field id: value}``; what the fields mean is the caller's knowledge. pyarrow parses the
same bytes but does not hand out the offsets of pages.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import struct
from typing import Any

Struct = dict[int, Any]

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def read_struct(data: bytes | memoryview, position: int = 0) -> tuple[Struct, int]:
    """The struct that starts at ``position``, and the position after it.

    Raises:
        ValueError: the bytes are no such struct, or end before it does.
    """
    reader = _Reader(data, position)
    try:
        return reader.struct(), reader.position
    except (IndexError, struct.error, RecursionError) as error:
        raise ValueError(f"no Thrift struct at byte {position} of {len(data)}: {type(error).__name__}") from error


class _Reader:
    def __init__(self, data: bytes | memoryview, position: int) -> None:
        self.data = data
        self.position = position

    def struct(self) -> Struct:
        fields: Struct = {}
        field = 0
        while header := self._byte():
            field = field + (header >> 4) if header >> 4 else self._zigzag()
            kind = header & 15
            # In a struct, a boolean is its own type code.
            fields[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BINARY:
            return bytes(self._take(self._varint()))
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            header = self._byte()
            length = header >> 4 if header >> 4 != 15 else self._varint()
            return [self._value(header & 15) for _ in range(length)]
        if kind == _BYTE:
            return self._byte()
        if kind in (_TRUE, _FALSE):
            return self._byte() == _TRUE
        if kind == _DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        raise ValueError(f"Thrift type {kind} at byte {self.position}")  # maps are not used in Parquet

    def _byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def _take(self, length: int) -> bytes | memoryview:
        self.position += length
        if self.position > len(self.data):
            raise IndexError(self.position)
        return self.data[self.position - length : self.position]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"number of more than 64 bits at byte {self.position}")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
