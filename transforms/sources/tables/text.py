"""Text tables as streams: encodings, gzip, lines, CSV records and JSON objects.

Lines and CSV records have bounds, so that memory does not depend on the file. A line that cannot be
read is an error in its place, and the next line is read. A text in another encoding than expected
is no table at all: a label must not be read as something else.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, TextIO, cast

from transforms.errors import InputError, ReadError
from transforms.storage import reading, urls

# A line's name, and its values or its error.
Lines = Iterator[tuple[str, Mapping[str, Any] | ReadError]]

_MAX_LINE_CHARS = 16 << 20  # parsed, JSON takes up to 25 times as much memory
_MAX_RECORD_LINES = 1000
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# How Python keeps a byte that is not UTF-8.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@contextmanager
def open_text(url: str, uri: str, encoding: str | None, newline: str) -> Iterator[TextIO]:
    """Open a text table, decompressed if its name ends in ``.gz``.

    Without an ``encoding`` it is UTF-8 or UTF-16, with or without a byte order mark. Iterate it
    with ``lines``, which checks that. Raise ``InputError`` if it is neither.
    """
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(reading.open_read(url))
        if urls.file_name(url).lower().endswith(".gz"):
            file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
        name = encoding or _recognise_encoding(file, uri)
        if codecs.lookup(name).name == "utf-8":
            name = "utf-8-sig"
        # With "surrogateescape" the line that is not UTF-8 can be named; others have no such bytes.
        errors = "surrogateescape" if name == "utf-8-sig" else "strict"
        yield stack.enter_context(io.TextIOWrapper(file, name, errors, newline=newline))


def _recognise_encoding(file: BinaryIO, uri: str) -> str:
    start: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise _wrong_encoding(uri, "it begins like UTF-32")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # A table begins with ASCII, which UTF-16 has zero bytes beside.
    zeros = [byte == 0 for byte in start]
    if zeros[:2] == [False, True] and zeros[2:] in ([], [False, True]):
        return "utf-16-le"
    if zeros[:2] == [True, False] and zeros[2:] in ([], [True, False]):
        return "utf-16-be"
    if any(zeros):
        raise _wrong_encoding(uri, "it begins with zero bytes")
    return "utf-8-sig"


def _wrong_encoding(uri: str, why: str) -> InputError:
    return InputError(
        f"{uri} is not text in UTF-8 or UTF-16: {why}. Name its encoding with --set "
        "manifest.encoding=NAME, such as cp1252 (Windows), latin-1, gb18030 or utf-32"
    )


def lines(text: TextIO, uri: str) -> Iterator[str | ReadError]:
    """Yield the lines of a file; an error in place of each that is too long.

    Raise ``InputError`` at the first text that is not in the file's encoding.
    """
    number = 0
    try:
        while line := text.readline(_MAX_LINE_CHARS):
            number += 1
            if not line.isascii() and text.errors == "surrogateescape":
                bad = _NOT_UTF8.search(line)
                if bad is not None:
                    byte = ord(bad.group()) - 0xDC00
                    raise _wrong_encoding(uri, f"line {number} has the byte 0x{byte:02X}")
            if len(line) < _MAX_LINE_CHARS or line.endswith(("\n", "\r")):
                yield line
                continue
            while (rest := text.readline(_MAX_LINE_CHARS)) and not rest.endswith(("\n", "\r")):
                pass
            yield ReadError(f"is longer than {_MAX_LINE_CHARS} characters")
    except UnicodeDecodeError as error:
        why = f"its text behind line {number} cannot be read as {error.encoding}: {error.reason}"
        raise _wrong_encoding(uri, why) from error


# --- JSON Lines ----------------------------------------------------------------------------


def read_jsonl(text: TextIO, uri: str) -> Lines:
    """Yield the JSON object of each line."""
    for number, line in enumerate(lines(text, uri), 1):
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


# --- CSV -----------------------------------------------------------------------------------


class CsvLines(Iterator[str]):
    """The lines of a CSV file for ``csv.reader``, with a bound for a record."""

    def __init__(self, text: TextIO, uri: str) -> None:
        self._lines = lines(text, uri)
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

    def peek(self, num_lines: int) -> list[str]:
        """Return the next lines, without taking them; fewer at the end or before an error."""
        while len(self._again) < num_lines and (line := next(self._lines, None)) is not None:
            self._again.append(line)
        texts: list[str] = []
        for line in self._again:
            if isinstance(line, ReadError) or len(texts) == num_lines:
                break
            texts.append(line)
        return texts

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


class CsvTable:
    """A CSV file: its header, then its records.

    The separator is the comma, semicolon or tab that divides the header into most columns.
    ``header`` is empty if the file is. Raise ``InputError`` if the header cannot be read.
    """

    def __init__(self, csv_lines: CsvLines, uri: str, usual_delimiter: str = ",") -> None:
        self._lines = csv_lines
        self.header: list[str] = []
        first = next(iter(csv_lines.peek(1)), "")
        marks = (usual_delimiter, *_DELIMITERS)  # the first of several that divide it equally
        self._delimiter = max(marks, key=lambda mark: len(_split(first, mark)))
        self._reader = csv.reader(csv_lines, delimiter=self._delimiter)
        try:
            self.header = [name.strip() for name in self._next() or ()]
        except ReadError as error:
            raise InputError(f"{uri}: its first line {error}") from error

    def records(self) -> Lines:
        """Yield the records by the names of the header; an empty field is None."""
        while True:
            line = f"line {self._lines.number + 1}"
            try:
                fields = self._next()
            except ReadError as error:
                fields = self._unquoted(is_whole=False)
                self._lines.restart_after_first()
                if fields is None:
                    yield line, error
                    continue
            if fields is None:
                return
            if len(fields) > len(self.header):
                yield (
                    line,
                    ReadError(
                        f"has {len(fields)} fields, the header {len(self.header)}; "
                        f"quote the {_DELIMITERS[self._delimiter]}"
                    ),
                )
            elif fields:
                values = zip(self.header, fields, strict=False)
                yield line, {name: value or None for name, value in values}

    def _next(self) -> list[str] | None:
        """Return the next record, or None at the end; raise ``ReadError`` if it is not CSV."""
        self._lines.record.clear()
        try:
            with _large_csv_fields():
                fields = next(self._reader, None)
                if fields and (len(self._lines.record) > 1 or len(fields) != len(self.header)):
                    unquoted = self._unquoted(is_whole=True)
                    if unquoted is not None:
                        self._lines.restart_after_first()
                        return unquoted
                if len(self._lines.record) > 1:
                    # ``csv`` accepts a record that ends inside quotes: only there, one more line is
                    # not one more record.
                    again = csv.reader([*self._lines.record, "."], delimiter=self._delimiter)
                    if len(list(again)) == 1:
                        raise ReadError(_UNCLOSED)
        except csv.Error as error:
            raise ReadError(f"is not CSV: {error}") from error
        return fields

    def _unquoted(self, *, is_whole: bool) -> list[str] | None:
        """Return the record's first line with its quotes as text, as many write tab-separated text.

        None unless that line, or with ``is_whole`` each line of the record, has all fields.
        """
        record = self._lines.record if is_whole else self._lines.record[:1]
        rows = [_split(line, "\t", csv.QUOTE_NONE) for line in record]
        if self._delimiter != "\t" or not rows or len(self.header) < 2:
            return None
        return rows[0] if all(len(row) == len(self.header) for row in rows) else None


def _split(line: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL) -> list[str]:
    """Return the fields of a line on its own; the line itself if it is not CSV."""
    try:
        return next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])
    except csv.Error:
        return [line]
