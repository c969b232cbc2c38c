"""Items of a Parquet file with an audio column: what it holds, and reading a range of its rows.

Part of ``sources``. The audio column is found by type: the Hugging Face layout
``struct<bytes, path>``, or binary. A row without bytes but with a path stands for the file at
that path. The other columns are metadata; a ``ClassLabel`` is given by its name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transforms import storage
from transforms.clip_ids import (
    make_clip_id,
    make_metadata,
    make_truth,
    printable,
    read_failure,
)
from transforms.errors import ContainerError, ReadError, UsageError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item
from transforms.tar_source import container_item

URI_COLUMNS = ("uri", "path", "file", "audio_filepath", "filename")
_BATCH_BYTES = 16 << 20
_MAX_BATCH_ROWS = 256


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


@contextmanager
def open_parquet(url: str, uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, read in bounded memory.

    Raises:
        ContainerError: It cannot be opened, or is not a whole Parquet file.
    """
    try:
        stream = storage.open_read(url)
    except OSError as error:
        raise ContainerError(f"{uri}: {error.strerror or error}") from error
    with stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise ContainerError(f"{uri}: is not a whole Parquet file: {error}") from error
        with file:
            yield file


def index_parquet(url: str, uri: str) -> ParquetIndex:
    """Read a Parquet file's footer.

    Raises:
        ContainerError: It cannot be opened, or is not a whole Parquet file.
    """
    with open_parquet(url, uri) as file:
        audio = find_audio_column(file.schema_arrow)
        groups = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            num_bytes = sum(
                group.column(column).total_uncompressed_size
                for column in range(group.num_columns)
                if audio is not None
                and group.column(column).path_in_schema.split(".")[0] == audio.name
            )
            if group.num_rows:
                groups.append((group.num_rows, num_bytes))
        return ParquetIndex(audio, tuple(file.schema_arrow.names), tuple(groups))


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


def read_parquet(part: ContainerSlice, wanted: tuple[Item, ...]) -> Iterator[EncodedClip | Failure]:
    """The items of a range of rows, in order, then what is broken.

    A row group that cannot be read does not keep the next ones from being read; what is missing
    is told in one failure of the container, or, of items asked for, in a failure of each.

    Args:
        part: The slice.
        wanted: Items to read, by row; empty means all there are.
    """
    rows: dict[int, list[Item]] = {}
    for item in wanted:
        rows.setdefault(-1 if item.row is None else item.row, []).append(item)
    damage: list[ContainerError] = []
    try:
        with open_parquet(part.url, part.uri) as file:
            audio = find_audio_column(file.schema_arrow)
            if audio is None:
                names = ", ".join(file.schema_arrow.names)
                raise ContainerError(f"{part.uri}: no column holds audio (columns: {names})")
            for row, values in _rows(file, part, frozenset(rows), damage):
                items = rows.pop(row) if wanted else [None]
                yield from (_clip(part, audio, row, values, item) for item in items)
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
    file: pq.ParquetFile,
    part: ContainerSlice,
    wanted: frozenset[int],
    damage: list[ContainerError],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers and their values; what could not be read is added to ``damage``."""
    first = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        start, stop = first, first + group.num_rows
        first = stop
        low = max(start, part.start)
        high = stop if part.stop is None else min(stop, part.stop)
        if low >= high or (wanted and not any(low <= row < high for row in wanted)):
            continue
        row_bytes = group.total_byte_size // max(1, group.num_rows)
        batch_size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        row = start
        try:
            for batch in file.iter_batches(batch_size, row_groups=[number], use_threads=False):
                for offset in range(batch.num_rows):
                    if low <= row < high and (not wanted or row in wanted):
                        yield row, _values(batch, offset)
                    row += 1
        except (OSError, pa.ArrowException) as error:
            text = f"{part.uri}: rows {max(row, low)} to {high - 1} cannot be read: {error}"
            damage.append(ContainerError(text))


def _values(batch: pa.RecordBatch, offset: int) -> dict[str, Any]:
    return {name: _value(batch.column(name)[offset]) for name in batch.schema.names}


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        # Text that is not UTF-8, a date before the year 1: Python has no value for it.
        return f"<cannot be read: {error}>"


def _clip(
    part: ContainerSlice, audio: AudioColumn, row: int, values: dict[str, Any], item: Item | None
) -> EncodedClip | Failure:
    value = values.pop(audio.name)
    if isinstance(value, str):
        data, path = None, None
    elif audio.is_struct:
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
    else:
        data, path = value, values.get(audio.path_column) if audio.path_column else None
    item = _make_item(part, row, _with_class_names(values, audio.class_names), path, item)
    if data is not None:
        return EncodedClip(item, data=data)
    if not path:
        is_told = isinstance(value, str)  # what `_value` says of one that cannot be read
        text = f": {value}" if is_told else " has neither bytes nor a path"
        return read_failure(item, ReadError(f"row {row}{text}"))
    return _clip_at_path(item, part, path)


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


def _clip_at_path(item: Item, part: ContainerSlice, path: str) -> EncodedClip | Failure:
    url = resolve(part.url, path)
    try:
        if storage.is_local(url):
            storage.stat(url)
            return EncodedClip(item, path=storage.local_path(url))
        return EncodedClip(item, data=storage.read_bytes(url))
    except (OSError, ValueError, UsageError) as error:
        tried = dataclasses.replace(item, uri=printable(storage.public_uri(url)))
        failure = read_failure(tried, error)
        text = f"row {item.row} has no bytes, and its path {path!r}: {failure.message}"
        return read_failure(item, ReadError(text, error_type=failure.error_type))


@functools.lru_cache(maxsize=64)  # asked for every row of a manifest
def _folder_of(url: str) -> str:
    return storage.parent(url)


def resolve(listing_url: str, path: str) -> str:
    """What ``path`` means inside the file at ``listing_url``: relative to the file's folder."""
    if not storage.is_local(path) or path.startswith(("/", "~", "file://")):
        return storage.normalise(path)
    url = storage.normalise(storage.join(_folder_of(listing_url), path))
    if storage.is_local(url) or ".." not in path.split("/"):
        return url
    start, mark, rest = url.partition("://")
    return start + mark + posixpath.normpath(rest)
