"""The progress display: a live bar on a terminal, a line every ten seconds elsewhere.

The pipeline does not know of the display: a thread of the display's own reads the counts four times
a second. Everything goes to stderr; on a terminal the bar stays below what is logged meanwhile.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from pipeline.terminal.wording import counted, format_audio, format_duration
from transforms.process.progress_counts import LiveCounts, UnitsSeen, live_counts, live_units

POLL_INTERVAL_S = 0.25
LINE_INTERVAL_S = 10.0

# A rate over less than this says more about the model's start than about the run.
MIN_RATED_S = 2.0

BAR_WIDTH = 12

# Columns beside the text: the spinner, the bar and the share, each followed by a space.
FIXED_WIDTH = 2 + (BAR_WIDTH + 1) + 5

# Columns left free at the right. A terminal echoes Ctrl-C as two characters after the bar. If they
# wrapped, the bar would be redrawn one line too low.
ECHO_WIDTH = 4

# What is dropped on a narrow terminal, the least important first.
DROPPED_FIRST = ("windows", "audio", "speed", "failed", "left")


class LiveReader:
    """Reads what this process has done since the reader was made."""

    def __init__(self) -> None:
        self._start = dataclasses.astuple(live_counts)
        self._first_unit = live_units.num_committed

    def __call__(self) -> LiveCounts:
        """Return the counts so far."""
        now = dataclasses.astuple(live_counts)
        return LiveCounts(*map(operator.sub, now, self._start))

    def seen(self) -> UnitsSeen:
        """Return how far units are."""
        return live_units.seen(self._first_unit)


@dataclass(frozen=True, slots=True)
class Pace:
    """What was done lately, and the time it took.

    Attributes:
        seconds: Seconds of work, without checks; above 0.
        since_s: Seconds since the last of it was done.
        check_s: Seconds that checking a window takes.
    """

    windows: int
    items: int
    audio_s: float
    seconds: float
    since_s: float = 0.0
    check_s: float = 0.0


class PaceMeter:
    """Measures the pace over the later half of what has been done.

    Checking the precision makes the first windows several times slower than all others, so its
    time does not count. The first windows come with the first reading that has any, after a time
    that says nothing about the speed: the model is loaded and compiled in it. So they only start
    the clock.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, LiveCounts]] = deque()

    def add(self, now_s: float, counts: LiveCounts) -> Pace | None:
        """Take the counts so far; return the pace, or None if it is too early to tell."""
        work = _work(counts)
        now_s -= counts.check_s
        if work and (not self._marks or work > _work(self._marks[-1][1])):
            self._marks.append((now_s, counts))
        while len(self._marks) > 2 and _work(self._marks[1][1]) <= work / 2:
            self._marks.popleft()
        if not self._marks or self._marks[-1][0] - self._marks[0][0] < MIN_RATED_S:
            return None
        (began_s, first), (ended_s, last) = self._marks[0], self._marks[-1]
        return Pace(
            windows=last.windows - first.windows,
            items=_items(last) - _items(first),
            audio_s=last.audio_s - first.audio_s,
            seconds=ended_s - began_s,
            since_s=now_s - ended_s,
            check_s=counts.check_s / counts.checked if counts.checked else 0.0,
        )


def _items(counts: LiveCounts) -> int:
    return counts.clips + counts.failures


def _work(counts: LiveCounts) -> int:
    return counts.windows + _items(counts)


@dataclass(frozen=True, slots=True)
class Moment:
    """Counts, and the time they took.

    Attributes:
        elapsed_s: Seconds since the display began.
        pace: The pace lately; None if it is too early to tell.
        is_complete: Whether the run has ended, so that these counts are final.
    """

    counts: LiveCounts
    elapsed_s: float
    pace: Pace | None = None
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """What there is to do.

    Attributes:
        windows: Estimated; None if not known.
        items: Number of items; None if not known.
        is_exact: Whether the number of items is; it is estimated where tars must be read to know.
        doing: What is being done, for the line at the start.
        has_windows: Whether clips are cut into windows; if not, only clips are counted.
    """

    windows: int | None = None
    items: int | None = None
    is_exact: bool = True
    doing: str = "labelling"
    has_windows: bool = True


def share_done(moment: Moment, expected: Expected) -> float | None:
    """Return how much of the work is done, in [0, 1]; None if that is not known.

    The expected windows are an estimate and may be exceeded, so they give at most 99 % until the
    end. Failed items have no windows; once all items are seen, the work is done.
    """
    if moment.is_complete:
        return 1.0
    counts = moment.counts
    items = _items(counts)
    if expected.items and expected.is_exact and items >= expected.items:
        return 1.0
    if expected.windows:
        return min(counts.windows / expected.windows, 0.99)
    return min(items / expected.items, 0.99) if expected.items else None


def seconds_left(moment: Moment, expected: Expected) -> float | None:
    """Return the estimated time left in seconds; None while there is nothing to go by."""
    share, pace = share_done(moment, expected), moment.pace
    if share is None or pace is None:
        return None
    if share == 1.0:
        return 0.0
    if expected.windows:
        remaining, done = expected.windows - moment.counts.windows, pace.windows
    else:
        remaining, done = (expected.items or 0) - _items(moment.counts), pace.items
    if remaining <= 0 or not done:
        return None
    left = remaining * pace.seconds / done - pace.since_s
    left += min(remaining, max(0, moment.counts.checks_left)) * pace.check_s
    return left if left > 0 else None


def format_counts(moment: Moment, expected: Expected) -> str:
    """Return ``1,200/9,600 clips · 2,400/~19,200 windows · 3.4 h of audio · 2 failed``."""
    return " · ".join(_count_parts(moment, expected).values())


def format_line(moment: Moment, expected: Expected) -> str:
    """Return a line of plain text: the share, the counts, the time taken and the time left."""
    share = share_done(moment, expected)
    left = seconds_left(moment, expected)
    parts = [f"{share:4.0%}"] if share is not None else []
    parts += [format_counts(moment, expected), f"{format_duration(moment.elapsed_s)} elapsed"]
    if left:
        parts.append(f"about {format_duration(left)} left")
    return " · ".join(parts)


def format_bar_text(moment: Moment, expected: Expected, width: int) -> str:
    """Return the text beside the bar: as many of the counts and the time left as fit.

    The clips are shown even if they take more than ``width`` columns.
    """
    parts = _count_parts(moment, expected)
    left = seconds_left(moment, expected)
    if left:
        parts["left"] = f"{format_duration(left)} left"
    for name in DROPPED_FIRST:
        if cell_len(" · ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return " · ".join(parts.values())


def _count_parts(moment: Moment, expected: Expected) -> dict[str, str]:
    """Return the counts as shown, in this order, by name."""
    counts = moment.counts
    parts = {
        "clips": f"{_clips(moment, expected)} clips",
        "windows": f"{_windows(moment, expected)} windows",
        "audio": f"{format_audio(counts.audio_s)} of audio",
    }
    if not expected.has_windows:
        del parts["windows"]
    if moment.pace is not None:
        times = moment.pace.audio_s / moment.pace.seconds
        parts["speed"] = f"{times:,.0f}× real time" if times >= 10 else f"{times:.1f}× real time"
    if counts.failures:
        parts["failed"] = f"{counts.failures:,} failed"
    return parts


def _clips(moment: Moment, expected: Expected) -> str:
    done, total = moment.counts.clips, expected.items
    if total is None or (not expected.is_exact and (moment.is_complete or done > total)):
        return f"{done:,}"
    return f"{done:,}/{'' if expected.is_exact else '~'}{total:,}"


def _how_much(expected: Expected) -> str:
    """Return `` 1,200 clips``; nothing if that is not known exactly."""
    if expected.items is None or not expected.is_exact:
        return ""
    return f" {counted(expected.items, 'clip')}"


def _windows(moment: Moment, expected: Expected) -> str:
    done, about = moment.counts.windows, expected.windows
    # An estimate that has been exceeded, or that a final count replaces, is of no use.
    if about is None or done > about or moment.is_complete:
        return f"{done:,}"
    return f"{done:,}/~{about:,}"


class _Silence:
    """No display, for ``--quiet``."""

    def start(self) -> None:
        pass

    def update(self, moment: Moment, expected: Expected) -> None:
        pass

    def finish(self, moment: Moment, expected: Expected) -> None:
        pass


class _Bar(_Silence):
    """A live bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
            TextColumn("{task.fields[share]:>4}", table_column=Column(min_width=4)),
            TextColumn(
                "{task.description}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
                markup=False,
            ),
            console=console,
            # The display's own thread draws it: nothing moves between two readings.
            auto_refresh=False,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None, share="")

    def start(self) -> None:
        self._progress.start()

    def update(self, moment: Moment, expected: Expected) -> None:
        share = share_done(moment, expected)
        width = self._console.width - FIXED_WIDTH - ECHO_WIDTH
        self._progress.update(
            self._task,
            completed=share or 0.0,
            total=None if share is None else 1.0,
            share="" if share is None else f"{share:.0%}",
            description=format_bar_text(moment, expected, width),
            refresh=True,
        )

    def finish(self, moment: Moment, expected: Expected) -> None:
        self.update(moment, expected)
        self._progress.stop()


class _Lines(_Silence):
    """A plain line every ten seconds: for files, pipes and job logs."""

    def __init__(self, started: str) -> None:
        self._started = started
        self._next_s = LINE_INTERVAL_S

    def start(self) -> None:
        self._print(self._started)

    def update(self, moment: Moment, expected: Expected) -> None:
        if moment.elapsed_s >= self._next_s:
            self._print(format_line(moment, expected))
            self._next_s = moment.elapsed_s + LINE_INTERVAL_S

    def finish(self, moment: Moment, expected: Expected) -> None:
        self._print(format_line(moment, expected))

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class ProgressDisplay:
    """Shows progress while its ``with`` block runs.

    A block that ends without an exception has done everything: the counts are read once more and
    shown as 100 %.

    Args:
        read: Called from the display's thread for the counts so far; must be quick and safe to
            call beside the work. One that caches its counts has a method ``refresh()``, which is
            called before the last reading.
        expected: What there is to do, as far as it is known at the start.
        forecast: Returns what there is to do, given the counts so far; called with each reading.
        quiet: Show nothing.
        console: Where to show it; stderr by default.
        clock: Returns a time in seconds.
    """

    def __init__(
        self,
        read: Callable[[], LiveCounts],
        expected: Expected,
        *,
        forecast: Callable[[LiveCounts], Expected] | None = None,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._expected = expected
        self._forecast = forecast
        self._clock = clock
        self._pace = PaceMeter()
        self._display = _make_display(expected, quiet, console)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="earmark-progress", daemon=True)
        self._began_s = 0.0
        self._shown: tuple[Moment, Expected] | None = None

    def __enter__(self) -> Self:
        self._began_s = self._clock()
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if exc_type is not None:
            # Units in progress have been given up by now, and are no part of what is read.
            self._display.finish(*(self._shown or self._look()))
            return
        refresh: Callable[[], None] | None = getattr(self._read, "refresh", None)
        if refresh is not None:
            refresh()
        moment, expected = self._look()
        self._display.finish(dataclasses.replace(moment, is_complete=True), expected)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            self._shown = self._look()
            self._display.update(*self._shown)

    def _look(self) -> tuple[Moment, Expected]:
        now_s, counts = self._clock(), self._read()
        moment = Moment(counts, now_s - self._began_s, self._pace.add(now_s, counts))
        return moment, self._forecast(counts) if self._forecast is not None else self._expected


def _make_display(expected: Expected, quiet: bool, console: Console | None) -> _Silence:
    if quiet:
        return _Silence()
    console = console or Console(stderr=True)
    if console.is_terminal:
        return _Bar(console)
    return _Lines(f"{expected.doing}{_how_much(expected)}")
