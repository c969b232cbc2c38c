"""The choice of the library that reads a file, by its content and never by its name.

The file's own structure also tells its length. It is compared here with the file's size, because
the libraries silently cut some files, and read some that are cut short without an error.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

UNKNOWN_SIZE_FROM = 0x7FFFF000  # streaming writers put "unknown" sizes this large into headers
UNKNOWN_LONG_SIZE_FROM = 1 << 62  # the same where sizes have 64 bits


@dataclass(frozen=True)
class Route:
    """The library to try first, and what the file's structure tells.

    ``promised_s`` is the length in seconds by the file's header, or None. ``notes`` are oddities
    of the file, for the clip's warning.
    """

    soundfile_first: bool
    promised_s: float | None = None
    notes: tuple[str, ...] = ()


_SOUNDFILE_MAGIC = (b"fLaC", b"NIST_1A")
_RIFF_MAGIC = (b"RIFF", b"RIFX", b"RF64")
_EBML_MAGIC = b"\x1aE\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18S\x80g"


def find_route(view: bytes | mmap.mmap, on_progress: Callable[[], None]) -> Route:
    """Choose by content; FFmpeg goes first where libsndfile would silently cut the file."""
    head = view[:64]
    if head.startswith(_RIFF_MAGIC):
        if head[8:12] == b"WAVE":
            return _find_wav_route(view)
        size = int.from_bytes(head[4:8], "little")
        return Route(False, notes=_cut_short(view, size + 8 if size < UNKNOWN_SIZE_FROM else 0))
    if head.startswith(b"riff"):  # W64: libsndfile reads trailing bytes as audio
        return Route(False, notes=_cut_short(view, int.from_bytes(head[16:24], "little")))
    if head.startswith(_EBML_MAGIC):
        return Route(False, notes=_cut_short(view, _matroska_length(view)))
    if head.startswith(b"FORM"):
        return Route(head[8:12] in (b"AIFF", b"AIFC"))
    if head[4:8] == b"ftyp":
        return Route(False, notes=_cut_short(view, _mp4_length(view)))
    if head.startswith(b"caff"):
        return Route(True, notes=_cut_short(view, _caf_length(view)))
    if head.startswith(b"OggS"):
        return _find_ogg_route(view, on_progress)
    if head.startswith(b".snd"):
        return _find_au_route(view)
    if head.startswith(_SOUNDFILE_MAGIC):
        return Route(True)
    start = _id3_length(head)
    if view[start : start + 4] == b"fLaC":
        return Route(True)
    return _find_mp3_route(view, start)


def _cut_short(view: bytes | mmap.mmap, declared_bytes: int) -> tuple[str, ...]:
    """Return a note if the header declares more bytes than the file has."""
    if not len(view) < declared_bytes < UNKNOWN_LONG_SIZE_FROM:
        return ()
    return (f"the file is cut short: {len(view)} of {declared_bytes} bytes",)


def _find_wav_route(view: bytes | mmap.mmap) -> Route:
    """Compare the data chunk's size with the file's: libsndfile trusts the chunk."""
    order: Literal["big", "little"] = "big" if view[:4] == b"RIFX" else "little"
    position = 12  # chunks follow the file header: type, size, content padded to even
    while position + 8 <= len(view) and view[position : position + 4] != b"data":
        position += 8 + (int.from_bytes(view[position + 4 : position + 8], order) + 1 & ~1)
    size = int.from_bytes(view[position + 4 : position + 8], order)
    start = position + 8
    if start >= len(view) or start + size >= len(view):
        return Route(True)
    if size == 0:  # the recorder was interrupted; FFmpeg reads to the end
        return Route(False, notes=("the header declares no audio; read to the end",))
    end = start + size + size % 2
    follows = view[end : end + 8]
    if len(follows) < 8 or not any(follows) or _is_chunk_name(follows[:4]):
        return Route(True)
    surplus = len(view) - end
    return Route(
        True, notes=(f"{surplus} bytes follow the {size} bytes of audio that the header declares",)
    )


def _is_chunk_name(name: bytes) -> bool:
    is_text = all(0x20 <= byte < 0x7F for byte in name)
    return is_text or name.startswith(b"TAG")  # ID3v1 stands at the end of any file


def _find_au_route(view: bytes | mmap.mmap) -> Route:
    """Note a size that exceeds 32 bits with the offset: libsndfile silently reads nothing."""
    offset, size = struct.unpack(">II", view[4:12].ljust(8, b"\0"))
    if size == 0xFFFFFFFF or size < UNKNOWN_SIZE_FROM:
        return Route(True)
    return Route(True, notes=_cut_short(view, offset + size))


def _matroska_length(view: bytes | mmap.mmap) -> int:
    """Return where a Matroska's segment ends by its header (RFC 8794); 0 if unknown."""
    size, start = _ebml_size(view, len(_EBML_MAGIC))
    position = start + size
    if view[position : position + 4] != _MATROSKA_SEGMENT:
        return 0
    size, start = _ebml_size(view, position + 4)
    return start + size if size else 0


def _ebml_size(view: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """Parse a size of 1 to 8 bytes (0: unknown), and return it with the position after it."""
    first = view[position] if position < len(view) else 0
    num_bytes = 9 - first.bit_length()  # as many bytes follow as there are leading zeros
    mask = (1 << 7 * num_bytes) - 1
    size = int.from_bytes(view[position : position + num_bytes], "big") & mask
    return (0 if size == mask else size), position + num_bytes


def _mp4_length(view: bytes | mmap.mmap) -> int:
    """Return where the last box of media or its index ends (ISO 14496-12); 0 if there is none."""
    position, end = 0, 0
    while position + 8 <= len(view):
        size = int.from_bytes(view[position : position + 4], "big")
        if size == 1:  # a 64-bit size follows the type
            size = int.from_bytes(view[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file
            break
        if view[position + 4 : position + 8] in (b"moov", b"mdat", b"moof"):
            end = position + size
        position += size
    return end


def _caf_length(view: bytes | mmap.mmap) -> int:
    """Return where a CAF's audio data ends by its header; 0 if unknown."""
    position = 8  # chunks follow the file header: type, 64-bit size, content
    while position + 12 <= len(view):
        kind = view[position : position + 4]
        size = int.from_bytes(view[position + 4 : position + 12], "big", signed=True)
        if size < 0:  # "to the end of the file"
            return 0
        position += 12 + size
        if kind == b"data":
            return position
    return 0


def _find_ogg_route(view: bytes | mmap.mmap, on_progress: Callable[[], None]) -> Route:
    """Send a chained Ogg to FFmpeg: libsndfile reads only the first link."""
    position, flags, chained, begun = 0, 0, False, False
    end = 0
    while position >= 0:
        header = view[position : position + 6]
        if len(header) == 6 and header[4] == 0:
            end = _ogg_page_end(view, position)
            flags = header[5]
            is_first_page = bool(flags & 2)
            chained = chained or (is_first_page and begun)
            begun = begun or not is_first_page
        position = view.find(b"OggS", position + 27)
        on_progress()
    has_end = flags & 4 and end <= len(view)
    notes = () if has_end else ("the Ogg stream has no end: it may have been cut short",)
    first_packet = view[28:37]
    known = first_packet.startswith((b"\x01vorbis", b"\x7fFLAC"))
    return Route(known and not chained, notes=notes)


def _ogg_page_end(view: bytes | mmap.mmap, position: int) -> int:
    """Return where a page ends by the sizes in its header (RFC 3533, section 6)."""
    body = position + 27 + (view[position + 26] if position + 26 < len(view) else 0)
    return body + sum(view[position + 27 : body])


def _id3_length(head: bytes) -> int:
    """Return the size of an ID3v2 tag at the start (ID3v2.4, section 3.1: 4 × 7 bits)."""
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | (byte & 0x7F)
    return 10 + size + (10 if head[5] & 0x10 else 0)


def _find_mp3_route(view: bytes | mmap.mmap, start: int) -> Route:
    """Give libsndfile only an MP3 whose Xing header covers the whole file.

    libsndfile trusts the header, or guesses the length from the first frames, and so would cut
    concatenated files and those without a header short.
    """
    frame = view[start : start + 256]
    if len(frame) < 256 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # sync, Layer III
        return Route(False)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    rate_index = frame[2] >> 2 & 3
    if at < 0 or rate_index == 3:
        return Route(False)
    version = frame[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1}.get(version, 2)
    flags, num_frames, num_bytes = struct.unpack_from(">III", frame, at + 4)
    if flags & 3 != 3:
        return Route(False)
    length = len(view) - start
    slack = 4096 + length // 100  # trailing tags
    promised_s = num_frames * (1152 if version == 3 else 576) / rate
    is_whole = abs(length - num_bytes) <= slack
    return Route(is_whole, promised_s if length < num_bytes and not is_whole else None)
