"""The inputs' content: loose items and containers, each once.

Nothing that is found is silently dropped: it is an item, a counted file of another kind, a reported
duplicate, or a failure.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from transforms.errors import ContainerError, InputError, TooManyListedError, in_words
from transforms.records import Failure, Item
from transforms.sources.clip_ids import (
    for_terminal,
    labelled_by_folder,
    make_clip_id,
    occurrence_of,
    printable,
    read_failure,
    same_name,
)
from transforms.sources.fetching import ReadLimits
from transforms.sources.file_kinds import (
    NOT_AUDIO_EXTENSIONS,
    extension,
    is_audio_name,
    is_shadow_name,
    is_tar_name,
    manifest_extension,
)
from transforms.sources.manifests import (
    TABLES_IN_FOLDERS,
    ContainerRow,
    ManifestRow,
    format_in_folder,
    is_table_name,
    read_manifest,
)
from transforms.sources.parquet import ParquetIndex, index_parquet
from transforms.sources.tables.columns import URI_COLUMNS, TableSettings
from transforms.sources.tar import may_hold_audio
from transforms.storage import filesystem, listing, urls
from transforms.storage.filesystem import FileInfo
from transforms.storage.secrets import public_uri

_In = TypeVar("_In")
_Out = TypeVar("_Out")

_INDEX_THREADS = 16
_MAX_EXAMPLES = 5
_TAR_WITHOUT_AUDIO = ".tar without audio"


@dataclass(frozen=True, slots=True)
class Container:
    """A tar or a Parquet file with audio.

    Attributes:
        uri: Without signature parameters.
        url: The address to open; never written or printed.
        size: Bytes, or None if the store does not tell.
        version: Etag or modification time.
        items: The members or rows that a manifest lists; empty for all.
        row_groups: Rows and decompressed bytes of each row group of a Parquet file; empty if it
            cannot be read.
        stop: Byte or row at which reading ends (``--limit``); None for the end.
        column: The audio column of a Parquet file; None to choose it by the schema.
    """

    uri: str
    url: str = field(repr=False)
    kind: Literal["tar", "parquet"]
    size: int | None
    version: str | None
    items: tuple[Item, ...] = ()
    row_groups: tuple[tuple[int, int], ...] = ()
    stop: int | None = None
    column: str | None = None

    @property
    def can_split(self) -> bool:
        """Whether it can be cut into slices; a compressed tar cannot."""
        return self.kind == "parquet" or self.uri.lower().endswith(".tar")


@dataclass(frozen=True)
class Found:
    """The result of ``find_inputs``; items and containers are in plan order.

    Attributes:
        items: Loose files and segments of them.
        duplicates: Number of repeated listings.
        duplicate_examples: Some of their clip ids.
        skipped_by_extension: Number of files of other kinds in folders.
        failures: Lines of manifests and folders that could not be read.
        notes: Messages for the user.
        warnings: Doubts about what tables mean, which the user should see even in a quiet run.
    """

    items: tuple[Item, ...] = ()
    containers: tuple[Container, ...] = ()
    duplicates: int = 0
    duplicate_examples: tuple[str, ...] = ()
    skipped_by_extension: Counter[str] = field(default_factory=Counter)
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def find_inputs(
    inputs: Sequence[str],
    *,
    exclude: str | None = None,
    max_page_bytes: int = ReadLimits().max_page_bytes,
    max_listed: int | None = None,
    tables: TableSettings | None = None,
) -> Found:
    """List the content of the inputs.

    Args:
        inputs: Files, globs, folders, tars, Parquet files and manifests, as paths or URLs.
        exclude: The output folder, which is never part of the input.
        max_page_bytes: Bound for a decompressed page of a Parquet manifest.
        max_listed: Bound for the number of files and of rows of manifests; None for no bound.
        tables: How to read manifests; None for what they say themselves.

    Raises:
        TooManyListedError: There are more than ``max_listed``.
        InputError: An input does not exist, cannot be listed or holds nothing to label, or two
            different items have the same clip id.
        UsageError: A protocol is unknown or needs an extra that is not installed.
    """
    finder = _Finder(exclude, max_page_bytes, max_listed, tables or TableSettings())
    try:
        for text in inputs:
            finder.add(text)
        return finder.finish()
    except InputError as error:
        raise InputError(for_terminal(str(error))) from error


def check_there(inputs: Sequence[str]) -> None:
    """Refuse inputs that do not exist, without listing them; patterns are not checked.

    Raises:
        InputError: An input does not exist, or its store does not answer.
        UsageError: A protocol is unknown or needs an extra that is not installed.
    """
    for text in inputs:
        url = urls.normalise(text)
        uri = printable(public_uri(url))
        try:
            if not urls.is_glob(url) and not filesystem.exists(url):
                raise FileNotFoundError(url)
        except (OSError, ValueError) as error:
            raise InputError(for_terminal(_why(uri, error))) from error


class _Finder:
    def __init__(
        self,
        exclude: str | None,
        max_page_bytes: int,
        max_listed: int | None,
        tables: TableSettings,
    ) -> None:
        self._tables = tables
        self._max_page_bytes = max_page_bytes
        self._max_listed = max_listed
        self._num_listed = 0
        self._excluded: list[str] = []
        self._real_folders: dict[str, str] = {}
        if exclude is not None:
            folder = urls.normalise(exclude)
            self._excluded = [folder]
            if urls.is_local(folder):
                self._excluded.append(os.path.realpath(folder))
        self._bare: list[Item] = []
        self._rows: list[ManifestRow] = []
        self._rows_of: dict[str, range] = {}  # by manifest
        self._containers: dict[str, Container] = {}
        self._failures: list[Failure] = []
        self._skipped: Counter[str] = Counter()
        self._tables_read: set[str] = set()
        self._unread: dict[str, str] = {}  # tables in folders, with their formats
        self._notes: dict[str, None] = {}
        self._warnings: dict[str, None] = {}
        self._duplicates: dict[str, int] = {}

    # -- one input --

    def add(self, text: str) -> None:
        if not text.strip():
            raise InputError("an input is empty; give a file, a folder, a glob or a URL")
        url = urls.normalise(text)
        uri = printable(public_uri(url))
        try:
            if urls.is_glob(url) and not filesystem.exists(url):
                self._add_listed(url, uri, listing.glob_files, _ending(urls.file_name(url)))
            elif filesystem.is_folder(url):
                self._add_listed(url, uri, listing.list_files, named_ending=None)
            else:
                self._add_named(url, uri)
        except (OSError, ValueError) as error:
            raise InputError(_why(uri, error)) from error

    def _add_listed(
        self,
        url: str,
        uri: str,
        list_them: Callable[[str, Callable[[OSError], None]], Iterator[FileInfo]],
        named_ending: str | None,
    ) -> None:
        """Add the files of a folder, or of a glob with its ending, and what cannot be listed."""
        errors: list[OSError] = []
        files = self._kept(url, list_them(url, errors.append))
        if errors and not files:
            raise errors[0]
        for error in errors:
            name = str(error.filename or url)
            item = Item(clip_id=make_clip_id(public_uri(name)), uri=printable(name))
            # A link to itself holds nothing; a folder may hold anything.
            is_container = error.errno != errno.ELOOP
            self._failures.append(read_failure(item, error, is_container=is_container))
        if named_ending is not None and not files:
            raise InputError(f"{uri}: the pattern matches no file; check it")
        self._add_files(uri, files, named_ending)

    def _kept(self, url: str, files: Iterable[FileInfo]) -> list[FileInfo]:
        found = list(self._counted(files))
        kept = [file for file in found if not self._is_excluded(file.url)]
        if len(kept) < len(found):
            output = printable(public_uri(self._excluded[0]))
            if not kept:
                uri = printable(public_uri(url))
                raise InputError(f"{uri} lies in the output folder {output}; give another --output")
            self._notes[f"The output folder {output} is left out of the input."] = None
        return kept

    def _counted(self, listed: Iterable[_In]) -> Iterator[_In]:
        for one in listed:
            self._num_listed += 1
            if self._max_listed is not None and self._num_listed > self._max_listed:
                raise TooManyListedError(f"there are more than {self._max_listed:,} files or rows")
            yield one

    def _is_excluded(self, url: str) -> bool:
        if not self._excluded:
            return False
        names = [url]
        if urls.is_local(url):
            folder, _, name = url.rpartition("/")
            if folder not in self._real_folders:
                self._real_folders[folder] = os.path.realpath(folder)
            names.append(f"{self._real_folders[folder]}/{name}")
        return any(
            name == folder or name.startswith(folder.rstrip("/") + "/")
            for folder in self._excluded
            for name in names
        )

    def _add_named(self, url: str, uri: str) -> None:
        info = filesystem.stat(url)
        self._kept(url, [info])
        ending = extension(urls.file_name(url))
        if ending == ".parquet":
            self._add_parquets([info], manifests_too=True, must_fit=True)
        elif is_table_name(urls.file_name(url), self._tables):
            self._add_manifest(url, uri)
        elif is_tar_name(urls.file_name(url)):
            self._add_container(info, "tar")
        elif ending in NOT_AUDIO_EXTENSIONS:
            raise InputError(
                f"{uri} is not audio, a tar, a Parquet file or a manifest (.jsonl, .csv, .tsv); "
                "audio under such a name must be renamed, or listed in a manifest"
            )
        else:
            self._bare.append(_bare_item(info))

    def _add_files(self, uri: str, files: list[FileInfo], named_ending: str | None) -> None:
        """Add the files of a folder or glob.

        Manifests only if the glob spells out their ending, or the folder is one of ``--format``.
        """
        before = self._num_found()
        parquets, tars = list[FileInfo](), list[FileInfo]()
        skipped: Counter[str] = Counter()
        num_tables = 0
        for info in files:
            name = urls.file_name(info.url)
            ending = _ending(name)
            table_format = format_in_folder(name)
            if table_format is not None and table_format == self._tables.format:
                num_tables += 1
                self._add_manifest(info.url, printable(public_uri(info.url)))
            elif is_tar_name(name):
                tars.append(info)
            elif is_audio_name(name):
                self._bare.append(_bare_item(info))
            elif ending == ".parquet":
                parquets.append(info)
            elif manifest_extension(name) and ending == named_ending:
                self._add_manifest(info.url, printable(public_uri(info.url)))
            else:
                if table_format is not None:
                    self._unread[info.url] = table_format
                skipped["._*" if is_shadow_name(name) else ending or "(no extension)"] += 1
        skipped += self._add_tars(tars)
        skipped += self._add_parquets(parquets, manifests_too=named_ending == ".parquet")
        self._skipped += skipped
        if named_ending is None and not num_tables:
            self._check_format_of_folder(uri)
        if self._num_found() == before:
            kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(5))
            if len(skipped) > 5:
                kinds += f" and {len(skipped) - 5} more"
            others = f" (files of other kinds: {kinds})" if kinds else ""
            advice = "; give files with audio, tars or Parquet files" + (
                " (manifests count only when they are named)" if kinds else ""
            )
            raise InputError(f"{uri} holds nothing to label{others}{advice}")

    def _check_format_of_folder(self, uri: str) -> None:
        names = sorted(TABLES_IN_FOLDERS.get(self._tables.format, ()))
        if names:
            raise InputError(
                f"{uri} holds no {' or '.join(names)}, which --format {self._tables.format} reads; "
                "leave --format out to take the audio alone"
            )

    def _num_found(self) -> int:
        listed_again = sum(self._duplicates.values())
        parts = (self._bare, self._rows, self._containers, self._failures)
        return sum(len(part) for part in parts) + listed_again

    def _add_parquets(
        self, files: list[FileInfo], *, manifests_too: bool, must_fit: bool = False
    ) -> Counter[str]:
        """Add Parquet files with audio, and manifests if wanted; count the others."""
        skipped: Counter[str] = Counter()
        notes: dict[str, list[str]] = {}
        indexes = in_threads(self._index_or_error, files)
        for info, index in zip(files, indexes, strict=True):
            uri = printable(public_uri(info.url))
            if isinstance(index, ContainerError):
                self._add_container(info, "parquet")  # reading it will make the failure
                continue
            if index.note is not None:
                notes.setdefault(index.note, []).append(uri)
            if index.audio is not None and index.row_groups:
                self._add_container(info, "parquet", index.row_groups, index.audio.name)
            elif index.audio is not None:
                if must_fit:
                    raise InputError(f"{uri} holds no rows")
                self._notes[f"{uri} holds no rows."] = None
            elif manifests_too and self._names_files(index.columns):
                self._add_manifest(info.url, uri)
            elif must_fit:
                columns = ", ".join(index.columns[:20])
                found = f" ({index.note})" if index.note else ""
                raise InputError(
                    f"{uri} has neither an audio column (bytes, or array and sampling_rate) nor "
                    f"one that names files ({', '.join(URI_COLUMNS)}); its columns: "
                    f"{columns}{found}. Name the one that does with --column uri=COLUMN"
                )
            else:
                skipped[".parquet"] += 1
        for note, uris in notes.items():
            others = f" and {len(uris) - 1:,} others like it" if len(uris) > 1 else ""
            self._notes[f"{uris[0]}{others}: {note}."] = None
        return skipped

    def _index_or_error(self, info: FileInfo) -> ParquetIndex | ContainerError:
        try:
            uri = printable(public_uri(info.url))
            return index_parquet(info.url, uri, self._max_page_bytes)
        except ContainerError as error:
            return error

    def _add_tars(self, files: list[FileInfo]) -> Counter[str]:
        """Add tars with audio, and those that cannot be read; count the others."""
        skipped: Counter[str] = Counter()
        for info, has_audio in zip(files, in_threads(_may_hold_audio, files), strict=True):
            if has_audio:
                self._add_container(info, "tar")
            else:
                skipped[_TAR_WITHOUT_AUDIO] += 1
        return skipped

    def _names_files(self, columns: Sequence[str]) -> bool:
        names = self._tables.names_of(*URI_COLUMNS)
        return self._tables.pattern is not None or not set(names).isdisjoint(columns)

    def _add_container(
        self,
        info: FileInfo,
        kind: Literal["tar", "parquet"],
        row_groups: tuple[tuple[int, int], ...] = (),
        column: str | None = None,
    ) -> None:
        uri = printable(public_uri(info.url))
        if uri in self._containers:
            self._count_duplicate(make_clip_id(uri))
            return
        container = Container(
            *(uri, info.url, kind, info.size, info.version),
            row_groups=row_groups,
            column=column,
        )
        self._containers[uri] = container
        if not container.can_split:
            self._notes[f"{uri} is compressed and cannot be split: it is one unit of work."] = None

    def _add_manifest(self, url: str, uri: str) -> None:
        self._tables_read.add(url)
        is_empty = True
        first = len(self._rows)
        wholes: dict[str, ContainerRow] = {}  # each slice of a container may have a row
        rows = read_manifest(url, self._max_page_bytes, self._tables, self._note, self._warn)
        for row in self._counted(rows):
            is_empty = False
            if isinstance(row, Failure):
                self._failures.append(row)
            elif isinstance(row, ContainerRow):
                wholes.setdefault(row.url, row)
            else:
                self._rows.append(row)
        if is_empty:
            raise InputError(f"the manifest {uri} holds no rows")
        self._rows_of[url] = range(first, len(self._rows))
        self._add_wholes(wholes)

    def _add_wholes(self, wholes: Mapping[str, ContainerRow]) -> None:
        """Add containers that an errors table names as a whole."""
        for url, facts in filesystem.stat_many(wholes).items():
            # Reading a missing one will report it.
            info = FileInfo(url, None, None) if isinstance(facts, OSError) else facts
            if is_tar_name(urls.file_name(url)):
                self._add_container(info, "tar")
            elif self._add_parquets([info], manifests_too=False):
                self._failures.append(wholes[url].failure)

    def _note(self, text: str) -> None:
        self._notes[text] = None

    def _warn(self, text: str) -> None:
        self._warnings[text] = None

    def _count_duplicate(self, clip_id: str) -> None:
        self._duplicates[clip_id] = self._duplicates.get(clip_id, 0) + 1

    # -- all of them --

    def finish(self) -> Found:
        self._say_what_was_not_read()
        items = self._resolve()
        loose = [item for item in items if item.member is None and item.row is None]
        inside = [item for item in items if item.member is not None or item.row is not None]
        containers = [*self._containers.values(), *self._asked_for(inside)]
        if self._tables.labels_from is not None and any(
            one.kind == "parquet" for one in containers
        ):
            self._note(
                "The rows of Parquet files lie in no folder: labels.from gives them no label."
            )
        return Found(
            items=tuple(sorted(loose, key=plan_order)),
            containers=tuple(sorted(containers, key=lambda one: (one.uri, bool(one.items)))),
            duplicates=sum(self._duplicates.values()),
            duplicate_examples=tuple(list(self._duplicates)[:_MAX_EXAMPLES]),
            skipped_by_extension=self._skipped,
            # The same manifest or folder may have been given twice.
            failures=tuple({one.item.clip_id: one for one in self._failures}.values()),
            notes=tuple(self._notes),
            warnings=tuple(self._warnings),
        )

    def _say_what_was_not_read(self) -> None:
        unread = [url for url in self._unread if url not in self._tables_read]
        if unread:
            more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
            self._warn(
                f"{printable(public_uri(unread[0]))}{more} lies in the folder and was not read: a "
                "table counts only when it is named. To use what it says, give --format "
                f"{self._unread[unread[0]]}, or the table itself."
            )

    def _resolve(self) -> list[Item]:
        """Merge items listed twice; a manifest's row wins over the bare file.

        A table with a row for each label lists a file several times: its truth is all of them.
        """
        by_id: dict[str, Item] = {}
        for item in self._bare:
            if item.clip_id in by_id:
                self._count_duplicate(item.clip_id)
            by_id[item.clip_id] = item
        bare = set(by_id)
        rows: dict[str, ManifestRow] = {}
        for row in self._rows:
            clip_id = row.item.clip_id
            earlier = rows.get(clip_id)
            if earlier is not None:
                if earlier.own_name != row.own_name:
                    raise _same_id(clip_id, earlier, row.where, row.item.uri)
                self._count_duplicate(clip_id)
                rows[clip_id] = earlier.with_truth_of(row)
                continue
            rows[clip_id] = row
            if row.own_name in bare:
                bare.discard(row.own_name)
                del by_id[row.own_name]
                self._count_duplicate(row.own_name)
        for clip_id, row in rows.items():
            if clip_id in bare:
                raise _same_id(clip_id, row, "the input itself", by_id[clip_id].uri)
        facts = filesystem.stat_many(row.item.url for row in rows.values())
        self._check_some_exist(facts)
        for clip_id, row in rows.items():
            found = facts[row.item.url]
            if isinstance(found, OSError):
                by_id[clip_id] = row.item  # reading it will report the error
            else:
                version = found.version
                by_id[clip_id] = dataclasses.replace(row.item, size=found.size, version=version)
        if self._tables.labels_from is None:
            return list(by_id.values())
        return [labelled_by_folder(item) for item in by_id.values()]

    def _check_some_exist(self, facts: Mapping[str, FileInfo | OSError]) -> None:
        """Refuse a manifest none of whose files exists: its paths are relative to something else.

        The tables of a result count as one: a unit may well have lost all of its files.
        """
        rows_of: dict[str, list[ManifestRow]] = defaultdict(list)
        own = ""
        for url, indices in self._rows_of.items():
            rows = [self._rows[index] for index in indices]
            if rows and not rows[0].path:
                own = url = own or url
            rows_of[url] += rows
        missing = (FileNotFoundError, NotADirectoryError)
        for url, rows in rows_of.items():
            if rows and all(isinstance(facts.get(row.item.url), missing) for row in rows):
                raise _none_exists(url, rows, self._tables.root or urls.parent(url))

    def _asked_for(self, items: list[Item]) -> Iterator[Container]:
        """Yield the containers of the members and rows that manifests list."""
        by_uri: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            by_uri[item.uri].append(item)
        for uri, asked in by_uri.items():
            if uri in self._containers:
                asked = self._not_in_whole(uri, asked)
            if not asked:
                continue
            first = asked[0]
            kind: Literal["tar", "parquet"] = "parquet" if first.member is None else "tar"
            whole = self._containers.get(uri)
            without_url = [dataclasses.replace(item, url="") for item in asked]
            yield Container(
                *(uri, first.url, kind, first.size, first.version, tuple(without_url)),
                row_groups=() if whole is None else whole.row_groups,
                column=None if whole is None else whole.column,
            )

    def _not_in_whole(self, uri: str, items: list[Item]) -> list[Item]:
        """Return the items that a container listed as a whole does not give: segments."""
        rest = []
        for item in items:
            own_name = make_clip_id(uri, item.member, occurrence_of(item), row=item.row)
            if same_name(item.clip_id) == same_name(own_name):
                self._count_duplicate(item.clip_id)
            else:
                rest.append(item)
        if len(rest) < len(items):
            note = (
                f"{uri} is listed as a whole, and {len(items) - len(rest)} of its items by a "
                "manifest too: they are read once, without the manifest's labels and metadata."
            )
            self._notes[note] = None
        return rest


def _ending(name: str) -> str:
    """Return the ending of a file that tells its kind: ``.csv.gz`` and not ``.gz``."""
    return manifest_extension(name) or extension(name)


def _why(uri: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{uri} does not exist; check the path (a relative one starts at the current folder)"
    text = printable(in_words(error) if isinstance(error, OSError) else str(error))
    if isinstance(error, PermissionError):
        text += "; give this user permission to read it, or give another input"
    return text if uri in text else f"{uri} cannot be read: {text}"


def _none_exists(url: str, rows: Sequence[ManifestRow], root: str) -> InputError:
    uri = printable(public_uri(url))
    example = rows[0].item.uri
    written = printable(public_uri(rows[0].path))
    if written not in ("", example):
        folder = printable(public_uri(root))
        example += f" (written as {written}; paths are relative to {folder})"
    return InputError(
        f"{uri} names no file that exists: {len(rows):,} missing, such as {example}. Correct the "
        "paths, or name the folder that they are relative to: --set manifest.root=FOLDER. If it "
        "only says what is true of audio elsewhere: "
        f"earmark label AUDIO… --truth {uri}"
    )


def _bare_item(info: FileInfo) -> Item:
    uri = public_uri(info.url)
    return Item(make_clip_id(uri), printable(uri), info.url, size=info.size, version=info.version)


def _same_id(clip_id: str, row: ManifestRow, where: str, uri: str) -> InputError:
    return InputError(
        f"the clip_id {clip_id!r} is given to two different items: {row.item.uri} ({row.where}) "
        f"and {uri} ({where}); a clip_id must be unique"
    )


def plan_order(item: Item) -> tuple[str, float, float, str]:
    """Return the sort key of loose items: the name, then the place of a segment."""
    end_s = math.inf if item.end_s is None else item.end_s
    return (item.uri, item.start_s or 0.0, end_s, item.clip_id)


def _may_hold_audio(info: FileInfo) -> bool:
    return may_hold_audio(info.url, printable(public_uri(info.url)))


def in_threads(function: Callable[[_In], _Out], values: Sequence[_In]) -> list[_Out]:
    """Map a function in parallel, because stores answer slowly; the results are in order."""
    if len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(min(_INDEX_THREADS, len(values)), "earmark-index") as pool:
        return list(pool.map(function, values))
