"""Windows: where they lie, that streaming changes nothing, and what the step carries along."""

from __future__ import annotations

import math

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from transforms.errors import AccountingError, ConfigError
from transforms.features.fbank import FbankSettings
from transforms.features.windows import (
    Cut,
    CutWindows,
    WindowCutter,
    WindowSettings,
    _CutWindowsFn,
    cut_windows,
)
from transforms.records import (
    ClipFacts,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    UnitEnd,
    Waveform,
    Window,
    WorkUnit,
)

RATE_HZ = 16_000


def lengths(window: int, hop: int | None = None, min_tail: int = 400) -> WindowSettings:
    return WindowSettings(RATE_HZ, window, hop or window, min_tail)


def ramp(num_samples: int) -> FloatArray:
    """Samples that tell their own position."""
    return np.arange(num_samples, dtype=np.float32)


def spans(cuts: list[Cut]) -> list[tuple[int, int]]:
    return [(cut.start, cut.stop) for cut in cuts]


def cut_in_pieces(
    samples: FloatArray, settings: WindowSettings, piece_sizes: list[int]
) -> list[Cut]:
    cutter = WindowCutter(settings)
    cuts, start = [], 0
    for size in piece_sizes:
        cuts += cutter.push(samples[start : start + size])
        start += size
    cuts += cutter.push(samples[start:])
    return [*cuts, cutter.finish()]


# --- where windows lie


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (0, [(0, 0)]),
        (1, [(0, 1)]),
        (399, [(0, 399)]),
        (999, [(0, 999)]),
        (1000, [(0, 1000)]),
        (1001, [(0, 1000), (1, 1001)]),  # a tail of 1: a full window that ends with the clip
        (1399, [(0, 1000), (399, 1399)]),
        (1400, [(0, 1000), (1000, 1400)]),  # a tail of min_tail: a window of its own
        (1999, [(0, 1000), (1000, 1999)]),
        (2000, [(0, 1000), (1000, 2000)]),
        (2001, [(0, 1000), (1000, 2000), (1001, 2001)]),
        (2400, [(0, 1000), (1000, 2000), (2000, 2400)]),
    ],
)
def test_windows_side_by_side(num_samples: int, expected: list[tuple[int, int]]) -> None:
    assert spans(cut_windows(ramp(num_samples), lengths(1000))) == expected
    assert spans(cut_in_pieces(ramp(num_samples), lengths(1000), [])) == expected


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (1000, [(0, 1000)]),
        (1001, [(0, 1000), (1, 1001)]),
        (1399, [(0, 1000), (399, 1399)]),
        # What no window has covered is a tail of 400, though the last window holds 900 samples.
        (1400, [(0, 1000), (500, 1400)]),
        (1500, [(0, 1000), (500, 1500)]),
        (1501, [(0, 1000), (500, 1500), (501, 1501)]),
        (2000, [(0, 1000), (500, 1500), (1000, 2000)]),
    ],
)
def test_windows_that_overlap(num_samples: int, expected: list[tuple[int, int]]) -> None:
    settings = lengths(1000, hop=500)
    assert spans(cut_windows(ramp(num_samples), settings)) == expected
    assert spans(cut_in_pieces(ramp(num_samples), settings, [])) == expected


@pytest.mark.parametrize(
    ("clip_s", "num_windows"),
    [(5.0, 1), (10.0, 1), (10.24, 1), (10.255, 1), (10.3, 2), (20.0, 2), (20.51, 2), (60.0, 6)],
)
def test_default_windows_of_the_reference_model(clip_s: float, num_windows: int) -> None:
    settings = WindowSettings.from_seconds(None, None, 0.1, 1024, RATE_HZ)
    cuts = cut_windows(ramp(round(clip_s * RATE_HZ)), settings)
    assert len(cuts) == num_windows


clips = st.integers(0, 5000)
window_settings = st.integers(400, 1200).flatmap(
    lambda window: st.builds(
        lengths,
        st.just(window),
        st.one_of(st.integers(1, window), st.just(window), st.just(max(1, window // 2))),
        st.integers(400, window),
    )
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(num_samples=clips, settings=window_settings)
def test_every_sample_is_covered_by_windows_of_legal_length(
    num_samples: int, settings: WindowSettings
) -> None:
    samples = ramp(num_samples)
    cuts = cut_windows(samples, settings)
    window = settings.window_samples
    covered = np.zeros(num_samples, bool)
    for cut in cuts:
        np.testing.assert_array_equal(cut.samples, samples[cut.start : cut.stop])
        covered[cut.start : cut.stop] = True
    assert covered.all()
    assert cuts[-1].stop == num_samples
    assert all(len(cut.samples) == window for cut in cuts[:-1])
    assert len(cuts[-1].samples) >= min(num_samples, 400)
    assert [cut.start for cut in cuts[:-1]] == [
        index * settings.hop_samples for index in range(len(cuts) - 1)
    ]
    if len(cuts) > 1:
        tail = num_samples - cuts[-2].stop
        assert tail > 0, "the last window covers nothing new"
        if tail >= settings.min_tail_samples:
            assert cuts[-1].start == (len(cuts) - 1) * settings.hop_samples
        else:
            assert len(cuts[-1].samples) == window


# --- streaming


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    num_samples=clips,
    settings=window_settings,
    piece_sizes=st.lists(
        st.one_of(st.integers(0, 30), st.integers(0, 1500), st.integers(2000, 5000)), max_size=12
    ),
)
def test_the_windows_do_not_depend_on_the_size_of_pieces(
    num_samples: int, settings: WindowSettings, piece_sizes: list[int]
) -> None:
    samples = ramp(num_samples)
    found = cut_in_pieces(samples, settings, piece_sizes)
    expected = cut_windows(samples, settings)
    assert spans(found) == spans(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.samples, theirs.samples)


def test_one_sample_at_a_time() -> None:
    samples = ramp(2001)
    found = cut_in_pieces(samples, lengths(1000), [1] * 2001)
    assert spans(found) == [(0, 1000), (1000, 2000), (1001, 2001)]
    np.testing.assert_array_equal(found[2].samples, samples[1001:2001])


def test_the_buffer_keeps_what_the_last_window_may_need() -> None:
    # The buffer is full just when the clip ends, 15 samples into the third window.
    samples = ramp(2015)
    found = cut_in_pieces(samples, lengths(1000), [1000, 5, 1000])
    assert spans(found) == [(0, 1000), (1000, 2000), (1015, 2015)]
    np.testing.assert_array_equal(found[2].samples, samples[1015:])


@pytest.mark.parametrize("hop", [400, 250, 7])
@pytest.mark.parametrize("num_samples", [800, 801, 820, 1199, 1200, 1201, 1215, 1605, 2003])
def test_pieces_of_every_even_size(num_samples: int, hop: int) -> None:
    settings, samples = lengths(400, hop), ramp(num_samples)
    expected = cut_windows(samples, settings)
    for size in range(1, 900, 13):
        found = cut_in_pieces(samples, settings, [size] * (num_samples // size))
        assert spans(found) == spans(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert np.array_equal(ours.samples, theirs.samples)


def test_a_window_is_emitted_as_soon_as_it_cannot_be_the_last() -> None:
    cutter = WindowCutter(lengths(1000))
    assert cutter.push(ramp(1000)) == []
    assert spans(cutter.push(ramp(1))) == [(0, 1000)]
    assert cutter.num_cuts == 1


def test_windows_are_not_overwritten_by_later_pieces() -> None:
    cutter = WindowCutter(lengths(1000))
    (first,) = cutter.push(ramp(1500))
    for _ in range(5):
        cutter.push(np.full(1500, -1.0, np.float32))
    np.testing.assert_array_equal(first.samples, ramp(1000))


def test_a_window_within_one_piece_is_not_copied() -> None:
    cutter, piece = WindowCutter(lengths(1000)), ramp(2500)
    first, second = cutter.push(piece)
    assert first.samples.base is piece
    assert second.samples.base is piece
    assert cutter.finish().samples.base is piece


def test_an_hour_needs_the_memory_of_two_windows() -> None:
    cutter = WindowCutter(lengths(1000))
    for _ in range(1_000):
        cutter.push(np.zeros(700, np.float32))
        # The window that was given last, and the pieces that the next begins with.
        assert held_bytes(cutter) <= (1000 + 2 * 700) * 4


def held_bytes(cutter: WindowCutter) -> int:
    held = [cutter._given, *cutter._filled]
    wholes = [array if array.base is None else array.base for array in held]
    return sum({id(whole): whole.nbytes for whole in wholes}.values())


@pytest.mark.parametrize(
    "piece",
    [np.zeros((2, 500), np.float32), np.zeros(500, np.int16), np.zeros(500)],
    ids=["stereo", "int16", "float64"],
)
def test_a_piece_of_another_shape_or_type_is_refused(piece: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be one-dimensional \(mono\) and float32"):
        WindowCutter(lengths(1000)).push(piece)


# --- settings


@pytest.mark.parametrize(
    ("num_frames", "window_samples", "seconds"), [(1024, 164_080, 10.255), (128, 20_720, 1.295)]
)
def test_the_default_window_is_the_checkpoint_s(
    num_frames: int, window_samples: int, seconds: float
) -> None:
    settings = WindowSettings.from_seconds(None, None, 0.1, num_frames, RATE_HZ)
    assert settings.window_samples == settings.hop_samples == window_samples
    assert settings.window_samples / RATE_HZ == seconds
    assert settings.min_tail_samples == round(window_samples / 10)


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 16_000, 22_050, 22_150, 32_000, 44_100, 48_000])
def test_the_longest_window_fills_the_features(rate_hz: int) -> None:
    settings = WindowSettings.from_seconds(None, None, 0.1, 1024, rate_hz)
    features = FbankSettings(sample_rate_hz=rate_hz)
    assert settings.window_samples == features.max_samples
    assert features.count_frames(settings.window_samples) == 1024
    shortest = WindowSettings.from_seconds(None, None, 0.0, 1024, rate_hz)
    assert shortest.min_tail_samples == features.frame_samples


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10.255, None, 0.1), (164_080, 164_080, 16_408)),
        ((5.0, None, 0.1), (80_000, 80_000, 8_000)),
        ((5.0, 2.5, 0.5), (80_000, 40_000, 40_000)),
        ((None, 1.0, 1.0), (164_080, 16_000, 164_080)),
        ((0.025, None, 0.1), (400, 400, 400)),
        ((1.0, None, 0.001), (16_000, 16_000, 400)),  # never less than a frame
    ],
)
def test_seconds_become_samples(
    arguments: tuple[float | None, float | None, float], expected: tuple[int, int, int]
) -> None:
    settings = WindowSettings.from_seconds(*arguments, 1024, RATE_HZ)
    found = (settings.window_samples, settings.hop_samples, settings.min_tail_samples)
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (None, 12.0, 0.1),
            r"window.hop_s is 12.0; must be in \(0, 10.255\] \(window.length_s\). Set it in",
        ),
        ((5.0, 5.1, 0.1), r"window.hop_s is 5.1; must be in \(0, 5\] \(window.length_s\)"),
        ((None, 0.0, 0.1), r"window.hop_s is 0.0; must be in \(0, 10.255\]"),
        ((None, -1.0, 0.1), r"window.hop_s is -1.0; must be in"),
        ((None, 1e-9, 0.1), r"window.hop_s is 1e-09; must be in"),
        ((None, math.nan, 0.1), r"window.hop_s is nan; must be in"),
        (
            (11.0, None, 0.1),
            r"window.length_s is 11.0; must be in \[0.025, 10.255\] \(what the model holds\)",
        ),
        ((0.02, None, 0.1), r"window.length_s is 0.02; must be in \[0.025, 10.255\]"),
        ((math.inf, None, 0.1), r"window.length_s is inf; must be in"),
        ((None, None, 1.5), r"window.min_tail is 1.5; must be in \[0, 1\]"),
        ((None, None, -0.1), r"window.min_tail is -0.1; must be in \[0, 1\]"),
        ((None, None, math.nan), r"window.min_tail is nan; must be in \[0, 1\]"),
    ],
)
def test_seconds_out_of_range_are_refused(
    arguments: tuple[float | None, float | None, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowSettings.from_seconds(*arguments, 1024, RATE_HZ)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((399, 399, 399), r"window_samples is 399; must be at least 400"),
        ((1000, 0, 400), r"hop_samples is 0; must be in \[1, 1000\]"),
        ((1000, 1001, 400), r"hop_samples is 1001; must be in \[1, 1000\]"),
        ((1000, 1000, 399), r"min_tail_samples is 399; must be in \[400, 1000\]"),
        ((1000, 1000, 1001), r"min_tail_samples is 1001; must be in \[400, 1000\]"),
    ],
)
def test_samples_out_of_range_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowSettings(RATE_HZ, *arguments)


# --- CutWindows

FACTS = ClipFacts(1.0, 44_100, 2, -3.0, -20.0, 0.0, 0.1, "0" * 64)
WHOLE = Item("/a.wav", "/a.wav")
SEGMENT = Item("/b.wav@100.000-110.000", "/b.wav", start_s=100.0, end_s=110.0)


def piece(
    index: int, item: Item, samples: FloatArray, last: bool = False, unit_id: str = "u"
) -> Waveform:
    return Waveform(unit_id, index, item, samples, FACTS if last else None)


def describe(element: Window | ItemFailure | UnitEnd) -> object:
    if not isinstance(element, Window):
        return element
    return (
        element.unit_id,
        element.item_index,
        element.window_index,
        element.start_s,
        element.end_s,
        element.data.tobytes() if element.data is not None else None,
        element.facts,
        element.num_windows,
        element.error,
    )


def assert_cut(elements: list, expected: list) -> None:
    """Runs the step in a pipeline and compares everything it gives."""
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        cut = pipeline | beam.Create(elements, reshuffle=False) | CutWindows(lengths(1600))
        assert_that(cut | "Describe" >> beam.Map(describe), equal_to(expected))


def row(index: int, window: int, start_s: float, end_s: float, data: FloatArray) -> tuple:
    return ("u", index, window, start_s, end_s, data.tobytes(), None, None, None)


def last_row(index: int, window: int, start_s: float, end_s: float, data: FloatArray) -> tuple:
    return ("u", index, window, start_s, end_s, data.tobytes(), FACTS, window + 1, None)


def test_the_last_window_carries_facts_and_count() -> None:
    samples = ramp(4000)
    assert_cut(
        [piece(0, WHOLE, samples[:1000]), piece(0, WHOLE, samples[1000:], last=True)],
        [
            row(0, 0, 0.0, 0.1, samples[:1600]),
            row(0, 1, 0.1, 0.2, samples[1600:3200]),
            last_row(0, 2, 0.2, 0.25, samples[3200:]),
        ],
    )


def test_times_of_a_segment_count_from_the_start_of_the_file() -> None:
    samples = ramp(1700)
    assert_cut(
        [piece(4, SEGMENT, samples, last=True)],
        [
            row(4, 0, 100.0, 100.1, samples[:1600]),
            last_row(4, 1, 100.0 + 100 / RATE_HZ, 100.0 + 1700 / RATE_HZ, samples[100:]),
        ],
    )


def test_facts_on_an_empty_last_piece() -> None:
    samples = ramp(1600)
    assert_cut(
        [piece(0, WHOLE, samples), piece(0, WHOLE, ramp(0), last=True)],
        [last_row(0, 0, 0.0, 0.1, samples)],
    )


def test_a_clip_without_samples_still_has_its_window() -> None:
    assert_cut([piece(0, WHOLE, ramp(0), last=True)], [last_row(0, 0, 0.0, 0.0, ramp(0))])


def test_clips_may_be_interleaved() -> None:
    one, two, other = ramp(2000), ramp(2000) + 1, ramp(500) + 2
    other_unit = [
        ("v", 0, 0, 0.0, 500 / RATE_HZ, other.tobytes(), FACTS, 1, None),
    ]
    assert_cut(
        [
            piece(0, WHOLE, one[:900]),
            piece(1, WHOLE, two[:1700]),
            piece(0, WHOLE, other, last=True, unit_id="v"),
            piece(0, WHOLE, one[900:], last=True),
            piece(1, WHOLE, two[1700:], last=True),
        ],
        [
            row(0, 0, 0.0, 0.1, one[:1600]),
            last_row(0, 1, 0.1, 0.125, one[1600:]),
            row(1, 0, 0.0, 0.1, two[:1600]),
            last_row(1, 1, 0.1, 0.125, two[1600:]),
            *other_unit,
        ],
    )


FAILURE = ItemFailure("u", 0, Failure(WHOLE, "decode", "DecodeError", "no audio"))
END = UnitEnd(WorkUnit("u", "files", (WHOLE,)), 1)


def test_failures_and_unit_ends_pass_unchanged() -> None:
    assert_cut([FAILURE, END], [FAILURE, END])


def test_a_clip_that_fails_midway_is_closed() -> None:
    assert_cut([piece(0, WHOLE, ramp(900)), FAILURE, END], [FAILURE, END])


def test_a_clip_left_open_fails_the_bundle() -> None:
    elements = [piece(0, WHOLE, ramp(900)), piece(1, SEGMENT, ramp(900)), END]
    with pytest.raises(Exception, match=r"2 clips have no last piece .* '/a.wav'") as caught:
        assert_cut(elements, [END])
    assert AccountingError.__name__ in repr(caught.value)


def test_an_open_clip_of_a_failed_bundle_does_not_affect_the_next() -> None:
    step = _CutWindowsFn(lengths(1600))
    step.start_bundle()
    assert list(step.process(piece(0, WHOLE, ramp(900)))) == []
    step.start_bundle()
    (window,) = step.process(piece(0, WHOLE, ramp(500), last=True))
    step.finish_bundle()
    assert isinstance(window, Window)
    np.testing.assert_array_equal(window.data, ramp(500))
