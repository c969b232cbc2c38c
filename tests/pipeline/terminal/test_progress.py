"""The progress display: what fits beside the bar, and what it ends with."""

from __future__ import annotations

import io
import logging
import re
import threading
import time

import pytest
from rich.console import Console

from pipeline.terminal.logs import StderrHandler
from pipeline.terminal.progress import (
    Expected,
    Moment,
    ProgressDisplay,
    format_bar_text,
    format_counts,
    format_line,
    seconds_left,
    share_done,
)
from transforms.process.progress_counts import LiveCounts

AT_WORK = Moment(LiveCounts(21, 42, 420.0, 2), elapsed_s=125, working_s=120)
EXPECTED = Expected(80, 40)


class LazyReader:
    """Looks once, and again only when told to."""

    def __init__(self, *counts: LiveCounts) -> None:
        self._counts = list(counts)
        self._looks = True
        self._seen = LiveCounts()

    def __call__(self) -> LiveCounts:
        if self._looks:
            self._seen = self._counts.pop(0)
            self._looks = False
        return self._seen

    def refresh(self) -> None:
        self._looks = True


def drawn(screen: io.StringIO) -> str:
    """The bar's last line as it stands on the screen."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return re.split(r"[\r\n]+", text.rstrip())[-1]


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (
            99,
            "21/40 clips · 42/~80 windows · 7.0 min of audio · 3.5× real time · 2 failed"
            " · 1:49 left",
        ),
        (80, "21/40 clips · 7.0 min of audio · 3.5× real time · 2 failed · 1:49 left"),
        (56, "21/40 clips · 3.5× real time · 2 failed · 1:49 left"),
        (51, "21/40 clips · 3.5× real time · 2 failed · 1:49 left"),
        (50, "21/40 clips · 2 failed · 1:49 left"),
        (30, "21/40 clips · 1:49 left"),
        (5, "21/40 clips"),
    ],
)
def test_beside_the_bar_the_least_important_goes_first(width: int, text: str) -> None:
    assert format_bar_text(AT_WORK, EXPECTED, width) == text


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_bar_keeps_its_width_and_leaves_room_for_an_echoed_ctrl_c(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width)
    counts = LiveCounts(1_021, 2_042, 10_000.0, 2)
    with (
        pytest.raises(KeyboardInterrupt),
        ProgressDisplay(lambda: counts, Expected(4_000, 2_000), console=console),
    ):
        raise KeyboardInterrupt
    line = drawn(screen)
    assert re.match(r"\S [━╸╺]{12}  51% 1,021/2,000 clips", line)
    assert len(line) <= width - 4


def test_a_narrow_terminal_still_has_the_bar_and_the_share() -> None:
    screen = io.StringIO()
    with ProgressDisplay(
        lambda: LiveCounts(1_000_000),
        Expected(),
        console=Console(file=screen, force_terminal=True, width=28),
    ):
        pass
    assert re.match(r"\s*━{12} 100% 1,000,000?$", drawn(screen))


@pytest.mark.parametrize(
    ("total_windows", "total_items", "line"),
    [
        (50, None, "100% · 20 clips · 43 windows · 7.0 min of audio · 1 failed"),
        (50, 21, "100% · 20/21 clips · 43 windows · 7.0 min of audio · 1 failed"),
        (None, None, "100% · 20 clips · 43 windows · 7.0 min of audio · 1 failed"),
    ],
)
def test_a_run_that_is_done_ends_with_all_counts_and_100_percent(
    total_windows: int | None,
    total_items: int | None,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = LazyReader(LiveCounts(), LiveCounts(20, 43, 420.0, 1))
    with ProgressDisplay(reader, Expected(total_windows, total_items)):
        assert reader() == LiveCounts()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{line} · 0 s elapsed"


def test_a_run_that_broke_off_does_not_end_with_100_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (
        pytest.raises(ValueError, match="broken"),
        ProgressDisplay(lambda: LiveCounts(5, 10, 100.0), Expected(20)),
    ):
        raise ValueError("broken")
    assert capsys.readouterr().err.splitlines()[-1].startswith(" 50% · 5 clips · 10/~20 windows")


@pytest.mark.parametrize("factor", [0.2, 1.0, 2.5, 5.0])
def test_the_items_done_correct_the_estimate_of_windows(factor: float) -> None:
    # 100 items of 2 windows take a second each; the plan expects a factor more windows.
    expected = Expected(
        round(200 * factor), 100, windows_of_first=lambda num_items: num_items * 2 * factor
    )
    for items in (10, 50, 90):
        counts = LiveCounts(items, 2 * items)
        moment = Moment(counts, elapsed_s=items + 5, working_s=items, item_windows=2 * items)
        assert share_done(moment, expected) == pytest.approx(items / 100, abs=0.01)
        assert seconds_left(moment, expected) == pytest.approx(100 - items, rel=0.05)
        assert f"{2 * items}/~200 windows" in format_line(moment, expected)


def test_a_long_item_counts_for_its_windows() -> None:
    # 99 items of 1 window, then one of 901, of which 401 are done; all expected twice.
    expected = Expected(
        2000, 100, windows_of_first=lambda num_items: 2000 if num_items == 100 else 2 * num_items
    )
    before = Moment(LiveCounts(99, 99), elapsed_s=99, working_s=99, item_windows=99)
    assert share_done(before, expected) == pytest.approx(0.1, abs=0.01)
    inside = Moment(LiveCounts(99, 500), elapsed_s=500, working_s=500, item_windows=99)
    assert share_done(inside, expected) == pytest.approx(0.5, abs=0.01)
    assert seconds_left(inside, expected) == pytest.approx(500, rel=0.02)


def test_windows_of_a_clip_under_way_do_not_correct_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.terminal.progress.POLL_INTERVAL_S", 0.001)
    counts = [LiveCounts(50, 100), LiveCounts(50, 150)]
    all_read = threading.Event()

    def read() -> LiveCounts:
        if len(counts) > 1:
            return counts.pop(0)
        all_read.set()
        return counts[0]

    with (
        pytest.raises(ValueError, match="broken"),
        ProgressDisplay(
            read, Expected(1000, 100, windows_of_first=lambda num_items: 10 * num_items)
        ),
    ):
        assert all_read.wait(timeout=60)
        raise ValueError("broken")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(" 75% · 50/100 clips · 150/~200 windows")


def test_where_clips_are_not_cut_into_windows_clips_alone_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = iter([LiveCounts(320, 0, 1600.0)] * 1000)
    expected = Expected(None, 320, doing="decoding", has_windows=False)
    with ProgressDisplay(lambda: next(reader), expected):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first == "decoding 320 clips"
    assert last.startswith("100% · 320/320 clips · 26.7 min of audio · ")
    half = Moment(LiveCounts(160), elapsed_s=11.0, working_s=10.0)
    assert seconds_left(half, expected) == 10.0


def at(
    clips: int = 0, windows: int = 0, audio_s: float = 0.0, failures: int = 0, s: float = 0.0
) -> Moment:
    return Moment(LiveCounts(clips, windows, audio_s, failures), elapsed_s=s + 3, working_s=s)


@pytest.mark.parametrize(
    ("moment", "expected", "share"),
    [
        (at(windows=50), Expected(100, None), 0.5),
        (at(windows=100), Expected(100, None), 0.99),  # an estimate: not said to be the end
        (at(windows=130), Expected(100, None), 0.99),
        (at(clips=8, failures=2, windows=50), Expected(100, 10), 1.0),
        (at(clips=4, failures=1), Expected(None, 10), 0.5),
        (at(windows=5), Expected(None, None), None),
        (at(windows=5), Expected(0, 0), None),
    ],
)
def test_the_share_done_is_never_claimed_too_high(
    moment: Moment, expected: Expected, share: float | None
) -> None:
    assert share_done(moment, expected) == share


@pytest.mark.parametrize(
    ("moment", "expected", "left"),
    [
        (at(windows=25, s=10), Expected(100, None), 30.0),
        (at(windows=25, s=1), Expected(100, None), None),  # too early to tell
        (at(windows=0, s=10), Expected(100, None), None),
        (at(windows=120, s=10), Expected(100, None), None),  # more than estimated
        (at(clips=10, windows=90, s=10), Expected(100, 10), 0.0),
        (at(windows=25, s=10), Expected(), None),
    ],
)
def test_the_time_left_comes_from_the_share(
    moment: Moment, expected: Expected, left: float | None
) -> None:
    assert seconds_left(moment, expected) == left


@pytest.mark.parametrize(
    ("moment", "expected", "text"),
    [
        (at(), Expected(), "0 clips · 0 windows · 0 s of audio"),
        (
            at(1200, 2400, 12_240, 2, s=102),
            Expected(19_200, 9600),
            "1,200/9,600 clips · 2,400/~19,200 windows · 3.4 h of audio · 120× real time"
            " · 2 failed",
        ),
        (
            at(1, 3, 30, s=20),
            Expected(2, None),
            "1 clips · 3 windows · 30 s of audio · 1.5× real time",
        ),
    ],
)
def test_counts_in_words(moment: Moment, expected: Expected, text: str) -> None:
    assert format_counts(moment, expected) == text


def test_without_a_terminal_there_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.terminal.progress.POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr("pipeline.terminal.progress.LINE_INTERVAL_S", 0.01)
    reads = iter(range(1_000_000))

    def read() -> LiveCounts:
        return LiveCounts(clips=next(reads))

    with ProgressDisplay(read, Expected(1000)):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    first, *lines, last = err.splitlines()
    assert out == ""
    assert first == "labelling about 1,000 windows"
    assert 1 < len(lines) <= 20  # of the two hundred readings
    assert all(re.match(r"  0% · \d+ clips · 0/~1,000 windows", line) for line in lines)
    assert re.match(r"100% · \d+ clips · 0 windows", last)


def test_on_a_terminal_there_is_a_bar_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    logger = logging.getLogger("tests.progress")
    logger.addHandler(StderrHandler())
    counts = LiveCounts(clips=3, windows=6, failures=1)
    with ProgressDisplay(lambda: counts, Expected(12), console=console):
        logger.warning("a clip is damaged")
    logger.handlers.clear()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a clip is damaged\n" in text
    assert "3 clips · 6 windows" in text.rpartition("a clip is damaged")[2]
    assert "1 failed" in text


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(LiveCounts, Expected(5), quiet=True):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_display_ends_with_the_work_also_when_that_fails() -> None:
    display = ProgressDisplay(LiveCounts, Expected(), quiet=True)
    with pytest.raises(ValueError, match="broken"), display:
        raise ValueError("broken")
    assert not display._thread.is_alive()
