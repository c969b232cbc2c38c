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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from pipeline.terminal.wording import counted, format_audio, format_duration
from transforms.process.progress_counts import LiveCounts, live_counts

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

    def __call__(self) -> LiveCounts:
        """Return the counts so far."""
        now = dataclasses.astuple(live_counts)
        return LiveCounts(*map(operator.sub, now, self._start))


@dataclass(frozen=True, slots=True)
class Moment:
    """Counts, and the time they took.

    Attributes:
        elapsed_s: Seconds since the display began.
        working_s: Seconds since the first window (without windows: clip) was done. Loading the
            model comes before, and says nothing about the speed.
        is_complete: Whether the run has ended, so that these counts are final.
        item_windows: Windows counted when the last item was done; those of a long clip in
            progress are not among them.
    """

    counts: LiveCounts
    elapsed_s: float
    working_s: float
    is_complete: bool = False
    item_windows: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """What there is to do.

    Attributes:
        windows: Estimated from the plan; None if not known.
        items: Number of items; None if containers must be read to know.
        doing: What is being done, for the line at the start.
        has_windows: Whether clips are cut into windows; if not, only clips are counted.
        windows_of_first: Gives the estimated windows of the first so many items; None if not known.
    """

    windows: int | None = None
    items: int | None = None
    doing: str = "labelling"
    has_windows: bool = True
    windows_of_first: Callable[[int], float] | None = None


def expected_windows(moment: Moment, expected: Expected) -> int | None:
    """Return how many windows to expect; None if not known.

    The estimate goes by file sizes, and is often several times off for compressed audio. The
    windows that the items done had, beside their estimate, correct it.
    """
    items = moment.counts.clips + moment.counts.failures
    if expected.windows is None or expected.windows_of_first is None or not moment.item_windows:
        return expected.windows
    estimated = expected.windows_of_first(items)
    return round(expected.windows * moment.item_windows / estimated) if estimated else None


def share_done(moment: Moment, expected: Expected) -> float | None:
    """Return how much of the work is done, in [0, 1]; None if that is not known.

    The expected windows are an estimate and may be exceeded, so they give at most 99 % until the
    end. Failed items have no windows; once all items are seen, the work is done.
    """
    if moment.is_complete:
        return 1.0
    counts = moment.counts
    items = counts.clips + counts.failures
    if expected.items and items >= expected.items:
        return 1.0
    windows = expected_windows(moment, expected)
    if windows:
        return min(counts.windows / windows, 0.99)
    return items / expected.items if expected.items else None


def seconds_left(moment: Moment, expected: Expected) -> float | None:
    """Return the estimated time left in seconds; None while there is nothing to go by."""
    share = share_done(moment, expected)
    if share is None or moment.working_s < MIN_RATED_S:
        return None
    if share == 1.0:
        return 0.0
    windows = expected_windows(moment, expected)
    passed = windows is not None and moment.counts.windows >= windows
    if passed or share == 0.0:
        return None
    return moment.working_s * (1 - share) / share


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
        "clips": f"{_of(counts.clips, expected.items)} clips",
        "windows": f"{_windows(moment, expected)} windows",
        "audio": f"{format_audio(counts.audio_s)} of audio",
    }
    if not expected.has_windows:
        del parts["windows"]
    if moment.working_s >= MIN_RATED_S:
        times = counts.audio_s / moment.working_s
        parts["speed"] = f"{times:,.0f}× real time" if times >= 10 else f"{times:.1f}× real time"
    if counts.failures:
        parts["failed"] = f"{counts.failures:,} failed"
    return parts


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def _how_much(expected: Expected) -> str:
    """Return `` about 320 windows`` or `` 1,200 clips``; nothing where it is not known."""
    if expected.has_windows:
        return "" if expected.windows is None else f" about {expected.windows:,} windows"
    if expected.items is None:
        return ""
    return f" {counted(expected.items, 'clip')}"


def _windows(moment: Moment, expected: Expected) -> str:
    done, about = moment.counts.windows, expected_windows(moment, expected)
    # An estimate that has been exceeded, or that a final count replaces, is of no use.
    if about is None or done > about or moment.is_complete:
        return f"{done:,}"
    return f"{done:,}/~{about:,}"


class _Silence:
    """No display, for ``--quiet``."""

    def start(self) -> None:
        pass

    def update(self, moment: Moment) -> None:
        pass

    def finish(self, moment: Moment) -> None:
        pass


class _Bar(_Silence):
    """A live bar on a terminal."""

    def __init__(self, expected: Expected, console: Console) -> None:
        self._expected = expected
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

    def update(self, moment: Moment) -> None:
        share = share_done(moment, self._expected)
        width = self._console.width - FIXED_WIDTH - ECHO_WIDTH
        self._progress.update(
            self._task,
            completed=share or 0.0,
            total=None if share is None else 1.0,
            share="" if share is None else f"{share:.0%}",
            description=format_bar_text(moment, self._expected, width),
            refresh=True,
        )

    def finish(self, moment: Moment) -> None:
        self.update(moment)
        self._progress.stop()


class _Lines(_Silence):
    """A plain line every ten seconds: for files, pipes and job logs."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._next_s = LINE_INTERVAL_S

    def start(self) -> None:
        self._print(f"{self._expected.doing}{_how_much(self._expected)}")

    def update(self, moment: Moment) -> None:
        if moment.elapsed_s >= self._next_s:
            self._print(format_line(moment, self._expected))
            self._next_s = moment.elapsed_s + LINE_INTERVAL_S

    def finish(self, moment: Moment) -> None:
        self._print(format_line(moment, self._expected))

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
        expected: What there is to do.
        quiet: Show nothing.
        console: Where to show it; stderr by default.
    """

    def __init__(
        self,
        read: Callable[[], LiveCounts],
        expected: Expected,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._read = read
        self._display = _make_display(expected, quiet, console)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="earmark-progress", daemon=True)
        self._began_s = 0.0
        self._began_work_s: float | None = None
        self._num_items = self._item_windows = 0

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if exc_type is not None:
            self._display.finish(self._moment())
            return
        refresh: Callable[[], None] | None = getattr(self._read, "refresh", None)
        if refresh is not None:
            refresh()
        self._display.finish(dataclasses.replace(self._moment(), is_complete=True))

    def _poll(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            self._display.update(self._moment())

    def _moment(self) -> Moment:
        now, counts = time.monotonic(), self._read()
        if self._began_work_s is None and (counts.windows or counts.clips):
            self._began_work_s = now
        working_s = 0.0 if self._began_work_s is None else now - self._began_work_s
        num_items = counts.clips + counts.failures
        if num_items != self._num_items:
            self._num_items, self._item_windows = num_items, counts.windows
        return Moment(counts, now - self._began_s, working_s, item_windows=self._item_windows)


def _make_display(expected: Expected, quiet: bool, console: Console | None) -> _Silence:
    if quiet:
        return _Silence()
    console = console or Console(stderr=True)
    return _Bar(expected, console) if console.is_terminal else _Lines(expected)
