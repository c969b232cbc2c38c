"""The recordings that clips come from, and the names of files that are exported for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from transforms.sources.clip_ids import make_clip_id

# Characters that are reserved in file names on a common system, and control characters.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_MAX_NAME_BYTES = 180


@dataclass(frozen=True, order=True)
class Source:
    """The recording of a clip; all segments of one recording share it, whatever their ids.

    Attributes:
        uri: The file or container.
        member: Name inside the tar, or "".
        occurrence: Number of the member among those of its name, from 1.
        row: Row of the Parquet file, or -1.
    """

    uri: str
    member: str = ""
    occurrence: int = 1
    row: int = -1

    def path_parts(self) -> list[str]:
        """Return the parts of its path; a member or row lies below its container."""
        parts = [part for part in f"{self.uri}/{self.member}".split("/") if part]
        if self.row >= 0:
            parts.append(f"row={self.row}")
        if self.occurrence > 1:
            parts[-1] += f"~{self.occurrence}"
        return parts

    def folder(self) -> tuple[str, ...]:
        """Return the folder of its file or container."""
        return tuple(part for part in self.uri.split("/") if part)[:-1]


def source_of(clip_id: str, uri: str, member: str | None, row: int | None) -> Source:
    """Return the recording of a clip from its row in ``clips``.

    A manifest may give clips any id. So the id is used only if it is made of the other columns, and
    only for the number of the member among those of its name (``#name~2``).
    """
    if member is None:
        return Source(uri, row=-1 if row is None else row)
    # A byte that is not UTF-8 is %XX in every column; its % must not be encoded again here.
    name, clip_id = (text.replace("%25", "%") for text in (make_clip_id(uri, member), clip_id))
    match = re.match(re.escape(name) + r"~(\d+)(?:[@!]|$)", clip_id)
    return Source(uri, member, int(match.group(1)) if match else 1)


def name_files(sources: Iterable[Source], suffix: str) -> dict[Source, str]:
    """Name a file for every source: its path below the shared folder, made safe and unique.

    A tar member or Parquet row lies in a folder with its container's name. Reserved characters are
    percent-encoded. Long names are cut and end in a hash, and so do names that would collide, also
    where upper and lower case are the same.
    """
    ordered = sorted(set(sources))
    folders = {source.folder() for source in ordered}
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    names: dict[Source, str] = {}
    taken: set[str] = set()
    for source in ordered:
        *above, last = source.path_parts()[depth:]
        # A folder must not have the name of another source's file.
        safe = [f"{name}_" if name.endswith(suffix) else name for name in map(_safe_name, above)]
        path = "/".join([*safe, _safe_name(last) + suffix])
        if path.casefold() in taken:
            path = "/".join([*safe, f"{_safe_name(last)}~{_short_hash(repr(source))}{suffix}"])
        taken.add(path.casefold())
        names[source] = path
    return names


def _safe_name(name: str) -> str:
    name = _UNSAFE.sub(lambda match: f"%{ord(match.group()):02X}", name)
    if name in (".", ".."):
        name = name.replace(".", "%2E")
    encoded = name.encode("utf-8", "surrogatepass")
    if len(encoded) > _MAX_NAME_BYTES:
        name = f"{encoded[: _MAX_NAME_BYTES - 11].decode('utf-8', 'ignore')}~{_short_hash(name)}"
    return name


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
