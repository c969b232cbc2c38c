"""What a file is that no library reads, in words that help."""

from __future__ import annotations

from transforms.decoding.formats.encoded import Encoded

_HEAD_BYTES = 4096
_MAGIC = (
    (b"\x1f\x8b", "a gzip file: unpack it"),
    (b"PK\x03\x04", "a zip archive: unpack it, or label what is inside with zip://*::FILE"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"(\xb5/\xfd", "a zstd file: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"PAR1", "a Parquet file; its name must end in .parquet"),
    (b"MThd", "a MIDI file: notes, not sound"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\x93NUMPY", "an array of NumPy"),
)
PICTURES_IN_MP4 = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftypavif", b"ftypavis")


def describe_not_audio(encoded: Encoded) -> str | None:
    """Return what the file is, and what to do if there is something to do; None if unknown."""
    head = encoded.read(0, _HEAD_BYTES)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    for magic, words in _MAGIC:
        if head.startswith(magic):
            return words
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[4:12] in PICTURES_IN_MP4:
        return "a HEIC or AVIF picture"
    if head[:2] == b"BM" and not any(head[6:10]):
        return "a BMP picture"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, perhaps an error page that was downloaded in the file's place"
    if text.startswith((b"<?xml", b"<error", b"<!--")):
        return "an XML document, perhaps an error message that was downloaded in the file's place"
    if not any(head) and _is_all_zeros(encoded):
        return "nothing but zeros: the file was never written, or its disk lost it"
    return None


def _is_all_zeros(encoded: Encoded) -> bool:
    step = 1 << 20
    blocks = (encoded.read(start, step) for start in range(0, len(encoded), step))
    return all(block.count(0) == len(block) for block in blocks)
