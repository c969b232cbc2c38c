"""Manifests: tables that list what to label, a row per item, with labels and metadata.

Part of ``sources``. JSON Lines, CSV (tab-separated too) and Parquet are read as streams. A line
that cannot be read is a failure that names the file and the line; the run goes on. A line, a record
of CSV and a name have bounds, so that memory does not depend on what a file makes of itself.

The tables that Earmark writes (``clips``, ``errors``) are manifests: their ``truth`` and
``metadata`` come back as they are, and what Earmark found out is left aside.
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from transforms.errors import ContainerError, InputError, ReadError
from transforms.records import Failure, Item
from transforms.sources.clip_ids import (
    extension,
    is_tar_name,
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.sources.fetching import ReadLimits
from transforms.sources.parquet import (
    URI_COLUMNS,
    UnreadableValue,
    open_parquet,
    resolve,
    rows_of,
)
from transforms.storage import filesystem, reading, urls
from transforms.storage.secrets import public_text, public_uri

MANIFEST_EXTENSIONS = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv"})
_MAX_LINE_BYTES = 16 << 20  # parsed, JSON takes up to 25 times as much
_MAX_RECORD_LINES = 1000
_MAX_NAME_CHARS = 32_768  # a signed URL has a few thousand
_MAX_SHOWN_CHARS = 200
_MAX_SECONDS = 1e12


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A row of a manifest that can be used.

    Attributes:
        item: What it names; size and version are not known yet.
        own_name: What the clip id would be if the manifest gave none; tells whether two rows
            name the same thing.
        where: The manifest and the line or row, for messages.
    """

    item: Item
    own_name: str
    where: str

    def with_truth_of(self, other: ManifestRow) -> ManifestRow:
        """The same row, with another's labels after its own; each once."""
        if other.item.truth is None:
            return self
        truth = tuple(dict.fromkeys((*(self.item.truth or ()), *other.item.truth)))
        return dataclasses.replace(self, item=dataclasses.replace(self.item, truth=truth))


@dataclass(frozen=True, slots=True)
class ContainerRow:
    """A row of an errors table that names a container as a whole: it could not be read to its end.

    Attributes:
        url: The container; may carry a signature, so it is never written or printed.
        failure: The row to write where there is no such container to read after all.
    """

    url: str
    failure: Failure


def read_manifest(
    url: str, max_page_bytes: int = ReadLimits().max_page_bytes
) -> Iterator[ManifestRow | ContainerRow | Failure]:
    """The rows of a manifest, in order.

    Args:
        url: The manifest.
        max_page_bytes: Bytes of a page, decompressed, if it is a Parquet file.

    Raises:
        InputError: It cannot be opened, or has no column that names files.
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


# A line's name, and its values or what is wrong with it.
_Lines = Iterator[tuple[str, Mapping[str, Any] | ReadError]]


def _read_jsonl(url: str, uri: str, max_page_bytes: int) -> _Lines:
    with reading.open_read(url) as file:
        _check_encoding(file, uri)
        for number, line in _lines(file):
            name = f"line {number}"
            if isinstance(line, ReadError):
                yield name, line
                continue
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()
            if not text:
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield name, ReadError(f"is not JSON: {error}")
                continue
            if isinstance(values, dict):
                yield name, values
            else:
                kind = type(values).__name__
                yield name, ReadError(f"is a JSON {kind}; expected an object")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | ReadError]]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) < _MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield number, ReadError(f"is longer than {_MAX_LINE_BYTES} bytes")


def _check_encoding(file: BinaryIO, uri: str) -> None:
    """Refuse UTF-16 and UTF-32, which have zero bytes where UTF-8 never has."""
    start: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise InputError(
            f"{printable(uri)} is not UTF-8 but probably UTF-16; convert it: "
            "iconv -f UTF-16 -t UTF-8"
        )


class _CsvLines:
    """The lines of a CSV file, for the csv module; those of the last record can be given back.

    Attributes:
        number: Of the last line given, from 1.
        taken: The lines of the record so far.
    """

    def __init__(self, text: TextIO, delimiter: str) -> None:
        self._text = text
        self._delimiter = delimiter
        self._again: deque[str] = deque()
        self.number = 0
        self.taken: list[str] = []

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if len(self.taken) >= _MAX_RECORD_LINES:
            raise csv.Error(_UNCLOSED)
        if sum(map(len, self.taken)) > _MAX_LINE_BYTES:
            raise csv.Error(f"a record of more than {_MAX_LINE_BYTES} characters")
        line = self._again.popleft() if self._again else self._text.readline(_MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        self.taken.append(line)
        if len(line) >= _MAX_LINE_BYTES and not line.endswith(("\n", "\r")):
            while (rest := self._text.readline(_MAX_LINE_BYTES)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"longer than {_MAX_LINE_BYTES} characters")
        return line

    def give_back(self) -> None:
        """All but the first line of the record are read again, as the records they may be."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1

    def is_unclosed(self) -> bool:
        """Whether the record ends inside quotes, which the csv module does not mind."""
        # Another line is a record of its own, or else becomes part of the open one.
        return len(list(csv.reader([*self.taken, "."], delimiter=self._delimiter))) == 1


_UNCLOSED = f"a quote is not closed, or not within {_MAX_RECORD_LINES} lines"


def _read_csv(url: str, uri: str, max_page_bytes: int) -> _Lines:
    delimiter = "\t" if extension(urls.file_name(url)) == ".tsv" else ","
    csv.field_size_limit(_MAX_LINE_BYTES)
    with (
        reading.open_read(url) as file,
        io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
    ):
        _check_encoding(file, uri)
        lines = _CsvLines(text, delimiter)
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise InputError(f"{printable(uri)}: its first line is not CSV: {error}") from error
        if not header:
            return
        if not set(header) & set(URI_COLUMNS):
            raise _no_uri_column(uri, header)
        while True:
            start = lines.number + 1
            lines.taken.clear()
            try:
                fields = next(reader, None)
                if len(lines.taken) > 1 and lines.is_unclosed():
                    raise csv.Error(_UNCLOSED)
            except csv.Error as error:
                lines.give_back()
                yield f"line {start}", ReadError(f"is not CSV: {error}")
                continue
            if fields is None:
                return
            if len(fields) > len(header):
                message = f"has {len(fields)} fields, the header {len(header)}; quote the commas"
                yield f"line {start}", ReadError(message)
            elif fields:
                values = zip(header, fields, strict=False)
                yield f"line {start}", {name: value or None for name, value in values}


def _read_parquet(url: str, uri: str, max_page_bytes: int) -> _Lines:
    with open_parquet(url, uri) as opened:
        names = list(opened.names)
        if not set(names) & set(URI_COLUMNS):
            raise _no_uri_column(uri, names)
        opened.check_num_rows()
        # Of a table of ours, only what names the items; its embeddings would be most of the bytes.
        columns = (
            [name for name in names if name in _COLUMNS_OF_OURS] if _is_ours(set(names)) else None
        )
        row = 0
        try:
            for number in range(len(opened.row_groups)):
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

# How the tables that Earmark writes are known, whatever format they were converted to.
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
    """A row names a container as a whole."""

    def __init__(self, target: str) -> None:
        super().__init__(
            f"names the container {public_uri(target)} as a whole; name a member (tar) or "
            "row (Parquet), or give the container itself as an input"
        )
        self.target = target


def _read_row(
    url: str, line: str, values: Mapping[str, Any]
) -> ManifestRow | ContainerRow | Failure:
    """The item that a row names, or why it names none."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return _make_row(url, line, given, _is_ours(values.keys()))
    except _WholeContainerError as error:
        failure = _line_failure(url, line, error)
        # An errors table has a row of that kind for a container that could not be read to its end.
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
    target = _target(url, column, values.pop(column))
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
    return ManifestRow(item, name, f"{line} of {_shown_uri(url)}")


@functools.lru_cache(maxsize=64)  # asked for every row of a manifest
def _shown_uri(url: str) -> str:
    return printable(public_uri(url))


def _shown(value: object) -> str:
    """A value as messages name it: on one line, and not all of it if it is long."""
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
    """Start and end in seconds; None and None for the whole.

    A ``duration`` without an ``offset`` is the file's length (NeMo writes it into every row), not
    a segment, and stays metadata.
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
    return None if math.isnan(number) else number  # how pandas writes "nothing"


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
