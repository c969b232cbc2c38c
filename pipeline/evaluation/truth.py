"""The true labels of a clip: from a manifest, AudioSet's segments CSV or the result's own column.

A row finds its clip by ``clip_id``; else by place (file, member, row, segment); else by stem (the
file's name without folder and extension), if exactly one row and one place have it. Rows and clips
without a match are counted and named. Where each channel of an item is a clip, they have one place,
and the row is that of all.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transforms.errors import InputError
from transforms.models.labels import Label, find_label
from transforms.sources.clip_ids import make_clip_id, make_truth
from transforms.sources.manifests import ContainerRow, ManifestRow, read_manifest
from transforms.storage import reading, urls
from transforms.storage.secrets import public_uri

_SEGMENT_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


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
    """

    rows: tuple[TruthRow, ...]
    unreadable: tuple[str, ...] = ()
    unlabelled: int = 0


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


def read_truth(source: str) -> Truth:
    """Read a manifest with labels, or AudioSet's segments.

    Raise ``InputError`` if the source cannot be read, or holds no labels.
    """
    url = urls.normalise(source)
    segments = _read_segments(url) if urls.file_name(url).lower().endswith(".csv") else None
    truth = segments or _read_manifest(url)
    if not truth.rows:
        more = f"; one of its lines {truth.unreadable[0]}" if truth.unreadable else ""
        raise InputError(
            f"{public_uri(url)} holds no labels; expected a manifest with a column labels "
            f"or label, or AudioSet's segments CSV{more}"
        )
    return truth


def _read_manifest(url: str) -> Truth:
    rows: list[TruthRow] = []
    unreadable, unlabelled = [], 0
    for entry in read_manifest(url):
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
    return Truth(tuple(_joined(rows)), tuple(unreadable), unlabelled)


def _joined(rows: Iterable[TruthRow]) -> Iterator[TruthRow]:
    """Join the rows of each place, with the labels of all."""
    by_place: dict[Place, list[TruthRow]] = defaultdict(list)
    for row in rows:
        by_place[row.place].append(row)
    for place, same in by_place.items():
        labels = tuple(dict.fromkeys(label for row in same for label in row.labels))
        yield TruthRow(place, labels, same[0].where)


def _read_segments(url: str) -> Truth | None:
    """Read AudioSet's CSV: comments, then ``YTID, start, end, "mid,mid"``; None if it is not."""
    try:
        text = reading.read_bytes(url).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise InputError(f"{public_uri(url)} cannot be read: {error}") from error
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    header = [name.strip() for name in comments[-1].lstrip("# ").split(",")] if comments else []
    if header != list(_SEGMENT_COLUMNS):
        return None
    name = public_uri(url)
    rows, unreadable = [], []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") or not line.strip():
            continue
        fields = next(csv.reader(io.StringIO(line), skipinitialspace=True))
        try:
            video, start_s, end_s, labels = fields
            place = Place(None, None, tuple(_segment_stems(video, float(start_s), float(end_s))))
        except ValueError:
            unreadable.append(f"line {number} of {name} does not have the four fields of a segment")
            continue
        truth = make_truth(labels.split(",")) or ()
        rows.append(TruthRow(place, truth, f"line {number} of {name}"))
    return Truth(tuple(rows), tuple(unreadable))


def _segment_stems(video: str, start_s: float, end_s: float) -> Iterator[str]:
    """Yield the file names that tools which fetch AudioSet's clips use."""
    for prefix in ("", "Y"):
        yield f"{prefix}{video}"
        yield f"{prefix}{video}_{start_s:.3f}_{end_s:.3f}"
        yield f"{prefix}{video}_{start_s:g}_{end_s:g}"
        yield f"{prefix}{video}_{start_s * 1000:.0f}_{end_s * 1000:.0f}"
        yield f"{prefix}{video}_{start_s * 1000:.0f}"


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
