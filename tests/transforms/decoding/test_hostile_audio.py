"""Hostile audio: every file becomes audio, audio with a warning, or an error with its cause.

No file may crash or hang a decoder, or take more than the bounds of the config. The mutations are
those of ``benchmarks/reliability/fuzz_audio.py``, which runs them by the ten thousand.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.reliability.fuzz_audio import (
    LOST,
    MUTATIONS,
    Corpus,
    TimedPool,
    decode_batch,
)
from pipeline.config import label as config_module
from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support import audio_factory
from tests.support.audio_factory import clip
from tests.support.labelling import read_rows, small_config
from transforms.decoding import settings as settings_module
from transforms.decoding.child import data_bytes
from transforms.decoding.decode import decode, decode_whole
from transforms.decoding.pool import DecodePool
from transforms.decoding.settings import UNLIMITED, DecodeSettings
from transforms.errors import DecodeError
from transforms.records import EncodedClip, Item, ItemFailure, Waveform

RATE = 16_000


def sound(
    format: str = "wav", rate: int = RATE, duration_s: float = 1.0, channels: int = 1
) -> bytes:
    samples = np.repeat(audio_factory.tone(duration_s, rate), channels, axis=1)
    return audio_factory.encode(samples, rate, format)


def put(data: bytes, at: int, code: str, *values: int) -> bytes:
    """Overwrite bytes with numbers."""
    changed = bytearray(data)
    struct.pack_into(code, changed, at, *values)
    return bytes(changed)


# Mutated files of every format


def test_every_mutation_of_every_format_comes_to_one_end(tmp_path: Path) -> None:
    """Every file has one result, costs no decoder, and has a message if it fails."""
    recordings, folder = tmp_path / "recordings", tmp_path / "mutants"
    recordings.mkdir()
    folder.mkdir()
    for index in range(3):
        samples = audio_factory.noise(4.0, 44_100, seed=index)
        audio_factory.write(recordings / f"{index}.ogg", samples, 44_100, "ogg")
    corpus, outcomes = Corpus(recordings), set()
    with TimedPool(DecodeSettings(num_processes=2, max_item_s=600.0)) as pool:
        mutants = [corpus.mutant(n) for n in range(len(audio_factory.FORMATS) * len(MUTATIONS))]
        for mutant, end in zip(mutants, decode_batch(pool, mutants, folder), strict=True):
            what = f"{mutant.index} ({mutant.format}, {mutant.mutation}): {end}"
            assert end.error_type not in LOST, what
            assert end.outcome == "whole" or end.words, what
            if mutant.mutation == "untouched":
                assert end.outcome == "whole", what
            outcomes.add(end.outcome)
    assert outcomes == {"whole", "part", "error"}
    assert list(folder.iterdir()) == []


# Headers that lie


@pytest.mark.parametrize(
    ("name", "chunk", "at", "code", "values"),
    [
        # Rate, channels and bits, then 36 bits of frames.
        ("flac", b"fLaC", 18, ">Q", (RATE << 44 | 15 << 36 | 1 << 31,)),
        ("rf64", b"ds64", 16, "<QQ", (1 << 32, 1 << 31)),
        ("aiff", b"COMM", 10, ">I", (1 << 31,)),
    ],
)
def test_two_billion_missing_frames_are_a_warning(
    name: str, chunk: bytes, at: int, code: str, values: tuple[int, ...]
) -> None:
    data = sound(name)
    samples, facts = decode_whole(put(data, data.find(chunk) + at, code, *values))
    assert len(samples) == RATE
    assert facts.warning == "decoded 1.0 of 134217.7 s"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: put(sound("wav"), 24, "<I", 0), "FFmpeg: Invalid sample rate: 0"),
        (lambda: put(sound("au"), 16, ">I", 0), "libsndfile: .*; FFmpeg: Invalid data"),
        # libsndfile would take it for 1 Hz, and a second for hours.
        (
            lambda: put(sound("aiff"), sound("aiff").find(b"COMM") + 16, ">HQ", 0, 0),
            "the sample rate is 0 Hz; must be at least 1",
        ),
    ],
)
def test_a_rate_of_0_hz_is_an_error(data: Callable[[], bytes], words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        decode_whole(data())


@pytest.mark.parametrize("name", ["wav", "wav_float", "aiff", "caf", "w64", "wavpack"])
def test_768_khz_is_a_rate_like_any_other(name: str) -> None:
    samples, facts = decode_whole(sound(name, 768_000))
    assert (facts.sample_rate_hz, facts.duration_s, facts.warning) == (768_000, 1.0, None)
    np.testing.assert_allclose(samples[100:-100], audio_factory.tone(1.0)[100:-100, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["wav", "wav_float", "aiff", "caf", "au"])
def test_64_channels_are_averaged(name: str) -> None:
    samples, facts = decode_whole(sound(name, channels=64))
    assert (facts.channels, facts.warning) == (64, None)
    np.testing.assert_allclose(samples, audio_factory.tone(1.0)[:, 0], atol=1e-4)


@pytest.mark.parametrize("num_channels", [0, 64, 1024, 65_535])
def test_missing_channels_are_an_error(num_channels: int) -> None:
    with pytest.raises(DecodeError) as error:
        decode_whole(put(sound("wav"), 22, "<H", num_channels))
    assert error.value.error_type in {"NoSamples", "TooShort"}


@pytest.mark.parametrize(
    ("size", "duration_s", "warning"),
    [
        (0, 1.0, "the header declares no audio; read to the end"),
        (16_000, 1.0, "the header declares 0.5 s; there are 1.0 s of audio"),
        (0x70000000, 1.0, "decoded 1.0 of 58720.3 s"),
        (0xFFFFFFFF, 1.0, None),
    ],
)
def test_a_wav_of_false_size_is_read_to_its_end(
    size: int, duration_s: float, warning: str | None
) -> None:
    facts = decode_whole(put(sound("wav"), 40, "<I", size))[1]
    assert (facts.duration_s, facts.warning) == (duration_s, warning)


@pytest.mark.parametrize("more", [b"LIST\4\0\0\0abcd", b"TAG" + bytes(125), bytes(1000), b"x"])
def test_known_chunks_after_the_audio_of_a_wav_are_not_damage(more: bytes) -> None:
    assert decode_whole(sound("wav") + more)[1].warning is None


@pytest.mark.parametrize("name", ["mkv", "mkv_video", "webm", "mp4_video", "m4a", "opus"])
def test_a_cut_that_the_length_does_not_show_is_a_warning(name: str) -> None:
    data = sound(name, 48_000, 3.0)
    assert decode_whole(data)[1].warning is None
    facts = decode_whole(data[:-20])[1]
    assert "cut short" in str(facts.warning)


def test_a_large_number_in_a_small_file_is_a_size_not_unknown() -> None:
    data = sound("w64")
    warning = decode_whole(put(data, 16, "<Q", 1 << 40))[1].warning
    assert f"the file is cut short: {len(data)} of {1 << 40} bytes" in str(warning)


def test_a_file_without_a_usable_packet_gives_ffmpegs_message() -> None:
    data = bytearray(sound("opus", 48_000, 0.5))
    data[-50] ^= 1  # the one page that holds audio
    with pytest.raises(DecodeError, match="FFmpeg: CRC mismatch!"):
        decode_whole(bytes(data))


# Bounds


def failed(settings: DecodeSettings, *clips: EncodedClip, **options: Any) -> list[Any]:
    """Return each clip's ``(error_type, message)``, or its duration."""
    ends: list[Any] = []
    with DecodePool(settings, **options) as pool:
        for result in pool.stream("u", clips):
            if isinstance(result, ItemFailure):
                assert result.failure.stage == "decode"
                ends.append((result.failure.error_type, result.failure.message))
            elif result.facts is not None:
                ends.append(result.facts.duration_s)
    return ends


def test_an_item_with_too_many_bytes_is_an_error(tmp_path: Path) -> None:
    data = sound("wav")
    path = tmp_path / "large.wav"
    path.write_bytes(data)
    ends = failed(
        DecodeSettings(num_processes=1, max_item_bytes=len(data) - 1),
        clip("a", data),
        EncodedClip(Item("b", "b"), path=str(path), delete_path=True),
        clip("c", sound("wav", duration_s=0.5)),
    )
    expected = (
        "ItemTooLarge",
        "the item has 32044 bytes; at most 32043 are allowed; to allow more, raise "
        "decode.max_item_bytes",
    )
    assert ends == [expected, expected, 0.5]
    assert not path.exists()


def test_an_item_that_is_too_long_is_an_error_and_not_cut() -> None:
    settings = DecodeSettings(num_processes=1, max_item_s=5.0, piece_samples=RATE)
    ends = failed(
        settings,
        clip("a", sound(duration_s=5.0)),
        clip("b", sound(duration_s=7.0)),
        clip("c", sound()),
    )
    assert ends == [
        5.0,
        (
            "ItemTooLong",
            "the item goes on after 6.0 s of audio; at most 5 s are allowed; to allow more, raise "
            "decode.max_item_s, or label it in segments",
        ),
        1.0,
    ]


def test_a_segment_of_a_long_file_is_as_long_as_the_segment() -> None:
    limits = dataclasses.replace(UNLIMITED, max_item_s=2.0)
    pieces = list(decode(sound(duration_s=9.0), start_s=4.0, end_s=5.5, settings=limits))
    assert pieces[-1].facts.duration_s == 1.5


def test_an_item_that_takes_too_much_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter(np.arange(0.0, 1e4, 0.5))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock_s)))
    limits = dataclasses.replace(UNLIMITED, max_decode_ratio=0.25, stall_timeout_s=2.0)
    with pytest.raises(DecodeError) as error:
        list(decode(sound(duration_s=60.0), settings=limits))
    assert error.value.error_type == "DecodingTooSlow"
    assert str(error.value) == (
        "decoding took 2.5 s for 4.0 s of audio; at most 0.25 s per second are allowed (and 2 s "
        "for any item); to allow more, raise decode.max_decode_ratio"
    )


def test_time_is_checked_even_if_every_packet_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packet can be decoded, so no block of samples would trigger the check."""
    clock_s = iter(np.arange(0.0, 1e6, 0.5))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock_s)))
    hostile = put(sound("wav", duration_s=4.0), 22, "<H", 0)  # no channels
    with pytest.raises(DecodeError, match=r"decoding took 10\.5 s for 0\.0 s of audio"):
        list(
            decode(
                hostile,
                settings=dataclasses.replace(UNLIMITED, max_decode_ratio=1.0, stall_timeout_s=10.0),
            )
        )


def test_waiting_for_a_slow_consumer_does_not_count_as_decoding() -> None:
    settings = DecodeSettings(num_processes=1, piece_samples=RATE, stall_timeout_s=1.0)
    with DecodePool(settings) as pool:
        stream = pool.stream("u", [clip("a", sound(duration_s=12.0))])
        next(stream)
        time.sleep(1.5)
        rest = list(stream)
    assert isinstance(rest[-1], Waveform) and rest[-1].facts is not None
    assert (rest[-1].facts.duration_s, rest[-1].facts.warning) == (12.0, None)


@pytest.mark.parametrize(
    ("mark", "error_type", "words"),
    [
        (b"SEGFAULT", "DecoderCrashed", "the decoder was killed by SIGSEGV"),
        (b"NATIVE_S", "DecoderHung", "the decoder gave no sign of life for 1.5 s and was killed"),
        (b"SIGSTOP_", "DecoderHung", "the decoder gave no sign of life for 1.5 s and was killed"),
    ],
)
def test_a_library_that_takes_its_process_along_costs_its_clip(
    mark: bytes, error_type: str, words: str, hostile_worker: list[str]
) -> None:
    settings = DecodeSettings(num_processes=1, stall_timeout_s=1.5)
    clips = [clip("a", sound()), clip("b", sound() + mark), clip("c", sound(duration_s=0.5))]
    ends = failed(settings, *clips, worker_command=hostile_worker)
    assert ends == [1.0, (error_type, words), 0.5]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings only on Linux")
def test_a_decoder_that_needs_too_much_memory_costs_its_clip(hostile_worker: list[str]) -> None:
    """Also after some of it was decoded; the next clip gets a new decoder."""
    settings = DecodeSettings(num_processes=1, max_decoder_bytes=256 << 20, piece_samples=RATE)
    greedy = clip("b", sound(duration_s=9.0) + b"GREEDY__")
    ends = failed(
        settings, clip("a", sound()), greedy, clip("c", sound()), worker_command=hostile_worker
    )
    assert (ends[0], ends[2]) == (1.0, 1.0)
    assert ends[1] == (
        "DecoderOutOfMemory",
        "the decoder needs too much memory (out of memory); at most 268435456 bytes are allowed; "
        "to allow more, raise decode.max_decoder_bytes",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings only on Linux")
def test_a_decoder_that_leaks_is_replaced_before_it_costs_a_clip(hostile_worker: list[str]) -> None:
    settings = DecodeSettings(num_processes=1, max_decoder_bytes=512 << 20)
    clips = [clip(str(index), sound() + b"LEAKS___") for index in range(6)]
    assert failed(settings, *clips, worker_command=hostile_worker) == [1.0] * 6


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings only on Linux")
def test_a_header_that_makes_ffmpeg_request_gigabytes_is_an_error_of_memory() -> None:
    data = sound("mov", 44_100)
    at = data.find(b"stsz") + 8  # a size of its own for each of so many samples
    hostile = put(data, at, ">II", 0, 0x0FFFFFFF)
    ends = failed(DecodeSettings(num_processes=1), clip("a", hostile), clip("b", sound()))
    assert ends[1] == 1.0
    assert isinstance(ends[0], tuple), ends


def test_memory_of_a_process_is_known_on_linux_only() -> None:
    assert data_bytes("no such process") == 0
    assert (data_bytes("self") > 1 << 20) == (sys.platform == "linux")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_item_bytes", 0),
        ("max_decoder_bytes", (256 << 20) - 1),
        ("max_item_s", 0.0),
        ("max_decode_ratio", math.nan),
        ("num_processes", -1),
        ("piece_samples", 399),
        ("bytes_ahead", 0),
        ("stall_timeout_s", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DecodeSettings(**{name: value})  # type: ignore[arg-type]


def test_the_config_and_the_step_agree_on_the_bounds() -> None:
    section, settings = RunConfig().decode.model_dump(), DecodeSettings()
    bounds = [name for name in section if name.startswith("max_")]
    assert bounds == ["max_item_bytes", "max_item_s", "max_decode_ratio", "max_decoder_bytes"]
    assert {name: section[name] for name in bounds} == {n: getattr(settings, n) for n in bounds}
    assert config_module.MIN_DECODER_BYTES == settings_module.MIN_DECODER_BYTES


# Through the whole pipeline


def test_an_item_that_fails_after_some_windows_leaves_only_its_error(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    audio_factory.write(folder / "good.wav", audio_factory.noise(12.0), RATE)
    audio_factory.write(folder / "long.wav", audio_factory.noise(65.0), RATE)
    bounds = {"processes": 1, "max_item_s": 60.0}
    config = small_config(tiny_model, out, folder, max_failed=1.0, decode=bounds, units={})
    assert run_label(config, []) == 0
    assert run_verify(str(out), quiet=True) == 0
    (error,) = read_rows(out, "errors")
    assert error["clip_id"] == f"{folder}/long.wav"
    assert (error["stage"], error["error_type"]) == ("decode", "ItemTooLong")
    assert "decode.max_item_s" in error["message"]
    (clip,) = read_rows(out, "clips")
    assert clip["clip_id"] == f"{folder}/good.wav"
    assert {row["clip_id"] for row in read_rows(out, "windows")} == {clip["clip_id"]}
