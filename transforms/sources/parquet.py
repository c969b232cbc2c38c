"""Parquet files with an audio column: their index, and the items of a range of rows.

The audio column is found by its type, the Hugging Face layout ``struct<bytes, path>`` or binary; if
several have such a type, by their first rows. A row without bytes but with a path stands for the
file at that path. The other columns are metadata; a ``ClassLabel`` becomes its name.

Memory is bounded by the largest page that ``max_page_bytes`` allows, whatever the footer says
(``parquet_pages``). A cell beyond ``spool_bytes`` goes to a temporary file.
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

from transforms.decoding.formats.audio_starts import begins_like_audio
from transforms.decoding.formats.encoded import Encoded
from transforms.decoding.formats.not_audio import describe_not_audio
from transforms.errors import ContainerError, EarmarkError, ReadError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item
from transforms.sources.clip_ids import (
    make_clip_id,
    make_metadata,
    make_truth,
    printable,
    read_failure,
    with_description,
)
from transforms.sources.fetching import RangeReader, ReadLimits, check_item_size, fetch, spool
from transforms.sources.file_kinds import NOT_AUDIO_EXTENSIONS, extension, is_audio_name
from transforms.sources.parquet_pages import ColumnChunk, measure_row_group, read_chunks
from transforms.sources.tables.columns import URI_COLUMNS
from transforms.sources.tables.samples import (
    ARRAY,
    RATE,
    is_array,
    is_samples_struct,
    join_pair,
    sample_columns,
    wav_of_samples,
)
from transforms.sources.tar import container_item
from transforms.storage import reading, urls
from transforms.storage.secrets import public_uri

_BATCH_BYTES = 16 << 20
# If each row had the largest entry of its dictionary, which is rare.
_MAX_DICTIONARY_BATCH_BYTES = 64 << 20
_MAX_BATCH_ROWS = 1024
# Rows, and bytes of each, that tell what a column holds.
_FIRST_ROWS = 8
_HEAD_BYTES = 4096
_BUFFER_BYTES = 64 << 10
_UNREADABLE = (ValueError, OverflowError, KeyError, pa.ArrowException)
# A run of equal values takes a few bytes, however long it is; rows with audio take more than a byte
# each. A file may have this many rows whatever its size.
_MIN_BOUND_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class AudioColumn:
    """The audio column of a Parquet file: ``struct<bytes, path>``, binary, or decoded samples.

    ``path_column`` names the file of a binary column. ``class_names`` has the names of each
    ``ClassLabel`` column.
    ``is_pair`` says that decoded samples have their rate in a column of its own.
    """

    name: str
    is_struct: bool
    path_column: str | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_pair: bool = False


@dataclass(frozen=True, slots=True)
class ParquetIndex:
    """The facts of a Parquet file's footer.

    ``row_groups`` are rows and decompressed bytes of each row group that has rows. ``note`` is what
    the user should know of the choice of the column, or None.
    """

    audio: AudioColumn | None
    columns: tuple[str, ...]
    row_groups: tuple[tuple[int, int], ...]
    note: str | None = None


class OpenParquet:
    """A Parquet file that is read in bounded memory.

    Attributes:
        num_rows: Rows of each row group, by the footer.
        names: Names of all columns; of two with one name, only the first is read.
    """

    def __init__(
        self,
        file: pq.ParquetFile,
        stream: BinaryIO,
        reader: RangeReader | None,
        uri: str,
    ) -> None:
        self.file = file
        self._stream = stream
        self._reader = reader
        self.uri = uri
        self.num_rows = tuple(max(0, group.num_rows) for group in self.groups())
        self.names = tuple(dict.fromkeys(file.schema_arrow.names))

    def groups(self) -> list[pq.RowGroupMetaData]:
        """Return pyarrow's metadata of each row group; its ``column`` must not be called."""
        metadata = self.file.metadata
        return [metadata.row_group(number) for number in range(metadata.num_row_groups)]

    def _chunks(self, number: int, columns: Sequence[str] | None) -> dict[int, ColumnChunk]:
        """Return the leaf columns of a row group by number: all, or those below ``columns``."""
        schema = self.file.schema
        groups = read_chunks(self._stream)
        if len(groups) != len(self.num_rows) or len(groups[number]) != len(schema):
            raise ValueError("the footer is damaged")
        leaves = dict(enumerate(groups[number]))
        if columns is None:
            return leaves
        prefixes = tuple(f"{name}." for name in columns)
        return {
            leaf: chunk
            for leaf, chunk in leaves.items()
            if f"{schema.column(leaf).path}.".startswith(prefixes)
        }

    def batches(
        self,
        number: int,
        max_page_bytes: int,
        columns: Sequence[str] | None = None,
        max_rows: int = _MAX_BATCH_ROWS,
    ) -> Iterator[pa.RecordBatch]:
        """Yield a row group in batches of about 16 MB; ``columns`` is None for all.

        A remote row group is fetched once, for its headers and its values. If it is too large for
        that, the headers are requested first, in small blocks. Raises ``ContainerError`` if a
        decompressed page exceeds ``max_page_bytes``, the row group is damaged, or rows are missing.
        """
        expected_rows, num_rows = self.num_rows[number], 0
        try:
            chunks = self._chunks(number, columns)
            if self._reader is not None:
                self._reader.hold((chunk.start, chunk.stop) for chunk in chunks.values())
            cost = measure_row_group(self._stream, self.file.schema, expected_rows, chunks)
            if cost.largest_bytes > max_page_bytes:
                raise ContainerError(
                    f"a page, or a column of lists, has {cost.largest_bytes} bytes decompressed; "
                    f"at most {max_page_bytes} are allowed; to allow more, raise "
                    "read.max_page_bytes, or write the file with smaller pages"
                )
            size = min(
                max_rows,
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
        if num_rows < expected_rows:
            raise ContainerError(f"a row group of {expected_rows} rows ends after {num_rows}")

    def first_values(self, name: str, max_page_bytes: int) -> list[Any]:
        """Return the first few values of a column; none if they cannot be read."""
        for number, num_rows in enumerate(self.num_rows):
            if num_rows:
                with suppress(ContainerError):  # reading the rows will report it
                    batch = next(self.batches(number, max_page_bytes, [name], _FIRST_ROWS), None)
                    return [] if batch is None else [_value(one) for one in batch.column(0)]
        return []

    def check_num_rows(self) -> None:
        """Raise ``ContainerError`` for more than a million rows, and fewer bytes than rows."""
        num_rows = sum(self.num_rows)
        num_bytes = self._stream.seek(0, io.SEEK_END)
        if num_rows > max(_MIN_BOUND_ROWS, num_bytes):
            raise ContainerError(
                f"{self.uri}: its footer declares {num_rows} rows, but the file has {num_bytes} "
                "bytes; a row takes at least one"
            )


@contextmanager
def open_parquet(url: str, uri: str) -> Iterator[OpenParquet]:
    """Open a Parquet file, or raise ``ContainerError`` if it is not a whole one."""
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
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ContainerError(f"{uri}: is not a whole Parquet file: {error}") from error
        with file:
            yield OpenParquet(file, stream, reader, uri)


def index_parquet(
    url: str, uri: str, max_page_bytes: int = ReadLimits().max_page_bytes
) -> ParquetIndex:
    """Read a Parquet file's footer, and its first rows where that does not tell what is audio.

    Errors are those of ``open_parquet``.
    """
    with open_parquet(url, uri) as opened:
        audio, note = _choose_audio_column(opened, max_page_bytes)
        if audio is not None:
            opened.check_num_rows()
        groups = ((group.num_rows, max(0, group.total_byte_size)) for group in opened.groups())
        row_groups = tuple(group for group in groups if group[0] > 0)
        return ParquetIndex(audio, opened.names, row_groups, note)


def _choose_audio_column(
    opened: OpenParquet, max_page_bytes: int
) -> tuple[AudioColumn | None, str | None]:
    """Choose the audio column by the schema, and by the first rows where that leaves a doubt.

    Returns:
        The column, or None if there is none; and what the user should know of it, or None.
    """
    schema = opened.file.schema_arrow
    first = find_audio_column(schema)
    declared = _declared_audio(schema)
    if declared:
        why = "the first that the schema declares as Audio"
        return first, _describe_choice(declared, declared[0], why)
    samples = sample_columns(schema)
    if first is not None and first.name in samples:
        return first, _describe_choice(samples, first.name, "the first of decoded samples")
    candidates = _candidates(schema)
    if candidates in ([], ["audio"]):
        return first, None
    found = {name: _look_at(opened, name, max_page_bytes) for name in candidates}
    possible = [name for name, words in found.items() if words in (_AUDIO, _UNKNOWN, None)]
    audible = [name for name in possible if found[name] == _AUDIO]
    if audible:
        why = "the first with rows that begin like audio"
        return _audio_column(schema, audible[0]), _describe_choice(possible, audible[0], why)
    if first is not None and first.name in possible:
        why = "the first by name and type"
        note = _describe_choice(possible, first.name, why)
        if found[first.name] == _UNKNOWN:
            doubt = "its first rows begin like no kind of audio"
            note = f"{note}; {doubt}" if note else f"column {first.name!r} is read, though {doubt}"
        return first, note
    others = [f"column {name!r} holds {words}" for name, words in found.items() if words]
    return None, "; ".join(others) or None


def _describe_choice(possible: Sequence[str], chosen: str, why: str) -> str | None:
    others = ", ".join(repr(name) for name in possible if name != chosen)
    return f"column {chosen!r} is read, and not {others}: it is {why}" if others else None


_AUDIO, _UNKNOWN = "audio", ""


def _look_at(opened: OpenParquet, name: str, max_page_bytes: int) -> str | None:
    """Return what the first values of a column are: ``_AUDIO``, ``_UNKNOWN``, or else in words.

    None if there are none.
    """
    found: set[str] = set()
    for value in opened.first_values(name, max_page_bytes):
        data, path = value, None
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        if isinstance(data, memoryview) and len(data):
            head = bytes(data[:_HEAD_BYTES])
            if begins_like_audio(head):
                return _AUDIO
            found.add(describe_not_audio(Encoded(head)) or _UNKNOWN)
        elif isinstance(path, str) and is_audio_name(path):
            return _AUDIO
        elif isinstance(path, str):
            is_other = extension(path) in NOT_AUDIO_EXTENSIONS
            found.add(f"files such as {path}" if is_other else _UNKNOWN)
    return min(found, default=None)  # unknown comes first


def _declared_audio(schema: pa.Schema) -> list[str]:
    features = _huggingface_features(schema)
    structs = [one.name for one in schema if _is_audio_struct(one.type)]
    return [name for name in structs if _declared_kind(features, name) == "Audio"]


def _candidates(schema: pa.Schema) -> list[str]:
    """Return the columns that may be audio by their types, the likeliest first.

    Those that Hugging Face's metadata declares as pictures and the like are not among them. A
    column ``uri`` shows that the table is a manifest, unless a binary column is named ``audio``.
    """
    features = _huggingface_features(schema)
    fields = [one for one in schema if _declared_kind(features, one.name) in _MAYBE_AUDIO]
    structs = [one.name for one in fields if _is_audio_struct(one.type)]
    binaries = [one.name for one in fields if _is_binary(one.type)]
    if "uri" in schema.names:
        binaries = [name for name in binaries if name == "audio"]
    return [*sorted(structs, key="audio".__ne__), *sorted(binaries, key="audio".__ne__)]


def find_audio_column(schema: pa.Schema, chosen: str | None = None) -> AudioColumn | None:
    """Find the audio column by the schema, unless it is already chosen; None if there is none.

    The first of these: the column that Hugging Face's metadata calls ``Audio``; a
    ``struct<bytes, path>``, preferably named ``audio``; a binary column named ``audio``; decoded
    samples, as ``struct<array, sampling_rate>`` or two columns; the only binary column, unless a
    column ``uri`` shows that the table is a manifest.
    """
    if chosen is not None and chosen in schema.names:
        return _audio_column(schema, chosen)
    candidates = _declared_audio(schema) or _candidates(schema)
    samples = sample_columns(schema)
    for name in candidates[:1]:
        is_struct = _is_audio_struct(schema.field(schema.names.index(name)).type)
        if is_struct or name == "audio" or (len(candidates) == 1 and not samples):
            return _audio_column(schema, name)
    return _audio_column(schema, samples[0]) if samples else None


def _audio_column(schema: pa.Schema, name: str) -> AudioColumn:
    features = _huggingface_features(schema)
    class_names = {column: _class_names(features.get(column)) for column in schema.names}
    classes = {column: names for column, names in class_names.items() if names}
    fields = {one.name: one for one in reversed(list(schema))}  # of two with one name, the first
    kind = fields[name].type
    if _is_audio_struct(kind) or is_samples_struct(kind) or is_array(kind):
        return AudioColumn(name, True, None, classes, is_pair=is_array(kind))
    paths = [one for one in URI_COLUMNS if one in fields and _is_text(fields[one].type)]
    return AudioColumn(name, False, paths[0] if paths else None, classes)


# What Hugging Face's metadata may call a column with audio; "" is for none. A video has a track.
_MAYBE_AUDIO = ("", "Audio", "Value", "Video")


def _declared_kind(features: Mapping[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


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
    """Yield the items of a range of rows, in order, then the failures; ``wanted`` is empty for all.

    After a row group that cannot be read, the next one is read. One failure of the container
    reports all missing rows; a wanted item that is missing has a failure of its own.
    """
    limits = limits or ReadLimits()
    rows: dict[int, list[Item]] = {}
    for item in wanted:
        rows.setdefault(-1 if item.row is None else item.row, []).append(item)
    damage: list[ContainerError] = []
    try:
        with open_parquet(part.url, part.uri) as opened:
            audio = find_audio_column(opened.file.schema_arrow, part.column)
            if audio is None:
                names = ", ".join(opened.names[:20])
                raise ContainerError(f"{part.uri}: no column holds audio (columns: {names})")
            opened.check_num_rows()
            for row, values in _rows(opened, part, audio, frozenset(rows), damage, limits):
                items = rows.pop(row) if wanted else [None]
                yield from (_clip(part, audio, row, dict(values), item, limits) for item in items)
    except ContainerError as error:
        damage.append(error)
    message = "; ".join(str(one) for one in damage[:5])
    for item in (item for items in rows.values() for item in items):
        yield read_failure(item, _row_error(item, part, message, damage))
    if damage and not wanted:
        item = container_item(part, "rows")
        yield read_failure(item, ContainerError(message), is_container=True)


def _row_error(
    item: Item, part: ContainerSlice, message: str, damage: Sequence[ContainerError]
) -> ReadError:
    if not damage:
        return ReadError(f"{part.uri} has no row {item.row}")
    cause = damage[0].__cause__ or damage[0]
    return ReadError(f"row {item.row} cannot be read: {message}", error_type=type(cause).__name__)


def _rows(
    opened: OpenParquet,
    part: ContainerSlice,
    audio: AudioColumn,
    wanted: frozenset[int],
    damage: list[ContainerError],
    limits: ReadLimits,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row numbers and values; append errors to ``damage``."""
    first = 0
    for number, num_rows in enumerate(opened.num_rows):
        start, stop = first, first + num_rows
        first = stop
        low = max(start, part.start)
        high = stop if part.stop is None else min(stop, part.stop)
        if low >= high or (wanted and not any(low <= row < high for row in wanted)):
            continue
        row = start
        try:
            for batch in opened.batches(number, limits.max_page_bytes):
                if audio.is_pair:
                    batch = join_pair(batch)
                for offset in range(batch.num_rows):
                    if low <= row < high and (not wanted or row in wanted):
                        yield row, row_values(batch, offset)
                    row += 1
        except ContainerError as error:
            text = f"{part.uri}: rows {max(row, low)} to {high - 1} cannot be read: {error}"
            damage.append(ContainerError(text))


def row_values(batch: pa.RecordBatch, offset: int) -> dict[str, Any]:
    """Return the values of a row by column; binary ones are views of the batch."""
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values.setdefault(name, _value(column[offset]))
    return values


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the values of each row, like ``row_values``."""
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name not in columns:
            columns[name] = _values(column)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    is_special = _is_audio_struct(column.type) or is_samples_struct(column.type)
    if not _is_binary(column.type) and not is_special:
        with suppress(*_UNREADABLE):
            return list(column.to_pylist())
    return [_value(scalar) for scalar in column]


class UnreadableValue(str):
    """The reason why a value has no Python equivalent, in place of that value."""


def _value(scalar: pa.Scalar) -> Any:
    try:
        if not scalar.is_valid:
            return None
        if _is_binary(scalar.type):
            return memoryview(scalar.as_buffer())
        if _is_audio_struct(scalar.type):
            return {name: _value(scalar[name]) for name in ("bytes", "path")}
        if is_samples_struct(scalar.type):
            return _samples_of(scalar)
        return scalar.as_py()
    except _UNREADABLE as error:
        # Text that is not UTF-8, or a date before the year 1.
        return UnreadableValue(f"<cannot be read: {error}>")


def _samples_of(scalar: pa.StructScalar) -> dict[str, Any]:
    """Return decoded samples as the bytes of a WAV file, or the reason why they are none."""
    names = {scalar.type.field(number).name for number in range(len(scalar.type))}
    path = _value(scalar["path"]) if "path" in names else None
    if not scalar[ARRAY].is_valid:
        return {"bytes": None, "path": path}
    try:
        data = memoryview(wav_of_samples(scalar[ARRAY], scalar[RATE].as_py()))
    except ReadError as error:
        return {"bytes": None, "path": UnreadableValue(str(error))}
    return {"bytes": data, "path": path}


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
    for column, names in audio.class_names.items():
        if column in values:
            values[column] = _named(values[column], names)
    item = _described(item, part, row, values, path)
    try:
        if data is not None:
            check_item_size(len(data), limits)
            if len(data) <= limits.spool_bytes:
                return EncodedClip(item, data=bytes(data))
            spooled = spool("", lambda file: file.write(data))
            return EncodedClip(item, path=spooled, delete_path=True)
        if not path:
            raise ReadError(f"row {row} has neither bytes nor a path")
        if isinstance(path, UnreadableValue):
            raise ReadError(f"row {row}: {path}")
        return _clip_at_path(item, part, path, limits)
    except ReadError as error:
        return read_failure(item, error)


def _described(
    item: Item | None, part: ContainerSlice, row: int, values: dict[str, Any], path: str | None
) -> Item:
    """Return a row's item, or a manifest's item with what it lacks."""
    if item is None:
        clip_id = make_clip_id(public_uri(part.url), row=row)
        item = Item(clip_id, part.uri, row=row, size=part.size, version=part.version)
    truth = make_truth(values.get("labels"), values.get("label"))
    return with_description(item, truth, make_metadata({"path": path, **values}))


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
    """Return whether the bytes are on this machine, also in ``zip://a.wav::/b.zip``."""
    return urls.is_local(url) or urls.is_local(url.rpartition("::")[2])


@functools.lru_cache(maxsize=64)  # called for every row of a manifest
def _folder_of(url: str) -> str:
    return urls.parent(url)


def resolve(listing_url: str, path: str) -> str:
    """Resolve a path from the file at ``listing_url``, relative to that file's folder."""
    if not urls.is_local(path) or path.startswith(("/", "~", "file://", "local://")):
        return urls.normalise(path)
    url = urls.normalise(urls.join(_folder_of(listing_url), path))
    if urls.is_local(url) or ".." not in path.split("/"):
        return url
    start, mark, rest = url.partition("://")
    return start + mark + posixpath.normpath(rest)
