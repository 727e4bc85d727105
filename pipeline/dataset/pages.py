"""Where the bytes of each tensor stand in a shard.

A data page of a PLAIN, uncompressed, not nullable column is its header and then, for every row, a 4-byte
length and the bytes. The offset index of the file says where pages start and, since Parquet 2.10, how many
bytes of data they hold; so a page of one row needs no further reading:

    | page header (20 to 40 bytes) | length | tensor |
    ^ offset                                         ^ offset + size
                                            <-------> from the offset index

The first page of every column is read to see that this holds; what a reader takes later is checked by its
hash. Pages of several rows (tensors below the writer's page size of 16 kB) are walked length by length.

Source: https://github.com/apache/parquet-format, parquet.thrift; field ids in comments are from there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.shard_file import ShardFile
from pipeline.dataset.thrift import Struct, read_struct
from pipeline.errors import DatasetError

_REQUIRED = 0  # FieldRepetitionType
_BYTE_ARRAY = 6  # Type
_PLAIN = 0  # Encoding
_UNCOMPRESSED = 0  # CompressionCodec
_DATA_PAGE = 0  # PageType
_HEADER_BYTES = 64  # more than a header without statistics takes
_LENGTH_BYTES = 4


class Extents(NamedTuple):
    """Byte ranges of one column's values, one a row of the file: absolute offset and length, ``int64 [N]``."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def locate_values(file: ShardFile, columns: list[str]) -> dict[str, Extents]:
    """The byte ranges of the values of blob columns.

    Columns whose layout has no such ranges (compressed, nullable, dictionary, no page index: another
    program's file) are left out; read those through row groups.

    Raises:
        DatasetError: the file is damaged: its page index and its pages contradict each other.
    """
    try:
        footer, _ = read_struct(file.footer)
        found = {}
        for name in columns:
            chunks = [_chunk(group, name) for group in footer[4]]  # FileMetaData.row_groups
            if _is_addressable(footer, chunks, name):
                found[name] = _locate_column(file, chunks)
        return found
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"{file.path}: damaged page index: {type(error).__name__}: {error}") from error


def _chunk(row_group: Struct, name: str) -> Struct:
    for chunk in row_group[1]:  # RowGroup.columns
        if chunk[3][3] == [name.encode()]:  # ColumnChunk.meta_data.path_in_schema
            return dict(chunk)
    raise KeyError(name)


def _is_addressable(footer: Struct, chunks: list[Struct], name: str) -> bool:
    element = {element[4]: element for element in footer[2]}[name.encode()]  # FileMetaData.schema, by name
    # SchemaElement.type, .repetition_type; ColumnChunk.offset_index_offset; ColumnMetaData.codec, .dictionary_page_offset
    return (
        element.get(1) == _BYTE_ARRAY
        and element[3] == _REQUIRED
        and all(4 in chunk and chunk[3][4] == _UNCOMPRESSED and 11 not in chunk[3] for chunk in chunks)
        and all(stats[2] == _PLAIN for chunk in chunks for stats in chunk[3].get(13, ()))  # .encoding_stats
    )


def _locate_column(file: ShardFile, chunks: list[Struct]) -> Extents:
    extents = [_locate_chunk(file, chunk, check_first=number == 0) for number, chunk in enumerate(chunks)]
    offsets = np.concatenate([np.empty(0, np.int64), *(offsets for offsets, _ in extents)])
    lengths = np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in extents)])
    return Extents(offsets, lengths)


def _locate_chunk(file: ShardFile, chunk: Struct, *, check_first: bool) -> Extents:
    index, _ = read_struct(file.read_at(chunk[4], chunk[5]))  # ColumnChunk.offset_index_offset, .offset_index_length
    pages: list[Struct] = index[1]  # OffsetIndex.page_locations: {1: offset, 2: size with header, 3: first row}
    num_rows: int = chunk[3][5]  # ColumnMetaData.num_values
    data_bytes: list[Any] = index.get(2) or [None] * len(pages)  # OffsetIndex.unencoded_byte_array_data_bytes
    first_rows = [page[3] for page in pages] + [num_rows]
    _check_contiguous(file, chunk[3], pages)
    ranges: list[tuple[int, int]] = []
    for number, page in enumerate(pages):
        offset, size = page[1], page[2]
        rows, length = first_rows[number + 1] - first_rows[number], data_bytes[number]
        if (number == 0 and check_first) or rows > 1 or length is None:
            ranges += _walk_page(file, offset, size, rows)
        else:
            if not 0 <= length < size - _LENGTH_BYTES:
                raise ValueError(f"page at {offset} of {size} bytes cannot hold {length} bytes of data")
            ranges.append((offset + size - length, length))
    if len(ranges) != num_rows:
        raise ValueError(f"{len(ranges)} values on the pages, but the chunk counts {num_rows}")
    table = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    return Extents(table[:, 0], table[:, 1])


def _check_contiguous(file: ShardFile, metadata: Struct, pages: list[Struct]) -> None:
    """The pages of a chunk fill it without gaps; whatever a damaged index says, no range leaves the file."""
    start: int = metadata[9]  # ColumnMetaData.data_page_offset
    end: int = start + metadata[7]  # .total_compressed_size
    position = start
    for page in pages:
        if page[1] != position or page[2] <= 0:
            raise ValueError(f"a page at {page[1]}, expected one at {position}")
        position += page[2]
    if position != end or start < 0 or end > file.size_bytes:
        raise ValueError(f"pages from {start} to {position}, but the chunk ends at {end} in a file of {file.size_bytes} bytes")


def _walk_page(file: ShardFile, offset: int, size: int, num_rows: int) -> list[tuple[int, int]]:
    """The byte ranges of a page's values, checked against its header and its end."""
    # A page of small rows is fetched whole; of one large row, only its head.
    window = file.read_at(offset, min(size, _HEADER_BYTES if num_rows == 1 else 64 << 10))
    header, position = read_struct(window)
    data = header[5]  # PageHeader.data_page_header
    facts = (header[1], header[2], header[3] + position, data[1], data[2])  # .type, sizes; .num_values, .encoding
    if facts != (_DATA_PAGE, size - position, size, num_rows, _PLAIN):
        raise ValueError(f"page at {offset} of {size} bytes and {num_rows} rows has another header: {facts}")
    ranges = []
    for _ in range(num_rows):
        field = window[position : position + _LENGTH_BYTES]
        if len(field) < _LENGTH_BYTES:
            field = file.read_at(offset + position, _LENGTH_BYTES)
        length = int.from_bytes(field, "little")
        ranges.append((offset + position + _LENGTH_BYTES, length))
        position += _LENGTH_BYTES + length
    if position != size:
        raise ValueError(f"values end at byte {position} of the page at {offset} of {size} bytes")
    return ranges
