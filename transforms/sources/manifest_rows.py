"""The rows of a manifest: from a table's cells to an item, or to the failure that names the line.

The tables that Earmark writes (``clips``, ``errors``) are manifests too: their ``truth`` and
``metadata`` are kept as they are, and the columns that Earmark computed are ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from transforms.errors import InputError, ReadError
from transforms.records import Failure, Item
from transforms.sources.clip_ids import (
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.sources.file_kinds import extension, is_tar_name, manifest_extension
from transforms.sources.parquet import UnreadableValue, resolve
from transforms.sources.tables.columns import (
    START_COLUMNS,
    URI_COLUMNS,
    TableSettings,
    is_none,
    path_of_row,
)
from transforms.storage import filesystem, urls
from transforms.storage.secrets import public_text, public_uri

_MAX_NAME_CHARS = 32_768  # a signed URL has a few thousand
_MAX_SHOWN_CHARS = 200
_MAX_SECONDS = 1e12
_AGREE_WITHIN_S = 0.01  # tables round
_NO_COLUMN = "\0"  # of a table; an empty name is that of pandas' index

# Columns that identify the tables that Earmark writes, in whatever format.
ERRORS_TABLE = frozenset({"clip_id", "uri", "stage", "error_type", "message"})
_CLIPS_TABLE = frozenset({"clip_id", "uri", "num_windows", "content_sha256"})
_USED_OF_OURS = frozenset({"member", "row", "start_s", "end_s", "truth", "metadata"})
COLUMNS_OF_OURS = ERRORS_TABLE | _CLIPS_TABLE | _USED_OF_OURS


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


def is_ours(columns: Set[str]) -> bool:
    """Return whether a table with these columns is one that Earmark writes."""
    return columns >= ERRORS_TABLE or columns >= _CLIPS_TABLE


def line_failure(url: str, line: str, error: ReadError) -> Failure:
    """Make the failure of a line or row of the manifest at ``url``."""
    uri = shown_uri(url)
    clip_id = make_clip_id(uri, line.replace(" ", "="))
    item = Item(clip_id=clip_id, uri=uri, url=url)
    return read_failure(item, ReadError(f"{line} of {uri} {error}", error_type=error.error_type))


class _WholeContainerError(ReadError):
    def __init__(self, target: str) -> None:
        super().__init__(
            f"names the container {public_uri(target)} as a whole; name a member (tar) or "
            "row (Parquet), or give the container itself as an input",
            error_type="ReadError",
        )
        self.target = target


class _ContradictionError(ReadError):
    """Two columns of a row say different things: the table is not what it seems."""


def read_row(
    url: str, line: str, values: Mapping[str, Any], settings: TableSettings
) -> ManifestRow | ContainerRow | Failure:
    """Make the item of a row; raise ``InputError`` if its columns contradict each other."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return _make_row(url, line, given, settings, of_ours=is_ours(values.keys()))
    except _WholeContainerError as error:
        failure = line_failure(url, line, error)
        # An errors table has such a row for a container that could not be read to its end.
        is_of_errors = values.keys() >= ERRORS_TABLE
        return ContainerRow(error.target, failure) if is_of_errors else failure
    except _ContradictionError as error:
        raise InputError(f"{line} of {shown_uri(url)} {error}") from error
    except ReadError as error:
        return line_failure(url, line, error)
    except RecursionError:
        return line_failure(url, line, ReadError("is nested too deeply"))


def _make_row(
    url: str, line: str, values: dict[str, Any], settings: TableSettings, *, of_ours: bool
) -> ManifestRow:
    target, path = _target_of(url, values, settings)
    uri = public_uri(target)
    member, row = _text(values, _name(settings, "member")), _row_number(values, settings)
    _check_kind(target, uri, member, row)
    start_s, end_s = _segment(values, settings)
    own_id = public_text(_text(values, _name(settings, "clip_id")) or "")
    name = make_clip_id(uri, member, row=row, start_s=start_s, end_s=end_s)
    if of_ours:
        truth = make_truth(values.get("truth"))
        metadata = values.get("metadata")
        if metadata is not None and not isinstance(metadata, str):
            metadata = make_metadata(metadata if isinstance(metadata, dict) else values)
    else:
        labels = values.pop(_name(settings, "labels"), None)
        label = values.pop(_name(settings, "label"), None)
        truth = make_truth(labels, label, settings.label_separator)
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
    return ManifestRow(item, name, f"{line} of {shown_uri(url)}", "" if of_ours else path)


def _name(settings: TableSettings, known: str) -> str:
    """Return the table's name of a column."""
    return next(iter(settings.names_of(known)), _NO_COLUMN)


@functools.lru_cache(maxsize=64)  # called for every row of a manifest
def shown_uri(url: str) -> str:
    """Return a table's URL fit to be shown: no secrets, and only text that is UTF-8."""
    return printable(public_uri(url))


def _shown(value: object) -> str:
    if isinstance(value, str | bytes):
        value = value[: _MAX_SHOWN_CHARS + 1]
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _target_of(url: str, values: dict[str, Any], settings: TableSettings) -> tuple[str, str]:
    """Return the URL and the path of the row's file, and take its column out of the values."""
    if settings.pattern is not None:
        column, path = "manifest.pattern", path_of_row(settings.pattern, values)
    else:
        names = settings.names_of(*URI_COLUMNS)
        column = next((name for name in names if not is_none(values.get(name))), "")
        if not column:
            raise ReadError(f"names no file; expected one of {', '.join(names)}")
        path = values.pop(column)
    return _target(_base_of(url, settings.root), column, path), path


@functools.lru_cache(maxsize=64)
def _base_of(url: str, root: str | None) -> str:
    """Return a URL in the folder that relative paths start from."""
    return url if root is None else urls.join(urls.normalise(root), "table")


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
    if manifest_extension(name):
        raise ReadError(f"names {uri}, a manifest; give it as an input of its own")


def _segment(values: dict[str, Any], settings: TableSettings) -> tuple[float | None, float | None]:
    """Return start and end in seconds, each None if not given.

    A ``duration`` without a start is the file's length (NeMo writes it into every row), not a
    segment: it stays metadata.
    """
    starts = {name: _number(values, name) for name in settings.names_of(*START_COLUMNS)}
    given = {name: value for name, value in starts.items() if value is not None}
    start_s = next(iter(given.values()), None)
    if any(abs(value - (start_s or 0.0)) > _AGREE_WITHIN_S for value in given.values()):
        raise _contradiction(given)
    end_name, duration_name = _name(settings, "end_s"), _name(settings, "duration")
    end_s = _number(values, end_name)
    if start_s is not None and duration_name in values:
        duration_s = _number(values, duration_name)
        if duration_s is not None:
            end_of_duration_s = start_s + duration_s
            if end_s is not None and abs(end_s - end_of_duration_s) > _AGREE_WITHIN_S:
                raise _contradiction({**given, end_name: end_s, duration_name: duration_s})
            end_s = end_of_duration_s if end_s is None else end_s
    if start_s is not None and start_s < 0:
        raise ReadError(f"starts at {start_s} s; must be at least 0")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ReadError(f"ends at {end_s} s; must be after its start at {start_s or 0.0} s")
    return start_s, end_s


def _contradiction(given: Mapping[str, float]) -> _ContradictionError:
    named = ", ".join(f"{name} = {value:g}" for name, value in given.items())
    *_, last = given
    return _ContradictionError(
        f"has {named}, which contradict each other; correct the table, or keep a column as "
        f"metadata with --column {'start_s' if last in START_COLUMNS else last}="
    )


def _number(values: dict[str, Any], column: str) -> float | None:
    value = values.pop(column, None)
    if is_none(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ReadError(f"has {column} = {_shown(value)}; expected a number of seconds") from None
    if math.isinf(number):
        raise ReadError(f"has {column} = {_shown(value)}; expected a finite number of seconds")
    if abs(number) > _MAX_SECONDS:
        raise ReadError(f"has {column} = {_shown(value)}; expected at most {_MAX_SECONDS:g} s")
    return None if math.isnan(number) else number


def _row_number(values: dict[str, Any], settings: TableSettings) -> int | None:
    value = values.pop(_name(settings, "row"), None)
    if is_none(value):
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
    if is_none(value):
        return None
    if not isinstance(value, str | int | float):
        raise ReadError(f"has {column} = {_shown(value)}; expected text")
    _check_length(column, str(value))
    return printable(str(value))
