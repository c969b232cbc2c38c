"""What reading a row group of a Parquet file would take, from the headers of its pages.

Part of ``sources``. Parquet is read a page at a time, and a page is decompressed whole: a file of a
few kilobytes may hold pages of gigabytes. How large they are stands in the pages' own headers (the
footer only sums them up, and is believed by nobody). So the headers are read first, and a row
group beyond the bound is refused before any of its bytes is decompressed.

The footer is read here too: a damaged one makes pyarrow's ``RowGroupMetaData.column`` end the whole
process (it does not catch what the C++ library throws; opening and reading do).

All of it is in Thrift's compact protocol, which pyarrow does not give access to. Only the fields
that are used are kept: what a file adds to them takes time but no memory. Sources:
parquet-format, ``src/main/thrift/parquet.thrift``; Thrift,
``doc/specs/thrift-compact-protocol.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow.parquet as pq

_FIRST_READ_BYTES = 1 << 10  # most headers have fewer than 100 bytes
_MAX_HEADER_BYTES = 16 << 20  # Arrow's own bound
_MAX_DEPTH = 16
_MAX_KEPT_BYTES = 8 << 20
_TAIL_BYTES = 8  # the footer's length and the magic number
_NUMBER_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_LIST_VALUE_BYTES = 8  # at least that much memory for each value of a list

# Thrift's types.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Fields by number, of PageHeader ...
_TYPE, _UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8
_DICTIONARY_PAGE = 2
# ... and of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _NUM_ROWS, _META_DATA = 4, 1, 3, 3
_PATH, _CODEC, _NUM_VALUES, _TOTAL_UNCOMPRESSED, _TOTAL_COMPRESSED = 3, 4, 5, 6, 7
_DATA_OFFSET, _DICTIONARY_OFFSET = 9, 11
_NUM_CODECS = 8  # the enum CompressionCodec; pyarrow takes others for "not compressed"

# Which fields of a struct are kept, and which of the structs in those.
_Fields = Mapping[int, "_Fields"]
_VALUE: _Fields = {}
_CHUNK_SIZES = (_NUM_VALUES, _TOTAL_UNCOMPRESSED, _TOTAL_COMPRESSED)
_CHUNK = dict.fromkeys((_PATH, _CODEC, *_CHUNK_SIZES, _DATA_OFFSET, _DICTIONARY_OFFSET), _VALUE)
_FOOTER: _Fields = {_ROW_GROUPS: {_COLUMNS: {_META_DATA: _CHUNK}, _NUM_ROWS: _VALUE}}
_COUNT: _Fields = {1: _VALUE}  # the number of values comes first in all three
_HEADER: _Fields = {
    **dict.fromkeys((_TYPE, _UNCOMPRESSED, _COMPRESSED), _VALUE),
    **dict.fromkeys((_DATA, _DICTIONARY, _DATA_V2), _COUNT),
}


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """What the footer says of a column in a row group; it may be wrong.

    Attributes:
        name: The top-level column.
        codec: Number of what compresses it.
        num_values: Of the leaf column.
        uncompressed_bytes: Its pages' sizes, decompressed.
        start: Its first byte in the file.
        stop: One past its last.
    """

    name: str
    codec: int
    num_values: int
    uncompressed_bytes: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """What the footer says of a row group; it may be wrong.

    Attributes:
        num_rows: At least 0.
        chunks: One per leaf column.
    """

    num_rows: int
    chunks: tuple[ColumnChunk, ...]


def read_footer(stream: BinaryIO) -> tuple[RowGroup, ...]:
    """The row groups by a Parquet file's footer.

    Raises:
        ValueError: It cannot be read.
        OSError: The bytes cannot be had.
    """
    end = stream.seek(0, 2)
    stream.seek(max(0, end - _TAIL_BYTES))
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, end - _TAIL_BYTES - length))
    data = stream.read(length)
    return _parse_footer(data) if len(data) > _MAX_KEPT_BYTES else _parse_footer_once(data)


def _parse_footer(data: bytes) -> tuple[RowGroup, ...]:
    try:
        footer = _CompactReader(data).read_struct(_FOOTER)
        return tuple(_row_group(group) for group in footer.get(_ROW_GROUPS, ()))
    except (IndexError, TypeError, AttributeError) as error:
        raise ValueError("the footer is damaged") from error


# Each unit of a file opens it again. By its bytes, so that a file that changed is another.
_parse_footer_once = lru_cache(maxsize=4)(_parse_footer)


def _row_group(fields: dict[int, Any]) -> RowGroup:
    chunks = (column.get(_META_DATA, {}) for column in fields.get(_COLUMNS, ()))
    return RowGroup(max(0, _number(fields, _NUM_ROWS)), tuple(_chunk(chunk) for chunk in chunks))


def _chunk(fields: dict[int, Any]) -> ColumnChunk:
    path = fields.get(_PATH) or [b""]
    start = _number(fields, _DATA_OFFSET)
    dictionary = _number(fields, _DICTIONARY_OFFSET)
    start = dictionary if 0 < dictionary < start else start
    return ColumnChunk(
        path[0].decode("utf-8", "replace"),
        _number(fields, _CODEC),
        _number(fields, _NUM_VALUES),
        _number(fields, _TOTAL_UNCOMPRESSED),
        start,
        start + _number(fields, _TOTAL_COMPRESSED),
    )


@dataclass(frozen=True, slots=True)
class RowGroupCost:
    """What a row group takes.

    Attributes:
        largest_bytes: Of its largest page, or its largest column of lists (a row of it may go
            over many pages), decompressed.
        row_bytes: Of a row, by the page with the largest rows of each column.
        entry_bytes: Of a row that has the largest entry of each column's dictionary; no more than
            that, as only the dictionary's size is known.
    """

    largest_bytes: int
    row_bytes: int
    entry_bytes: int


def measure_row_group(
    stream: BinaryIO,
    schema: pq.ParquetSchema,
    group: RowGroup,
    columns: frozenset[str] | None = None,
) -> RowGroupCost:
    """Read the headers of all pages of a row group.

    Args:
        stream: The file's bytes.
        schema: Of the file.
        group: Of the file.
        columns: Top-level columns that will be read; None for all.

    Raises:
        ValueError: A header cannot be read, or holds other than what the footer says.
        OSError: The bytes cannot be had.
    """
    if len(group.chunks) != len(schema):
        raise ValueError(f"a row group has {len(group.chunks)} columns, the file {len(schema)}")
    largest = row_bytes = entry_bytes = 0
    for index, chunk in enumerate(group.chunks):
        if columns is not None and chunk.name not in columns:
            continue
        if not 0 <= chunk.codec < _NUM_CODECS:
            raise ValueError(f"column {chunk.name} has the unknown codec {chunk.codec}")
        column = schema.column(index)
        is_list = column.max_repetition_level > 0
        total = densest = found = entry = 0
        for size, num_values, is_dictionary in _pages(stream, chunk):
            found += 0 if is_dictionary else num_values
            taken = max(size, num_values * _LIST_VALUE_BYTES) if is_list else size
            total += taken
            largest = max(largest, taken)
            if is_dictionary:
                # One entry may be all of it, but for numbers.
                entry = max(entry, min(size, _NUMBER_BYTES.get(column.physical_type, size)))
            else:
                densest = max(densest, size // max(1, num_values))
        if is_list:
            largest, densest = max(largest, total), max(densest, total // max(1, group.num_rows))
        elif found > group.num_rows:
            raise ValueError(
                f"column {chunk.name} has {found} values in a row group of {group.num_rows} rows"
            )
        row_bytes += densest
        entry_bytes += entry
    return RowGroupCost(largest, row_bytes, entry_bytes)


def _pages(stream: BinaryIO, chunk: ColumnChunk) -> Iterator[tuple[int, int, bool]]:
    """Size decompressed, number of values, and whether it is a dictionary, of each page."""
    position, num_left = chunk.start, chunk.num_values
    while num_left > 0 and position < chunk.stop:
        header, length = _read_header(stream, position)
        size, compressed = _number(header, _UNCOMPRESSED), _number(header, _COMPRESSED)
        is_dictionary = header.get(_TYPE) == _DICTIONARY_PAGE
        details = header.get(_DICTIONARY) or header.get(_DATA) or header.get(_DATA_V2)
        num_values = _number(details, 1) if isinstance(details, dict) else 0
        if min(size, compressed, num_values) < 0:
            raise ValueError(f"the page at byte {position} has no size")
        yield size, num_values, is_dictionary
        num_left -= 0 if is_dictionary else num_values
        position += length + compressed


def _number(fields: dict[int, Any], field: int) -> int:
    """A field that must be a number; -1 where there is none."""
    value = fields.get(field)
    return value if isinstance(value, int) else -1


def _read_header(stream: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """The fields of the header at ``position``, by number, and its length in bytes."""
    if not 0 <= position < 1 << 62:
        raise ValueError(f"a page is said to lie at byte {position}")
    size = _FIRST_READ_BYTES
    while True:
        stream.seek(position)
        data = stream.read(size)
        try:
            header = _CompactReader(data)
            return header.read_struct(_HEADER), header.position
        except IndexError:  # more of it follows
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise ValueError(f"the header of the page at byte {position} has no end") from None
            size *= 16


class _CompactReader:
    """Reads values in Thrift's compact protocol; IndexError where the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def read_struct(self, wanted: _Fields | None, depth: int = 0) -> dict[int, Any]:
        """Values by field number: numbers, bytes, lists, structs.

        Args:
            wanted: The fields to keep; the others are passed over.
            depth: How many structs and lists this one lies in.
        """
        if depth > _MAX_DEPTH:
            raise ValueError("what describes the pages is nested too deeply")
        wanted = wanted or {}
        fields: dict[int, Any] = {}
        number = 0
        while first := self._byte():
            kind = first & 0x0F
            number = number + (first >> 4) if first >> 4 else self._zigzag()
            inner = wanted.get(number)
            value = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, inner, depth)
            if inner is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: _Fields | None, depth: int) -> Any:
        """A value; ``wanted`` is None where it is passed over."""
        if kind in (_TRUE, _FALSE, _BYTE):  # a bool has a byte of its own in lists alone
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            first = self._byte()
            count = first >> 4 if first >> 4 != 15 else self._varint()
            return self._values(count, (first & 0x0F,), wanted, depth)
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return self._values(count, (kinds >> 4, kinds & 0x0F), wanted, depth)
        if kind == _STRUCT:
            return self.read_struct(wanted, depth + 1)
        raise ValueError(f"the header of a page has a value of the unknown type {kind}")

    def _values(
        self, count: int, kinds: tuple[int, ...], wanted: _Fields | None, depth: int
    ) -> list[Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("what describes the pages is nested too deeply")
        values = (self._value(kind, wanted, depth + 1) for _ in range(count) for kind in kinds)
        return list(deque(values, maxlen=None if wanted is not None else 0))

    def _take(self, num_bytes: int) -> bytes:
        start = self.position
        self.position += num_bytes
        if self.position > len(self._data):
            raise IndexError
        return self._data[start : self.position]

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _varint(self) -> int:
        first = self._data[self.position]
        if first < 0x80:  # most are that small
            self.position += 1
            return first
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("the header of a page holds a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
