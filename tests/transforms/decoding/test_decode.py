"""Decoding: every format, segments, levels, and damaged input."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr

from tests.support import audio_factory
from tests.support.audio_factory import wav
from transforms.decoding import ffmpeg_reader, soundfile_reader
from transforms.decoding.decode import decode, decode_whole
from transforms.decoding.formats import encoded
from transforms.decoding.settings import UNLIMITED
from transforms.errors import DecodeError

RATE = 16_000
LOSSLESS = [name for name, f in audio_factory.FORMATS.items() if f.lossless_bits is not None]
LOSSY = [name for name, f in audio_factory.FORMATS.items() if f.lossless_bits is None]


def rate_for(name: str) -> int:
    rates = audio_factory.FORMATS[name].rates
    return 44_100 if rates is None else rates[-1]


def sound(name: str, duration_s: float, num_channels: int = 1) -> audio_factory.Samples:
    """Return a tone in noise with the precision of the format."""
    rate = rate_for(name)
    samples = audio_factory.tone(duration_s, rate, num_channels=num_channels)
    samples += audio_factory.noise(duration_s, rate, amplitude=0.02, num_channels=num_channels)
    bits = audio_factory.FORMATS[name].lossless_bits
    return samples if bits is None else audio_factory.quantised(samples, bits)


def native(data: bytes, rate: int, **segment: float) -> audio_factory.Samples:
    """Decode without resampling."""
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
def test_encoder_delay_is_cut_if_the_file_declares_it(name: str) -> None:
    samples = sound(name, 1.5)
    decoded = native(audio_factory.encode(samples, rate_for(name), name), rate_for(name))
    length = min(len(decoded), len(samples))
    assert np.corrcoef(decoded[:length], samples[:length, 0])[0, 1] > 0.99


def test_content_decides_not_the_name_and_large_files_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file_name in (("flac", "a.mp3"), ("ogg", "b"), ("m4a", "c.wav"), ("wav", "d.raw")):
        path = audio_factory.write(tmp_path / file_name, sound(name, 2.0), rate_for(name), name)
        in_memory, facts = decode_whole(path.read_bytes())
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
    pieces = list(decode(data, dataclasses.replace(UNLIMITED, piece_samples=piece_samples)))
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
    assert "changes from 44100 Hz, 1 channel to 22050 Hz, 2 channels" in str(facts.warning)
    assert np.argmax(np.abs(np.fft.rfft(samples[-RATE:]))) == pytest.approx(440, abs=1)


def test_the_first_of_several_audio_streams_is_used_with_a_warning() -> None:
    first, second = audio_factory.tone(0.5), audio_factory.tone(0.5, frequency_hz=880.0)
    samples, facts = decode_whole(audio_factory.encode_video(RATE, [first, second]))
    np.testing.assert_allclose(samples, first[:, 0], atol=1e-4)
    assert facts.warning == "2 audio streams; the first was used"
    assert facts.warning_kinds == ("several_streams",)


# Level statistics


def expected_levels(samples: audio_factory.Samples, rate: int) -> tuple[float, ...]:
    """Compute peak, RMS, clipped and silent ratios from their definitions."""
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


def test_digital_silence_is_minus_infinity() -> None:
    facts = decode_whole(audio_factory.encode(np.zeros((RATE, 1), np.float32), RATE))[1]
    assert (facts.peak_dbfs, facts.rms_dbfs) == (-np.inf, -np.inf)
    assert (facts.clipped_ratio, facts.silent_ratio) == (0.0, 1.0)


# Segments


@pytest.mark.parametrize(
    "name", ["wav", "wav24", "flac", "aiff", "ogg", "mp3", "mp3_no_header", "m4a", "opus", "mkv"]
)
def test_a_segment_equals_a_slice_of_the_whole(name: str, monkeypatch: Any) -> None:
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
    assert facts.warning_kinds == ("segment_beyond_end",)


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
        (lambda: Path("/nowhere/gone.wav"), "FileNotFoundError", "No such file"),
        (lambda: b"Dear diary, " * 500, "NotAudio", "not audio that can be decoded"),
        (lambda: np.random.default_rng(0).bytes(50_000), "NotAudio", "not audio that can be"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "NoAudioStream", "no audio stream in this png"),
        (lambda: audio_factory.encode_video(RATE, []), "NoAudioStream", "no audio stream"),
        (lambda: wav(0.02), "TooShort", "20[.]0 ms of audio; at least 25 ms are needed"),
        (lambda: wav(0.0), "NoSamples", "there is no audio in it"),
        (
            lambda: audio_factory.encode(sound("m4a", 2.0), 44_100, "m4a")[:9000],
            "NotAudio",
            "FFmpeg: moov atom not found",
        ),
    ],
)
def test_errors_tell_why_a_file_cannot_be_labelled(
    make: Callable[[], bytes | Path], error_type: str, words: str
) -> None:
    with pytest.raises(DecodeError, match=words) as error:
        decode_whole(make())
    assert error.value.error_type == error_type


def test_25_ms_are_enough() -> None:
    samples, _ = decode_whole(audio_factory.encode(audio_factory.tone(0.025), RATE))
    assert len(samples) == 400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("piece_samples", [8_000, 160_000])
def test_a_clip_ends_where_the_numbers_end(value: float, piece_samples: int) -> None:
    samples = audio_factory.tone(2.0, num_channels=2)
    samples[24_000, 1] = value
    settings = dataclasses.replace(UNLIMITED, piece_samples=piece_samples)
    pieces = list(decode(audio_factory.encode(samples, RATE, "wav_float"), settings))
    decoded, facts = np.concatenate([piece.samples for piece in pieces]), pieces[-1].facts
    assert (decoded.size, facts.duration_s) == (24_000, 1.5)
    assert np.isfinite(decoded).all()
    assert facts.warning == (
        "decoded 1.5 s, then stopped: the sample at 1.500 s is NaN or infinite"
    )
    assert facts.warning_kinds == ("damaged",)


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
        *((name, "decoded 2.5 of 5.0 s") for name in ("wav", "wav_float", "rf64", "aiff", "au")),
        *((name, "decoded 2.. of 5.0 s") for name in ("flac", "mp3", "mkv", "m4a_faststart")),
        ("wavpack", "decoded 2.. of 5.0 s"),
        ("wma", "decoded 2.. of 5.0 s|damaged"),
        *((name, "the file is cut short: ") for name in ("caf", "w64", "avi_video")),
        *((name, "the Ogg stream has no end") for name in ("ogg", "opus", "ogg_flac")),
    ],
)
def test_cut_files_are_labelled_as_far_as_they_go(name: str, words: str) -> None:
    samples = sound(name, 5.0)
    data = audio_factory.encode(samples, rate_for(name), name)
    decoded, facts = decode_whole(data[: len(data) // 2], sample_rate_hz=rate_for(name))
    assert 1.4 < facts.duration_s < 2.7
    assert len(decoded) == pytest.approx(facts.duration_s * rate_for(name), abs=1)
    assert re.search(words, str(facts.warning))
    assert "cut_short" in facts.warning_kinds
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
    assert "damaged" in facts.warning_kinds


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
