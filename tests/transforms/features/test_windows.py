"""Windows: where they lie, that streaming changes nothing, and what the step carries along."""

from __future__ import annotations

import math

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.unit_factory import FACTS
from transforms.errors import AccountingError, ConfigError
from transforms.features.fbank_settings import FbankSettings
from transforms.features.windows import (
    Cut,
    CutWindows,
    WindowCutter,
    WindowSettings,
    _CutWindowsFn,
    cut_windows,
)
from transforms.records import (
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


def expected_spans(num_samples: int, settings: WindowSettings) -> list[tuple[int, int]]:
    """Return where the windows of a clip lie, from the definition."""
    window, hop = settings.window_samples, settings.hop_samples
    num_full = max(0, (num_samples - window) // hop + 1)
    starts = [index * hop for index in range(num_full)]
    tail = num_samples - (starts[-1] + window if starts else 0)
    if not starts or tail >= settings.min_tail_samples:
        starts.append(num_full * hop)
    elif tail > 0:
        starts.append(num_samples - window)
    return [(start, min(start + window, num_samples)) for start in starts]


# --- where windows lie


@pytest.mark.parametrize(
    ("num_samples", "hop", "expected"),
    [
        (0, 1000, [(0, 0)]),
        (399, 1000, [(0, 399)]),
        (1000, 1000, [(0, 1000)]),
        (1001, 1000, [(0, 1000), (1, 1001)]),  # a tail of 1: a full window that ends with the clip
        (1399, 1000, [(0, 1000), (399, 1399)]),
        (1400, 1000, [(0, 1000), (1000, 1400)]),  # a tail of min_tail: a window of its own
        (2000, 1000, [(0, 1000), (1000, 2000)]),
        (2001, 1000, [(0, 1000), (1000, 2000), (1001, 2001)]),
        (1000, 500, [(0, 1000)]),
        (1399, 500, [(0, 1000), (399, 1399)]),
        # The tail is the 400 samples that no window has covered, though the last window holds 900.
        (1400, 500, [(0, 1000), (500, 1400)]),
        (1501, 500, [(0, 1000), (500, 1500), (501, 1501)]),
    ],
)
def test_where_windows_lie(num_samples: int, hop: int, expected: list[tuple[int, int]]) -> None:
    assert spans(cut_windows(ramp(num_samples), lengths(1000, hop))) == expected


clips = st.integers(0, 5000)
window_settings = st.integers(400, 1200).flatmap(
    lambda window: st.builds(
        lengths,
        st.just(window),
        st.one_of(st.integers(1, window), st.just(window), st.just(max(1, window // 2))),
        st.integers(400, window),
    )
)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    num_samples=clips,
    settings=window_settings,
    piece_sizes=st.lists(
        st.one_of(st.integers(0, 30), st.integers(0, 1500), st.integers(2000, 5000)), max_size=12
    ),
)
@example(num_samples=2001, settings=lengths(1000), piece_sizes=[1] * 2001)
# The buffer is full just when the clip ends, 15 samples into the third window.
@example(num_samples=2015, settings=lengths(1000), piece_sizes=[1000, 5, 1000])
def test_the_windows_do_not_depend_on_the_size_of_pieces(
    num_samples: int, settings: WindowSettings, piece_sizes: list[int]
) -> None:
    samples = ramp(num_samples)
    expected = expected_spans(num_samples, settings)
    for found in (cut_in_pieces(samples, settings, piece_sizes), cut_windows(samples, settings)):
        assert spans(found) == expected
        for cut in found:
            np.testing.assert_array_equal(cut.samples, samples[cut.start : cut.stop])


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
        # The window returned last, and the pieces that start the next.
        assert held_bytes(cutter) <= (1000 + 2 * 700) * 4


def held_bytes(cutter: WindowCutter) -> int:
    held = [cutter._given, *cutter._filled]
    wholes = [array if array.base is None else array.base for array in held]
    return sum({id(whole): whole.nbytes for whole in wholes}.values())


# --- settings


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 22_050, 22_150, 48_000])
def test_the_longest_window_fills_the_features(rate_hz: int) -> None:
    features = FbankSettings(sample_rate_hz=rate_hz)
    settings = WindowSettings.from_seconds(features)
    assert settings.window_samples == settings.hop_samples == features.max_samples
    assert features.count_frames(settings.window_samples) == 1024
    assert features.count_frames(settings.window_samples - 1) == 1023


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None, 0.1), (164_080, 164_080, 16_408)),
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
    settings = WindowSettings.from_seconds(FbankSettings(), *arguments)
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
        WindowSettings.from_seconds(FbankSettings(), *arguments)


# --- CutWindows

WHOLE = Item("/a.wav", "/a.wav")
SEGMENT = Item("/b.wav@100.000-110.000", "/b.wav", start_s=100.0, end_s=110.0)


FAILURE = ItemFailure("u", 9, Failure(WHOLE, "decode", "DecodeError", "no audio"))
END = UnitEnd(WorkUnit("u", "files", (WHOLE,)), 1)


def piece(
    index: int, item: Item, samples: FloatArray, last: bool = False, unit_id: str = "u"
) -> Waveform:
    return Waveform(unit_id, index, item, samples, FACTS if last else None)


def describe(element: Window | ItemFailure | UnitEnd) -> object:
    if not isinstance(element, Window):
        return element
    data = element.data.tobytes() if element.data is not None else None
    span = (element.start_s, element.end_s)
    where = (element.unit_id, element.item_index, element.window_index)
    return (*where, span, data, element.facts, element.num_windows, element.error)


def assert_cut(elements: list, expected: list) -> None:
    """Runs the step in a pipeline and compares everything it gives."""
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        cut = pipeline | beam.Create(elements, reshuffle=False) | CutWindows(lengths(1600))
        assert_that(cut | "Describe" >> beam.Map(describe), equal_to(expected))


def row(
    index: int, window: int, span: tuple[float, float], data: FloatArray, unit_id: str = "u"
) -> tuple:
    return (unit_id, index, window, span, data.tobytes(), None, None, None)


def last_row(
    index: int, window: int, span: tuple[float, float], data: FloatArray, unit_id: str = "u"
) -> tuple:
    return (unit_id, index, window, span, data.tobytes(), FACTS, window + 1, None)


def test_windows_carry_their_place_and_the_last_one_facts_and_count() -> None:
    one, two, other, segment = ramp(4000), ramp(1600) + 1, ramp(500) + 2, ramp(1700) + 3
    from_s, end_s = 100.0 + 100 / RATE_HZ, 100.0 + 1700 / RATE_HZ
    assert_cut(
        [
            piece(0, WHOLE, one[:900]),  # clips may be interleaved
            piece(1, WHOLE, two),
            piece(9, WHOLE, ramp(900)),
            piece(0, WHOLE, other, last=True, unit_id="v"),
            FAILURE,  # closes its clip
            piece(0, WHOLE, one[900:], last=True),
            piece(1, WHOLE, ramp(0), last=True),
            piece(2, WHOLE, ramp(0), last=True),
            piece(4, SEGMENT, segment, last=True),
            END,
        ],
        [
            row(0, 0, (0.0, 0.1), one[:1600]),
            row(0, 1, (0.1, 0.2), one[1600:3200]),
            last_row(0, 2, (0.2, 0.25), one[3200:]),
            last_row(1, 0, (0.0, 0.1), two),
            last_row(2, 0, (0.0, 0.0), ramp(0)),
            row(4, 0, (100.0, 100.1), segment[:1600]),  # counted from the start of the file
            last_row(4, 1, (from_s, end_s), segment[100:]),
            last_row(0, 0, (0.0, 500 / RATE_HZ), other, "v"),
            FAILURE,
            END,
        ],
    )


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
