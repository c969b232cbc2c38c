"""What reading a row group of a Parquet file takes, by the headers of its pages.

Parquet is read a page at a time, and a page is decompressed whole: a file of a few kilobytes may
hold pages of gigabytes. Only a page's own header tells its size; the footer gives sums, which may
be wrong. So the headers are read first, and a row group beyond the bound is refused before any of
it is decompressed.

The footer is parsed here for where the pages are: on a damaged one, pyarrow's
``RowGroupMetaData.column`` ends the process, as it does not catch what the C++ library throws.

Both are in Thrift's compact protocol, to which pyarrow gives no access. Only the fields that are
used are kept: other fields take time but no memory. Sources: parquet-format,
``src/main/thrift/parquet.thrift``; Thrift, ``doc/specs/thrift-compact-protocol.md``.
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
_MAX_CACHED_FOOTER_BYTES = 8 << 20
_TAIL_BYTES = 8  # the footer's length and the magic number
_NUMBER_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_LIST_VALUE_BYTES = 8  # at least that much memory for each value of a list

# Thrift's types.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

# The fields of a struct that are kept, by number, and those of the structs in them.
_Fields = Mapping[int, "_Fields"]
_VALUE: _Fields = {}
# FileMetaData, RowGroup, ColumnChunk and ColumnMetaData
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
_CODEC, _NUM_VALUES, _TOTAL_COMPRESSED, _DATA_OFFSET, _DICTIONARY_OFFSET = 4, 5, 7, 9, 11
_CHUNK = dict.fromkeys(
    (_CODEC, _NUM_VALUES, _TOTAL_COMPRESSED, _DATA_OFFSET, _DICTIONARY_OFFSET), _VALUE
)
_FOOTER: _Fields = {_ROW_GROUPS: {_COLUMNS: {_META_DATA: _CHUNK}}}
_NUM_CODECS = 8  # the enum CompressionCodec; pyarrow takes others for "not compressed"
# PageHeader
_TYPE, _UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8
_DICTIONARY_PAGE = 2
_COUNT: _Fields = {1: _VALUE}  # the number of values is field 1 of all three
_HEADER: _Fields = {
    **dict.fromkeys((_TYPE, _UNCOMPRESSED, _COMPRESSED), _VALUE),
    **dict.fromkeys((_DATA, _DICTIONARY, _DATA_V2), _COUNT),
}


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """A column of a row group, by the footer, which may be wrong; its bytes are [start, stop)."""

    codec: int
    num_values: int
    start: int
    stop: int


def read_chunks(stream: BinaryIO) -> tuple[tuple[ColumnChunk, ...], ...]:
    """Read the columns of each row group; raise ``ValueError`` if the footer is damaged."""
    end = stream.seek(0, 2)
    stream.seek(max(0, end - _TAIL_BYTES))
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, end - _TAIL_BYTES - length))
    data = stream.read(length)
    parse = _parse_footer if len(data) > _MAX_CACHED_FOOTER_BYTES else _parse_footer_once
    return parse(data)


def _parse_footer(data: bytes) -> tuple[tuple[ColumnChunk, ...], ...]:
    try:
        groups = _CompactReader(data).read_struct(_FOOTER).get(_ROW_GROUPS, ())
        return tuple(
            tuple(_chunk(column.get(_META_DATA, {})) for column in group.get(_COLUMNS, ()))
            for group in groups
        )
    except (IndexError, TypeError, AttributeError) as error:
        raise ValueError("the footer is damaged") from error


# Each unit of a file opens it again. The key is the footer, so a changed file is parsed again.
_parse_footer_once = lru_cache(maxsize=4)(_parse_footer)


def _chunk(fields: dict[int, Any]) -> ColumnChunk:
    start = _number(fields, _DATA_OFFSET)
    dictionary = _number(fields, _DICTIONARY_OFFSET)
    start = dictionary if 0 < dictionary < start else start
    return ColumnChunk(
        _number(fields, _CODEC),
        _number(fields, _NUM_VALUES),
        start,
        start + _number(fields, _TOTAL_COMPRESSED),
    )


@dataclass(frozen=True, slots=True)
class RowGroupCost:
    """What reading a row group takes.

    Attributes:
        largest_bytes: Largest page, or largest column of lists (a row of which may span many
            pages), decompressed.
        row_bytes: Size of a row, by the page with the largest rows of each column.
        entry_bytes: Size of a row that has the largest entry of each column's dictionary. It is an
            upper bound, because only the size of the whole dictionary is known.
    """

    largest_bytes: int
    row_bytes: int
    entry_bytes: int


def measure_row_group(
    stream: BinaryIO,
    schema: pq.ParquetSchema,
    num_rows: int,
    chunks: Mapping[int, ColumnChunk],
) -> RowGroupCost:
    """Read the headers of all pages of a row group; ``chunks`` are by their number in the schema.

    Raises ``ValueError`` if a header is damaged, or contradicts the footer.
    """
    largest = row_bytes = entry_bytes = 0
    for number, chunk in chunks.items():
        column = schema.column(number)
        if not 0 <= chunk.codec < _NUM_CODECS:
            raise ValueError(f"column {column.path} has the unknown codec {chunk.codec}")
        is_list = column.max_repetition_level > 0
        total = densest = found = entry = 0
        for size, num_values, is_dictionary in _pages(stream, chunk):
            found += 0 if is_dictionary else num_values
            taken = max(size, num_values * _LIST_VALUE_BYTES) if is_list else size
            total += taken
            largest = max(largest, taken)
            if is_dictionary:
                # A single entry may fill the dictionary, except for numbers.
                entry = max(entry, min(size, _NUMBER_BYTES.get(column.physical_type, size)))
            else:
                densest = max(densest, size // max(1, num_values))
        if is_list:
            largest, densest = max(largest, total), max(densest, total // max(1, num_rows))
        elif found > num_rows:
            raise ValueError(
                f"column {column.path} has {found} values in a row group of {num_rows} rows"
            )
        row_bytes += densest
        entry_bytes += entry
    return RowGroupCost(largest, row_bytes, entry_bytes)


def _pages(stream: BinaryIO, chunk: ColumnChunk) -> Iterator[tuple[int, int, bool]]:
    """Yield decompressed size, number of values and whether it is a dictionary, for each page."""
    position, remaining = chunk.start, chunk.num_values
    while remaining > 0 and position < chunk.stop:
        header, length = _read_header(stream, position)
        size, compressed = _number(header, _UNCOMPRESSED), _number(header, _COMPRESSED)
        is_dictionary = header.get(_TYPE) == _DICTIONARY_PAGE
        details = header.get(_DICTIONARY) or header.get(_DATA) or header.get(_DATA_V2)
        num_values = _number(details, 1) if isinstance(details, dict) else 0
        if min(size, compressed, num_values) < 0:
            raise ValueError(f"the page at byte {position} has no size")
        yield size, num_values, is_dictionary
        remaining -= 0 if is_dictionary else num_values
        position += length + compressed


def _number(fields: dict[int, Any], field: int) -> int:
    """Return a number; -1 if the field is missing or not a number."""
    value = fields.get(field)
    return value if isinstance(value, int) else -1


def _read_header(stream: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at ``position`` by number, and its length in bytes."""
    if not 0 <= position < 1 << 62:
        raise ValueError(f"a page would be at byte {position}")
    size = _FIRST_READ_BYTES
    while True:
        stream.seek(position)
        data = stream.read(size)
        try:
            header = _CompactReader(data)
            return header.read_struct(_HEADER), header.position
        except IndexError:  # longer than what was read
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise ValueError(f"the header of the page at byte {position} has no end") from None
            size *= 16


class _CompactReader:
    """Parses Thrift's compact protocol; raises IndexError if the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def read_struct(self, wanted: _Fields | None, depth: int = 0) -> dict[int, Any]:
        """Return the wanted values by field number: numbers, bytes, lists, structs."""
        if depth > _MAX_DEPTH:
            raise ValueError("the metadata of the pages is nested too deeply")
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
        """Parse a value; ``wanted`` is None where it is skipped."""
        if kind in (_TRUE, _FALSE, _BYTE):  # only in lists has a bool a byte of its own
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
            raise ValueError("the metadata of the pages is nested too deeply")
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
