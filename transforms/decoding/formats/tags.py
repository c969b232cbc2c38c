"""Tags in front of a file's audio and behind it, which the libraries count as audio.

libsndfile miscounts through a Python file object where a tag lies in front, and FFmpeg looks for
ID3v2 in front of MP3 and its like only. A decoder of frames takes a tag behind them for a frame.
"""

from __future__ import annotations

from transforms.decoding.formats.encoded import Encoded

MAX_LYRICS3_BYTES = 5100 + 11 + 9  # Lyrics3 1.00: the text, LYRICSBEGIN and LYRICSEND


def without_front_tags(encoded: Encoded) -> Encoded:
    """Return the part behind the ID3v2 and APEv2 tags at the start."""
    while num_bytes := _front_tag_bytes(encoded):
        encoded = encoded.part(min(num_bytes, len(encoded)))
    return encoded


def without_back_tags(encoded: Encoded) -> Encoded:
    """Return the part in front of the ID3v1, APEv2, Lyrics3 and ID3v2 tags at the end."""
    while num_bytes := _back_tag_bytes(encoded):
        encoded = encoded.part(0, max(len(encoded) - num_bytes, 0))
    return encoded


def _front_tag_bytes(encoded: Encoded) -> int:
    head = encoded.read(0, 32)
    if head.startswith(b"APETAGEX") and len(head) == 32:
        return 32 + int.from_bytes(head[12:16], "little")
    if not head.startswith(b"ID3") or len(head) < 10 or max(head[6:10]) > 0x7F:
        return 0
    return 10 + _syncsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)


def _back_tag_bytes(encoded: Encoded) -> int:
    end = len(encoded)
    tail = encoded.read(max(end - 128, 0), 128)
    if len(tail) == 128 and tail.startswith(b"TAG"):  # ID3v1
        has_extension = encoded.read(max(end - 355, 0), 4) == b"TAG+"
        return 355 if has_extension else 128
    footer = tail[-32:]
    if footer.startswith(b"APETAGEX"):
        has_header = footer[23] & 0x80
        return int.from_bytes(footer[12:16], "little") + (32 if has_header else 0)
    if tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
        return int(tail[-15:-9]) + 15
    if tail.endswith(b"LYRICSEND"):
        start = max(end - MAX_LYRICS3_BYTES, 0)
        found = encoded.find(b"LYRICSBEGIN", start)
        return end - found if found >= 0 else 0
    if tail[-10:-7] == b"3DI" and max(tail[-4:]) <= 0x7F:
        return 20 + _syncsafe(tail[-4:])
    return 0


def _syncsafe(data: bytes) -> int:
    """Parse a number of 4 × 7 bits (ID3v2.4, section 6.2)."""
    return data[0] << 21 | data[1] << 14 | data[2] << 7 | data[3]
