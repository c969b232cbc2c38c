"""The columns of a table: which of them Earmark takes, and under which names.

A table may call its columns as it likes: ``TableSettings.columns`` maps them. A column that looks
like a time or a label under another name, and is not mapped, is named in a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transforms.errors import InputError, ReadError

URI_COLUMNS = ("uri", "path", "file", "audio_filepath", "filename", "file_name")
START_COLUMNS = ("start_s", "offset")
LABEL_COLUMNS = ("labels", "label")
# What a column may be mapped to. The first name of several is the usual one.
KNOWN_COLUMNS = (
    *(*URI_COLUMNS, *LABEL_COLUMNS, *START_COLUMNS),
    *("end_s", "duration", "clip_id", "member", "row"),
)
_MAX_SHOWN_COLUMNS = 20
_MAX_SHOWN_LABEL = 80

TableFormat = Literal["audiofolder", "kaldi", "lhotse", "nemo", "audioset"]
FORMATS: tuple[str, ...] = get_args(TableFormat)

# Names of other tools' columns, in lower case, with one underscore for everything between words.
_STARTS = """
    start begin onset start_time begin_time time_start start_seconds start_sec begin_time_s
    start_time_s t_start segment_start
"""
_ENDS = """
    end stop end_time stop_time time_end end_seconds end_sec end_time_s t_end segment_end
"""
_LABELS = """
    class class_name classname class_label category categories target primary_label label_name
    label_names tag tags event event_label sound_class species species_name common_name ebird_code
    annotation annotations positive_labels ground_truth
"""
_LIKE_START, _LIKE_END = frozenset(_STARTS.split()), frozenset(_ENDS.split())
_LIKE_LABEL = frozenset(_LABELS.split())
# pandas and Python write a missing value like this.
_NONE_TEXTS = frozenset({"", "nan", "NaN", "None"})
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class TableSettings:
    """How tables are read.

    Attributes:
        format: The tool whose layout the tables have; None to recognise it.
        columns: Pairs of a known column and the name that the table gives it. An empty name says
            that the table has no such column, whatever its columns are called.
        root: Folder or URL that relative paths start from; None for each table's own folder.
        pattern: The path of a row's file, with ``{COLUMN}`` for what a column says.
        encoding: Encoding of text tables; None for UTF-8 or UTF-16, whichever it is.
        label_separator: What separates the names in a text of several labels.
        labels_from: ``folder`` labels an item without labels with the name of its folder.
    """

    format: TableFormat | None = None
    columns: tuple[tuple[str, str], ...] = ()
    root: str | None = None
    pattern: str | None = None
    encoding: str | None = None
    label_separator: str = ";"
    labels_from: Literal["folder"] | None = None

    def names_of(self, *known: str) -> tuple[str, ...]:
        """Return the table's names for a known column that may have several, the best first.

        A mapped name hides all others: ``label=category`` says that the label is nowhere else.
        """
        mapped = dict(self.columns)
        given = tuple(mapped[name] for name in known if name in mapped)
        return tuple(name for name in given if name) if given else known


def is_none(value: object) -> bool:
    """Return whether a cell is missing: empty, or what pandas and Python write for nothing."""
    if isinstance(value, str):
        return value.strip() in _NONE_TEXTS
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_columns(found: Iterable[str], uri: str, settings: TableSettings) -> None:
    """Raise ``InputError`` if a table lacks a mapped column, or one that names the files."""
    names = list(dict.fromkeys(found))
    shown = ", ".join(names[:_MAX_SHOWN_COLUMNS]) or "none"
    for known, name in settings.columns:
        if name and name not in names:
            raise InputError(
                f"{uri}: no column is called {name}, which manifest.columns takes for {known}; "
                f"the columns are {shown}. Correct --column {known}={name}"
            )
    if settings.pattern is not None:
        for name in pattern_columns(settings.pattern):
            if name not in names:
                raise InputError(
                    f"{uri}: no column is called {name}, which manifest.pattern "
                    f"({settings.pattern}) names; the columns are {shown}. Correct the pattern"
                )
    elif not set(names) & set(settings.names_of(*URI_COLUMNS)):
        raise InputError(
            f"{uri}: no column names the files; expected one of {', '.join(URI_COLUMNS)}, found "
            f"{shown}. Name the one that does with --column uri=COLUMN, or how it becomes a path "
            "with --set manifest.pattern='FOLDER/{COLUMN}.wav'"
        )


def pattern_columns(pattern: str) -> tuple[str, ...]:
    """Return the columns that a pattern names."""
    return tuple(_FIELD.findall(pattern))


def path_of_row(pattern: str, values: Mapping[str, Any]) -> str:
    """Return the path that a pattern gives for a row; ``ReadError`` if a cell of it is empty."""

    def cell(match: re.Match[str]) -> str:
        value = values.get(match.group(1))
        if is_none(value):
            raise ReadError(
                f"has nothing in the column {match.group(1)}, which manifest.pattern needs"
            )
        # Parquet and pandas have a column of whole numbers as floats if one is missing.
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    return _FIELD.sub(cell, pattern)


def notes_on_columns(found: Iterable[str], uri: str, settings: TableSettings) -> Iterator[str]:
    """Yield notes on columns that look like times or labels and are not taken for them."""
    names = set(dict.fromkeys(found))
    mapped = {name for _, name in settings.columns}
    settled = {known for known, name in settings.columns if not name}

    def alike(wanted: frozenset[str], *known: str) -> list[str]:
        if names & set(settings.names_of(*known)) or settled & set(known):
            return []
        return sorted(name for name in names - mapped if _plain(name) in wanted)

    starts = [(name, "start_s") for name in alike(_LIKE_START, *START_COLUMNS)]
    ends = [(name, "end_s") for name in alike(_LIKE_END, "end_s")]
    labels = [(name, "label") for name in alike(_LIKE_LABEL, *LABEL_COLUMNS)]
    for what, doubts in (("times", starts + ends), ("labels", labels)):
        if doubts:
            options = " ".join(f"--column {known}={_quoted(name)}" for name, known in doubts)
            look, are, them = ("looks", "is", "it") if len(doubts) == 1 else ("look", "are", "them")
            yield (
                f"{uri}: {', '.join(name for name, _ in doubts)} {look} like {what}, but {are} not "
                f"used as such: metadata. To use {them}: {options}"
            )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else f"'{name}'"


# --- Several labels in one text --------------------------------------------------------------

_ITEM = re.compile(
    r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|(None|nan|-?\d+(?:\.\d+)?))\s*,?\s*""",
    re.DOTALL,
)


def list_in_text(text: str) -> list[str] | None:
    """Return the names in a list as Python or numpy print it, like ``['dog', 'cat']``.

    None if the text is not such a list: a name may begin with a bracket.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    names, position, end = [], 1, len(text) - 1
    while position < end:
        item = _ITEM.match(text, position, end)
        if item is None:
            return [] if not text[1:-1].strip() else None
        single, double, bare = item.groups()
        quoted = single if single is not None else double
        names.append(bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
        position = item.end()
    return names


def labels_with_commas(values: Mapping[str, Any], settings: TableSettings) -> str | None:
    """Return a row's text of labels if commas may divide it, shortened; else None.

    A comma within a name has a space behind it, as in AudioSet's "Speech, music".
    """
    if settings.label_separator != ";":
        return None
    for name in settings.names_of("labels"):
        text = values.get(name)
        if (
            isinstance(text, str)
            and re.search(r",\S", text)
            and ";" not in text
            and not text.startswith("[")
        ):
            return text[:_MAX_SHOWN_LABEL]
    return None
