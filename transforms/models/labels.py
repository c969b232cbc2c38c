"""Label lists: what the outputs of a model mean, in order.

Its place: ``checkpoints`` asks here for the labels of a model, ``rows`` writes them. The order and
the names always belong to the checkpoint; the lists kept here are for checkpoints that carry none
(original ``.pth`` files), and for AudioSet's ids, which configs on the hub leave out.

Guarantees: a label's ``id`` is AudioSet's mid when the 527 names are AudioSet's in order, else
None, whatever the names were read from. So a list means the same before and after it went through
a ``config.json``, which has no place for ids.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from transforms.errors import ModelError

KNOWN_LISTS = ("audioset", "speech_commands")
_NAME_COLUMNS = ("name", "display_name")


@dataclass(frozen=True, slots=True)
class Label:
    """What one output of a model means.

    Attributes:
        index: Which output, from 0.
        id: AudioSet's mid (``/m/09x0r``), or None.
        name: The name that the checkpoint gives it.
    """

    index: int
    id: str | None
    name: str


@functools.cache
def audioset_labels() -> tuple[Label, ...]:
    """AudioSet's 527 labels with their mids, in the order of every published AudioSet model."""
    return _bundled("audioset")


@functools.cache
def speech_commands_labels() -> tuple[Label, ...]:
    """The 35 labels of Speech Commands v2, in the order of the published model."""
    return _bundled("speech_commands")


def labels_from_names(names: Sequence[str]) -> tuple[Label, ...]:
    """Labels in the order of ``names``, with AudioSet's mids where the names are AudioSet's.

    Spelling decides; case, runs of spaces and the kind of apostrophe do not.
    """
    audioset = audioset_labels()
    is_audioset = [*map(_spelling, names)] == [_spelling(label.name) for label in audioset]
    ids = [label.id for label in audioset] if is_audioset else [None] * len(names)
    return tuple(
        Label(index, label_id, name)
        for index, (label_id, name) in enumerate(zip(ids, names, strict=True))
    )


def find_label(text: str, labels: Sequence[Label]) -> int | None:
    """The index of the label that a text means: by name, by id, or by a name spelled likewise.

    Args:
        text: A name or an id.
        labels: A model's labels.
    """
    named = [label.index for label in labels if label.name == text]
    named += [label.index for label in labels if label.id == text]
    if named:
        return named[0]
    spelled = [label.index for label in labels if _spelling(label.name) == _spelling(text)]
    return spelled[0] if len(spelled) == 1 else None


def read_labels(
    source: str,
    read_bytes: Callable[[str], bytes] = lambda path: Path(path).read_bytes(),
    name: str = "",
) -> tuple[Label, ...]:
    """Read the list that ``--set model.labels=`` names.

    Args:
        source: ``audioset`` or ``speech_commands``; or a CSV file with the columns ``index``
            (optional) and ``name`` or ``display_name``, any others passed over; or a text file
            with a name per line. UTF-8.
        read_bytes: How to read a file; ``storage.read_bytes`` for URLs.
        name: What it is called in messages; ``source`` by default, which may be signed.

    Raises:
        ModelError: there is no such list, or it is not one name per index, each once.
    """
    if source in KNOWN_LISTS:
        return _bundled(source)
    name = name or source
    try:
        text = read_bytes(source).decode("utf-8-sig")
    except OSError as error:
        raise ModelError(
            f"model.labels is {name!r}, which cannot be read ({error}); expected "
            f"{' or '.join(KNOWN_LISTS)}, a CSV file with a name column, or a text file with a "
            "name per line"
        ) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"model.labels: {name} is not UTF-8 text ({error})") from error
    is_csv = name.lower().endswith(".csv") or _has_header(text)
    names = _names_from_csv(text, name) if is_csv else _names_from_lines(text)
    _check_names(names, name)
    return labels_from_names(names)


def _bundled(name: str) -> tuple[Label, ...]:
    text = (resources.files("transforms.models") / "label_lists" / f"{name}.csv").read_text("utf-8")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return tuple(Label(int(row["index"]), row["id"] or None, row["name"]) for row in rows)


def _spelling(name: str) -> str:
    return re.sub(r"\s+", " ", name.strip()).replace("’", "'").casefold()


def _has_header(text: str) -> bool:
    """Whether the first line is a CSV header: several columns, one of them the names'."""
    header = next(csv.reader(io.StringIO(text, newline="")), [])
    return len(header) > 1 and any(column.strip() in _NAME_COLUMNS for column in header)


def _names_from_lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def _names_from_csv(text: str, source: str) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [column.strip() for column in next(reader, [])]
    name_column = next((header.index(name) for name in _NAME_COLUMNS if name in header), None)
    if name_column is None:
        raise ModelError(
            f"model.labels: {source} begins with the columns {header}; expected name or "
            "display_name among them, and index"
        )
    index_column = header.index("index") if "index" in header else None
    names: dict[int, str] = {}
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ModelError(
                f"model.labels: {source} line {reader.line_num} has {len(row)} columns; expected "
                f"{len(header)}. A name with a comma needs quotes"
            )
        index = row[index_column].strip() if index_column is not None else str(len(names))
        if not index.isdecimal() or int(index) in names:
            raise ModelError(
                f"model.labels: {source} line {reader.line_num} has the index {index!r}; expected "
                "a whole number from 0 that no other line has"
            )
        names[int(index)] = row[name_column].strip()
    missing = sorted(set(range(len(names))) - names.keys())
    if missing:
        raise ModelError(
            f"model.labels: {source} has no index {missing[0]}; expected 0 to {len(names) - 1}, "
            "each once"
        )
    return [names[index] for index in range(len(names))]


def _check_names(names: Sequence[str], source: str) -> None:
    if not names:
        raise ModelError(f"model.labels: {source} is empty; expected a name per output")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name:
            raise ModelError(f"model.labels: {source} has no name for index {index}")
        if name in seen:
            raise ModelError(
                f"model.labels: {source} names {name!r} twice, for index {seen[name]} and {index}"
            )
        seen[name] = index
