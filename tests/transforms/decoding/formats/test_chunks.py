"""WAV, RF64, AIFF, CAF and AU: audio beyond what the header declares is read, or warned about."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support import audio_factory
from transforms.decoding.decode import decode_whole
from transforms.decoding.formats import chunks
from transforms.errors import DecodeError

RATE = 16_000
NAMES = [
    "wav",
    "wav8",
    "wav24",
    "wav32",
    "wav_float",
    "wav_double",
    "rf64",
    "aiff",
    "aiff24",
    "caf",
]
# Type of the audio chunk, bytes of its size, byte order, and the bytes before the samples.
LAYOUT = {
    "wav": (b"data", 4, "little", 0),
    "rf64": (b"ds64", 0, "little", 0),
    "aiff": (b"SSND", 4, "big", 8),
    "caf": (b"data", 8, "big", 4),
    "au": (b"", 4, "big", 0),
}


def layout_of(name: str) -> tuple[bytes, int, str, int]:
    return next(layout for start, layout in LAYOUT.items() if name.startswith(start))


def encode(samples: np.ndarray, name: str) -> bytes:
    return audio_factory.encode(samples, RATE, name)


def recording(duration_s: float, seed: int = 0) -> np.ndarray:
    """Return what sounds like the outdoors: noise with more power below, and pauses of nothing."""
    walk = audio_factory.noise(duration_s, RATE, amplitude=1.0, seed=seed)
    smooth = np.convolve(walk[:, 0], np.hanning(24), mode="same")[:, None]
    return (smooth / np.abs(smooth).max() * 0.5).astype(np.float32)


def with_size(data: bytes, name: str, keep_ratio: float) -> bytes:
    """Let the header declare only a share of the audio, in whole samples."""
    kind, num_bytes, order, lead = layout_of(name)
    at = 8 if name == "au" else data.find(kind) + (4 if num_bytes else 16)
    num_bytes = num_bytes or 8
    size = int.from_bytes(data[at : at + num_bytes], order)  # type: ignore[arg-type]
    frame = {"wav8": 1, "wav24": 3, "wav32": 4, "wav_float": 4, "wav_double": 8, "aiff24": 3}
    step = frame.get(name, 2)
    kept = round((size - lead) * keep_ratio) // step * step + lead
    changed = data[:at] + kept.to_bytes(num_bytes, order) + data[at + num_bytes :]  # type: ignore[arg-type]
    if name.startswith("aiff"):
        comm = data.find(b"COMM") + 10
        changed = changed[:comm] + struct.pack(">I", (kept - lead) // step) + changed[comm + 4 :]
    return changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_ratio", [0.1, 0.5, 0.9])
def test_audio_that_goes_on_is_read(name: str, keep_ratio: float) -> None:
    data = encode(recording(4.0), name)
    samples, facts = decode_whole(with_size(data, name, keep_ratio))
    np.testing.assert_array_equal(samples, decode_whole(data)[0])
    declared_s = 4.0 * keep_ratio
    assert facts.warning == (f"the header declares {declared_s:.1f} s; there are 4.0 s of audio")
    assert facts.warning_kinds == ("header_wrong",)


@pytest.mark.parametrize("name", ["wav", "wav24", "aiff", "caf"])
def test_zeros_and_text_like_bytes_behind_the_size_may_be_audio(name: str) -> None:
    samples = recording(4.0)
    samples[2 * RATE : 2 * RATE + 4000] = 0.0  # a pause right behind the declared end
    _, facts = decode_whole(with_size(encode(samples, name), name, 0.5))
    assert facts.duration_s == pytest.approx(4.0)
    if name == "wav":  # "LIST" and a size, as four samples
        data = bytearray(encode(recording(4.0), name))
        middle = data.find(b"data") + 8 + 4 * RATE
        data[middle : middle + 8] = b"abcd\x00\x01\x00\x00"
        assert decode_whole(with_size(bytes(data), name, 0.5))[1].duration_s == pytest.approx(4.0)


@pytest.mark.parametrize(
    "more",
    [b"<html>" * 4000, np.random.default_rng(0).bytes(20_000), bytes(200_000), b"?" * 12],
    ids=["text", "random", "zeros", "few"],
)
@pytest.mark.parametrize("name", ["wav", "wav24", "aiff", "caf", "au"])
def test_what_is_no_audio_is_a_warning(name: str, more: bytes) -> None:
    data = encode(recording(2.0), name)
    samples, facts = decode_whole(data + more)
    assert len(samples) == 2 * RATE
    assert f"{len(more)} bytes follow the" in str(facts.warning)
    assert facts.warning_kinds == ("extra_bytes",)


@pytest.mark.parametrize(
    "more", [bytes(4096), b"LIST\4\0\0\0abcd" * 3, b"LIST\0\1\0\0cut", b"ID3\4" + bytes(40)]
)
def test_padding_chunks_and_tags_are_no_news(more: bytes) -> None:
    assert decode_whole(encode(recording(2.0), "wav") + more)[1].warning is None


@pytest.mark.parametrize("name", ["wav", "wav24", "aiff", "caf"])
def test_files_joined_end_to_end_are_read(name: str) -> None:
    first, second = encode(recording(2.0), name), encode(recording(1.0, seed=1), name)
    samples, facts = decode_whole(first + second)
    parts = [decode_whole(first)[0], decode_whole(second)[0]]
    np.testing.assert_array_equal(samples, np.concatenate(parts))
    assert facts.warning is None


def test_mp4_files_joined_end_to_end_are_read() -> None:
    one = audio_factory.encode(audio_factory.tone(1.0, 44_100), 44_100, "m4a")
    fast = audio_factory.encode(audio_factory.tone(1.0, 44_100), 44_100, "m4a_faststart")
    _, facts = decode_whole(one + fast + one)
    assert facts.duration_s == pytest.approx(3 * decode_whole(one)[1].duration_s, abs=0.01)
    assert facts.warning is None


def test_a_second_chunk_of_audio_is_read() -> None:
    data = encode(recording(2.0), "wav")
    at = data.find(b"data")
    samples, facts = decode_whole(data + data[at:])
    assert len(samples) == 4 * RATE
    assert facts.warning == "the header declares 2.0 s; there are 4.0 s of audio"


@pytest.mark.parametrize("chunk", [b"LIST", b"id3 ", b"bext", b"xyz1"])
@pytest.mark.parametrize("name", ["wav", "wav24"])
def test_an_empty_wav_with_a_chunk_is_empty(name: str, chunk: bytes) -> None:
    data = encode(np.zeros((0, 1), np.float32), name)
    data = data[: data.find(b"data") + 8] + chunk + struct.pack("<I", 2000) + b"\x55" * 2000
    with pytest.raises(DecodeError, match="there is no audio in it") as error:
        decode_whole(data)
    assert error.value.error_type == "NoSamples"


@pytest.mark.parametrize("declared", [0x00018000, 0xFFFFFFFF, 0])
def test_sizes_over_4_gib_wrap(
    declared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a recording over 4 GiB, with 64 KiB for the bytes that 32 bits can count."""
    monkeypatch.setattr(chunks, "MAX_SIZE", 1 << 16)
    noise = audio_factory.noise(6.0, RATE, seed=3)  # white: only the size tells
    data = encode(noise, "wav")
    at = data.find(b"data") + 4
    lying = data[:at] + struct.pack("<I", declared) + data[at + 4 :]
    assert decode_whole(lying)[1].duration_s == pytest.approx(6.0)


@pytest.mark.slow
def test_a_wav_over_4_gib_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    num_bytes = (1 << 32) + 40 * 2 * 2 * 192_000  # of stereo at 192 kHz: a sparse file of silence
    head = encode(np.zeros((0, 2), np.float32), "wav")
    head = bytearray(head[: head.find(b"data") + 8])
    head[24:32] = struct.pack("<II", 192_000, 192_000 * 4)
    for size in (num_bytes - (1 << 32), 0xFFFFFFFF):
        head[-4:] = struct.pack("<I", size)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + num_bytes)
        _, facts = decode_whole(path, sample_rate_hz=8_000)
        assert facts.duration_s == pytest.approx(num_bytes / 4 / 192_000)
