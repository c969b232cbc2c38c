"""Names and descriptions of items: clip ids, unit ids, labels and metadata as text.

Part of ``sources``; import these from there. Everything made here can be written as UTF-8, whatever
bytes a file name or a JSON text holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transforms.errors import ItemError
from transforms.records import ContainerSlice, Failure, Item, UnitKind
from transforms.storage.secrets import public_text

# What FFmpeg or libsndfile reads, by extension. Left out: ".ts" (mostly TypeScript), ".raw" and
# ".pcm" (nothing says at which rate).
# fmt: off
AUDIO_EXTENSIONS = frozenset({
    ".wav", ".wave", ".w64", ".rf64", ".bwf", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3",
    ".mp2", ".mpga", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".aac", ".m4a", ".m4b",
    ".m4r", ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".mka", ".webm", ".wma", ".wmv", ".asf", ".avi",
    ".flv", ".f4v", ".amr", ".awb", ".3gp", ".3gpp", ".3g2", ".ac3", ".eac3", ".dts", ".ape", ".wv",
    ".tta", ".tak", ".mpc", ".ra", ".rm", ".gsm", ".voc", ".sph", ".nist", ".dsf", ".dff", ".mpg",
    ".mpeg", ".vob", ".ogv", ".mts", ".m2ts",
})
# fmt: on

# Encoded bytes per second, for estimates alone: 44.1 kHz mono 16 bit for what is not compressed,
# half of that for lossless, usual bit rates for the rest (128 kbit/s where nothing is known).
_BYTES_PER_S = {
    **dict.fromkeys((".wav", ".wave", ".w64", ".rf64", ".bwf", ".aif", ".aiff", ".aifc"), 88_200),
    **dict.fromkeys((".au", ".snd", ".caf"), 88_200),
    **dict.fromkeys((".flac", ".ape", ".wv", ".tta", ".tak"), 44_100),
    **dict.fromkeys((".ogg", ".oga", ".opus", ".wma", ".webm"), 12_000),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".avi", ".wmv", ".mpg", ".mpeg"), 250_000),
    **dict.fromkeys((".amr", ".gsm", ".spx"), 1_600),
}
DEFAULT_BYTES_PER_S = 16_000


def extension(name: str) -> str:
    """The last extension of a file's or member's name in lower case, with its dot, or ""."""
    base = name.rpartition("/")[2]
    stem, dot, tail = base.rpartition(".")
    return f".{tail.lower()}" if dot and stem else ""


def is_audio_name(name: str) -> bool:
    """Whether a name has an audio or video extension (and is not macOS's ``._`` shadow file)."""
    return extension(name) in AUDIO_EXTENSIONS and not is_shadow_name(name)


def is_shadow_name(name: str) -> bool:
    """Whether a name is that of the file in which macOS keeps another file's attributes."""
    return name.rpartition("/")[2].startswith("._")


def is_tar_name(name: str) -> bool:
    """Whether a name is that of a tar we read: ``.tar``, ``.tar.gz`` or ``.tgz``."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


@dataclass(frozen=True)
class WindowEstimate:
    """Guesses how many windows something has before it is decoded.

    Attributes:
        window_s: Length of a window in seconds.
        hop_s: From one window's start to the next's, in seconds.
    """

    window_s: float
    hop_s: float

    def of_duration(self, duration_s: float) -> int:
        """Windows that cover ``duration_s`` seconds; at least 1."""
        return 1 + max(0, math.ceil((duration_s - self.window_s) / self.hop_s))

    def of_file(self, name: str, size: int | None) -> int:
        """Windows to expect of a file, from its extension and its size in bytes; at least 1."""
        bytes_per_s = _BYTES_PER_S.get(extension(name), DEFAULT_BYTES_PER_S)
        return self.of_duration((size or 0) / bytes_per_s)


def printable(text: str) -> str:
    """``text`` as it can be written: a byte of a name that is not UTF-8 becomes ``%XX``."""
    return _without_surrogates(text)


# What moves the cursor, colours, ends a line or turns its direction around; lone surrogates.
_NOT_SHOWN = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def for_terminal(text: str, *, keep_lines: bool = False) -> str:
    """``text`` as it may be shown: what a terminal would obey instead of showing it is escaped.

    Args:
        text: May hold names from anywhere.
        keep_lines: Line breaks are meant.
    """

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
    """The unique, stable name of an item in a result.

    Args:
        uri: Absolute local path or full URL, without signature parameters.
        member: Name inside the tar.
        occurrence: Which member of that name, from 1.
        row: Row of the Parquet file, from 0.
        start_s: Start of the segment in seconds; None (with ``end_s`` given) is 0.
        end_s: End of the segment in seconds; None is the end of the file.
    Returns:
        ``uri``, ``uri#member``, ``uri#member~2``, ``uri#row=5``; with ``@1.500-3.000`` for a
        segment. ``%``, ``#`` and ``@`` inside names are percent-encoded, and so are bytes that
        are not UTF-8.
    """
    name = _encoded(uri)
    if member is not None:
        # A name that itself ends like a mark of repetition must not look like one.
        name += "#" + re.sub(r"~(?=\d+$)", "%7E", _encoded(member))
        name += f"~{occurrence}" if occurrence > 1 else ""
    if row is not None:
        name += f"#row={row}"
    if start_s is not None or end_s is not None:
        name += f"@{start_s or 0.0:.3f}-" + ("" if end_s is None else f"{end_s:.3f}")
    return name


def occurrence_of(item: Item) -> int:
    """Which member of its name an item means: what its clip id says, else the first."""
    if item.member is None:
        return 1
    prefix = make_clip_id(item.uri, item.member)
    match = re.match(re.escape(prefix) + r"~(\d+)(?:@|$)", item.clip_id)
    return int(match.group(1)) if match else 1


def _encoded(text: str) -> str:
    text = text.replace("%", "%25").replace("#", "%23").replace("@", "%40")
    return _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    if text.isascii():
        return text
    # Python keeps a byte that is not UTF-8 as a lone surrogate U+DC80…U+DCFF.
    text = re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match.group()) - 0xDC00:02X}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def make_unit_id(
    kind: UnitKind,
    items: Sequence[Item] = (),
    container: ContainerSlice | None = None,
    *,
    replaces: Sequence[str] = (),
    attempt: int = 0,
) -> str:
    """The name of a unit: a digest of what is in it, the same on every machine and run.

    Args:
        kind: Of the unit.
        items: Its items; their clip ids, sizes and versions count.
        container: Its slice; the container's name, size and version and the range count.
        replaces: Units that it takes the place of.
        attempt: Raise it to try the same content again under another name.
    Returns:
        20 hex digits (80 bits).
    """
    digest = hashlib.sha256()
    parts: list[object] = [kind, attempt, *sorted(replaces)]
    if container is not None:
        range_ = [container.start, container.stop]
        parts += [container.uri, container.size, container.version, *range_]
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    for item in items:
        # A clip id that a manifest gives does not say where the item lies.
        place = (item.uri, item.member, item.row, item.start_s, item.end_s)
        facts = (item.clip_id, *place, item.size, item.version)
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()[:20]


def read_failure(item: Item, error: Exception, *, is_container: bool = False) -> Failure:
    """The row for what could not be read; the message names the cause, not the URL's secrets."""
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


def make_truth(labels: object, label: object = None) -> tuple[str, ...] | None:
    """The labels that an input gives.

    Args:
        labels: A list, or text: a JSON list, or names separated by ``;``.
        label: One name.
    Returns:
        The names, each once, in order; None if neither says anything (an empty list does: it
        says that there are none).
    """
    if labels is None and label is None:
        return None
    names = [*_label_names(labels, split=True), *_label_names(label, split=False)]
    if not names and not isinstance(labels, list | tuple):
        return None
    return tuple(dict.fromkeys(names))


def _label_names(value: object, *, split: bool) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [name for part in value for name in _label_names(part, split=False)]
    if not isinstance(value, str):
        return [printable(str(value))]
    value = public_text(value)
    if split and value.lstrip().startswith("["):
        try:
            return _label_names(json.loads(value), split=False)
        except ValueError:
            pass  # a name that begins with a bracket
    names = value.split(";") if split else [value]
    return [printable(name.strip()) for name in names if name.strip()]


def make_metadata(values: Mapping[str, object]) -> str | None:
    """What else the input says, as the JSON text of an object; None if it says nothing.

    Nulls are left out, NaN and infinities become null (JSON has none), bytes are replaced by their
    number, and URLs lose what signs them, wherever in a text they stand.
    """
    plain = {
        public_text(str(key)): _plain(value) for key, value in values.items() if value is not None
    }
    if not plain:
        return None
    text = json.dumps(plain, ensure_ascii=False)
    # A lone surrogate cannot be written as UTF-8; escaped, JSON can hold it.
    return text if text.isascii() or _is_utf8(text) else json.dumps(plain)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
