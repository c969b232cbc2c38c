"""Cut files say so; whole files do not; what cannot be decoded is told for what it is."""

from __future__ import annotations

import gzip
import struct
import zipfile
from io import BytesIO

import numpy as np
import pytest

from tests.support import audio_factory
from tests.support.audio_factory import Format
from transforms.decoding.decode import decode_whole
from transforms.errors import DecodeError

RATE = 16_000
RARE = {
    "sphere": Format("soundfile", "NIST", "PCM_16", 16),
    "voc": Format("soundfile", "VOC", "PCM_16", 16),
    "avr": Format("soundfile", "AVR", "PCM_16", 16),
    "svx": Format("soundfile", "SVX", "PCM_16", 16),
    "paf": Format("soundfile", "PAF", "PCM_16", 16),
    "pvf": Format("soundfile", "PVF", "PCM_16", 16),
    "ircam": Format("soundfile", "IRCAM", "PCM_16", 16),
    "ircam_float": Format("soundfile", "IRCAM", "FLOAT", 24),
}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", RARE)
def test_rare_formats_are_whole_or_cut(name: str, channels: int) -> None:
    if name == "svx" and channels == 2:
        pytest.skip("SVX is mono")
    sound = audio_factory.tone(2.0, RATE, num_channels=channels)
    data = audio_factory.encode(sound, RATE, RARE[name])
    samples, facts = decode_whole(data)
    assert (len(samples), facts.warning) == (2 * RATE, None)
    # PAF, PVF and IRCAM declare no length: only a cut within a sample shows.
    _, facts = decode_whole(data[: len(data) // 2 | 1])
    assert facts.duration_s == pytest.approx(1.0, abs=0.1)
    assert "cut short" in str(facts.warning) or "of 2.0 s" in str(facts.warning)


def test_a_cut_video_gives_all_the_audio_that_is_there() -> None:
    sound = audio_factory.tone(2.0, 44_100)
    options = {"movflags": "+faststart"}
    video = Format("av", "mov", "pcm_s16le", 16, with_video=True, options=options)
    data = bytearray(audio_factory.encode(sound, 44_100, video))
    at = data.find(b"stco", data.find(b"vide"))  # where the pictures lie: beyond the end now
    (num_chunks,) = struct.unpack_from(">I", data, at + 8)
    for index in range(num_chunks):
        struct.pack_into(">I", data, at + 12 + 4 * index, len(data) + 1000 * index)
    _, facts = decode_whole(bytes(data))
    assert (facts.duration_s, facts.warning) == (pytest.approx(2.0), None)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("name", ["m4a", "m4a_faststart", "wma", "mkv", "mp4_video"])
def test_whole_files_with_encoder_delay_have_no_warning(name: str, rate: int) -> None:
    for duration_s in (0.7, 3.0):
        data = audio_factory.encode(audio_factory.tone(duration_s, rate), rate, name)
        assert decode_whole(data)[1].warning is None


def test_mp3_in_wav_has_no_warning() -> None:
    frames = audio_factory.encode(audio_factory.tone(3.0, 44_100), 44_100, "mp3_no_header")
    fmt = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44_100, 16_000, 1, 0, 12, 1, 2, 417, 1, 1393)
    num_samples = len(frames) * 44_100 // 8_000  # by the bit rate, as FFmpeg writes it
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"fact" + struct.pack("<II", 4, num_samples)
    chunks += b"data" + struct.pack("<I", len(frames)) + frames
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    _, facts = decode_whole(data)
    assert facts.duration_s == pytest.approx(3.0, abs=0.1)
    assert facts.warning is None


@pytest.mark.parametrize("pre_skip", [312, 24_000, 48_000])
def test_opus_with_a_large_pre_skip_has_no_warning(pre_skip: int) -> None:
    data = bytearray(audio_factory.encode(audio_factory.tone(3.0, 48_000), 48_000, "opus"))
    at = data.find(b"OpusHead")
    struct.pack_into("<H", data, at + 10, pre_skip)
    struct.pack_into("<I", data, 22, 0)
    struct.pack_into("<I", data, 22, ogg_crc(bytes(data[: at + 19])))
    _, facts = decode_whole(bytes(data))
    assert facts.duration_s == pytest.approx(3.0 - (pre_skip - 312) / 48_000, abs=0.05)
    assert facts.warning is None


def ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


@pytest.mark.parametrize("num_bytes", [1, 1000, 100_000])
@pytest.mark.parametrize("name", ["flac", "ogg", "opus", "ogg_flac", "aac"])
def test_junk_in_front_is_skipped_with_a_warning(name: str, num_bytes: int) -> None:
    data = audio_factory.encode(audio_factory.tone(2.0, 48_000), 48_000, name)
    junk = (b"junk!" * num_bytes)[:num_bytes]
    samples, facts = decode_whole(junk + data)
    np.testing.assert_array_equal(samples, decode_whole(data)[0])
    if name != "aac":  # FFmpeg itself looks for AAC behind a little of anything
        assert facts.warning == f"{num_bytes} bytes in front of the audio skipped"


def zipped() -> bytes:
    target = BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.wav", b"RIFF")
    return target.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n <HTML>not found</HTML>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML document"),
        (gzip.compress(b"audio", mtime=0), "a gzip file"),
        (zipped(), "a zip archive"),
        (bytes(5000), "nothing but zeros"),
        (bytes(3 << 20), "nothing but zeros"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # no test is named by bytes
)
def test_what_is_not_audio_is_named(data: bytes, words: str) -> None:
    with pytest.raises(DecodeError, match=words) as error:
        decode_whole(data)
    assert error.value.error_type == "NotAudio"


@pytest.mark.parametrize("kind", [b"enca", b"drms", b"aavd"])
def test_encrypted_mp4_is_an_error_of_its_own(kind: bytes) -> None:
    data = audio_factory.encode(audio_factory.tone(1.0, 44_100), 44_100, "m4a")
    with pytest.raises(DecodeError, match="without its key") as error:
        decode_whole(data.replace(b"mp4a", kind, 1))
    assert error.value.error_type == "Encrypted"


def test_encrypted_asf_is_an_error_of_its_own() -> None:
    data = audio_factory.encode(audio_factory.tone(1.0, 44_100), 44_100, "wma")
    drm = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e") + struct.pack("<Q", 40) + bytes(16)
    (size,) = struct.unpack_from("<Q", data, 16)
    with pytest.raises(DecodeError, match="without its key"):
        decode_whole(data[:16] + struct.pack("<Q", size + 40) + data[24:30] + drm + data[30:])


def test_encrypted_webm_is_an_error_of_its_own() -> None:
    data = audio_factory.encode(audio_factory.tone(1.0, 48_000), 48_000, "webm")
    at = data.find(b"\x63\xa2")  # CodecPrivate, within the track
    inner = b"\x50\x35\x84abcd"
    encodings = (
        b"\x6d\x80" + bytes([0x80 | len(inner) + 3]) + b"\x62\x40" + bytes([0x80 | len(inner)])
    )
    with pytest.raises(DecodeError, match="without its key"):
        decode_whole(data[:at] + encodings + inner + data[at:])
