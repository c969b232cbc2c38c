"""Manifests: tables that list what to label, a row per item, with labels and metadata.

JSON Lines, CSV (also tab-separated) and Parquet are read as streams. A line that cannot be read is
a failure that names the file and the line, and the next line is read. Lines, CSV records and names
have bounds, so that memory does not depend on the file.

The tables that Earmark writes (``clips``, ``errors``) are manifests too: their ``truth`` and
``metadata`` are kept as they are, and the columns that Earmark computed are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TextIO

from transforms.errors import ContainerError, InputError, ReadError
from transforms.records import Failure, Item
from transforms.sources.clip_ids import (
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.sources.fetching import ReadLimits
from transforms.sources.file_kinds import MANIFEST_EXTENSIONS, extension, is_tar_name
from transforms.sources.parquet import (
    URI_COLUMNS,
    UnreadableValue,
    open_parquet,
    resolve,
    rows_of,
)
from transforms.storage import filesystem, reading, urls
from transforms.storage.secrets import public_text, public_uri

_MAX_LINE_CHARS = 16 << 20  # parsed, JSON takes up to 25 times as much memory
_MAX_RECORD_LINES = 1000
_MAX_NAME_CHARS = 32_768  # a signed URL has a few thousand
_MAX_SHOWN_CHARS = 200
_MAX_SECONDS = 1e12


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A valid row of a manifest; ``item`` is without size and version.

    ``own_name`` is the clip id unless the manifest gives one: equal for two rows that name the same
    thing. ``where`` is the manifest and the line or row, for messages. ``path`` is the file as the
    manifest names it, which may carry a signature; empty in the tables of a result.
    """

    item: Item
    own_name: str
    where: str
    path: str = field(default="", repr=False)

    def with_truth_of(self, other: ManifestRow) -> ManifestRow:
        """Return the row with another row's labels appended, each once."""
        if other.item.truth is None:
            return self
        truth = tuple(dict.fromkeys((*(self.item.truth or ()), *other.item.truth)))
        return dataclasses.replace(self, item=dataclasses.replace(self.item, truth=truth))


@dataclass(frozen=True, slots=True)
class ContainerRow:
    """A row of an errors table for a container that could not be read to its end.

    ``url`` may carry a signature, so it is never written or printed. ``failure`` is the row to
    write if the container is not one that can be read.
    """

    url: str
    failure: Failure


def read_manifest(
    url: str, max_page_bytes: int = ReadLimits().max_page_bytes
) -> Iterator[ManifestRow | ContainerRow | Failure]:
    """Yield the rows of a manifest, in order.

    ``max_page_bytes`` bounds a decompressed page of Parquet. Raises ``InputError`` if the manifest
    cannot be opened, or has no column that names files.
    """
    ending = extension(urls.file_name(url))
    read = _READERS.get(ending)
    uri = public_uri(url)
    if read is None:
        endings = ", ".join(sorted(_READERS))
        raise InputError(f"{uri}: a manifest ends in one of {endings}")
    try:
        for line, values in read(url, uri, max_page_bytes):
            if isinstance(values, ReadError):
                yield _line_failure(url, line, values)
            else:
                yield _read_row(url, line, values)
    except (OSError, ContainerError) as error:
        item = Item(clip_id=make_clip_id(printable(uri)), uri=printable(uri), url=url)
        yield read_failure(item, error, is_container=True)


# A line's name, and its values or its error.
_Lines = Iterator[tuple[str, Mapping[str, Any] | ReadError]]


def _read_jsonl(url: str, uri: str, max_page_bytes: int) -> _Lines:
    with _open_text(url, uri, newline="\n") as text:
        for number, line in enumerate(_lines(text), 1):
            name = f"line {number}"
            if isinstance(line, ReadError):
                yield name, line
                continue
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield name, ReadError(f"is not JSON: {error}")
                continue
            if isinstance(values, dict):
                yield name, values
            else:
                kind = type(values).__name__
                yield name, ReadError(f"is a JSON {kind}; expected an object")


@contextmanager
def _open_text(url: str, uri: str, newline: str) -> Iterator[TextIO]:
    with (
        reading.open_read(url) as file,
        io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=newline) as text,
    ):
        _check_encoding(file, uri)
        yield text


def _check_encoding(file: BinaryIO, uri: str) -> None:
    """Refuse UTF-16 and UTF-32, which have zero bytes where UTF-8 never has."""
    start: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise InputError(
            f"{printable(uri)} is not UTF-8 but probably UTF-16; convert it: "
            "iconv -f UTF-16 -t UTF-8"
        )


def _lines(text: TextIO) -> Iterator[str | ReadError]:
    """Yield the lines of a file; an error in place of each that is too long."""
    while line := text.readline(_MAX_LINE_CHARS):
        if len(line) < _MAX_LINE_CHARS or line.endswith(("\n", "\r")):
            yield line
            continue
        while (rest := text.readline(_MAX_LINE_CHARS)) and not rest.endswith(("\n", "\r")):
            pass
        yield ReadError(f"is longer than {_MAX_LINE_CHARS} characters")


class _CsvLines(Iterator[str]):
    """The lines of a CSV file for ``csv.reader``, with a bound for a record."""

    def __init__(self, text: TextIO) -> None:
        self._lines = _lines(text)
        self._again: deque[str | ReadError] = deque()
        self.number = 0  # of the last line, from 1
        self.record: list[str] = []

    def __next__(self) -> str:
        if len(self.record) >= _MAX_RECORD_LINES:
            raise ReadError(_UNCLOSED)
        if sum(map(len, self.record)) > _MAX_LINE_CHARS:
            raise ReadError(f"is not CSV: a record of more than {_MAX_LINE_CHARS} characters")
        line = self._again.popleft() if self._again else next(self._lines)
        if isinstance(line, ReadError):
            if self.record:  # an error of its own line
                self._again.appendleft(line)
                raise ReadError(_UNCLOSED)
            self.number += 1
            raise line
        self.number += 1
        self.record.append(line)
        return line

    def restart_after_first(self) -> None:
        """Give all but the first line of the record again, as records of their own."""
        rest = self.record[1:]
        self._again.extendleft(reversed(rest))
        self.number -= len(rest)


_UNCLOSED = f"is not CSV: a quote is not closed, or not within {_MAX_RECORD_LINES} lines"
_csv_limit_lock = threading.Lock()


@contextmanager
def _large_csv_fields() -> Iterator[None]:
    """Let ``csv`` parse long fields; its limit is one for the whole process."""
    with _csv_limit_lock:
        limit = csv.field_size_limit(_MAX_LINE_CHARS)
        try:
            yield
        finally:
            csv.field_size_limit(limit)


def _next_record(reader: Iterator[list[str]], lines: _CsvLines, delimiter: str) -> list[str] | None:
    """Return the next record, or None at the end; raise ``ReadError`` if it is not CSV."""
    lines.record.clear()
    try:
        with _large_csv_fields():
            fields = next(reader, None)
            if len(lines.record) > 1:
                # ``csv`` accepts a record that ends inside quotes: only there, one more line is
                # not one more record.
                records = csv.reader([*lines.record, "."], delimiter=delimiter)
                if len(list(records)) == 1:
                    raise ReadError(_UNCLOSED)
    except csv.Error as error:
        raise ReadError(f"is not CSV: {error}") from error
    return fields


def _read_csv(url: str, uri: str, max_page_bytes: int) -> _Lines:
    delimiter = "\t" if extension(urls.file_name(url)) == ".tsv" else ","
    with _open_text(url, uri, newline="") as text:
        lines = _CsvLines(text)
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            header = [name.strip() for name in _next_record(reader, lines, delimiter) or ()]
        except ReadError as error:
            raise InputError(f"{printable(uri)}: its first line {error}") from error
        if not header:
            return
        if not set(header) & set(URI_COLUMNS):
            raise _no_uri_column(uri, header)
        while True:
            line = f"line {lines.number + 1}"
            try:
                fields = _next_record(reader, lines, delimiter)
            except ReadError as error:
                lines.restart_after_first()
                yield line, error
                continue
            if fields is None:
                return
            if len(fields) > len(header):
                message = f"has {len(fields)} fields, the header {len(header)}; quote the commas"
                yield line, ReadError(message)
            elif fields:
                values = zip(header, fields, strict=False)
                yield line, {name: value or None for name, value in values}


def _read_parquet(url: str, uri: str, max_page_bytes: int) -> _Lines:
    with open_parquet(url, uri) as opened:
        names = list(opened.names)
        if not set(names) & set(URI_COLUMNS):
            raise _no_uri_column(uri, names)
        opened.check_num_rows()
        # Of a table of ours, only the columns used: most of its bytes are embeddings.
        columns = (
            [name for name in names if name in _COLUMNS_OF_OURS] if _is_ours(set(names)) else None
        )
        row = 0
        try:
            for number in range(len(opened.num_rows)):
                for batch in opened.batches(number, max_page_bytes, columns):
                    for values in rows_of(batch):
                        yield f"row {row}", values
                        row += 1
        except ContainerError as error:
            raise ContainerError(f"{uri}: cannot be read past row {row}: {error}") from error


def _no_uri_column(uri: str, columns: list[str]) -> InputError:
    return InputError(
        f"{uri}: no column names the files; expected one of {', '.join(URI_COLUMNS)}, found "
        f"{', '.join(columns[:20]) or 'none'}"
    )


_READERS: dict[str, Callable[[str, str, int], _Lines]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


# --- Rows ----------------------------------------------------------------------------------

# Columns that identify the tables that Earmark writes, in whatever format.
_ERRORS_TABLE = frozenset({"clip_id", "uri", "stage", "error_type", "message"})
_CLIPS_TABLE = frozenset({"clip_id", "uri", "num_windows", "content_sha256"})
_USED_OF_OURS = frozenset({"member", "row", "start_s", "end_s", "truth", "metadata"})
_COLUMNS_OF_OURS = _ERRORS_TABLE | _CLIPS_TABLE | _USED_OF_OURS


def _is_ours(columns: Set[str]) -> bool:
    return columns >= _ERRORS_TABLE or columns >= _CLIPS_TABLE


def _line_failure(url: str, line: str, error: ReadError) -> Failure:
    uri = _shown_uri(url)
    clip_id = make_clip_id(uri, line.replace(" ", "="))
    item = Item(clip_id=clip_id, uri=uri, url=url)
    return read_failure(item, ReadError(f"{line} of {uri} {error}"))


class _WholeContainerError(ReadError):
    def __init__(self, target: str) -> None:
        super().__init__(
            f"names the container {public_uri(target)} as a whole; name a member (tar) or "
            "row (Parquet), or give the container itself as an input"
        )
        self.target = target


def _read_row(
    url: str, line: str, values: Mapping[str, Any]
) -> ManifestRow | ContainerRow | Failure:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return _make_row(url, line, given, _is_ours(values.keys()))
    except _WholeContainerError as error:
        failure = _line_failure(url, line, error)
        # An errors table has such a row for a container that could not be read to its end.
        is_of_errors = values.keys() >= _ERRORS_TABLE
        return ContainerRow(error.target, failure) if is_of_errors else failure
    except ReadError as error:
        return _line_failure(url, line, error)
    except RecursionError:
        return _line_failure(url, line, ReadError("is nested too deeply"))


def _make_row(url: str, line: str, values: dict[str, Any], is_ours: bool) -> ManifestRow:
    column = next((name for name in URI_COLUMNS if values.get(name) not in (None, "")), None)
    if column is None:
        raise ReadError(f"names no file; expected one of {', '.join(URI_COLUMNS)}")
    path = values.pop(column)
    target = _target(url, column, path)
    uri = public_uri(target)
    member, row = _text(values, "member"), _row_number(values)
    _check_kind(target, uri, member, row)
    start_s, end_s = _segment(values)
    own_id = public_text(_text(values, "clip_id") or "")
    name = make_clip_id(uri, member, row=row, start_s=start_s, end_s=end_s)
    if is_ours:
        truth = make_truth(values.get("truth"))
        metadata = values.get("metadata")
        if metadata is not None and not isinstance(metadata, str):
            metadata = make_metadata(metadata if isinstance(metadata, dict) else values)
    else:
        truth = make_truth(values.pop("labels", None), values.pop("label", None))
        metadata = make_metadata(values)
    item = Item(
        clip_id=own_id or name,
        uri=printable(uri),
        url=target,
        member=member,
        row=row,
        start_s=start_s,
        end_s=end_s,
        truth=truth,
        metadata=metadata,
    )
    if own_id and (occurrence := occurrence_of(item)) > 1:
        name = make_clip_id(uri, member, occurrence, row=row, start_s=start_s, end_s=end_s)
    return ManifestRow(item, name, f"{line} of {_shown_uri(url)}", "" if is_ours else path)


@functools.lru_cache(maxsize=64)  # called for every row of a manifest
def _shown_uri(url: str) -> str:
    return printable(public_uri(url))


def _shown(value: object) -> str:
    if isinstance(value, str | bytes):
        value = value[: _MAX_SHOWN_CHARS + 1]
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _target(url: str, column: str, path: object) -> str:
    if not isinstance(path, str) or isinstance(path, UnreadableValue):
        raise ReadError(f"has {column} = {_shown(path)}; expected text")
    _check_length(column, path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ReadError(f"has {column} = {_shown(path)}, which cannot be a name: {error}") from None
    if "\0" in path:
        raise ReadError(
            f"has {column} = {_shown(path)}, which cannot be a name: it holds a zero byte"
        )
    target = resolve(url, path)
    if not filesystem.is_known(target):
        raise ReadError(f"names {public_uri(target)}, whose protocol is not known")
    return target


def _check_length(column: str, text: str) -> None:
    if len(text) > _MAX_NAME_CHARS:
        raise ReadError(
            f"has {column} = {_shown(text)}, of {len(text)} characters; at most "
            f"{_MAX_NAME_CHARS} are read"
        )


def _check_kind(target: str, uri: str, member: str | None, row: int | None) -> None:
    name = urls.file_name(uri)
    is_tar, is_parquet = is_tar_name(name), extension(name) == ".parquet"
    if member is not None and row is not None:
        raise ReadError("has both a member and a row; a tar has members, a Parquet file rows")
    if member is not None and is_parquet:
        raise ReadError(f"names a member of {uri}, which has rows; give row instead")
    if row is not None and is_tar:
        raise ReadError(f"names a row of {uri}, which has members; give member instead")
    if (is_tar and member is None) or (is_parquet and row is None):
        raise _WholeContainerError(target)
    if extension(name) in MANIFEST_EXTENSIONS:
        raise ReadError(f"names {uri}, a manifest; give it as an input of its own")


def _segment(values: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return start and end in seconds, each None if not given.

    A ``duration`` without an ``offset`` is the file's length (NeMo writes it into every row), not
    a segment: it stays metadata.
    """
    start_s, end_s = _number(values, "start_s"), _number(values, "end_s")
    if start_s is None and end_s is None and "offset" in values:
        start_s, duration_s = _number(values, "offset"), _number(values, "duration")
        if duration_s is not None:
            end_s = (start_s or 0.0) + duration_s
    if start_s is not None and start_s < 0:
        raise ReadError(f"starts at {start_s} s; must be at least 0")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ReadError(f"ends at {end_s} s; must be after its start at {start_s or 0.0} s")
    return start_s, end_s


def _number(values: dict[str, Any], column: str) -> float | None:
    value = values.pop(column, None)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ReadError(f"has {column} = {_shown(value)}; expected a number of seconds") from None
    if math.isinf(number):
        raise ReadError(f"has {column} = {_shown(value)}; expected a finite number of seconds")
    if abs(number) > _MAX_SECONDS:
        raise ReadError(f"has {column} = {_shown(value)}; expected at most {_MAX_SECONDS:g} s")
    return None if math.isnan(number) else number  # pandas writes a missing value like that


def _row_number(values: dict[str, Any]) -> int | None:
    value = values.pop("row", None)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if math.isnan(number):
        return None
    if not 0 <= number < sys.maxsize or not number.is_integer():
        raise ReadError(f"has row = {_shown(value)}; expected a whole number from 0")
    return int(number)


def _text(values: dict[str, Any], column: str) -> str | None:
    value = values.pop(column, None)
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ReadError(f"has {column} = {_shown(value)}; expected text")
    _check_length(column, str(value))
    return printable(str(value))
