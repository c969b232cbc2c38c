"""MP4 and Matroska: where they end by their own account, and whether they are encrypted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transforms.decoding.formats.encoded import Encoded

EBML_MAGIC = b"\x1aE\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18S\x80g"
_CONTENT_ENCODINGS, _CONTENT_ENCODING, _CONTENT_ENCRYPTION = b"\x6d\x80", b"\x62\x40", b"\x50\x35"
_MATROSKA_HEAD_BYTES = 1 << 20  # the tracks are described within
# What stands for the codec where samples are encrypted: CENC (ISO 23001-7), FairPlay, Audible.
_ENCRYPTED_SAMPLES = frozenset({b"enca", b"drms", b"aavd"})


class _Box(NamedTuple):
    kind: bytes
    start: int  # of its content
    stop: int


def _boxes(encoded: Encoded, position: int, stop: int) -> Iterator[_Box]:
    """Yield the boxes of an MP4 (ISO 14496-12, section 4.2) between two positions."""
    while len(head := encoded.read(position, 16)) >= 8 and position < stop:
        size, header_bytes = int.from_bytes(head[:4], "big"), 8
        if size == 1:  # a 64-bit size follows the type
            size, header_bytes = int.from_bytes(head[8:16], "big"), 16
        if size < header_bytes:  # 0: to the end of the file
            return
        yield _Box(head[4:8], position + header_bytes, position + size)
        position += size


def mp4_length(encoded: Encoded) -> int:
    """Return where the last box of media or its index ends; 0 if there is none."""
    boxes = _boxes(encoded, 0, len(encoded))
    return max((box.stop for box in boxes if box.kind in (b"moov", b"mdat", b"moof")), default=0)


def next_mp4(encoded: Encoded) -> int:
    """Return where a second file starts behind the first; -1 if there is one file."""
    seen = set()
    for box in _boxes(encoded, 0, len(encoded)):
        if box.kind == b"ftyp" and b"moov" in seen:
            return box.start - 8
        seen.add(box.kind)
    return -1


def mp4_is_encrypted(encoded: Encoded) -> bool:
    """Whether the samples of an audio track cannot be decoded without a key."""
    return any(
        encoded.read(box.start + 12, 4) in _ENCRYPTED_SAMPLES
        for box in _descend(encoded, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"))
    )


def _descend(encoded: Encoded, path: tuple[bytes, ...]) -> Iterator[_Box]:
    boxes = [_Box(b"", 0, len(encoded))]
    for kind in path:
        boxes = [
            child
            for parent in boxes
            for child in _boxes(encoded, parent.start, parent.stop)
            if child.kind == kind
        ]
    yield from boxes


def matroska_length(encoded: Encoded) -> int:
    """Return where a Matroska's segment ends by its header (RFC 8794); 0 if unknown."""
    size, start = _ebml_size(encoded, len(EBML_MAGIC))
    position = start + size
    if encoded.read(position, 4) != _MATROSKA_SEGMENT:
        return 0
    size, start = _ebml_size(encoded, position + 4)
    return start + size if size else 0


def matroska_is_encrypted(encoded: Encoded) -> bool:
    """Whether a track's ContentEncodings (RFC 9559, section 5.1.4.1.31) hold an encryption."""
    position = -1
    while True:
        position = encoded.find(_CONTENT_ENCODINGS, position + 1, _MATROSKA_HEAD_BYTES)
        if position < 0:
            return False
        size, start = _ebml_size(encoded, position + 2)
        if size and encoded.read(start, 2) == _CONTENT_ENCODING:
            return encoded.find(_CONTENT_ENCRYPTION, start, start + size) >= 0


def _ebml_size(encoded: Encoded, position: int) -> tuple[int, int]:
    """Parse a size of 1 to 8 bytes (0: unknown), and return it with the position after it."""
    data = encoded.read(position, 8)
    first = data[0] if data else 0
    num_bytes = 9 - first.bit_length()  # as many bytes follow as there are leading zeros
    mask = (1 << 7 * num_bytes) - 1
    size = int.from_bytes(data[:num_bytes], "big") & mask
    return (0 if size == mask else size), position + num_bytes
