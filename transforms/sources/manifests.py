"""Manifests: tables that list what to label, a row per item, with labels and metadata.

JSON Lines, CSV (also with semicolons or tabs) and Parquet are read as streams, text also if it is
compressed with gzip. A line that cannot be read is a failure that names the file and the line, and
the next line is read. The layouts of other tools (``tables``) give rows with the same columns.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transforms.errors import ContainerError, InputError, ReadError
from transforms.records import Failure, Item
from transforms.sources.clip_ids import make_clip_id, printable, read_failure
from transforms.sources.fetching import ReadLimits
from transforms.sources.file_kinds import (
    extension,
    is_audio_name,
    manifest_extension,
)
from transforms.sources.manifest_rows import (
    COLUMNS_OF_OURS,
    ContainerRow,
    ManifestRow,
    is_ours,
    line_failure,
    read_row,
)
from transforms.sources.parquet import open_parquet, rows_of
from transforms.sources.tables.audioset import Segment, is_audioset, read_segments
from transforms.sources.tables.columns import (
    TableFormat,
    TableSettings,
    check_columns,
    labels_with_commas,
    notes_on_columns,
)
from transforms.sources.tables.kaldi import SCP_NAME, SEGMENTS_NAME, read_kaldi
from transforms.sources.tables.lhotse import is_lhotse, row_of_lhotse
from transforms.sources.tables.text import CsvLines, CsvTable, Lines, open_text, read_jsonl
from transforms.storage import filesystem, listing, urls
from transforms.storage.secrets import public_uri

__all__ = [
    "TABLES_IN_FOLDERS",
    "ContainerRow",
    "ManifestRow",
    "format_in_folder",
    "is_table_name",
    "read_manifest",
]

_MAX_COLUMNS = 1000  # of JSON Lines, whose lines may each have others
_ENDINGS_OF: Mapping[TableFormat, frozenset[str]] = {
    "audiofolder": frozenset({".csv", ".jsonl", ".parquet"}),
    "lhotse": frozenset({".jsonl", ".ndjson", ".json"}),
    "nemo": frozenset({".jsonl", ".ndjson", ".json"}),
    "audioset": frozenset({".csv", ".tsv"}),
}
_DESCRIBED: Mapping[TableFormat, str] = {
    "audiofolder": "the metadata of a Hugging Face audio folder",
    "kaldi": "a Kaldi wav.scp",
    "lhotse": "a lhotse manifest",
    "nemo": "a NeMo manifest",
    "audioset": "AudioSet's segments",
}
# The tables of a format by which it is known in a folder.
TABLES_IN_FOLDERS: Mapping[TableFormat | None, frozenset[str]] = {
    "audiofolder": frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"}),
    "kaldi": frozenset({SCP_NAME}),
}


def is_table_name(name: str, settings: TableSettings) -> bool:
    """Return whether a file that is named as an input is a manifest, by its name."""
    if manifest_extension(name) or extension(name) == ".scp":
        return True
    return settings.format == "kaldi" and name == SEGMENTS_NAME


def format_in_folder(name: str) -> TableFormat | None:
    """Return the format whose table in a folder has this name."""
    formats = (kind for kind, names in TABLES_IN_FOLDERS.items() if name in names)
    return next(formats, None)


def _ignore(text: str) -> None:
    """Take no note."""


def read_manifest(
    url: str,
    max_page_bytes: int = ReadLimits().max_page_bytes,
    settings: TableSettings | None = None,
    note: Callable[[str], object] = _ignore,
    warn: Callable[[str], object] = _ignore,
) -> Iterator[ManifestRow | ContainerRow | Failure]:
    """Yield the rows of a manifest, in order.

    Args:
        url: The manifest.
        max_page_bytes: Bound for a decompressed page of Parquet.
        settings: How to read it; None for what it says itself.
        note: Called with what the table is read as, a sentence.
        warn: Called with each doubt about what it means.

    Raises:
        InputError: The manifest cannot be read as what it is said to be, has no column that names
            files, or has columns that contradict each other.
    """
    table = _Table(url, max_page_bytes, settings or TableSettings(), note, warn)
    try:
        for line, values in table.lines():
            if isinstance(values, ReadError):
                yield line_failure(url, line, values)
            else:
                yield read_row(url, line, values, table.settings)
    except (OSError, EOFError, zlib.error, ContainerError) as error:
        item = Item(clip_id=make_clip_id(table.uri), uri=table.uri, url=url)
        yield read_failure(item, error, is_container=True)


class _Table:
    """A manifest that is read, and the doubts about it."""

    def __init__(
        self,
        url: str,
        max_page_bytes: int,
        settings: TableSettings,
        note: Callable[[str], object],
        warn: Callable[[str], object],
    ) -> None:
        self.uri = printable(public_uri(url))
        self.settings = settings
        self._url = url
        self._max_page_bytes = max_page_bytes
        self._note = note
        self._warn = warn
        self._columns: dict[str, None] = {}  # of the rows, where no header names them
        self._has_header = False
        self._is_adapted = False  # whether the columns are ours, made of another tool's
        self._num_with_commas = 0
        self._comma_example = ""

    def lines(self) -> Lines:
        """Yield the lines with the columns that rows are made of."""
        name = urls.file_name(self._url)
        ending = extension(name) if extension(name) == ".parquet" else manifest_extension(name)
        ending = ending.removesuffix(".gz")
        given = self.settings.format
        is_kaldi = ending == "" and (extension(name) == ".scp" or given == "kaldi")
        if not is_kaldi and ending not in _READERS:
            endings = ", ".join(sorted(_READERS))
            raise InputError(f"{self.uri}: a manifest ends in one of {endings}")
        if given is not None and ending not in _ENDINGS_OF.get(given, {""}):
            endings = ", ".join(sorted(_ENDINGS_OF.get(given, {SCP_NAME, SEGMENTS_NAME})))
            raise InputError(
                f"{self.uri} is not {_DESCRIBED[given]}, which --format {given} says: expected a "
                f"name that ends in {endings}"
            )
        for line, values in self._read_kaldi() if is_kaldi else _READERS[ending](self):
            if not isinstance(values, ReadError):
                if not self._has_header and len(self._columns) < _MAX_COLUMNS:
                    self._columns |= dict.fromkeys(values)
                text = labels_with_commas(values, self.settings)
                self._num_with_commas += text is not None
                self._comma_example = self._comma_example or text or ""
            yield line, values
        if self._columns:
            self._check(self._columns)
        if self._num_with_commas:
            self._warn(
                f"{self.uri}: labels hold commas in {self._num_with_commas:,} rows, such as "
                f"{self._comma_example!r}, and each is taken as one label. If they are several: "
                '--label-separator ","'
            )

    def _say(self, kind: TableFormat, more: str = "") -> None:
        if self.settings.format is None:
            self._note(f"{self.uri} is read as {_DESCRIBED[kind]}{more}.")

    def _check(self, columns: Iterable[str]) -> None:
        """Refuse a table whose columns do not fit, and say what may be meant otherwise."""
        names = list(columns)
        stem = urls.file_name(self._url).partition(".")[0]
        if not self._is_adapted and "file_name" in names and stem == "metadata":
            self._say("audiofolder")
        elif self.settings.format == "audiofolder" and "file_name" not in names:
            raise InputError(
                f"{self.uri} has no column file_name, which {_DESCRIBED['audiofolder']} has; read "
                "it without --format audiofolder"
            )
        check_columns(names, self.uri, self.settings)
        if not self._is_adapted and not is_ours(set(names)):
            for text in notes_on_columns(names, self.uri, self.settings):
                self._warn(text)

    def _read_csv(self) -> Lines:
        settings = self.settings
        with open_text(self._url, self.uri, settings.encoding, newline="") as text:
            csv_lines = CsvLines(text, self.uri)
            if is_audioset(csv_lines) or settings.format == "audioset":
                self._say("audioset", "; each is the file of its name")
                yield from self._read_segments(csv_lines)
                return
            is_tsv = manifest_extension(urls.file_name(self._url)).startswith(".tsv")
            table = CsvTable(csv_lines, self.uri, "\t" if is_tsv else ",")
            if table.header:
                self._has_header = True
                self._check(table.header)
                yield from table.records()

    def _read_segments(self, csv_lines: CsvLines) -> Lines:
        """Yield AudioSet's segments, with their files."""
        self._is_adapted = True
        files: _FilesByStem | None = None
        for line, segment in read_segments(csv_lines):
            if isinstance(segment, ReadError):
                yield line, segment
                continue
            values: dict[str, Any] = {
                "YTID": segment.video,
                "start_seconds": segment.start_s,
                "end_seconds": segment.end_s,
                "labels": list(segment.labels),
            }
            if self.settings.pattern is None:
                files = files or _FilesByStem(self.settings.root or urls.parent(self._url))
                found = files.find(segment)
                if isinstance(found, ReadError):
                    yield line, found
                    continue
                values["uri"] = found
            yield line, values

    def _read_kaldi(self) -> Lines:
        self._is_adapted = True
        segments = urls.join(urls.parent(self._url), SEGMENTS_NAME)
        is_divided = filesystem.exists(segments)
        self._say("kaldi", ", divided by the segments beside it" if is_divided else "")
        yield from read_kaldi(self._url, self.uri, self.settings.encoding)

    def _read_jsonl(self) -> Lines:
        kind: TableFormat | None = self.settings.format
        is_first = True
        with open_text(self._url, self.uri, self.settings.encoding, newline="\n") as text:
            for line, values in read_jsonl(text, self.uri):
                row = values
                if isinstance(row, Mapping) and is_first:
                    is_first = False
                    kind = kind or _recognise(row)
                    if kind is not None:
                        self._say(kind)
                if isinstance(row, Mapping) and kind == "lhotse":
                    self._is_adapted = True
                    row = row_of_lhotse(row)
                yield line, row

    def _read_parquet(self) -> Lines:
        with open_parquet(self._url, self.uri) as opened:
            names = list(opened.names)
            self._has_header = True
            self._check(names)
            opened.check_num_rows()
            # Of a table of ours, only the columns used: most of its bytes are embeddings.
            columns = (
                [name for name in names if name in COLUMNS_OF_OURS] if is_ours(set(names)) else None
            )
            row = 0
            try:
                for number in range(len(opened.num_rows)):
                    for batch in opened.batches(number, self._max_page_bytes, columns):
                        for values in rows_of(batch):
                            yield f"row {row}", values
                            row += 1
            except ContainerError as error:
                message = f"{self.uri}: cannot be read past row {row}: {error}"
                raise ContainerError(message) from error


_READERS: Mapping[str, Callable[[_Table], Lines]] = {
    ".jsonl": _Table._read_jsonl,
    ".ndjson": _Table._read_jsonl,
    ".json": _Table._read_jsonl,
    ".csv": _Table._read_csv,
    ".tsv": _Table._read_csv,
    ".parquet": _Table._read_parquet,
}


def _recognise(values: Mapping[str, Any]) -> TableFormat | None:
    """Return the tool that writes lines like this."""
    if is_lhotse(values):
        return "lhotse"
    return "nemo" if {"audio_filepath", "duration"} <= values.keys() else None


class _FilesByStem:
    """The audio files below a folder by their names without extension."""

    def __init__(self, folder: str) -> None:
        self._folder = urls.normalise(folder)
        self._urls: dict[str, list[str]] = defaultdict(list)
        for info in listing.list_files(self._folder):
            name = urls.file_name(info.url)
            if is_audio_name(name):
                self._urls[name.rpartition(".")[0]].append(info.url)

    def find(self, segment: Segment) -> str | ReadError:
        """Return the URL of a segment's file."""
        for stem in segment.stems():
            found = self._urls.get(stem, [])
            if len(found) > 1:
                return ReadError(f"has {len(found)} files called {stem}: {', '.join(found[:3])}")
            if found:
                return found[0]
        return ReadError(
            f"has no file called {segment.video} below {printable(public_uri(self._folder))}; "
            "--set manifest.root names the folder of the files"
        )
