"""Manifests: tables that list what to label, a row per item, with labels and metadata.

Part of ``sources``. JSON Lines, CSV (tab-separated too) and Parquet are read as streams. A line
that cannot be read is a failure that names the file and the line; the run goes on. The tables that
Earmark writes (``clips``, ``errors``) are manifests: their ``truth`` and ``metadata`` come back as
they are, and what Earmark found out is left aside.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from transforms import storage
from transforms.clip_ids import (
    extension,
    is_tar_name,
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.errors import ContainerError, InputError, ReadError
from transforms.parquet_source import URI_COLUMNS, open_parquet, resolve
from transforms.records import Failure, Item

MANIFEST_EXTENSIONS = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv"})
_MAX_LINE_BYTES = 64 << 20


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


def read_manifest(url: str) -> Iterator[ManifestRow | ContainerRow | Failure]:
    """The rows of a manifest, in order.

    Raises:
        InputError: It cannot be opened, or has no column that names files.
    """
    ending = extension(storage.file_name(url))
    read = _READERS.get(ending)
    uri = storage.public_uri(url)
    if read is None:
        endings = ", ".join(sorted(_READERS))
        raise InputError(f"{uri}: a manifest ends in one of {endings}")
    try:
        for line, values in read(url, uri):
            if isinstance(values, ReadError):
                yield _line_failure(url, line, values)
            else:
                yield _read_row(url, line, values)
    except (OSError, ContainerError) as error:
        item = Item(clip_id=make_clip_id(printable(uri)), uri=printable(uri), url=url)
        yield read_failure(item, error, is_container=True)


# A line's name, and its values or what is wrong with it.
_Lines = Iterator[tuple[str, Mapping[str, Any] | ReadError]]


def _read_jsonl(url: str, uri: str) -> _Lines:
    with storage.open_read(url) as file:
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


def _read_csv(url: str, uri: str) -> _Lines:
    delimiter = "\t" if extension(storage.file_name(url)) == ".tsv" else ","
    csv.field_size_limit(_MAX_LINE_BYTES)
    with (
        storage.open_read(url) as file,
        io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
    ):
        reader = csv.reader(text, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        if not header:
            return
        if not set(header) & set(URI_COLUMNS):
            raise _no_uri_column(uri, header)
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
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


def _read_parquet(url: str, uri: str) -> _Lines:
    with open_parquet(url, uri) as file:
        names = file.schema_arrow.names
        if not set(names) & set(URI_COLUMNS):
            raise _no_uri_column(uri, names)
        # Of a table of ours, only what names the items; its embeddings would be most of the bytes.
        columns = [name for name in names if name in _COLUMNS_OF_OURS] if _is_ours(names) else None
        row = 0
        try:
            for batch in file.iter_batches(1024, columns=columns, use_threads=False):
                for values in batch.to_pylist():
                    yield f"row {row}", values
                    row += 1
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ContainerError(f"{uri}: cannot be read past row {row}: {error}") from error


def _no_uri_column(uri: str, columns: list[str]) -> InputError:
    return InputError(
        f"{uri}: no column names the files; expected one of {', '.join(URI_COLUMNS)}, found "
        f"{', '.join(columns[:20]) or 'none'}"
    )


_READERS: dict[str, Callable[[str, str], _Lines]] = {
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


def _is_ours(columns: Iterable[str]) -> bool:
    names = frozenset(columns)
    return names >= _ERRORS_TABLE or names >= _CLIPS_TABLE


def _line_failure(url: str, line: str, error: ReadError) -> Failure:
    uri = printable(storage.public_uri(url))
    clip_id = make_clip_id(uri, line.replace(" ", "="))
    item = Item(clip_id=clip_id, uri=uri, url=url)
    return read_failure(item, ReadError(f"{line} of {uri} {error}"))


class _WholeContainerError(ReadError):
    """A row names a container as a whole."""

    def __init__(self, target: str) -> None:
        super().__init__(
            f"names the container {storage.public_uri(target)} as a whole; name a member (tar) or "
            "row (Parquet), or give the container itself as an input"
        )
        self.target = target


def _read_row(
    url: str, line: str, values: Mapping[str, Any]
) -> ManifestRow | ContainerRow | Failure:
    """The item that a row names, or why it names none."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return _make_row(url, line, given, _is_ours(values))
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
    uri = storage.public_uri(target)
    member, row = _text(values, "member"), _row_number(values)
    _check_kind(target, member, row)
    start_s, end_s = _segment(values)
    own_id = _text(values, "clip_id")
    if is_ours:
        truth = make_truth(values.get("truth"))
        metadata = values.get("metadata")
        if metadata is not None and not isinstance(metadata, str):
            metadata = make_metadata(metadata if isinstance(metadata, dict) else values)
    else:
        truth = make_truth(values.pop("labels", None), values.pop("label", None))
        metadata = make_metadata(values)
    item = Item(
        clip_id=own_id or make_clip_id(uri, member, row=row, start_s=start_s, end_s=end_s),
        uri=printable(uri),
        url=target,
        member=member,
        row=row,
        start_s=start_s,
        end_s=end_s,
        truth=truth,
        metadata=metadata,
    )
    occurrence = occurrence_of(item)
    own_name = make_clip_id(uri, member, occurrence, row=row, start_s=start_s, end_s=end_s)
    return ManifestRow(item, own_name, f"{line} of {printable(storage.public_uri(url))}")


def _target(url: str, column: str, path: object) -> str:
    if not isinstance(path, str):
        raise ReadError(f"has {column} = {path!r}; expected text")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ReadError(f"has {column} = {path!r}, which cannot be a name: {error}") from None
    if "\0" in path:
        raise ReadError(f"has {column} = {path!r}, which cannot be a name: it holds a zero byte")
    target = resolve(url, path)
    if not storage.is_known(target):
        raise ReadError(f"names {storage.public_uri(target)}, whose protocol is not known")
    return target


def _check_kind(target: str, member: str | None, row: int | None) -> None:
    uri = storage.public_uri(target)
    name = storage.file_name(uri)
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
        raise ReadError(f"has {column} = {value!r}; expected a number of seconds") from None
    if math.isinf(number):
        raise ReadError(f"has {column} = {value!r}; expected a finite number of seconds")
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
    if number < 0 or not number.is_integer():
        raise ReadError(f"has row = {value!r}; expected a whole number from 0")
    return int(number)


def _text(values: dict[str, Any], column: str) -> str | None:
    value = values.pop(column, None)
    if isinstance(value, dict | list):
        raise ReadError(f"has {column} = {value!r}; expected text")
    return None if value in (None, "") else printable(str(value))
