"""How files with audio begin, to tell whether a table's bytes are audio before any is decoded."""

from __future__ import annotations

from transforms.decoding.formats.not_audio import PICTURES_IN_MP4

_STARTS = (
    *(b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b"FRM8", b".snd", b"caff", b"DSD "),
    *(b"fLaC", b"OggS", b"ID3", b"MAC ", b"wvpk", b"TTA1", b"tBaK", b"MPCK", b"MP+", b"ajkg"),
    *(b"#!AMR", b"\x0b\x77", b"\x7f\xfe\x80\x01", b"NIST_1A", b"Creative Voice File", b"TWIN"),
    *(b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"FLV", b".RMF", b"\0\0\x01\xba"),
)


def begins_like_audio(head: bytes) -> bool:
    """Return whether a file that begins with ``head``, at least 12 bytes, probably has audio."""
    if head[4:8] == b"ftyp":
        return head[4:12] not in PICTURES_IN_MP4
    if head.startswith(_STARTS):
        return head[8:12] != b"WEBP"
    # An MPEG or AAC frame: eleven bits are set, and the layer's or the rate's are not all.
    return len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[2] & 0xF0 != 0xF0
