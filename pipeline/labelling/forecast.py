"""What a run has to do, as far as it is known: by the plan, a sample, and what has been done.

The plan knows sizes. A sample of headers, read while the run starts, gives the windows of each
unit. What the items done had, beside what was estimated for them, corrects the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

from pipeline.labelling.sample import WorkEstimate, take_sample
from pipeline.result.state import PLANNED_UNITS, read_run
from pipeline.terminal.progress import Expected, ProgressDisplay
from transforms.decoding.settings import DecodeSettings
from transforms.errors import EarmarkError
from transforms.process.progress_counts import LiveCounts, UnitsSeen
from transforms.records import WorkUnit
from transforms.sources.read_unit import Found, SourceSettings

# The estimate of a sample counts like this share of all windows beside what has been done. With
# less, a few items at the beginning would be taken for all. With more, headers that promise too
# much would never be corrected.
SAMPLE_WEIGHT = 0.25

# The items of a slice in progress are not known one by one, and may be of very different lengths,
# so they tell less about the rest than files do.
SLICE_WEIGHT = 2.0

PLAN_POLL_INTERVAL_S = 5.0
STOP_TIMEOUT_S = 2.0


class Forecast(Protocol):
    """Expects what there is to do in a run; a context while it runs."""

    def __call__(self, counts: LiveCounts, seen: UnitsSeen) -> Expected:
        """Return what there is to do, given what has been done and how far units are."""

    def __enter__(self) -> Self:
        """Begin to look at the inputs."""

    def __exit__(self, *exception: object) -> None:
        """Stop that."""


def expect_windows(total: float, done: float, counts: LiveCounts, *, weight: float) -> float:
    """Return how many windows to expect in all.

    Args:
        total: The estimated windows of everything.
        done: The estimated windows of the items that are done.
        counts: What has been done.
        weight: How much the estimate counts, in windows.
    """
    if not done + weight:
        return total
    ratio = (counts.clip_windows + weight) / (done + weight)
    return counts.clip_windows + max(0.0, total - done) * ratio


class PlanForecast:
    """Expects what a plan holds. As a context, it takes a sample in the background."""

    def __init__(
        self,
        units: Sequence[WorkUnit],
        found: Found,
        sources: SourceSettings,
        decode: DecodeSettings,
        *,
        doing: str = "labelling",
    ) -> None:
        self._units, self._found = units, found
        self._sources, self._decode = sources, decode
        self._doing = doing
        self._numbers = {unit.unit_id: number for number, unit in enumerate(units)}
        self._estimate = self._latest = WorkEstimate(units, found, sources)
        self._num_committed = 0
        self._committed_windows = 0.0  # as estimated
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="earmark-sample", daemon=True)

    def __enter__(self) -> Self:
        with contextlib.suppress(RuntimeError):  # no more threads: then sizes must do
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _sample(self) -> None:
        # The run meets the same errors, and reports them.
        with contextlib.suppress(OSError, RuntimeError, EarmarkError):
            sample = take_sample(
                self._units, self._found, self._sources, self._decode, stop=self._stop
            )
            self._latest = WorkEstimate(self._units, self._found, self._sources, sample)

    def __call__(self, counts: LiveCounts, seen: UnitsSeen) -> Expected:
        """Return what there is to do; ``seen`` must be of one run, and never go back."""
        if self._latest is not self._estimate:
            self._estimate = self._latest
            self._num_committed, self._committed_windows = 0, 0.0
        estimate = self._estimate
        for unit_id in seen.committed[self._num_committed :]:
            self._num_committed += 1
            if unit_id in self._numbers:
                self._committed_windows += estimate.of_unit[self._numbers[unit_id]].windows
        done = self._committed_windows + sum(
            estimate.of_first_items(self._numbers[unit_id], num_items)
            for unit_id, num_items in seen.open.items()
            if unit_id in self._numbers
        )
        total, is_exact = estimate.total, estimate.has_exact_items
        weight = 0.0
        if estimate.is_sampled:
            opened = (self._units[self._numbers[one]] for one in seen.open if one in self._numbers)
            in_slice = any(unit.container is not None and not unit.items for unit in opened)
            weight = total.windows * (SLICE_WEIGHT if in_slice else SAMPLE_WEIGHT)
        windows: int | None = round(expect_windows(total.windows, done, counts, weight=weight))
        if not done and not estimate.is_sampled and self._thread.is_alive():
            windows = None  # sizes alone may be far off, and the sample takes seconds
        return Expected(
            windows=windows,
            items=round(total.items) if is_exact or estimate.is_sampled else None,
            is_exact=is_exact,
            doing=self._doing,
        )


class DeferredForecast:
    """Expects what remains of a plan that workers make; they write its size into ``run.json``.

    Units are about the same work each, so those that are done tell how many windows there are.
    """

    def __init__(self, output: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._next_look_s = 0.0
        self._num_units: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self, counts: LiveCounts, seen: UnitsSeen) -> Expected:
        """Return what there is to do: nothing is known before the first unit is done."""
        if self._num_units is None and self._clock() >= self._next_look_s:
            self._next_look_s = self._clock() + PLAN_POLL_INTERVAL_S
            # A store that does not answer must not end the run.
            with contextlib.suppress(OSError, EarmarkError):
                self._num_units = (read_run(self._output) or {}).get(PLANNED_UNITS)
        if self._num_units is None or not seen.committed:
            return Expected()
        num_done = len(seen.committed) + len(seen.open) / 2
        return Expected(windows=round(self._num_units * counts.clip_windows / num_done))


class Reader(Protocol):
    """Reads what a run has done so far."""

    def __call__(self) -> LiveCounts:
        """Return the counts."""

    def seen(self) -> UnitsSeen:
        """Return how far units are."""


@contextlib.contextmanager
def show_progress(read: Reader, forecast: Forecast, *, quiet: bool) -> Iterator[None]:
    """Show the progress of a run while the ``with`` block lasts."""
    if quiet:
        yield
        return
    display = ProgressDisplay(
        read,
        forecast(LiveCounts(), UnitsSeen()),
        forecast=lambda counts: forecast(counts, read.seen()),
    )
    with forecast, display:
        yield
