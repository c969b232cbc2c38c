"""Tags in front of the audio and behind it cost neither a sample nor a warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import audio_factory
from transforms.decoding.decode import decode_whole
from transforms.decoding.formats import encoded as encoded_module

RATE = 44_100


def id3v2(num_bytes: int) -> bytes:
    """Return an ID3v2 tag with so many bytes of content."""
    size = bytes(num_bytes >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + size + b"\1" * num_bytes


def apev2(num_bytes: int, with_header: bool) -> bytes:
    """Return an APEv2 tag with so many bytes of items."""
    numbers = b"".join(n.to_bytes(4, "little") for n in (2000, num_bytes + 32, 1))
    flags = 0x80000000 if with_header else 0
    footer = b"APETAGEX" + numbers + flags.to_bytes(4, "little") + bytes(8)
    header = b"APETAGEX" + numbers + (0xA0000000).to_bytes(4, "little") + bytes(8)
    return (header if with_header else b"") + b"\2" * num_bytes + footer


ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
LYRICS = b"LYRICSBEGIN" + b"IND0000200" + b"LYR00100words words"
BEHIND = {
    "ID3v1": ID3V1,
    "enhanced ID3v1": b"TAG+" + bytes(223) + ID3V1,
    "APEv2": apev2(500, with_header=True),
    "APEv2 without header, ID3v1": apev2(500, with_header=False) + ID3V1,
    "Lyrics3": LYRICS + str(len(LYRICS)).zfill(6).encode() + b"LYRICS200" + ID3V1,
    "Lyrics3 1.00": b"LYRICSBEGIN" + b"words " * 99 + b"LYRICSEND" + ID3V1,
    "ID3v2": id3v2(200) + b"3DI" + id3v2(200)[3:10],
}
FRAMED = ("ac3", "wavpack", "mp3", "mp3_no_header", "mp2", "aac")


@pytest.mark.parametrize("num_bytes", [100, 40_000])
@pytest.mark.parametrize(
    "name",
    "wav wav24 aiff caf au flac ogg mp3 mp3_no_header w64 opus m4a mov mkv webm wma avi_video "
    "wavpack ac3 aac amr".split(),
)
def test_a_tag_in_front_changes_nothing(name: str, num_bytes: int) -> None:
    rate = (audio_factory.FORMATS[name].rates or (RATE,))[-1]
    data = audio_factory.encode(audio_factory.tone(1.0, rate), rate, name)
    plain, plain_facts = decode_whole(data)
    tagged, facts = decode_whole(id3v2(num_bytes) + id3v2(num_bytes) + data)
    np.testing.assert_array_equal(tagged, plain)
    assert facts.warning == plain_facts.warning is None


@pytest.mark.parametrize("tag", BEHIND)
@pytest.mark.parametrize("name", FRAMED)
def test_a_tag_behind_frames_changes_nothing(name: str, tag: str) -> None:
    data = audio_factory.encode(audio_factory.tone(1.0, RATE), RATE, name)
    plain, _ = decode_whole(data)
    tagged, facts = decode_whole(data + BEHIND[tag])
    np.testing.assert_array_equal(tagged, plain)
    assert facts.warning is None


@pytest.mark.parametrize("name", ["mp3", "mp3_no_header", "aac"])
def test_zeros_behind_frames_are_padding(name: str) -> None:
    data = audio_factory.encode(audio_factory.tone(1.0, RATE), RATE, name)
    plain, _ = decode_whole(data)
    padded, facts = decode_whole(data + bytes(5000))
    assert facts.warning is None
    assert len(padded) >= len(plain)


def test_a_tag_in_front_of_a_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_module, "MAX_IN_MEMORY_BYTES", 1000)
    for name in ("wav", "m4a", "flac"):
        data = audio_factory.encode(audio_factory.tone(1.0, RATE), RATE, name)
        path = tmp_path / name
        path.write_bytes(id3v2(3000) + data)
        np.testing.assert_array_equal(decode_whole(path)[0], decode_whole(data)[0])
