"""Items of a Parquet file with an audio column: what it holds, and reading a range of its rows.

Part of ``sources``. The audio column is found by type: the Hugging Face layout
``struct<bytes, path>``, or binary. A row without bytes but with a path stands for the file at
that path. The other columns are metadata; a ``ClassLabel`` is given by its name.

Memory is bounded by the largest page that ``max_page_bytes`` allows, whatever a file says of
itself (``parquet_pages``); a cell beyond ``spool_bytes`` travels in a temporary file.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.errors import ContainerError, EarmarkError, ReadError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item
from transforms.sources.clip_ids import (
    make_clip_id,
    make_metadata,
    make_truth,
    printable,
    read_failure,
)
from transforms.sources.fetching import RangeReader, ReadLimits, check_item_size, fetch, spool
from transforms.sources.parquet_pages import RowGroup, measure_row_group, read_footer
from transforms.sources.tar import container_item
from transforms.storage import reading, urls
from transforms.storage.secrets import public_uri

URI_COLUMNS = ("uri", "path", "file", "audio_filepath", "filename")
_BATCH_BYTES = 16 << 20
# Where each row may be the largest entry of a dictionary, which is hardly ever so.
_MAX_DICTIONARY_BATCH_BYTES = 64 << 20
_MAX_BATCH_ROWS = 1024
_BUFFER_BYTES = 64 << 10
_UNREADABLE = (ValueError, OverflowError, KeyError, pa.ArrowException)
# A run of nulls, or of one value, has a few bytes however long it is; but an item that is one has
# more than a byte. A file may hold that many rows whatever its size.
_MIN_BOUND_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class AudioColumn:
    """Where a Parquet file keeps its audio.

    Attributes:
        name: The column.
        is_struct: ``struct<bytes, path>`` rather than binary.
        path_column: With a binary column: another column that names the file, or None.
        class_names: Names of the classes of each ``ClassLabel`` column.
    """

    name: str
    is_struct: bool
    path_column: str | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParquetIndex:
    """What a Parquet file's footer says.

    Attributes:
        audio: Its audio column, or None.
        columns: Names of all columns.
        row_groups: Rows and bytes of audio in each row group.
    """

    audio: AudioColumn | None
    columns: tuple[str, ...]
    row_groups: tuple[tuple[int, int], ...]


class OpenParquet:
    """A Parquet file that is read in bounded memory.

    Attributes:
        file: As pyarrow gives it.
        uri: For messages.
        row_groups: By the footer.
        names: Of all columns; the second of a name is never looked at.
    """

    def __init__(
        self,
        file: pq.ParquetFile,
        stream: BinaryIO,
        reader: RangeReader | None,
        row_groups: tuple[RowGroup, ...],
        uri: str,
    ) -> None:
        self.file = file
        self._reader = reader
        self.row_groups = row_groups
        self.uri = uri
        self.names = tuple(dict.fromkeys(file.schema_arrow.names))
        self._stream = stream

    def batches(
        self, number: int, max_page_bytes: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """A row group in batches of about 16 MB.

        A remote one is fetched once, for its headers and its values; if it is too large for that,
        the headers are asked for first, in small blocks.

        Args:
            number: Of the row group.
            max_page_bytes: Bytes of a page, decompressed.
            columns: The columns to read; None for all.

        Raises:
            ContainerError: A page is larger, the row group is damaged, or rows are missing.
        """
        wanted = None if columns is None else frozenset(columns)
        group, num_rows = self.row_groups[number], 0
        try:
            if self._reader is not None:
                self._reader.hold(
                    (chunk.start, chunk.stop)
                    for chunk in group.chunks
                    if wanted is None or chunk.name in wanted
                )
            cost = measure_row_group(self._stream, self.file.schema, group, wanted)
            if cost.largest_bytes > max_page_bytes:
                raise ContainerError(
                    f"a page, or a column of lists, has {cost.largest_bytes} bytes decompressed; "
                    f"at most {max_page_bytes} are allowed; to allow more, raise "
                    "read.max_page_bytes, or write the file with smaller pages"
                )
            size = min(
                _MAX_BATCH_ROWS,
                _BATCH_BYTES // max(1, cost.row_bytes),
                _MAX_DICTIONARY_BATCH_BYTES // max(1, cost.entry_bytes),
            )
            size = max(1, size)
            for batch in self.file.iter_batches(
                size, row_groups=[number], columns=columns, use_threads=False
            ):
                num_rows += batch.num_rows
                yield batch
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ContainerError(str(error)) from error
        if num_rows < group.num_rows:
            raise ContainerError(f"a row group of {group.num_rows} rows ends after {num_rows}")

    def check_num_rows(self) -> None:
        """Refuse rows that are nothing but a number in the footer.

        Raises:
            ContainerError: There are more than a million rows, and fewer bytes than rows.
        """
        num_rows = sum(group.num_rows for group in self.row_groups)
        num_bytes = self._stream.seek(0, io.SEEK_END)
        if num_rows > max(_MIN_BOUND_ROWS, num_bytes):
            raise ContainerError(
                f"{self.uri}: is said to hold {num_rows} rows, and has {num_bytes} bytes; a row "
                "takes at least one"
            )


@contextmanager
def open_parquet(url: str, uri: str) -> Iterator[OpenParquet]:
    """Open a Parquet file.

    Raises:
        ContainerError: It cannot be opened, or is not a whole Parquet file.
    """
    reader: RangeReader | None = None
    try:
        if urls.is_local(url):
            stream = reading.open_read(url)
        else:
            reader = RangeReader(url)
            stream = cast(BinaryIO, io.BufferedReader(reader, _BUFFER_BYTES))
    except OSError as error:
        raise ContainerError(f"{uri}: {error.strerror or error}") from error
    with stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            row_groups = read_footer(stream)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ContainerError(f"{uri}: is not a whole Parquet file: {error}") from error
        with file:
            yield OpenParquet(file, stream, reader, row_groups, uri)


def index_parquet(url: str, uri: str) -> ParquetIndex:
    """Read a Parquet file's footer.

    Raises:
        ContainerError: It cannot be opened, or is not a whole Parquet file.
    """
    with open_parquet(url, uri) as opened:
        audio = find_audio_column(opened.file.schema_arrow)
        if audio is not None:
            opened.check_num_rows()
        groups = []
        for group in opened.row_groups:
            sizes = (
                chunk.uncompressed_bytes
                for chunk in group.chunks
                if audio is not None and chunk.name == audio.name
            )
            if group.num_rows:
                groups.append((group.num_rows, max(0, sum(sizes))))
        return ParquetIndex(audio, opened.names, tuple(groups))


def find_audio_column(schema: pa.Schema) -> AudioColumn | None:
    """The audio column of a schema, or None.

    First what Hugging Face's own metadata calls ``Audio``; then a ``struct<bytes, path>``, the
    one named ``audio`` before others; then a binary column named ``audio``; then the only binary
    column, unless a column ``uri`` says that this is a manifest.
    """
    features = _huggingface_features(schema)
    class_names = {name: _class_names(features.get(name)) for name in schema.names}
    classes = {name: names for name, names in class_names.items() if names}
    structs = [one.name for one in schema if _is_audio_struct(one.type)]
    binaries = [one.name for one in schema if _is_binary(one.type)]
    declared = [
        name
        for name in structs
        if isinstance(features.get(name), dict) and features[name].get("_type") == "Audio"
    ]
    for name in (*declared, *(name for name in structs if name == "audio"), *structs):
        return AudioColumn(name, True, None, classes)
    named = [name for name in binaries if name == "audio"]
    only = binaries if len(binaries) == 1 and "uri" not in schema.names else []
    for name in (*named, *only):
        paths = [
            one for one in URI_COLUMNS if one in schema.names and _is_text(schema.field(one).type)
        ]
        return AudioColumn(name, False, paths[0] if paths else None, classes)
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_audio_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(number).name: kind.field(number).type for number in range(len(kind))}
    # A column of nulls alone has the type null.
    may_be_null = pa.types.is_null
    return (
        "bytes" in fields
        and "path" in fields
        and (_is_binary(fields["bytes"]) or may_be_null(fields["bytes"]))
        and (_is_text(fields["path"]) or may_be_null(fields["path"]))
    )


def _huggingface_features(schema: pa.Schema) -> dict[str, Any]:
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> list[str]:
    """Names of a ``ClassLabel``, or of a list of them."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return [str(name) for name in names] if isinstance(names, list) else []
    return _class_names(feature.get("feature"))


# --- Reading -------------------------------------------------------------------------------


def read_parquet(
    part: ContainerSlice, wanted: tuple[Item, ...], limits: ReadLimits | None = None
) -> Iterator[EncodedClip | Failure]:
    """The items of a range of rows, in order, then what is broken.

    A row group that cannot be read does not keep the next ones from being read; what is missing
    is told in one failure of the container, or, of items asked for, in a failure of each.

    Args:
        part: The slice.
        wanted: Items to read, by row; empty means all there are.
        limits: What reading may take.
    """
    limits = limits or ReadLimits()
    rows: dict[int, list[Item]] = {}
    for item in wanted:
        rows.setdefault(-1 if item.row is None else item.row, []).append(item)
    damage: list[ContainerError] = []
    try:
        with open_parquet(part.url, part.uri) as opened:
            audio = find_audio_column(opened.file.schema_arrow)
            if audio is None:
                names = ", ".join(opened.names[:20])
                raise ContainerError(f"{part.uri}: no column holds audio (columns: {names})")
            opened.check_num_rows()
            for row, values in _rows(opened, part, frozenset(rows), damage, limits):
                items = rows.pop(row) if wanted else [None]
                yield from (_clip(part, audio, row, dict(values), item, limits) for item in items)
    except ContainerError as error:
        damage.append(error)
    told = "; ".join(str(one) for one in damage[:5])
    for item in (item for items in rows.values() for item in items):
        yield read_failure(item, _row_error(item, part, told, damage))
    if damage and not wanted:
        item = container_item(part, "rows")
        yield read_failure(item, ContainerError(told), is_container=True)


def _row_error(
    item: Item, part: ContainerSlice, told: str, damage: Sequence[ContainerError]
) -> ReadError:
    """Why a row that was asked for was not met."""
    if not damage:
        return ReadError(f"row {item.row} of {part.uri} is not there")
    cause = damage[0].__cause__ or damage[0]
    return ReadError(f"row {item.row} cannot be read: {told}", error_type=type(cause).__name__)


def _rows(
    opened: OpenParquet,
    part: ContainerSlice,
    wanted: frozenset[int],
    damage: list[ContainerError],
    limits: ReadLimits,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers and their values; what could not be read is added to ``damage``."""
    first = 0
    for number, group in enumerate(opened.row_groups):
        start, stop = first, first + group.num_rows
        first = stop
        low = max(start, part.start)
        high = stop if part.stop is None else min(stop, part.stop)
        if low >= high or (wanted and not any(low <= row < high for row in wanted)):
            continue
        row = start
        try:
            for batch in opened.batches(number, limits.max_page_bytes):
                for offset in range(batch.num_rows):
                    if low <= row < high and (not wanted or row in wanted):
                        yield row, row_values(batch, offset)
                    row += 1
        except ContainerError as error:
            text = f"{part.uri}: rows {max(row, low)} to {high - 1} cannot be read: {error}"
            damage.append(ContainerError(text))


def row_values(batch: pa.RecordBatch, offset: int) -> dict[str, Any]:
    """The values of a row, by column; binary ones as they lie in the batch, not copied."""
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values.setdefault(name, _value(column[offset]))
    return values


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The values of each row, as ``row_values`` gives them."""
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name not in columns:
            columns[name] = _values(column)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    if not _is_binary(column.type) and not _is_audio_struct(column.type):
        with suppress(*_UNREADABLE):
            return list(column.to_pylist())
    return [_value(scalar) for scalar in column]


class UnreadableValue(str):
    """Stands for a value that Python cannot hold, and says why."""


def _value(scalar: pa.Scalar) -> Any:
    try:
        if not scalar.is_valid:
            return None
        if _is_binary(scalar.type):
            return memoryview(scalar.as_buffer())
        if _is_audio_struct(scalar.type):
            return {name: _value(scalar[name]) for name in ("bytes", "path")}
        return scalar.as_py()
    except _UNREADABLE as error:
        # Text that is not UTF-8, a date before the year 1: Python has no value for it.
        return UnreadableValue(f"<cannot be read: {error}>")


def _clip(
    part: ContainerSlice,
    audio: AudioColumn,
    row: int,
    values: dict[str, Any],
    item: Item | None,
    limits: ReadLimits,
) -> EncodedClip | Failure:
    value = values.pop(audio.name)
    data: memoryview | None = None
    path: str | None
    if isinstance(value, UnreadableValue):
        path = value
    elif audio.is_struct:
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
    else:
        data, path = value, values.get(audio.path_column) if audio.path_column else None
    item = _make_item(part, row, _with_class_names(values, audio.class_names), path, item)
    try:
        if data is not None:
            return _clip_of_cell(item, data, limits)
        if not path:
            raise ReadError(f"row {row} has neither bytes nor a path")
        if isinstance(path, UnreadableValue):
            raise ReadError(f"row {row}: {path}")
        return _clip_at_path(item, part, path, limits)
    except ReadError as error:
        return read_failure(item, error)


def _clip_of_cell(item: Item, data: memoryview, limits: ReadLimits) -> EncodedClip:
    check_item_size(len(data), limits)
    if len(data) <= limits.spool_bytes:
        return EncodedClip(item, data=bytes(data))
    path = spool("", lambda file: file.write(data))
    return EncodedClip(item, path=path, delete_path=True)


def _make_item(
    part: ContainerSlice, row: int, values: dict[str, Any], path: str | None, item: Item | None
) -> Item:
    truth = make_truth(values.get("labels"), values.get("label"))
    described = {**values, "path": path} if "path" not in values else values
    metadata = make_metadata(described)
    return Item(
        clip_id=make_clip_id(part.uri, row=row) if item is None else item.clip_id,
        uri=part.uri,
        row=row,
        start_s=None if item is None else item.start_s,
        end_s=None if item is None else item.end_s,
        truth=truth if item is None or item.truth is None else item.truth,
        metadata=metadata if item is None or item.metadata is None else item.metadata,
        size=part.size,
        version=part.version,
    )


def _with_class_names(
    values: dict[str, Any], class_names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    for column, names in class_names.items():
        if column in values:
            values[column] = _named(values[column], names)
    return values


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        if value == -1:  # Hugging Face's mark for "no label"
            return None
        return names[value] if 0 <= value < len(names) else value
    return value


def _clip_at_path(item: Item, part: ContainerSlice, path: str, limits: ReadLimits) -> EncodedClip:
    try:
        url = resolve(part.url, path)
    except (OSError, ValueError, EarmarkError) as error:
        raise ReadError(f"row {item.row} has no bytes, and its path {path!r}: {error}") from error
    if _lies_here(url) and not urls.is_local(part.url):
        raise ReadError(
            f"row {item.row} has no bytes, and its path {path!r} lies on this machine, where a "
            "file from elsewhere cannot point; copy the Parquet file here to allow it"
        )
    fetched = fetch(url, None, limits)
    if fetched.error is not None:
        tried = dataclasses.replace(item, uri=printable(public_uri(url)))
        failure = read_failure(tried, fetched.error)
        text = f"row {item.row} has no bytes, and its path {path!r}: {failure.message}"
        raise ReadError(text, error_type=failure.error_type)
    return EncodedClip(item, data=fetched.data, path=fetched.path, delete_path=fetched.is_temporary)


def _lies_here(url: str) -> bool:
    """Whether its bytes are on this machine, be it behind others (``zip://a.wav::/b.zip``)."""
    return urls.is_local(url) or urls.is_local(url.rpartition("::")[2])


@functools.lru_cache(maxsize=64)  # asked for every row of a manifest
def _folder_of(url: str) -> str:
    return urls.parent(url)


def resolve(listing_url: str, path: str) -> str:
    """What ``path`` means inside the file at ``listing_url``: relative to the file's folder."""
    if not urls.is_local(path) or path.startswith(("/", "~", "file://", "local://")):
        return urls.normalise(path)
    url = urls.normalise(urls.join(_folder_of(listing_url), path))
    if urls.is_local(url) or ".." not in path.split("/"):
        return url
    start, mark, rest = url.partition("://")
    return start + mark + posixpath.normpath(rest)
