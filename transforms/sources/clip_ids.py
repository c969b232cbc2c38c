"""Names and descriptions of items: clip ids, unit ids, labels and metadata as text.

All of them can be written as UTF-8, whatever bytes a file name or a JSON text holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transforms.errors import ItemError
from transforms.records import ContainerSlice, Failure, Item, UnitKind
from transforms.sources.tables.columns import is_none, list_in_text
from transforms.storage import urls
from transforms.storage.secrets import public_text


def printable(text: str) -> str:
    """Make a text writable as UTF-8: a byte of a name that is not UTF-8 becomes ``%XX``."""
    if text.isascii():
        return text
    # Python keeps a byte that is not UTF-8 as a lone surrogate U+DC80…U+DCFF.
    text = re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match.group()) - 0xDC00:02X}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# Characters that move the cursor, set colours, end a line or reverse it, and lone surrogates.
_NOT_SHOWN = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def for_terminal(text: str, *, keep_lines: bool = False) -> str:
    """Escape the characters that a terminal would obey instead of showing them."""

    def escaped(match: re.Match[str]) -> str:
        if keep_lines and match.group() == "\n":
            return "\n"
        return match.group().encode("unicode_escape").decode("ascii")

    return _NOT_SHOWN.sub(escaped, text)


def make_clip_id(
    uri: str,
    member: str | None = None,
    occurrence: int = 1,
    row: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> str:
    """Return the unique, stable name of an item in a result.

    It is ``uri``, ``uri#member``, ``uri#member~2``, ``uri#row=5``; with ``@1.500-3.000`` for a
    segment. ``%``, ``#`` and ``@`` inside names are percent-encoded, and so are bytes that are not
    UTF-8.

    Args:
        uri: Absolute local path or full URL, without signature parameters.
        member: Name inside the tar.
        occurrence: Which member of that name, from 1.
        row: Row of the Parquet file, from 0.
        start_s: None (with ``end_s`` given) is 0.
        end_s: None is the end of the file.
    """
    name = _encoded(uri)
    if member is not None:
        # A name that ends in "~2" must not look like a second occurrence.
        name += "#" + re.sub(r"~(?=\d+$)", "%7E", _encoded(member))
        name += f"~{occurrence}" if occurrence > 1 else ""
    if row is not None:
        name += f"#row={row}"
    if start_s is not None or end_s is not None:
        name += f"@{start_s or 0.0:.3f}-" + ("" if end_s is None else f"{end_s:.3f}")
    return name


def same_name(clip_id: str) -> str:
    """Return what is equal for clip ids of one name, whether a byte of it was text before or not.

    The name of a container that an item, a ledger or a row gives has ``%XX`` for a byte that is not
    UTF-8, and its ``%`` would be encoded once more.
    """
    return re.sub("%25([89A-F][0-9A-F])", r"%\1", clip_id)


def original_name(row: int | None, metadata: str | None) -> str | None:
    """Return the name that a Parquet row's metadata gives (Hugging Face's ``path``), or None."""
    name = None if row is None or metadata is None else json.loads(metadata).get("path")
    return name if isinstance(name, str) else None


def occurrence_of(item: Item) -> int:
    """Return which member of its name an item is, from 1, by its clip id."""
    if item.member is None:
        return 1
    prefix = same_name(make_clip_id(item.uri, item.member))
    match = re.match(re.escape(prefix) + r"~(\d+)(?:[@!]|$)", same_name(item.clip_id))
    return int(match.group(1)) if match else 1


def _encoded(text: str) -> str:
    return printable(text.replace("%", "%25").replace("#", "%23").replace("@", "%40"))


def make_unit_id(
    kind: UnitKind,
    items: Sequence[Item] = (),
    container: ContainerSlice | None = None,
    *,
    replaces: Sequence[str] = (),
) -> str:
    """Return the name of a unit: a digest of its content, the same on every machine and run.

    It has 20 hex digits (80 bits). Items are hashed by clip id, place, size and version, the
    container by name, size, version and range.
    """
    digest = hashlib.sha256()
    parts: list[object] = [kind, 0, *sorted(replaces)]  # 0: ids of existing results have it
    if container is not None:
        range_ = [container.start, container.stop]
        parts += [container.uri, container.size, container.version, *range_]
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    for item in items:
        # A clip id from a manifest does not tell where the item is stored.
        place = (item.uri, item.member, item.row, item.start_s, item.end_s)
        facts = (item.clip_id, *place, item.size, item.version)
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()[:20]


def read_failure(item: Item, error: Exception, *, is_container: bool = False) -> Failure:
    """Make the row of an item that cannot be read; the message hides the URL's secrets."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    error_type = error.error_type if isinstance(error, ItemError) else type(cause).__name__
    if isinstance(error, FileNotFoundError) and error.errno is not None:
        message = f"there is no such file: {item.uri}"
    elif isinstance(error, OSError) and error.strerror and error.errno is not None:
        message = f"{error.strerror}: {printable(str(error.filename or item.uri))}"
    else:
        message = public_text(printable(str(error))) or type(error).__name__
    return Failure(item, "read", error_type, message, is_container)


# --- Labels and metadata -------------------------------------------------------------------


def make_truth(
    labels: object, label: object = None, separator: str = ";"
) -> tuple[str, ...] | None:
    """Parse the labels that an input gives; return each name once, in order.

    ``labels`` is a list, the text of one (JSON, Python or numpy), or names with ``separator``
    between them. ``label`` is one name, or the text of a list. None means that both are missing,
    which "nan" and "None" are too; an empty list says that there are no labels.
    """
    if labels is None and label is None:
        return None
    names = [*_label_names(labels, separator), *_label_names(label)]
    if not names and not isinstance(labels, list | tuple):
        return None
    return tuple(dict.fromkeys(names))


def _label_names(value: object, separator: str | None = None) -> list[str]:
    if is_none(value):
        return []
    if isinstance(value, list | tuple):
        return [name for part in value for name in _label_names(part)]
    if not isinstance(value, str):
        return [printable(str(value))]
    value = public_text(value)
    if value.lstrip().startswith("["):
        listed = _list_in_text(value)
        if listed is not None:  # else a name that begins with a bracket
            return _label_names(listed)
    names = [value] if separator is None else value.split(separator)
    return [printable(name.strip()) for name in names if not is_none(name)]


def _list_in_text(value: str) -> list[object] | None:
    try:
        listed = json.loads(value)
    except (ValueError, RecursionError):
        listed = list_in_text(value)
    is_flat = isinstance(listed, list) and not any(isinstance(one, list | dict) for one in listed)
    return listed if is_flat else None


def labelled_by_folder(item: Item) -> Item:
    """Return an item without labels with the name of the folder that it lies in as its label.

    That of a tar's member is the folder inside the tar. A Parquet row lies in none.
    """
    if item.truth is not None or item.row is not None:
        return item
    path = urls.split_url(item.uri).path if item.member is None else item.member
    folder = path.rpartition("/")[0].rpartition("/")[2]
    return dataclasses.replace(item, truth=(folder,)) if folder.strip(".") else item


def with_description(item: Item, truth: tuple[str, ...] | None, metadata: str | None) -> Item:
    """Return a manifest's item with its container's labels and metadata where it has none."""
    return dataclasses.replace(
        item,
        truth=truth if item.truth is None else item.truth,
        metadata=metadata if item.metadata is None else item.metadata,
    )


def make_metadata(values: Mapping[str, object]) -> str | None:
    """Write the other values of an input as the JSON text of an object; None if there are none.

    Nulls are left out. NaN and infinities become null, as JSON has neither. Bytes are replaced by
    their number, and URLs lose their signatures, wherever in a text they stand.
    """
    plain = {
        public_text(str(key)): _plain(value) for key, value in values.items() if value is not None
    }
    if not plain:
        return None
    text = json.dumps(plain, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate; escaped, JSON can hold it
        return json.dumps(plain)
    return text


def _plain(value: Any) -> object:
    if isinstance(value, str):
        return public_text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {public_text(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, Iterable):
        return [_plain(part) for part in value]
    return public_text(str(value))
