"""FLAC files whose frames and header do not agree are read frame by frame."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.support import audio_factory
from transforms.decoding.decode import decode_whole
from transforms.decoding.formats.encoded import Encoded
from transforms.decoding.formats.flac import find_flac_parts

RATE = 16_000


def flac(duration_s: float, rate: int = RATE, channels: int = 1, name: str = "flac") -> bytes:
    samples = audio_factory.tone(duration_s, rate, num_channels=channels)
    return audio_factory.encode(samples, rate, name)


def with_total(data: bytes, num_samples: int) -> bytes:
    packed = int.from_bytes(data[18:26], "big")
    return data[:18] + (packed >> 36 << 36 | num_samples).to_bytes(8, "big") + data[26:]


def frames_of(data: bytes) -> bytes:
    """Return a FLAC's frames without its metadata."""
    position, is_last = 4, False
    while not is_last:
        is_last = bool(data[position] & 0x80)
        position += 4 + int.from_bytes(data[position + 1 : position + 4], "big")
    return data[position:]


@pytest.mark.parametrize("name", ["flac", "flac24"])
@pytest.mark.parametrize("duration_s", [0.2, 3.0, 11.7])
def test_samples_beyond_the_headers_count_are_read(duration_s: float, name: str) -> None:
    whole = flac(duration_s, name=name)
    samples, facts = decode_whole(with_total(whole, 1600))
    np.testing.assert_array_equal(samples, decode_whole(whole)[0])
    assert facts.warning == (f"the header declares 0.1 s; there are {duration_s:.1f} s of audio")


def test_a_header_that_counts_nothing_is_no_news() -> None:
    assert decode_whole(with_total(flac(3.0), 0))[1].warning is None
    assert decode_whole(flac(3.0))[1].warning is None


@pytest.mark.parametrize("num_files", [2, 5])
def test_files_one_behind_the_other_are_read(num_files: int) -> None:
    one = flac(1.3, channels=2)
    samples, facts = decode_whole(one * num_files)
    np.testing.assert_array_equal(samples, np.tile(decode_whole(one)[0], num_files))
    assert facts.warning is None


def test_files_of_other_formats_one_behind_the_other() -> None:
    samples, facts = decode_whole(flac(1.0) + flac(2.0, 44_100, 2) + flac(0.5, 8_000))
    assert facts.duration_s == pytest.approx(3.5)
    assert len(samples) == pytest.approx(3.5 * RATE, abs=10)
    assert "at 3.0 s the audio changes from 44100 Hz, 2 channels" in str(facts.warning)


@pytest.mark.parametrize(
    "runs",
    [
        [(3.0, 16_000, 1), (3.0, 48_000, 1)],
        [(3.0, 48_000, 1), (3.0, 16_000, 1)],
        [(2.0, 44_100, 1), (2.0, 44_100, 2)],
        [(1.0, 44_100, 2), (1.0, 22_050, 1), (2.0, 44_100, 2)],
    ],
)
def test_frames_may_change_rate_and_channels(runs: list[tuple[float, int, int]]) -> None:
    parts = [flac(*run) for run in runs]
    data = with_total(parts[0], 0) + b"".join(map(frames_of, parts[1:]))
    samples, facts = decode_whole(data)
    assert facts.duration_s == pytest.approx(sum(duration_s for duration_s, _, _ in runs))
    assert str(facts.warning).count("the audio changes") == len(runs) - 1
    at = 0.0
    for duration_s, _, _ in runs:  # pitch and times are right
        inside = samples[round((at + 0.2) * RATE) : round((at + 0.7) * RATE)]
        assert np.argmax(np.abs(np.fft.rfft(inside))) == pytest.approx(220, abs=1)
        at += duration_s


def test_real_frames_are_one_part() -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((RATE * 20, 2)), axis=0)
    for samples in (walk / np.abs(walk).max(), rng.uniform(-1, 1, (RATE * 20, 2))):
        data = audio_factory.encode(samples.astype(np.float32), RATE, "flac")
        (part,) = find_flac_parts(Encoded(data), lambda: None)
        assert (part.declared_s, part.encoded.prefix) == (None, b"")


def test_a_cut_file_is_one_part_and_says_what_is_missing() -> None:
    data = flac(5.0)
    for stop in np.linspace(len(data) // 5, len(data) - 1, 7).astype(int):
        assert "of 5.0" in str(decode_whole(data[:stop])[1].warning)


def test_a_part_ends_where_the_next_begins() -> None:
    data = flac(1.0) + flac(1.0, 44_100)
    parts = find_flac_parts(Encoded(data), lambda: None)
    assert parts[0].encoded.start == 0
    for part, following in pairwise(parts):
        assert part.encoded.stop == following.encoded.start
