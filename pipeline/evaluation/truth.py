"""The true labels of a clip: from a manifest, AudioSet's segments CSV or the result's own column.

A row finds its clip by ``clip_id``; else by place (file, member, row, segment); else by stem (the
file's name without folder and extension), if exactly one row and one place have it. Rows and clips
without a match are counted and named. Where each channel of an item is a clip, they have one place,
and the row is that of all.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transforms.errors import InputError, ReadError
from transforms.models.labels import Label, find_label
from transforms.sources.clip_ids import make_clip_id, make_truth, printable
from transforms.sources.file_kinds import manifest_extension
from transforms.sources.manifests import ContainerRow, ManifestRow, read_manifest
from transforms.sources.tables.audioset import is_audioset, read_segments
from transforms.sources.tables.columns import TableSettings
from transforms.sources.tables.text import CsvLines, open_text
from transforms.storage import urls
from transforms.storage.secrets import public_uri


@dataclass(frozen=True, slots=True)
class Place:
    """The names by which a clip or a row of truth is found, the most reliable first.

    ``name`` is the result of ``make_clip_id`` for its file, member, row and segment. ``stems`` are
    names without folder and extension.
    """

    clip_id: str | None
    name: str | None
    stems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TruthRow:
    """The labels of one clip, by name or id, each once; empty if the clip has none of the classes.

    ``where`` is the file and line, for messages.
    """

    place: Place
    labels: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Truth:
    """All labels that a source gives.

    Attributes:
        rows: A row per clip; rows of the same place are joined.
        unreadable: Messages about lines that could not be read.
        unlabelled: Number of lines that name a clip and no label.
        notes: Doubts about what the table means.
    """

    rows: tuple[TruthRow, ...]
    unreadable: tuple[str, ...] = ()
    unlabelled: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matches:
    """The index of each clip's row of truth, or None, and the rows and stems without a match."""

    row_of_clip: tuple[int | None, ...]
    rows_without_clip: tuple[int, ...]
    ambiguous_stems: tuple[str, ...]


def place_of(
    clip_id: str | None,
    uri: str,
    member: str | None = None,
    row: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Place:
    """Return the names of a clip from the columns of a table or manifest."""
    name = make_clip_id(uri, member, row=row, start_s=start_s, end_s=end_s)
    return Place(clip_id, name, () if row is not None else (stem_of(member or uri),))


def stem_of(path: str) -> str:
    """Return a file's name without its folder and last extension."""
    name = urls.file_name(path)
    return name.rpartition(".")[0] or name


def read_truth(source: str, tables: TableSettings | None = None) -> Truth:
    """Read a manifest with labels, or AudioSet's segments.

    Raise ``InputError`` if the source cannot be read, or holds no labels.
    """
    url = urls.normalise(source)
    tables = tables or TableSettings()
    truth = _read_segments(url, tables) or _read_manifest(url, tables)
    if not truth.rows:
        more = f"; one of its lines {truth.unreadable[0]}" if truth.unreadable else ""
        more += "".join(f". {note}" for note in truth.notes)
        raise InputError(
            f"{public_uri(url)} holds no labels; expected a manifest with a column labels "
            f"or label, or AudioSet's segments CSV{more}"
        )
    return truth


def _read_manifest(url: str, tables: TableSettings) -> Truth:
    rows: list[TruthRow] = []
    notes: list[str] = []
    unreadable, unlabelled = [], 0
    for entry in read_manifest(url, settings=tables, note=notes.append, warn=notes.append):
        if not isinstance(entry, ManifestRow):
            failure = entry.failure if isinstance(entry, ContainerRow) else entry
            unreadable.append(failure.message)
            continue
        item = entry.item
        if item.truth is None:
            unlabelled += 1
            continue
        place = place_of(item.clip_id, item.uri, item.member, item.row, item.start_s, item.end_s)
        rows.append(TruthRow(place, item.truth, entry.where))
    return Truth(tuple(_joined(rows)), tuple(unreadable), unlabelled, tuple(notes))


def _joined(rows: Iterable[TruthRow]) -> Iterator[TruthRow]:
    """Join the rows of each place, with the labels of all."""
    by_place: dict[Place, list[TruthRow]] = defaultdict(list)
    for row in rows:
        by_place[row.place].append(row)
    for place, same in by_place.items():
        labels = tuple(dict.fromkeys(label for row in same for label in row.labels))
        yield TruthRow(place, labels, same[0].where)


def _read_segments(url: str, tables: TableSettings) -> Truth | None:
    """Read AudioSet's segments, which several names of files fit; None if it is no such table."""
    if not manifest_extension(urls.file_name(url)).startswith(".csv"):
        return None
    name = printable(public_uri(url))
    rows, unreadable = [], []
    try:
        with open_text(url, name, tables.encoding, newline="") as text:
            csv_lines = CsvLines(text, name)
            if not is_audioset(csv_lines) and tables.format != "audioset":
                return None
            for line, segment in read_segments(csv_lines):
                if isinstance(segment, ReadError):
                    unreadable.append(f"{line} of {name} {segment}")
                else:
                    place = Place(None, None, tuple(segment.stems()))
                    rows.append(
                        TruthRow(place, make_truth(segment.labels) or (), f"{line} of {name}")
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} cannot be read: {error}") from error
    return Truth(tuple(rows), tuple(unreadable))


def match_rows(rows: Sequence[TruthRow], clips: Sequence[Place]) -> Matches:
    """Find each clip's row."""
    found: list[int | None] = [None] * len(clips)
    for name in ("clip_id", "name"):
        index_of = {getattr(row.place, name): index for index, row in enumerate(rows)}
        for clip, place in enumerate(clips):
            key = getattr(place, name)
            if found[clip] is None and key is not None:
                found[clip] = index_of.get(key)
    taken = {index for index in found if index is not None}
    rows_by_stem = _by_stem({i: row.place for i, row in enumerate(rows) if i not in taken})
    clips_by_stem = _by_stem({i: clip for i, clip in enumerate(clips) if found[i] is None})
    ambiguous = []
    for stem in rows_by_stem.keys() & clips_by_stem.keys():
        row_indices, clip_indices = rows_by_stem[stem], clips_by_stem[stem]
        names = {clips[clip].name for clip in clip_indices}
        if len(row_indices) == len(names) == 1:
            for clip in clip_indices:
                found[clip] = row_indices[0]
        else:
            ambiguous.append(stem)
    taken = {index for index in found if index is not None}
    return Matches(
        tuple(found),
        tuple(index for index in range(len(rows)) if index not in taken),
        tuple(sorted(ambiguous)),
    )


def _by_stem(places: Mapping[int, Place]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, place in places.items():
        for stem in dict.fromkeys(place.stems):
            found[stem].append(index)
    return found


def find_classes(rows: Iterable[TruthRow], labels: Sequence[Label]) -> dict[str, int | None]:
    """Return the index of the model's output for each label of the truth; None if it has none."""
    names = dict.fromkeys(name for row in rows for name in row.labels)
    return {name: find_label(name, labels) for name in names}
