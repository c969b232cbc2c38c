"""Channels: what mixing them down loses, and one of them, or each, instead."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import audio_factory
from tests.support.audio_factory import Samples, clip
from transforms.decoding.decode import decode, decode_whole
from transforms.decoding.pool import DecodePool
from transforms.decoding.settings import UNLIMITED, DecodeSettings
from transforms.errors import DecodeError
from transforms.records import EncodedClip, Item, ItemFailure, Waveform

RATE = 16_000
NOISE = audio_factory.noise(1.0)[:, 0]
OTHER = audio_factory.noise(1.0, seed=1)[:, 0]
SILENCE = np.zeros_like(NOISE)


def together(*channels: Samples, format: str = "wav_float", rate: int = RATE) -> bytes:
    """Encode channels, each of shape (num_samples,), as one file."""
    return audio_factory.encode(np.stack(channels, axis=1), rate, format)


def one_of(num_channels: int, live: int) -> list[Samples]:
    """Return channels of which one, from 1, is not silent."""
    return [NOISE if number == live else SILENCE for number in range(1, num_channels + 1)]


# What mixing down loses


@pytest.mark.parametrize("format", ["wav_float", "wav", "flac"])
@pytest.mark.parametrize(
    ("channels", "words"),
    [
        ([NOISE, -NOISE], "loses everything against channel 1, the loudest of 2"),
        ([0.9 * NOISE, -NOISE], "loses 26.0 dB against channel 2, the loudest of 2"),
        (one_of(8, 5), "loses 18.1 dB against channel 5, the loudest of 8"),
        (one_of(6, 1), "loses 15.6 dB against channel 1, the loudest of 6"),
        (one_of(5, 1), None),  # 14.0 dB
        (one_of(2, 2), None),  # 6.0 dB
        ([NOISE, NOISE], None),
        ([NOISE, OTHER], None),
        ([NOISE], None),
        ([SILENCE, SILENCE], None),
        # Over the whole clip: where only a part is in opposite phase, most of the sound is left.
        ([np.tile(NOISE, 2), np.concatenate([-NOISE, NOISE])], None),
    ],
)
def test_a_mix_that_loses_15_db_warns(
    channels: list[Samples], words: str | None, format: str
) -> None:
    warning = decode_whole(together(*channels, format=format))[1].warning
    if words is None:
        assert warning is None
    elif format == "wav_float":
        assert warning == (
            f"mixing down to mono {words}; to label that one alone: --set decode.channel=loudest"
        )
    else:  # sixteen bits hold -1, and not 1
        assert re.search(r"mixing down to mono loses .* the loudest of \d", str(warning))


def test_the_loss_is_that_of_the_segment() -> None:
    data = together(np.tile(NOISE, 2), np.concatenate([-NOISE, NOISE]))
    first, second = (decode_whole(data, start_s=s, end_s=s + 1.0)[1].warning for s in (0.0, 1.0))
    assert "loses everything" in str(first)
    assert second is None


def test_samples_of_any_size_have_their_loss() -> None:
    for size in (1e-12, 1e12):
        warning = decode_whole(together(0.9 * size * NOISE, -size * NOISE))[1].warning
        assert "loses 26.0 dB" in str(warning)


def test_one_channel_alone_has_no_warning_of_a_loss() -> None:
    for channel in ("first", 2, "loudest", "each"):
        assert decode_whole(together(NOISE, -NOISE), channel=channel)[1].warning is None


def test_a_real_recording_in_opposite_phases_warns(esc10: list[Path]) -> None:
    samples, facts = decode_whole(esc10[0], sample_rate_hz=44_100)
    opposite = decode_whole(together(samples, -0.99 * samples, format="flac", rate=44_100))[1]
    assert facts.warning is None
    assert "dB against channel 1, the loudest of 2" in str(opposite.warning)


# One channel


@pytest.mark.parametrize("format", ["wav_float", "flac24"])
@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize(
    ("channel", "index"), [("first", 0), (1, 0), (2, 1), (3, 2), ("loudest", 1), ("each", 0)]
)
def test_a_channel_is_decoded_as_if_it_were_alone(
    channel: Any, index: int, rate: int, format: str
) -> None:
    noise = audio_factory.noise(11.0, rate, num_channels=3)
    channels = [gain * noise[:, number] for number, gain in enumerate((0.2, 1.0, 0.5))]
    channels[1][: 4 * rate] *= 1e-4
    alone = audio_factory.encode(channels[index], rate, format)
    expected, of_alone = decode_whole(alone)
    samples, facts = decode_whole(together(*channels, format=format, rate=rate), channel=channel)
    assert np.array_equal(samples, expected)
    assert facts == dataclasses.replace(of_alone, channels=3, content_sha256=facts.content_sha256)


def test_the_loudest_is_that_of_the_segment() -> None:
    data = together(np.concatenate([NOISE, SILENCE]), np.concatenate([SILENCE, OTHER]))
    for start_s, expected in ((0.0, NOISE), (1.0, OTHER)):
        samples, _ = decode_whole(data, start_s=start_s, end_s=start_s + 1.0, channel="loudest")
        assert np.array_equal(samples, expected)


def test_of_silence_the_loudest_channel_is_the_first() -> None:
    samples, facts = decode_whole(together(SILENCE, SILENCE), channel="loudest")
    assert (len(samples), facts.channels, facts.warning) == (RATE, 2, None)


def test_of_damaged_audio_the_loudest_channel_is_labelled_as_far_as_it_goes() -> None:
    data = together(SILENCE, NOISE, format="flac")
    samples, facts = decode_whole(data[: len(data) // 2], channel="loudest")
    np.testing.assert_allclose(samples, NOISE[: len(samples)], atol=1e-4)
    assert "of 1.0 s" in str(facts.warning)


def test_a_bound_holds_while_the_loudest_channel_is_looked_for() -> None:
    settings = dataclasses.replace(UNLIMITED, channel="loudest", max_item_s=0.5)
    with pytest.raises(DecodeError, match=r"decode\.max_item_s") as error:
        list(decode(together(NOISE, OTHER), settings))
    assert error.value.error_type == "ItemTooLong"


@pytest.mark.parametrize(
    ("num_channels", "words"), [(1, "the audio has 1 channel;"), (2, "the audio has 2 channels;")]
)
def test_a_channel_that_is_not_there_is_an_error_that_says_how_many_are(
    num_channels: int, words: str
) -> None:
    with pytest.raises(DecodeError, match=f"decode.channel is 3, and {words} give") as error:
        decode_whole(together(*[NOISE] * num_channels), channel=3)
    assert error.value.error_type == "NoSuchChannel"


def test_another_channels_nan_does_not_matter() -> None:
    broken = NOISE.copy()
    broken[5_000] = np.nan
    data = together(broken, OTHER)
    assert "is NaN" in str(decode_whole(data)[1].warning)
    samples, facts = decode_whole(data, channel=2)
    assert np.array_equal(samples, OTHER)
    assert facts.warning is None


@pytest.mark.parametrize("channel", [0, -1, "left", None])
def test_a_channel_without_meaning_is_refused(channel: Any) -> None:
    with pytest.raises(ValueError, match="must be mix, first, loudest, each or a number from 1"):
        DecodeSettings(channel=channel)


def mono_then_stereo() -> bytes:
    mono = audio_factory.encode(audio_factory.tone(1.0), RATE, "aac")
    stereo = audio_factory.encode(audio_factory.tone(1.0, num_channels=2), RATE, "aac")
    return mono + stereo


def test_a_channel_that_comes_later_is_silent_until_then() -> None:
    (*_, first) = decode(mono_then_stereo(), channel=1)
    (*_, second) = decode(mono_then_stereo(), channel=2)
    assert first.num_channels == second.num_channels == 2
    assert first.facts.duration_s == second.facts.duration_s
    half = len(second.samples) // 2
    assert np.abs(second.samples[: half - 2_000]).max() == 0.0
    assert np.abs(second.samples[half:]).max() > 0.1
    assert "changes from 16000 Hz, 1 channel to 16000 Hz, 2 channels" in str(second.facts.warning)


# Each channel


@pytest.fixture(scope="module")
def each() -> Iterator[DecodePool]:
    """A pool with short pieces, so that a clip of a second has several."""
    settings = DecodeSettings(num_processes=2, channel="each", piece_samples=6_000)
    with DecodePool(settings) as pool:
        yield pool


def ends(results: Sequence[Waveform | ItemFailure]) -> list[tuple[int, int | None, bool]]:
    """Return item, channel and whether it failed, of the last result of each clip."""
    return [
        (result.item_index, result.channel, isinstance(result, ItemFailure))
        for result in results
        if isinstance(result, ItemFailure) or result.facts is not None
    ]


def joined(results: Sequence[Any], item_index: int, channel: int) -> Samples:
    return np.concatenate(
        [r.samples for r in results if (r.item_index, r.channel) == (item_index, channel)]
    )


def test_the_channels_of_each_clip_follow_one_another(each: DecodePool) -> None:
    files = [together(NOISE, OTHER, NOISE), together(OTHER), b"no audio", together(OTHER, NOISE)]
    results = list(each.stream("u", [clip(str(n), data) for n, data in enumerate(files)]))
    assert ends(results) == [
        *((0, 1, False), (0, 2, False), (0, 3, False)),
        *((1, 1, False), (2, 1, True), (3, 1, False), (3, 2, False)),
    ]
    assert np.array_equal(joined(results, 0, 2), OTHER)
    assert np.array_equal(joined(results, 3, 2), NOISE)
    assert {result.item.clip_id for result in results if isinstance(result, Waveform)} == set("013")
    facts = [r.facts for r in results if isinstance(r, Waveform) and r.facts is not None]
    assert [one.channels for one in facts] == [3, 3, 3, 1, 2, 2]
    assert len({one.content_sha256 for one in facts}) == 3


def test_a_channel_that_comes_later_is_a_clip_too(each: DecodePool) -> None:
    assert ends(list(each.stream("u", [clip("a", mono_then_stereo())]))) == [
        (0, 1, False),
        (0, 2, False),
    ]


def test_a_segment_and_a_temporary_file_have_their_channels(
    each: DecodePool, tmp_path: Path
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(together(NOISE, OTHER))
    item = Item("a", "a", start_s=0.25, end_s=0.75)
    results = list(each.stream("u", [EncodedClip(item, path=str(path), delete_path=True)]))
    assert np.array_equal(joined(results, 0, 1), NOISE[4_000:12_000])
    assert np.array_equal(joined(results, 0, 2), OTHER[4_000:12_000])
    assert not path.exists()


def test_a_stream_may_be_closed_between_channels(each: DecodePool) -> None:
    stream = each.stream("u", [clip("a", together(*[NOISE] * 8))])
    while next(stream).channel == 1:
        pass
    stream.close()
    assert ends(list(each.stream("u", [clip("b", together(OTHER))]))) == [(0, 1, False)]


CRASHES_ON_CHANNEL_2 = """
import os, sys
from transforms.decoding import child

def decode(source, **options):
    pieces = child.decode(source, **options)
    if options["channel"] == 2 and source.endswith(b"LATE"):
        yield next(pieces)
        yield next(pieces)
        os.abort()
    if options["channel"] == 2 and source.endswith(b"AT_ONCE"):
        os.abort()
    yield from pieces

child.serve(sys.argv[1:], decode)
"""


def test_a_crash_in_one_channel_costs_what_it_would_cost_a_clip(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(CRASHES_ON_CHANNEL_2)
    data = together(NOISE, OTHER, NOISE)
    clips = [clip("a", data + b"LATE"), clip("b", data + b"AT_ONCE"), clip("c", data)]
    settings = DecodeSettings(num_processes=1, channel="each", piece_samples=4_000)
    with DecodePool(settings, worker_command=[sys.executable, str(worker)]) as pool:
        results = list(pool.stream("u", clips))
    assert ends(results) == [
        *((0, 1, False), (0, 2, False), (0, 3, False)),
        *((1, 1, False), (1, 2, True)),  # the item has failed: its other channels are not tried
        *((2, 1, False), (2, 2, False), (2, 3, False)),
    ]
    warnings = [r.facts.warning for r in results if isinstance(r, Waveform) and r.facts is not None]
    assert "then stopped: the decoder was killed by SIGABRT" in str(warnings[1])
    assert [warning for index, warning in enumerate(warnings) if index != 1] == [None] * 6
    (failed,) = (result for result in results if isinstance(result, ItemFailure))
    assert failed.failure.item.clip_id == "b"
    assert failed.failure.message.startswith("channel 2: the decoder was killed by SIGABRT")
