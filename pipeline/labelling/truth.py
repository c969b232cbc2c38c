"""Truth: the labels that a table gives, and which row belongs to which clip.

``label --truth`` and ``evaluate --truth`` use the same code. A row finds its clip

1. by ``clip_id``, if the table gives one;
2. else by URI: the same file, member or row, and segment;
3. else by the longest common tail of their paths, for the same segment.

A tail counts if it is all that the table says (``a.wav``, ``fold1/a.wav``), or if it has a folder
in it (``/old/fold1/a.wav`` and ``/new/fold1/a.wav``). So a name alone never joins the files of
two folders. The extension of an audio file matters only where two files differ in nothing else.
What fits several rows or clips equally well is left out and named.
"""

from __future__ import annotations

import dataclasses
import posixpath
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from transforms.errors import InputError, ReadError
from transforms.records import Item
from transforms.sources.clip_ids import (
    make_clip_id,
    make_truth,
    occurrence_of,
    original_name,
    printable,
)
from transforms.sources.file_kinds import is_audio_name, manifest_extension
from transforms.sources.inputs import Found
from transforms.sources.manifests import ContainerRow, ManifestRow, read_manifest
from transforms.sources.tables.audioset import is_audioset, read_segments
from transforms.sources.tables.columns import TableSettings
from transforms.sources.tables.text import CsvLines, open_text
from transforms.storage import urls
from transforms.storage.secrets import public_uri

_MAX_EXAMPLES = 3
_SEVERAL = -1

_Key = TypeVar("_Key")

JoinedBy = Literal["clip_id", "uri", "path"]
_JOINED_BY: dict[JoinedBy, str] = {
    "clip_id": "by clip_id",
    "uri": "by URI",
    "path": "by the end of the path",
}


@dataclass(frozen=True, slots=True)
class Place:
    """The names by which a clip or a row of truth is found, the most reliable first.

    Attributes:
        clip_id: The clip's, or the one that a table gives; None if it gives none.
        name: ``make_clip_id`` of its file, member, row and segment; None if they are not known.
        paths: The file's path, as far as it is known, with the member or row behind it. Several are
            alternatives.
        segment: Start and end as in a clip id; empty for a whole file.
    """

    clip_id: str | None
    name: str | None
    paths: tuple[str, ...]
    segment: str = ""

    @property
    def shown(self) -> str:
        """The name to print."""
        return self.clip_id or self.name or self.paths[0]


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
    """Which row belongs to which clip.

    Attributes:
        row_of_clip: The index of each clip's row of truth, or None.
        joined_by: How each clip found its row; None without one.
        rows_without_clip: The indices of the other rows.
        ambiguous: Names in the truth that fit several clips, or as well as another row.
    """

    row_of_clip: tuple[int | None, ...]
    joined_by: tuple[JoinedBy | None, ...]
    rows_without_clip: tuple[int, ...]
    ambiguous: tuple[str, ...]

    @property
    def counts(self) -> dict[JoinedBy, int]:
        """How many clips were joined by what; all kinds are there."""
        numbers = Counter(self.joined_by)
        return {kind: numbers[kind] for kind in get_args(JoinedBy)}


def place_of(
    clip_id: str | None,
    uri: str,
    member: str | None = None,
    row: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    metadata: str | None = None,
) -> Place:
    """Return the names of a clip from the columns of a result.

    A Parquet row has its original name too, below its file.
    """
    occurrence = 1 if clip_id is None else occurrence_of(Item(clip_id, uri, member=member))
    name = make_clip_id(uri, member, occurrence, row=row, start_s=start_s, end_s=end_s)
    paths = [_path(uri, member, row)]
    if original := original_name(row, metadata):
        paths.append(_path(uri, original, None))
    return Place(clip_id, name, tuple(paths), _segment(start_s, end_s))


def _place_of_row(entry: ManifestRow) -> Place:
    item = entry.item
    return Place(
        None if item.clip_id == entry.own_name else item.clip_id,
        entry.own_name,
        (_path(printable(public_uri(entry.path)) or item.uri, item.member, item.row),),
        _segment(item.start_s, item.end_s),
    )


def _path(uri: str, member: str | None, row: int | None) -> str:
    inside = member if row is None else f"row={row}"
    return uri if inside is None else f"{uri}/{inside}"


def _segment(start_s: float | None, end_s: float | None) -> str:
    return make_clip_id("", start_s=start_s, end_s=end_s)


# --- Read ----------------------------------------------------------------------------------


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
        elif entry.item.truth is None:
            unlabelled += 1
        else:
            rows.append(TruthRow(_place_of_row(entry), entry.item.truth, entry.where))
    return Truth(tuple(_merged(rows)), tuple(unreadable), unlabelled, tuple(notes))


def _merged(rows: Iterable[TruthRow]) -> Iterator[TruthRow]:
    """Merge the rows of each place, with the labels of all."""
    by_place: dict[tuple[str | None, str | None], list[TruthRow]] = defaultdict(list)
    for row in rows:
        by_place[row.place.clip_id, row.place.name].append(row)
    for same in by_place.values():
        labels = tuple(dict.fromkeys(label for row in same for label in row.labels))
        yield dataclasses.replace(same[0], labels=labels)


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


# --- Join ----------------------------------------------------------------------------------


def match_rows(rows: Sequence[TruthRow], clips: Sequence[Place]) -> Matches:
    """Find each clip's row, as the module says."""
    found: list[int | None] = [None] * len(clips)
    joined_by: list[JoinedBy | None] = [None] * len(clips)
    ambiguous: dict[str, None] = {}

    def join(clip: int, row: int, by: JoinedBy) -> None:
        found[clip], joined_by[clip] = row, by

    for by in get_args(JoinedBy)[:2]:
        attribute = "clip_id" if by == "clip_id" else "name"
        index_of = _owners((getattr(row.place, attribute),) for row in rows)
        for clip, place in enumerate(clips):
            index = index_of.get(getattr(place, attribute))
            if found[clip] is not None or index is None:
                continue
            if index == _SEVERAL:
                ambiguous[place.shown] = None
            else:
                join(clip, index, by)
    same = defaultdict[str | int, list[int]](list)  # several clips may be of one file
    for clip, place in enumerate(clips):
        same[clip if place.name is None else place.name].append(clip)
    of_file = list(same.values())
    for by_stem in (False, True):
        pairs, several = _match_tails(
            [row.place for row in rows],
            [clips[first] for first, *_ in of_file],
            [next((found[clip] for clip in of if found[clip] is not None), None) for of in of_file],
            by_stem=by_stem,
        )
        for row, file in pairs:
            for clip in of_file[file]:
                join(clip, row, "path")
        ambiguous |= dict.fromkeys(several)
    taken = set(found)
    return Matches(
        tuple(found),
        tuple(joined_by),
        tuple(index for index in range(len(rows)) if index not in taken),
        tuple(sorted(ambiguous)),
    )


def _owners(keys_of: Iterable[Iterable[_Key]]) -> dict[_Key, int]:
    """Return the index of the one that has each key; ``_SEVERAL`` if several have it."""
    owner_of: dict[_Key, int] = {}
    for index, keys in enumerate(keys_of):
        for key in keys:
            if key is not None and owner_of.setdefault(key, index) != index:
                owner_of[key] = _SEVERAL
    return owner_of


def _match_tails(
    rows: Sequence[Place], clips: Sequence[Place], found: Sequence[int | None], *, by_stem: bool
) -> tuple[list[tuple[int, int]], list[str]]:
    """Pair the rows and clips without a match whose longest common tail is each other's.

    Those with a match still count: what fits one of them as well is ambiguous. Returns the pairs,
    and the ambiguous names. With ``by_stem`` the extension of audio does not matter.
    """
    taken = set(found)
    ends_of_row = [_ends(place, by_stem=by_stem) for place in rows]
    ends_of_clip = [_ends(place, by_stem=by_stem) for place in clips]
    names = {ends[-1] for clip, of in enumerate(ends_of_clip) if found[clip] is None for ends in of}
    names &= {ends[-1] for row, of in enumerate(ends_of_row) if row not in taken for ends in of}
    # Of names that matter only: most tables have been joined by URI at this point.
    tails_of_row = [_tails(ends, names, is_row=True) for ends in ends_of_row]
    row_with = _owners(tails_of_row)
    tails_of_clip = [
        {tail for tail in _tails(ends, names, is_row=False) if tail in row_with}
        for ends in ends_of_clip
    ]
    clip_with = _owners(tails_of_clip)
    pairs, ambiguous = [], []
    for row, tails in enumerate(tails_of_row):
        shared = [tail for tail in tails if tail in clip_with]
        if row in taken or not shared:
            continue
        length = max(map(len, shared))
        longest = [tail for tail in shared if len(tail) == length]
        fitting = {clip_with[tail] for tail in longest}
        if len(fitting) > 1 or _SEVERAL in (*fitting, *(row_with[tail] for tail in longest)):
            ambiguous.append(rows[row].paths[0])
            continue
        (clip,) = fitting
        if found[clip] is None and length == max(map(len, tails_of_clip[clip])):
            pairs.append((row, clip))
    return pairs, ambiguous


def _ends(place: Place, *, by_stem: bool) -> list[list[str]]:
    """Return the parts of each path of a place; the last one with the segment."""
    ends = []
    for path in place.paths:
        parts = [part for part in posixpath.normpath(path).split("/") if part not in ("", "..")]
        last = parts.pop() if parts else ""
        if by_stem and is_audio_name(last):
            last = last.rpartition(".")[0]
        ends.append([*parts, last + place.segment])
    return ends


def _tails(ends: Iterable[list[str]], names: set[str], *, is_row: bool) -> set[tuple[str, ...]]:
    """Return the tails of paths that count; of a clip, any may be all that a row says."""
    return {
        tuple(parts[-length:])
        for parts in ends
        if parts[-1] in names
        for length in range(1, len(parts) + 1)
        if not is_row or length > 1 or length == len(parts)
    }


# --- Say -----------------------------------------------------------------------------------


def describe_joined(matches: Matches, rows: Sequence[TruthRow], clips: Sequence[Place]) -> str:
    """Say how many clips were joined by what, in a sentence; with an example for paths."""
    parts = [f"{n:,} {_JOINED_BY[by]}" for by, n in matches.counts.items() if n]
    if "path" in matches.joined_by:
        clip = matches.joined_by.index("path")
        row = rows[matches.row_of_clip[clip] or 0]
        parts[-1] += f" (such as {row.place.paths[0]} for {clips[clip].shown})"
    return f"Clips joined with a row of the truth: {', '.join(parts) or 'none'}."


def why_none_is_joined(source: str | None, rows: Sequence[TruthRow], clips: Sequence[Place]) -> str:
    """Say what a clip and a row are called, and what the paths of the table are relative to."""
    text = f"one of the clips is {clips[0].shown}, and one of the rows is {rows[0].place.shown}"
    if source is None:
        return text
    folder = public_uri(urls.parent(urls.normalise(source)))
    return (
        f"{text}. Paths in a table are relative to its folder, {folder}; correct them, or give the "
        "clip_id of each clip"
    )


def some(names: Sequence[str]) -> str:
    """Return the first few names."""
    more = ", …" if len(names) > _MAX_EXAMPLES else ""
    return ", ".join(names[:_MAX_EXAMPLES]) + more


# --- Truth of an input ---------------------------------------------------------------------


def with_truth(found: Found, source: str, tables: TableSettings | None = None) -> Found:
    """Give the items found the labels of a table, which adds no items.

    A note says how the items were joined; what was not joined is a warning.

    A row's labels replace those that the input gives its item. What is inside a container is not
    known before it is read, and keeps its own labels.

    Raise ``InputError`` if the table cannot be read, holds no labels or belongs to no item.
    """
    truth = read_truth(source, tables)
    items = [*found.items, *(item for one in found.containers for item in one.items)]
    places = [
        place_of(item.clip_id, item.uri, item.member, item.row, item.start_s, item.end_s)
        for item in items
    ]
    matches = match_rows(truth.rows, places)
    name = public_uri(urls.normalise(source))
    if not any(matches.joined_by):
        if not items:
            raise InputError(
                f"--truth {name} names files, and the input has only containers, whose content is "
                "not known before it is read. Leave --truth out, and use earmark evaluate --truth "
                "when the clips are labelled"
            )
        raise InputError(
            f"--truth {name} has no row for any of the {len(items):,} items found: "
            f"{why_none_is_joined(source, truth.rows, places)}"
        )
    labels_of = {
        item.clip_id: truth.rows[index].labels
        for item, index in zip(items, matches.row_of_clip, strict=True)
        if index is not None
    }

    def labelled(of: Iterable[Item]) -> tuple[Item, ...]:
        return tuple(
            dataclasses.replace(item, truth=labels_of.get(item.clip_id, item.truth)) for item in of
        )

    containers = [dataclasses.replace(one, items=labelled(one.items)) for one in found.containers]
    return dataclasses.replace(
        found,
        items=labelled(found.items),
        containers=tuple(containers),
        notes=(*found.notes, describe_joined(matches, truth.rows, places)),
        warnings=(*found.warnings, *truth.notes, *_left_out(found, truth, matches, places)),
    )


def _left_out(
    found: Found, truth: Truth, matches: Matches, places: Sequence[Place]
) -> Iterator[str]:
    without = [
        place.shown
        for place, index in zip(places, matches.row_of_clip, strict=True)
        if index is None
    ]
    wholes = [one.uri for one in found.containers if not one.items]
    lost = [truth.rows[index].place.shown for index in matches.rows_without_clip]
    for names, words in (
        (without, "of the items found have no row in the truth"),
        (wholes, "containers were not joined, because their content is not known yet"),
        (lost, "of the truth's rows have no item"),
        (matches.ambiguous, "of the truth's names fit several items or rows"),
        (truth.unreadable, "of the truth's lines cannot be read"),
    ):
        if names:
            yield f"{len(names):,} {words}, such as {some(names)}."
    if truth.unlabelled:
        yield f"{truth.unlabelled:,} of the truth's rows have no label."
