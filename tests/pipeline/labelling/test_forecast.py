"""What a run expects to be left, from the plan, a sample and what was done; with a fake clock."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.labelling import forecast as forecast_module
from pipeline.labelling.forecast import DeferredForecast, PlanForecast, expect_windows
from pipeline.labelling.remaining import find_units
from pipeline.labelling.sample import Amount, Measured, Sample, WorkEstimate
from pipeline.terminal.progress import Expected, Moment, PaceMeter, seconds_left, share_done
from tests.support.audio_factory import encode, noise
from tests.support.unit_factory import make_item
from transforms.decoding.settings import DecodeSettings
from transforms.process.progress_counts import LiveCounts, UnitsSeen
from transforms.records import ContainerSlice, WorkUnit
from transforms.sources.read_unit import Found, SourceSettings, find_inputs

SOURCES = SourceSettings(window_s=10.0, hop_s=10.0)
DECODE = DecodeSettings(num_processes=1)


class Run:
    """A run by a fake clock: each window takes a tenth of a second, in batches of four.

    ``windows`` are those of the items of each unit; 0 is a failure.
    """

    def __init__(self, units: Sequence[WorkUnit], windows: Sequence[Sequence[int]]) -> None:
        self.units, self.windows = units, windows
        self.total = sum(map(sum, windows))
        self.total_s = self.total / 10

    def at(self, time_s: float) -> tuple[LiveCounts, UnitsSeen]:
        done = min(self.total, int(time_s * 10) // 4 * 4)
        counts = LiveCounts(windows=done)
        committed, opened = [], {}
        for unit, items in zip(self.units, self.windows, strict=True):
            num_done = 0
            for windows in items:
                if done < windows or (not done and not windows):
                    done = 0
                    break
                done -= windows
                num_done += 1
                counts.clip_windows += windows
                counts.clips += windows > 0
                counts.failures += not windows
            if num_done == len(items):
                committed.append(unit.unit_id)
            elif num_done:
                opened[unit.unit_id] = num_done
        return counts, UnitsSeen(opened, committed)

    def errors(self, forecast: Callable[[LiveCounts, UnitsSeen], Expected]) -> Iterator[Error]:
        """Yield how far off share and time left are, ten times a second from a fifth on.

        The time left is relative to the true one; in the last tenth, to a tenth of the run.
        """
        meter = PaceMeter()
        for tick in range(int(self.total_s * 10)):
            now_s = tick / 10
            counts, seen = self.at(now_s)
            expected = forecast(counts, seen)
            moment = Moment(counts, now_s, meter.add(now_s, counts))
            left_s, share = seconds_left(moment, expected), share_done(moment, expected)
            if now_s >= self.total_s / 5 and self.total_s - now_s >= 2:
                assert share is not None
                true_s = self.total_s - now_s
                off_s = (left_s or 0.0) - true_s
                yield Error(off_s / max(true_s, self.total_s / 10), share - now_s / self.total_s)


class Error(NamedTuple):
    left: float
    share: float


def files(*names_and_sizes: tuple[str, int], per_unit: int = 8) -> list[WorkUnit]:
    items = [make_item(name, size=size) for name, size in names_and_sizes]
    groups = [tuple(items[start : start + per_unit]) for start in range(0, len(items), per_unit)]
    return [
        WorkUnit(
            f"u{number}",
            "files",
            group,
            estimated_windows=sum(SOURCES.estimate.of_file(i.uri, i.size) for i in group),
        )
        for number, group in enumerate(groups)
    ]


def forecast_of(
    units: Sequence[WorkUnit], sample: Sample | None = None, found: Found | None = None
) -> PlanForecast:
    found = found or Found(items=tuple(item for unit in units for item in unit.items))
    forecast = PlanForecast(units, found, SOURCES, DECODE)
    if sample is not None:
        forecast._latest = WorkEstimate(units, found, SOURCES, sample)
    return forecast


def lengths(count: int, seed: int = 0) -> list[float]:
    """Seconds, from five to an hour; a few make most of all."""
    return list(np.exp(np.random.default_rng(seed).uniform(np.log(5), np.log(3600), count)))


def worst(errors: Iterator[Error]) -> Error:
    found = list(errors)
    assert len(found) > 50
    return Error(*(max(abs(value) for value in values) for values in zip(*found, strict=True)))


@pytest.mark.parametrize("bytes_per_s", [20_000, 192_000])
def test_sizes_alone_are_corrected_by_the_items_done(bytes_per_s: int) -> None:
    # Sizes suggest 88,200 bytes a second: four times too few windows, or twice too many.
    seconds = np.random.default_rng(0).uniform(20, 200, 80)
    units = files(*((f"{n}.wav", int(s * bytes_per_s)) for n, s in enumerate(seconds)))
    windows = [SOURCES.estimate.of_duration(s) for s in seconds]
    run = Run(units, [windows[start : start + 8] for start in range(0, 80, 8)])
    error = worst(run.errors(forecast_of(units)))
    assert error.left < 0.2
    assert error.share < 0.1


def test_a_sample_tells_what_is_to_come() -> None:
    # Ten minutes of WAV, then Opus, in which there is far more.
    wavs = [(f"a/{n}.wav", 60 * 192_000) for n in range(10)]
    opuses = [(f"b/{n}.opus", 600 * 4_000) for n in range(30)]
    units = files(*wavs, *opuses)
    sample = Sample(
        {
            ".wav": [Measured(0, 60 * 192_000, Amount(1, 60.0, 6))],
            ".opus": [Measured(99, 600 * 4_000, Amount(1, 600.0, 60))],
        },
        2,
    )
    windows = [6] * 10 + [60] * 30
    run = Run(units, [windows[start : start + 8] for start in range(0, 40, 8)])
    error = worst(run.errors(forecast_of(units, sample)))
    assert error.left < 0.05
    assert error.share < 0.02
    assert worst(run.errors(forecast_of(units))).left > 0.3  # by what was done alone


@pytest.mark.parametrize("seed", range(5))
def test_files_of_very_different_lengths(seed: int) -> None:
    seconds = lengths(80, seed)
    # Every third was sampled, and bit rates vary by a sixth up and down.
    rates = np.random.default_rng(seed).uniform(25_000, 35_000, 80)
    units = files(
        *((f"{n}.flac", int(s * r)) for n, (s, r) in enumerate(zip(seconds, rates, strict=True)))
    )
    starts = np.cumsum([0, *(unit.estimated_windows for unit in units)])
    amounts = [Amount(1, s, SOURCES.estimate.of_duration(s)) for s in seconds]
    measured = [
        Measured(
            starts[n // 8] + units[n // 8].estimated_windows * (n % 8) / 8,
            int(seconds[n] * rates[n]),
            amounts[n],
        )
        for n in range(0, 80, 3)
    ]
    windows = [int(amount.windows) for amount in amounts]
    run = Run(units, [windows[start : start + 8] for start in range(0, 80, 8)])
    error = worst(run.errors(forecast_of(units, Sample({".flac": measured}, len(measured)))))
    assert error.left < 0.2
    assert error.share < 0.1


def test_headers_that_promise_too_much_are_corrected() -> None:
    units = files(*((f"{n}.mp3", 600 * 16_000) for n in range(80)))
    sample = Sample({".mp3": [Measured(0, 600 * 16_000, Amount(1, 720.0, 72))]}, 1)
    run = Run(units, [[60] * 8] * 10)
    error = worst(run.errors(forecast_of(units, sample)))
    assert error.left < 0.2
    late = list(run.errors(forecast_of(units, sample)))[-100:]
    assert max(abs(one.left) for one in late) < 0.1


def test_a_tar_counts_by_the_items_that_a_sample_suggests() -> None:
    part = ContainerSlice("x.tar", "x.tar", 80_000_000, "v1")
    units = [WorkUnit("t", "tar", container=part, estimated_windows=500)]
    sample = Sample({"tar": [Measured(250, 20_000_000, Amount(20, 400.0, 60))]}, 20)
    forecast = forecast_of(units, sample, Found())
    run = Run(units, [[3] * 80])
    error = worst(run.errors(forecast))
    assert error.left < 0.1
    expected = forecast(*run.at(8.0))
    assert (expected.items, expected.is_exact) == (80, False)
    assert expected.windows == 240


def test_items_of_a_slice_may_be_of_very_different_lengths() -> None:
    part = ContainerSlice("x.tar", "x.tar", 80_000_000, "v1")
    units = [WorkUnit("t", "tar", container=part, estimated_windows=500)]
    sample = Sample({"tar": [Measured(250, 80_000_000, Amount(80, 3600.0, 360))]}, 80)
    run = Run(units, [[10] * 20 + [1] * 20 + [7] * 20 + [0] * 20])
    error = worst(run.errors(forecast_of(units, sample, Found())))
    assert error.share < 0.2


def test_units_may_be_done_in_any_order() -> None:
    units = files(*((f"{n}.wav", (1 + 9 * (n >= 8)) * 882_000) for n in range(16)))
    forecast = forecast_of(units)
    counts = LiveCounts(windows=80, clips=8, clip_windows=80)
    expected = forecast(counts, UnitsSeen({}, ["u1"]))  # the long ones first
    assert expected.windows == 88
    assert expected.items == 16
    expected = forecast(
        LiveCounts(windows=84, clips=12, clip_windows=84), UnitsSeen({"u0": 4}, ["u1"])
    )
    assert expected.windows == 88


@pytest.mark.parametrize(
    ("total", "done", "clip_windows", "weight", "expected"),
    [
        (100.0, 0.0, 0, 0.0, 100.0),
        (100.0, 10.0, 20, 0.0, 200.0),  # sizes alone: what was done decides
        (100.0, 10.0, 20, 25.0, 20 + 90 * 45 / 35),  # a sample: it decides only a part
        (100.0, 100.0, 150, 25.0, 150.0),
        (100.0, 110.0, 110, 0.0, 110.0),
        (0.0, 0.0, 0, 0.0, 0.0),
    ],
)
def test_the_arithmetic(
    total: float, done: float, clip_windows: int, weight: float, expected: float
) -> None:
    counts = LiveCounts(clip_windows=clip_windows)
    assert expect_windows(total, done, counts, weight=weight) == pytest.approx(expected)


def test_the_sample_is_taken_in_the_background(tmp_path: Path) -> None:
    for number in range(3):
        samples = noise(25.0, 48_000, num_channels=2)
        (tmp_path / f"{number}.wav").write_bytes(encode(samples, 48_000))
    found = find_inputs([str(tmp_path)])
    units = find_units(found, SOURCES)
    forecast = PlanForecast(units, found, SOURCES, DECODE)
    by_sizes = forecast(LiveCounts(), UnitsSeen())
    assert by_sizes.windows == 18
    with forecast:
        forecast._thread.join(60)
        assert forecast(LiveCounts(), UnitsSeen()).windows == 9
    assert not forecast._thread.is_alive()


def test_a_run_that_ends_first_does_not_wait_for_the_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = threading.Event()

    def sample_for_ever(*_: object, stop: threading.Event) -> Sample:
        assert stop.wait(60)
        stopped.set()
        return Sample()

    monkeypatch.setattr(forecast_module, "take_sample", sample_for_ever)
    with forecast_of(files(("a.wav", 882_000))) as forecast:
        assert forecast(LiveCounts(), UnitsSeen()).windows is None  # sizes may be far off
    assert stopped.is_set()
    assert forecast(LiveCounts(), UnitsSeen()).windows == 1


def test_of_a_plan_that_workers_make_the_units_tell(tmp_path: Path) -> None:
    now_s = 0.0
    forecast = DeferredForecast(str(tmp_path), clock=lambda: now_s)
    done = LiveCounts(windows=530, clips=50, clip_windows=500)
    seen = UnitsSeen({"c": 3}, ["a", "b"])
    assert forecast(LiveCounts(), UnitsSeen()) == Expected()
    run = {"fingerprint": "f", "results": {"top_k": 1}, "planned_units": 100}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert forecast(done, seen) == Expected()  # not looked at all the time
    now_s = 5.0
    assert forecast(done, UnitsSeen({"a": 3})) == Expected()
    assert forecast(done, seen) == Expected(windows=20_000)
