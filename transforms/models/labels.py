"""Label lists: the meaning of a model's outputs, in order.

Order and names always come from the checkpoint. The lists kept here are for checkpoints without
labels (original ``.pth`` files), and for AudioSet's ids, which configs on the hub omit.

Guarantees: a label's ``id`` is AudioSet's mid if the 527 names are AudioSet's in order, else None,
whatever the names were read from. So a list keeps its meaning when it passes through a
``config.json``, which has no place for ids.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from transforms.errors import ModelError
from transforms.storage import reading
from transforms.storage.secrets import public_uri

KNOWN_LISTS = ("audioset", "speech_commands")
_NAME_COLUMNS = ("name", "display_name")


@dataclass(frozen=True, slots=True)
class Label:
    """The meaning of one output of a model; ``id`` is AudioSet's mid (``/m/09x0r``), or None."""

    index: int
    id: str | None
    name: str


def audioset_labels() -> tuple[Label, ...]:
    """Return AudioSet's 527 labels with mids, in the order of all published AudioSet models."""
    return _bundled("audioset")


def speech_commands_labels() -> tuple[Label, ...]:
    """Return the 35 labels of Speech Commands v2, in the order of the published model."""
    return _bundled("speech_commands")


def labels_from_names(names: Sequence[str]) -> tuple[Label, ...]:
    """Make labels of names, with AudioSet's mids if the names are AudioSet's in order.

    Case, runs of spaces and the kind of apostrophe do not matter.
    """
    audioset = audioset_labels()
    is_audioset = [*map(_spelling, names)] == [_spelling(label.name) for label in audioset]
    ids = [label.id for label in audioset] if is_audioset else [None] * len(names)
    return tuple(
        Label(index, label_id, name)
        for index, (label_id, name) in enumerate(zip(ids, names, strict=True))
    )


def find_label(text: str, labels: Sequence[Label]) -> int | None:
    """Return the index of a label by its name, its id, or a name of equivalent spelling."""
    named = [label.index for label in labels if label.name == text]
    named += [label.index for label in labels if label.id == text]
    if named:
        return named[0]
    spelled = [label.index for label in labels if _spelling(label.name) == _spelling(text)]
    return spelled[0] if len(spelled) == 1 else None


def read_labels(source: str) -> tuple[Label, ...]:
    """Read the list that ``--set model.labels=`` names.

    Args:
        source: ``audioset`` or ``speech_commands``; or a CSV file with the columns ``index``
            (optional) and ``name`` or ``display_name``, others ignored; or a text file with a name
            per line. UTF-8, local or remote.

    Raises:
        ModelError: There is no such list, or it is not one name per index, each once.
    """
    if source in KNOWN_LISTS:
        return _bundled(source)
    name = public_uri(source)
    try:
        text = reading.read_bytes(source).decode("utf-8-sig")
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


@functools.cache
def _bundled(name: str) -> tuple[Label, ...]:
    text = (resources.files("transforms.models") / "label_lists" / f"{name}.csv").read_text("utf-8")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return tuple(Label(int(row["index"]), row["id"] or None, row["name"]) for row in rows)


def _spelling(name: str) -> str:
    return re.sub(r"\s+", " ", name.strip()).replace("’", "'").casefold()


def _has_header(text: str) -> bool:
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
