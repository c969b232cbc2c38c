"""Decoding: every format, damaged input, and decoders that crash, hang or are left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import soundfile
import soxr
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from tests.support import audio_factory
from tests.support.paths import ROOT
from transforms.decoding import encoded, ffmpeg_reader, soundfile_reader
from transforms.decoding import pool as decode_module
from transforms.decoding.decode import decode, decode_whole
from transforms.decoding.pool import DecodeAudio, DecodePool, DecodeSettings
from transforms.errors import DecodeError, EarmarkError
from transforms.process.stage_times import stage_clocks
from transforms.records import EncodedClip, Failure, Item, ItemFailure, UnitEnd, Waveform, WorkUnit

RATE = 16_000
LOSSLESS = [name for name, f in audio_factory.FORMATS.items() if f.lossless_bits is not None]
LOSSY = [name for name, f in audio_factory.FORMATS.items() if f.lossless_bits is None]


def rate_for(name: str) -> int:
    rates = audio_factory.FORMATS[name].rates
    return 44_100 if rates is None else rates[-1]


def sound(name: str, duration_s: float, num_channels: int = 1) -> audio_factory.Samples:
    """A tone in noise, as the format can hold it."""
    rate = rate_for(name)
    samples = audio_factory.tone(duration_s, rate, num_channels=num_channels)
    samples += audio_factory.noise(duration_s, rate, amplitude=0.02, num_channels=num_channels)
    bits = audio_factory.FORMATS[name].lossless_bits
    return samples if bits is None else audio_factory.quantised(samples, bits)


def native(data: bytes, rate: int, **segment: float) -> audio_factory.Samples:
    """Decoded without resampling."""
    return decode_whole(data, sample_rate_hz=rate, **segment)[0]


# Formats


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_their_samples(name: str, num_channels: int) -> None:
    samples = sound(name, 0.7, num_channels)
    data = audio_factory.encode(samples, rate_for(name), name)
    decoded, facts = decode_whole(data, sample_rate_hz=rate_for(name))
    np.testing.assert_allclose(decoded, samples.mean(axis=1), atol=1e-7, rtol=0)
    assert (facts.sample_rate_hz, facts.channels) == (rate_for(name), num_channels)
    assert facts.duration_s == pytest.approx(0.7)
    assert facts.warning is None


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_give_the_same_sound(name: str) -> None:
    samples = sound(name, 1.5)
    decoded, facts = decode_whole(audio_factory.encode(samples, rate_for(name), name))
    assert facts.duration_s == pytest.approx(1.5, abs=0.06)
    assert len(decoded) == pytest.approx(facts.duration_s * RATE, abs=1)
    spectrum = np.abs(np.fft.rfft(decoded[:RATE]))
    assert np.argmax(spectrum) == 440  # Hz: one second makes the bins one hertz wide
    assert facts.rms_dbfs == pytest.approx(20 * np.log10(np.sqrt(np.mean(samples**2))), abs=1)
    assert facts.warning is None


@pytest.mark.parametrize("name", ["mp3", "ogg", "opus", "webm", "m4a"])
def test_encoder_delay_is_cut_where_the_file_says_how_much(name: str) -> None:
    samples = sound(name, 1.5)
    decoded = native(audio_factory.encode(samples, rate_for(name), name), rate_for(name))
    length = min(len(decoded), len(samples))
    assert np.corrcoef(decoded[:length], samples[:length, 0])[0, 1] > 0.99


@pytest.mark.parametrize(
    ("name", "file_name"), [("flac", "a.mp3"), ("m4a", "b.wav"), ("wav", "c.raw"), ("ogg", "d")]
)
def test_content_decides_not_the_name(name: str, file_name: str, tmp_path: Path) -> None:
    data = audio_factory.encode(sound(name, 0.5), rate_for(name), name)
    path = tmp_path / file_name
    path.write_bytes(data)
    assert np.array_equal(decode_whole(path)[0], decode_whole(data)[0])


def test_large_files_are_read_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flac", "ogg", "m4a"):
        path = audio_factory.write(tmp_path / name, sound(name, 2.0), rate_for(name), name)
        in_memory, facts = decode_whole(path)
        with monkeypatch.context() as patch:
            patch.setattr(encoded, "MAX_IN_MEMORY_BYTES", 1000)
            patch.setattr(encoded, "HASH_CHUNK_BYTES", 777)
            mapped, mapped_facts = decode_whole(path)
        assert np.array_equal(in_memory, mapped)
        assert facts == mapped_facts


def test_a_large_file_is_hashed_once_for_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = audio_factory.write(tmp_path / "a.wav", audio_factory.noise(3.0, seed=1), RATE)
    small = decode_whole(path)[1].content_sha256
    hashed: list[Any] = []
    hash_bytes = encoded._hash_bytes

    def count(file: encoded.Encoded, on_progress: Any) -> str:
        hashed.append(file.path)
        return hash_bytes(file, on_progress)

    monkeypatch.setattr(encoded, "MAX_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(encoded, "_hash_bytes", count)
    for start_s in (0.0, 1.0, 2.0):
        facts = decode_whole(path, start_s=start_s, end_s=start_s + 1)[1]
        assert facts.content_sha256 == small
    assert hashed == [str(path)]
    audio_factory.write(path, audio_factory.noise(3.0, seed=2), RATE)  # as large as before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    facts = decode_whole(path, start_s=0.0, end_s=1.0)[1]
    assert facts.content_sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != small


@pytest.mark.parametrize("num_channels", [1, 3, 6])
def test_channels_are_averaged(num_channels: int) -> None:
    samples = audio_factory.noise(0.3, RATE, num_channels=num_channels)
    decoded = native(audio_factory.encode(samples, RATE, "wav_float"), RATE)
    np.testing.assert_allclose(decoded, samples.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("num_channels", [6, 8])
def test_surround_sound_is_averaged(num_channels: int) -> None:
    samples = np.repeat(audio_factory.tone(1.0, 48_000), num_channels, axis=1)
    decoded, facts = decode_whole(audio_factory.encode(samples, 48_000, "m4a"))
    assert facts.channels == num_channels
    assert np.argmax(np.abs(np.fft.rfft(decoded[:RATE]))) == 440


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("piece_samples", [400, 7_777, 160_000])
def test_streaming_equals_resampling_in_one_go(rate: int, piece_samples: int) -> None:
    duration_s = 6.1 if rate < 192_000 else 2.6  # several blocks
    samples = audio_factory.noise(duration_s, rate)
    data = audio_factory.encode(samples, rate, "wav_float")
    pieces = list(decode(data, piece_samples=piece_samples))
    decoded = np.concatenate([piece.samples for piece in pieces])
    expected = soxr.resample(samples[:, 0], rate, RATE)
    assert decoded.shape == expected.shape
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.samples) == piece_samples for piece in pieces[:-1])
    assert 1 <= len(pieces[-1].samples) <= piece_samples


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flac", "ogg", "mp3", "m4a"):
        data = audio_factory.encode(sound(name, 3.0, 2), rate_for(name), name)
        samples, facts = decode_whole(data)
        for seed in range(3):
            sizes = np.random.default_rng(seed)
            for module in (soundfile_reader, ffmpeg_reader):
                monkeypatch.setattr(
                    module, "block_frames", lambda rate, channels, r=sizes: int(r.integers(1, 9999))
                )
            other, other_facts = decode_whole(data)
            np.testing.assert_allclose(other, samples, atol=1e-6)
            assert other_facts.duration_s == facts.duration_s
            assert other_facts.silent_ratio == facts.silent_ratio
            assert other_facts.rms_dbfs == pytest.approx(facts.rms_dbfs, abs=1e-6)
        monkeypatch.undo()


def test_concatenated_files_are_read_to_their_end() -> None:
    """libsndfile alone would silently stop after the first part."""
    for name in ("ogg", "mp3", "mp3_no_header"):
        one = audio_factory.encode(sound(name, 2.0), rate_for(name), name)
        assert decode_whole(one + one)[1].duration_s == pytest.approx(4.0, abs=0.2)


def test_mp3_whose_first_frames_mislead_about_its_length_is_read_to_its_end() -> None:
    loud = dataclasses.replace(audio_factory.FORMATS["mp3_no_header"], bit_rate=320_000)
    quiet = dataclasses.replace(loud, bit_rate=32_000)
    parts = [
        audio_factory._encode_with_av([audio_factory.noise(2.0, 44_100)], 44_100, chosen)
        for chosen in (loud, quiet)
    ]
    assert decode_whole(b"".join(parts))[1].duration_s == pytest.approx(4.0, abs=0.2)


def test_a_stream_may_change_its_rate_and_channels() -> None:
    first = audio_factory.encode(audio_factory.tone(1.0, 44_100), 44_100, "aac")
    second = audio_factory.encode(audio_factory.tone(1.0, 22_050, num_channels=2), 22_050, "aac")
    samples, facts = decode_whole(first + second)
    assert len(samples) == pytest.approx(2.1 * RATE, abs=0.1 * RATE)
    assert (facts.sample_rate_hz, facts.channels) == (44_100, 1)
    assert "changes from 44100 Hz, 1 channels to 22050 Hz, 2 channels" in str(facts.warning)
    assert np.argmax(np.abs(np.fft.rfft(samples[-RATE:]))) == pytest.approx(440, abs=1)


def test_of_several_audio_streams_the_first_is_used_and_said() -> None:
    first, second = audio_factory.tone(0.5), audio_factory.tone(0.5, frequency_hz=880.0)
    samples, facts = decode_whole(audio_factory.encode_video(RATE, [first, second]))
    np.testing.assert_allclose(samples, first[:, 0], atol=1e-4)
    assert facts.warning == "2 audio streams; the first was used"


# Level statistics


def expected_levels(samples: audio_factory.Samples, rate: int) -> tuple[float, ...]:
    """Peak, RMS, clipped and silent ratios, straight from their definitions."""
    values = samples.astype(np.float64)
    size = round(0.02 * rate)
    frames = [values[start : start + size] for start in range(0, len(values), size)]
    silent = [20 * np.log10(np.sqrt((f**2).mean()) + 1e-300) < -60 for f in frames]
    return (
        float(20 * np.log10(np.abs(values).max())),
        float(20 * np.log10(np.sqrt((values**2).mean()))),
        float((np.abs(samples) >= np.float32(0.999)).mean()),
        float(np.mean(silent)),
    )


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_levels_are_those_of_the_source(rate: int, num_channels: int) -> None:
    samples = audio_factory.noise(11.013, rate, amplitude=0.4, num_channels=num_channels)
    samples[rate : 4 * rate] *= 1e-4
    samples[-rate // 3 :] = 0.0
    facts = decode_whole(audio_factory.encode(samples, rate, "wav_float"))[1]
    measured = (facts.peak_dbfs, facts.rms_dbfs, facts.clipped_ratio, facts.silent_ratio)
    assert measured == pytest.approx(expected_levels(samples, rate), rel=1e-9)
    assert facts.clipped_ratio > 0 and 0.2 < facts.silent_ratio < 0.4


def test_channels_out_of_phase_are_silent_only_after_mixing() -> None:
    wave = audio_factory.tone(0.5)
    samples, facts = decode_whole(audio_factory.encode(np.hstack([wave, -wave]), RATE))
    assert np.abs(samples).max() < 1e-4
    assert facts.rms_dbfs == pytest.approx(-9.03, abs=0.01)


def test_digital_silence_is_minus_infinity() -> None:
    facts = decode_whole(audio_factory.encode(np.zeros((RATE, 1), np.float32), RATE))[1]
    assert (facts.peak_dbfs, facts.rms_dbfs) == (-np.inf, -np.inf)
    assert (facts.clipped_ratio, facts.silent_ratio) == (0.0, 1.0)


def test_content_hash_is_that_of_the_encoded_bytes() -> None:
    data = audio_factory.encode(audio_factory.tone(0.5), RATE, "flac")
    facts = decode_whole(data, start_s=0.1, end_s=0.3)[1]
    assert facts.content_sha256 == hashlib.sha256(data).hexdigest()


# Segments


@pytest.mark.parametrize(
    "name", ["wav", "wav24", "flac", "aiff", "ogg", "mp3", "mp3_no_header", "m4a", "opus", "mkv"]
)
def test_a_segment_is_what_slicing_the_whole_gives(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(soundfile_reader, "PREROLL_FRAMES", 60_000)  # so that short files seek, too
    rate = rate_for(name)
    data = audio_factory.encode(sound(name, 6.0, 2), rate, name)
    whole = native(data, rate)
    for start_s, end_s in ((0.0, 1.0), (0.333, 0.9), (2.5, 4.00007), (4.1, 5.9)):
        part = native(data, rate, start_s=start_s, end_s=end_s)
        expected = whole[round(start_s * rate) : round(end_s * rate)]
        assert part.shape == expected.shape
        np.testing.assert_allclose(part, expected, atol=3e-7, rtol=0)


def test_a_segment_is_cut_before_it_is_resampled() -> None:
    samples = audio_factory.noise(2.0, 44_100)
    data = audio_factory.encode(samples, 44_100, "wav_float")
    decoded, facts = decode_whole(data, start_s=0.5, end_s=1.25)
    expected = soxr.resample(samples[22_050:55_125, 0], 44_100, RATE)
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    assert facts.duration_s == 0.75


@pytest.mark.parametrize("name", ["wav", "ogg", "m4a"])
def test_a_segment_that_ends_after_the_file_is_labelled_as_far_as_it_goes(name: str) -> None:
    data = audio_factory.encode(sound(name, 2.0), rate_for(name), name)
    facts = decode_whole(data, start_s=1.0, end_s=4.0)[1]
    assert facts.duration_s == pytest.approx(1.0, abs=0.05)
    assert "decoded 1.0 of 3.0 s (the segment ends at 4.000 s, the file at 2.0" in str(
        facts.warning
    )


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "m4a"])
def test_a_segment_that_starts_after_the_file_is_an_error(name: str) -> None:
    data = audio_factory.encode(sound(name, 2.0), rate_for(name), name)
    with pytest.raises(
        DecodeError, match=r"starts at 7\.000 s, but the audio ends at 2\.0"
    ) as error:
        decode_whole(data, start_s=7.0, end_s=8.0)
    assert error.value.error_type == "BadSegment"


@pytest.mark.parametrize(
    ("start_s", "end_s", "words"),
    [
        (-1.0, None, "start_s is -1.0; must be a number of seconds ≥ 0"),
        (1.0, 1.0, r"end_s is 1.0; must be greater than start_s \(1.0\)"),
        (None, 0.0, "end_s is 0.0; must be greater"),
        (float("nan"), None, "start_s is nan"),
    ],
)
def test_impossible_segments_are_errors(
    start_s: float | None, end_s: float | None, words: str
) -> None:
    data = audio_factory.encode(audio_factory.tone(2.0), RATE)
    with pytest.raises(DecodeError, match=words):
        decode_whole(data, start_s=start_s, end_s=end_s)


# Damaged and hostile input


@pytest.mark.parametrize(
    ("make", "error_type", "words"),
    [
        (lambda: b"", "EmptyFile", "0 bytes"),
        (lambda: b"Dear diary, " * 500, "NotAudio", "not audio that can be decoded"),
        (lambda: np.random.default_rng(0).bytes(50_000), "NotAudio", "not audio that can be"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "NoAudioStream", "no audio stream in this png"),
        (lambda: audio_factory.encode_video(RATE, []), "NoAudioStream", "no audio stream"),
        (lambda: wav(0.02), "TooShort", "20[.]0 ms of audio; at least 25 ms are needed"),
        (lambda: wav(0.0), "TooShort", "0[.]0 ms of audio"),
        (
            lambda: audio_factory.encode(sound("m4a", 2.0), 44_100, "m4a")[:9000],
            "NotAudio",
            "FFmpeg: moov atom not found",
        ),
    ],
)
def test_what_cannot_be_labelled_says_why(
    make: Callable[[], bytes], error_type: str, words: str
) -> None:
    with pytest.raises(DecodeError, match=words) as error:
        decode_whole(make())
    assert error.value.error_type == error_type


def test_25_ms_are_enough() -> None:
    samples, _ = decode_whole(audio_factory.encode(audio_factory.tone(0.025), RATE))
    assert len(samples) == 400


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="No such file") as error:
        decode_whole(tmp_path / "gone.wav")
    assert error.value.error_type == "FileNotFoundError"


def test_a_rate_of_zero_is_an_error() -> None:
    data = bytearray(audio_factory.encode(audio_factory.tone(1.0), RATE))
    struct.pack_into("<I", data, 24, 0)
    with pytest.raises(DecodeError):
        decode_whole(bytes(data))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_clip_ends_where_the_numbers_end(value: float) -> None:
    samples = audio_factory.tone(2.0, num_channels=2)
    samples[24_000, 1] = value
    decoded, facts = decode_whole(audio_factory.encode(samples, RATE, "wav_float"))
    assert (decoded.size, facts.duration_s) == (24_000, 1.5)
    assert np.isfinite(decoded).all()
    assert facts.warning == (
        "decoded 1.5 s, then stopped: the sample at 1.500 s is NaN or infinite"
    )


def test_a_long_clip_ends_where_the_numbers_end() -> None:
    samples = audio_factory.tone(8.0)
    samples[7 * RATE] = np.nan
    data = audio_factory.encode(samples, RATE, "wav_float")
    pieces = list(decode(data, piece_samples=RATE))
    assert sum(len(piece.samples) for piece in pieces) == 7 * RATE
    assert pieces[-1].facts.duration_s == 7.0
    assert str(pieces[-1].facts.warning).startswith(
        "decoded 7.0 s, then stopped: the sample at 7.0"
    )


@pytest.mark.parametrize("at_s", [0.0, 0.02])
def test_a_clip_with_too_few_numbers_is_an_error_with_their_place(at_s: float) -> None:
    samples = audio_factory.tone(2.0)
    samples[round(at_s * RATE)] = np.nan
    with pytest.raises(DecodeError, match=rf"sample at {at_s:.3f} s is NaN or infinite") as error:
        decode_whole(audio_factory.encode(samples, RATE, "wav_float"))
    assert error.value.error_type == "NonFiniteSamples"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wav", "decoded 2.5 of 5.0 s"),
        ("wav_float", "decoded 2.5 of 5.0 s"),
        ("rf64", "decoded 2.5 of 5.0 s"),
        ("aiff", "decoded 2.5 of 5.0 s"),
        ("au", "decoded 2.5 of 5.0 s"),
        ("flac", "decoded 2.. of 5.0 s"),
        ("mp3", "decoded 2.. of 5.0 s"),
        ("mkv", "decoded 2.. of 5.0 s"),
        ("m4a_faststart", "decoded 2.. of 5.0 s"),
        ("wma", "decoded 2.. of 5.0 s|damaged"),
        ("wavpack", "decoded 2.. of 5.0 s"),
        ("caf", "the file is cut short: "),
        ("w64", "the file is cut short: "),
        ("avi_video", "the file is cut short: "),
        ("ogg", "the Ogg stream has no end"),
        ("opus", "the Ogg stream has no end"),
        ("ogg_flac", "the Ogg stream has no end"),
    ],
)
def test_cut_files_are_labelled_as_far_as_they_go(name: str, words: str) -> None:
    samples = sound(name, 5.0)
    data = audio_factory.encode(samples, rate_for(name), name)
    decoded, facts = decode_whole(data[: len(data) // 2], sample_rate_hz=rate_for(name))
    assert 1.4 < facts.duration_s < 2.7
    assert len(decoded) == pytest.approx(facts.duration_s * rate_for(name), abs=1)
    assert re.search(words, str(facts.warning))
    if audio_factory.FORMATS[name].lossless_bits is not None:
        np.testing.assert_allclose(decoded, samples[: len(decoded), 0], atol=1e-7)


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "mp3", "m4a", "opus", "w64", "aiff"])
def test_trailing_garbage_is_ignored(name: str) -> None:
    data = audio_factory.encode(sound(name, 1.0), rate_for(name), name)
    clean, _ = decode_whole(data)
    dirty, _ = decode_whole(data + b"garbage" * 400)
    assert np.array_equal(clean, dirty)


@pytest.mark.parametrize("name", ["flac", "mp3", "m4a"])
def test_damage_in_the_middle_does_not_end_a_clip(name: str) -> None:
    data = bytearray(audio_factory.encode(sound(name, 5.0), rate_for(name), name))
    middle = len(data) // 2
    data[middle : middle + 1500] = np.random.default_rng(1).bytes(1500)
    facts = decode_whole(bytes(data))[1]
    assert facts.duration_s > 4.5
    assert facts.warning is not None


def test_a_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    data = bytearray(audio_factory.encode(audio_factory.tone(1.0), RATE))
    struct.pack_into("<I", data, 40, 0x70000000)  # the data chunk: 16 hours
    path = tmp_path / "liar.wav"
    path.write_bytes(data)
    code = (
        "import resource, sys; from transforms.decoding.decode import decode_whole\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "samples, facts = decode_whole(sys.argv[1])\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(len(samples), grown < 50_000, facts.warning)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "16000 True decoded 1.0 of 58720.3 s"


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_stream_that_knows_no_size_is_no_damage(size: int) -> None:
    data = bytearray(audio_factory.encode(audio_factory.tone(1.0), RATE))
    struct.pack_into("<I", data, 4, size)
    struct.pack_into("<I", data, 40, size)
    samples, facts = decode_whole(bytes(data))
    assert (len(samples), facts.warning) == (RATE, None)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile other.wav\n", "#EXTM3U\n#EXTINF:1,\nother.wav\n"]
)
def test_a_playlist_opens_no_other_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio_factory.write(tmp_path / "other.wav", audio_factory.tone(1.0), RATE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecodeError):
        decode_whole(text.encode())


@pytest.mark.parametrize("rate", [1, 999_999])
def test_odd_rates_stay_in_bounds(rate: int) -> None:
    data = audio_factory.encode(audio_factory.noise(30.0, 1), 1, "wav")
    data = data[:24] + struct.pack("<II", rate, 2 * rate) + data[32:]
    if rate == 1:
        pieces = list(decode(data))
        assert sum(len(piece.samples) for piece in pieces) == 30 * RATE
    else:
        with pytest.raises(DecodeError, match=r"0\.0 ms"):
            decode_whole(data)


# The pool

MISBEHAVING_WORKER = """
import os, sys, time
from transforms.decoding import child

def decode(source, **options):
    marks = bytes(source[-40:]) if isinstance(source, bytes) else b""
    if b"ABORT" in marks:
        print("assertion failed: marked clip", file=sys.stderr, flush=True)
        os.abort()
    if b"EXIT" in marks:
        os._exit(7)
    if b"HANG" in marks:
        time.sleep(1000)
    for index, piece in enumerate(child.decode(source, **options)):
        print("noise on stdout")
        yield piece
        if index == 2 and b"LATE" in marks:
            os.abort()
        if index == 2 and b"STUCK" in marks:
            time.sleep(1000)
        if index == 2 and b"RAISE" in marks:
            raise RuntimeError("the library stumbled")

child.serve(sys.argv[1:], decode)
"""


@pytest.fixture
def misbehaving(tmp_path: Path) -> list[str]:
    """A command that starts decoders which misbehave on marked clips."""
    path = tmp_path / "misbehaving_worker.py"
    path.write_text(MISBEHAVING_WORKER)
    return [sys.executable, str(path)]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(DecodeSettings(num_processes=2)) as pool:
        yield pool


def clip(name: str, data: bytes, **segment: float) -> EncodedClip:
    return EncodedClip(Item(name, name, **segment), data=data)


def wav(duration_s: float, mark: bytes = b"", frequency_hz: float = 440.0) -> bytes:
    samples = audio_factory.tone(duration_s, frequency_hz=frequency_hz)
    return audio_factory.encode(samples, RATE, "wav_float") + mark


def joined(results: list[Any], item_index: int = 0) -> audio_factory.Samples:
    """All samples of one item."""
    mine = [r.samples for r in results if isinstance(r, Waveform) and r.item_index == item_index]
    return np.concatenate(mine)


def children() -> set[int]:
    """Processes that this one has started and not yet waited for."""
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
    return pids


def is_gone(pid: int) -> bool:
    """The process has ended, be it waited for or not."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def test_results_come_in_order_with_failures_in_their_place(pool: DecodePool) -> None:
    missing = Failure(Item("b", "b"), "read", "ReadError", "gone")
    inputs = [clip("a", wav(2.0)), missing, clip("c", b"no audio at all"), clip("d", wav(0.1))]
    first, second, third, fourth = pool.stream("unit", inputs)
    assert isinstance(first, Waveform) and first.item.clip_id == "a" and first.facts is not None
    assert second == ItemFailure("unit", 1, missing)
    assert isinstance(third, ItemFailure)
    assert (third.failure.stage, third.failure.error_type) == ("decode", "NotAudio")
    assert isinstance(fourth, Waveform) and (fourth.unit_id, fourth.item_index) == ("unit", 3)
    assert np.array_equal(fourth.samples, audio_factory.tone(0.1)[:, 0])


def test_decoders_say_how_long_they_worked_on_good_clips_and_bad(pool: DecodePool) -> None:
    stage_clocks.reset()
    samples = audio_factory.tone(2.0, 44_100)
    list(pool.stream("u", [clip("a", audio_factory.encode(samples, 44_100))]))
    good = stage_clocks.lap()
    assert good.read_s > 0.0 and good.open_s > 0.0
    assert good.decode_s > 0.0 and good.resample_s > 0.0
    list(pool.stream("u", [clip("b", b"no audio at all" * 100)]))
    bad = stage_clocks.lap()
    assert bad.open_s > 0.0 and bad.decode_s > 0.0 and bad.resample_s == 0.0


def test_many_clips_stay_in_order(pool: DecodePool) -> None:
    durations = np.random.default_rng(0).uniform(0.03, 1.0, 60)
    results = list(pool.stream("u", (clip(str(d), wav(d)) for d in durations)))
    assert [result.item_index for result in results] == list(range(60))
    assert [len(r.samples) for r in results] == [round(d * RATE) for d in durations]


def test_segments_and_paths_reach_the_decoder(pool: DecodePool, tmp_path: Path) -> None:
    path = audio_factory.write(tmp_path / "a.wav", audio_factory.tone(2.0), RATE, "wav_float")
    item = Item("a", "a", start_s=0.5, end_s=1.5)
    (result,) = pool.stream("u", [EncodedClip(item, path=str(path))])
    assert np.array_equal(result.samples, audio_factory.tone(2.0)[8_000:24_000, 0])
    assert path.exists()


def test_temporary_clips_are_removed_in_every_case(tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(6)]
    for index, path in enumerate(paths):
        path.write_bytes(b"broken" if index == 1 else wav(0.1))
    clips = [EncodedClip(Item(p.name, p.name), path=str(p), delete_path=True) for p in paths]
    with DecodePool(DecodeSettings(num_processes=1, clips_ahead=4)) as pool:
        stream = pool.stream("u", iter(clips))
        next(stream), next(stream)
        stream.close()
        assert not paths[0].exists() and not paths[1].exists()
    left = [path for path in paths if path.exists()]
    assert all(path in paths[4:] for path in left)  # never read: still the reader's


def test_a_crash_costs_its_own_clip_only(misbehaving: list[str]) -> None:
    data = [wav(0.5), wav(0.5, b"ABORT"), wav(0.6), wav(0.5, b"EXIT"), wav(0.7)]
    settings = DecodeSettings(num_processes=2)
    with DecodePool(settings, worker_command=misbehaving) as pool:
        results = list(pool.stream("u", [clip(str(i), d) for i, d in enumerate(data)]))
    assert [isinstance(r, Waveform) for r in results] == [True, False, True, False, True]
    aborted, exited = results[1].failure, results[3].failure
    assert (aborted.stage, aborted.error_type) == ("decode", "DecoderCrashed")
    assert aborted.message == "the decoder was killed by SIGABRT (assertion failed: marked clip)"
    assert exited.message == "the decoder ended with exit code 7"


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (b"LATE", "the decoder was killed by SIGABRT"),
        (b"STUCK", "the decoder gave no sign of life for 1 s and was killed"),
        (b"RAISE", "the decoder failed: RuntimeError: the library stumbled"),
    ],
)
def test_what_was_decoded_before_the_trouble_is_kept(
    mark: bytes, words: str, misbehaving: list[str]
) -> None:
    settings = DecodeSettings(num_processes=1, piece_samples=RATE, stall_timeout_s=1.0)
    with DecodePool(settings, worker_command=misbehaving) as pool:
        results = list(pool.stream("u", [clip("a", wav(9.5, mark)), clip("b", wav(0.5))]))
    assert np.array_equal(joined(results), audio_factory.tone(3.0)[:, 0])
    last = results[2]
    assert last.facts is not None and last.facts.duration_s == 3.0 and len(last.samples) == RATE
    assert str(last.facts.warning).startswith(f"decoded 3.0 s, then stopped: {words}")
    assert last.facts.peak_dbfs == pytest.approx(-6.02, abs=0.01)
    assert len(joined(results, 1)) == RATE // 2


def test_a_hang_is_ended(misbehaving: list[str]) -> None:
    settings = DecodeSettings(num_processes=1, stall_timeout_s=0.5)
    with DecodePool(settings, worker_command=misbehaving) as pool:
        hung, fine = pool.stream("u", [clip("a", wav(0.5, b"HANG")), clip("b", wav(0.5))])
    assert hung.failure.error_type == "DecoderHung"
    assert hung.failure.message == "the decoder gave no sign of life for 0.5 s and was killed"
    assert isinstance(fine, Waveform)


def test_signs_of_life_keep_a_slow_clip_alive(tmp_path: Path) -> None:
    path = tmp_path / "slow_worker.py"
    path.write_text(
        "import sys, time\n"
        "from transforms.decoding import child\n"
        "child.ALIVE_EVERY_S = 0.05\n"
        "def decode(source, on_progress, **options):\n"
        "    for _ in range(20):\n"
        "        time.sleep(0.1)\n"
        "        on_progress()\n"
        "    yield from child.decode(source, **options)\n"
        "child.serve(sys.argv[1:], decode)\n"
    )
    settings = DecodeSettings(num_processes=1, stall_timeout_s=1.0)
    with DecodePool(settings, worker_command=[sys.executable, str(path)]) as pool:
        (result,) = pool.stream("u", [clip("a", wav(0.5))])
    assert isinstance(result, Waveform)


def test_ctrl_c_and_death_between_clips_are_survived() -> None:
    others = children()
    with DecodePool(DecodeSettings(num_processes=1)) as pool:
        list(pool.stream("u", [clip("a", wav(0.5))]))
        (child,) = children() - others
        os.kill(child, signal.SIGINT)
        list(pool.stream("u", [clip("a", wav(0.5))]))
        assert children() - others == {child}
        os.kill(child, signal.SIGKILL)
        assert eventually(lambda: is_gone(child))
        (result,) = pool.stream("u", [clip("a", wav(0.5))])
        assert isinstance(result, Waveform)


def test_a_decoder_that_cannot_start_is_an_error_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no libsndfile here')"]
    with (
        DecodePool(DecodeSettings(num_processes=1), worker_command=command) as pool,
        pytest.raises(EarmarkError, match=r"exit code 1 \(no libsndfile here"),
    ):
        list(pool.stream("u", [clip("a", wav(0.5))]))
    assert len(caplog.records) == 3


def test_an_error_of_the_reader_is_raised_in_its_place(pool: DecodePool) -> None:
    def clips() -> Iterator[EncodedClip]:
        yield clip("a", wav(0.5))
        raise OSError("the disk is gone")

    stream = pool.stream("u", clips())
    assert isinstance(next(stream), Waveform)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert list(stream) == []


def test_reading_ahead_is_bounded_in_clips_and_bytes() -> None:
    num_read = 0

    def clips() -> Iterator[EncodedClip]:
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield clip(str(index), wav(0.1))

    with DecodePool(DecodeSettings(num_processes=1, clips_ahead=5)) as pool:
        stream = pool.stream("u", clips())
        assert eventually(lambda: num_read == 5)
        time.sleep(0.2)
        assert num_read == 5
        next(stream)
        assert eventually(lambda: num_read == 6)
        assert len(list(stream)) == 99
    num_read = 0
    with DecodePool(DecodeSettings(num_processes=1, bytes_ahead=1)) as pool:
        stream = pool.stream("u", clips())
        assert isinstance(next(stream), Waveform)
        assert len(list(stream)) == 99


def test_hours_flow_in_bounded_memory() -> None:
    ten_minutes = audio_factory.encode(audio_factory.tone(600.0, 8_000), 8_000, "flac")
    settings = DecodeSettings(num_processes=1, piece_samples=RATE)
    others = children()
    with DecodePool(settings) as pool:
        stream = pool.stream("u", [clip("a", ten_minutes)])
        first = next(stream)
        job = stream._stream.jobs[0]
        assert eventually(lambda: len(job.results) == decode_module.PIECES_AHEAD)
        time.sleep(0.3)
        assert len(job.results) == decode_module.PIECES_AHEAD
        (child,) = children() - others
        rest = list(stream)
        status = Path(f"/proc/{child}/status").read_text()
    peak_kb = int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))
    assert peak_kb < 200_000
    assert len(first.samples) + sum(len(r.samples) for r in rest) == 600 * RATE
    assert [r.facts is not None for r in rest] == [False] * (len(rest) - 1) + [True]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_streams_of_long_clips_can_be_taken_in_any_order(num_processes: int) -> None:
    """No decoder is free and no room is left when the last stream is asked for first."""
    settings = DecodeSettings(num_processes=num_processes, clips_ahead=2, piece_samples=400)
    others = children()
    with DecodePool(settings) as pool:
        streams = [
            pool.stream(name, [clip(f"{name}{i}", wav(1.0)) for i in range(3)]) for name in "xyz"
        ]
        assert eventually(lambda: pool._num_stalled == num_processes)
        done = []
        for stream in reversed(streams):
            results = list(stream)
            done.append([len(joined(results, index)) for index in range(3)])
        assert done == [[RATE] * 3] * 3
        assert eventually(lambda: len(children() - others) <= num_processes)


def test_several_threads_share_a_pool() -> None:
    settings = DecodeSettings(num_processes=2, clips_ahead=3, piece_samples=4_000)
    totals: dict[str, int] = {}
    with DecodePool(settings) as pool:

        def consume(name: str) -> None:
            previous = None
            for round_index in range(4):
                stream = pool.stream(name, [clip(f"{i}", wav(0.9)) for i in range(5)])
                for taken in (previous, stream if round_index == 3 else None):
                    if taken is not None:
                        totals[name] = totals.get(name, 0) + sum(len(r.samples) for r in taken)
                previous = stream

        threads = [threading.Thread(target=consume, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert totals == dict.fromkeys("abcd", 4 * 5 * round(0.9 * RATE))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_leaves_nothing_behind() -> None:
    threads, files, processes = threading.active_count(), open_files(), children()
    pool = DecodePool(DecodeSettings(num_processes=2, piece_samples=400, clips_ahead=4))
    streams = [pool.stream("u", [clip(f"{i}", wav(3.0)) for i in range(9)]) for _ in range(2)]
    next(streams[0])
    assert len(children() - processes) >= 1
    pool.close()
    assert children() == processes
    assert threading.active_count() == threads
    assert open_files() == files
    with pytest.raises(EarmarkError, match="was closed"):
        list(streams[0])
    with pytest.raises(EarmarkError, match="is closed"):
        pool.stream("u", [])


@pytest.mark.parametrize("how", ["close", "drop"])
def test_an_abandoned_stream_stops_and_frees_the_pool(how: str) -> None:
    closed = threading.Event()

    def clips() -> Iterator[EncodedClip]:
        try:
            for index in range(1000):
                yield clip(str(index), wav(3.0))
        finally:
            closed.set()

    with DecodePool(DecodeSettings(num_processes=1, piece_samples=400, clips_ahead=3)) as pool:
        stream = pool.stream("u", clips())
        next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        assert closed.wait(20)
        assert len(list(pool.stream("v", [clip("a", wav(0.02 * 5))]))) == 4
        assert (pool._clips_under_way, pool._bytes_under_way) == (0, 0)


def test_children_end_when_their_parent_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from tests.transforms.decoding.test_decode import children, clip, wav\n"
        "from transforms.decoding.pool import DecodePool, DecodeSettings\n"
        "pool = DecodePool(DecodeSettings(num_processes=1, piece_samples=400))\n"
        "stream = pool.stream('u', [clip('a', wav(5.0))])\n"
        "next(stream)\n"
        "print(*children(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    assert eventually(lambda: is_gone(int(result.stdout)))


def test_real_clips_equal_soundfile_and_soxr(pool: DecodePool, esc10: list[Path]) -> None:
    paths = esc10[::32]
    results = list(
        pool.stream("u", [EncodedClip(Item(p.name, p.name), path=str(p)) for p in paths])
    )
    for path, result in zip(paths, results, strict=True):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        expected = soxr.resample(samples.mean(axis=1), rate, RATE)
        assert isinstance(result, Waveform) and result.facts is not None
        np.testing.assert_allclose(result.samples, expected, atol=1e-6)
        assert result.facts.warning is None
        levels = (result.facts.peak_dbfs, result.facts.rms_dbfs)
        assert levels == pytest.approx(expected_levels(samples + 0.0, rate)[:2], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_processes", -1), ("piece_samples", 399), ("bytes_ahead", 0), ("stall_timeout_s", 0.0)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DecodeSettings(**{name: value})  # type: ignore[arg-type]


# The Beam step


def read_unit(unit: WorkUnit) -> Iterator[EncodedClip | Failure]:
    for item in unit.items:
        if item.uri == "broken":
            yield Failure(item, "read", "ReadError", "cannot be read")
        else:
            yield EncodedClip(item, data=wav(float(item.uri)))


def make_units(num_units: int) -> list[WorkUnit]:
    uris = ["0.5", "broken", "0.75"]
    return [
        WorkUnit(f"u{n}", "files", tuple(Item(f"u{n}/{uri}", uri) for uri in uris[: n % 4]))
        for n in range(num_units)
    ]


def summary(result: Any) -> tuple[Any, ...]:
    if isinstance(result, UnitEnd):
        return (result.unit.unit_id, "end", result.num_items)
    if isinstance(result, ItemFailure):
        return (result.unit_id, result.item_index, result.failure.message)
    return (result.unit_id, result.item_index, len(result.samples))


def expected_summary(num_units: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    contents = [8_000, "cannot be read", 12_000]
    for n in range(num_units):
        rows += [(f"u{n}", index, contents[index]) for index in range(n % 4)]
        rows.append((f"u{n}", "end", n % 4))
    return rows


def test_units_are_decoded_one_behind_and_in_order() -> None:
    step = decode_module._DecodeFn(DecodeSettings(num_processes=1), read_unit)
    step.setup()
    try:
        for _ in range(2):  # a second bundle finds a clean step
            step.start_bundle()
            out = [
                [summary(r.value) for r in step.process(unit, "window", 17)]
                for unit in make_units(5)
            ]
            out.append([summary(r.value) for r in step.finish_bundle()])
            assert out[0] == []
            assert [row for rows in out for row in rows] == expected_summary(5)
            assert [rows[-1] for rows in out[1:]] == [(f"u{n}", "end", n % 4) for n in range(5)]
        results = [*step.process(make_units(1)[0], "window", 17), *step.finish_bundle()]
        assert [(r.timestamp, r.windows) for r in results] == [(17, ("window",))]
    finally:
        step.teardown()
    assert decode_module._shared_pools == {}


def test_a_failed_bundle_leaves_no_work_behind() -> None:
    step = decode_module._DecodeFn(DecodeSettings(num_processes=1), read_unit)
    step.setup()
    try:
        step.start_bundle()
        list(step.process(make_units(4)[3], "window", 17))
        step.start_bundle()
        assert list(step.finish_bundle()) == []
    finally:
        step.teardown()


def test_steps_of_one_process_share_a_pool() -> None:
    settings = DecodeSettings(num_processes=1)
    steps = [decode_module._DecodeFn(settings, read_unit) for _ in range(3)]
    for step in steps:
        step.setup()
    assert len({id(step._pool) for step in steps}) == 1
    pool = steps[0]._pool
    for step in steps[:2]:
        step.teardown()
    assert pool is not None and len(list(pool.stream("u", [clip("a", wav(0.5))]))) == 1
    steps[2].teardown()
    assert decode_module._shared_pools == {}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_decode_audio_in_a_pipeline(num_workers: int) -> None:
    options = beam.options.pipeline_options.PipelineOptions(
        direct_num_workers=num_workers, direct_running_mode="multi_threading"
    )
    with beam.Pipeline(FnApiRunner(), options=options) as pipeline:
        rows = (
            pipeline
            | beam.Create(make_units(9), reshuffle=False)
            | DecodeAudio(DecodeSettings(num_processes=2), read_unit)
            | beam.Map(summary)
        )
        assert_that(rows, equal_to(expected_summary(9)))
    assert decode_module._shared_pools == {}
