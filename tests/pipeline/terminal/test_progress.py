"""The progress display: what fits beside the bar, and what it ends with."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from pipeline.terminal import progress
from pipeline.terminal.logs import StderrHandler
from pipeline.terminal.progress import (
    Expected,
    Moment,
    Pace,
    PaceMeter,
    ProgressDisplay,
    format_bar_text,
    format_counts,
    seconds_left,
    share_done,
)
from transforms.process.progress_counts import LiveCounts

AT_WORK = Moment(
    LiveCounts(21, 42, 420.0, 2), elapsed_s=125, pace=Pace(42, 23, 420.0, seconds=120.0)
)
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


def test_what_an_interrupted_run_gives_up_does_not_change_the_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = [20]
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.01)
    display = ProgressDisplay(
        lambda: LiveCounts(5, 10, 100.0), Expected(), forecast=lambda counts: Expected(totals[-1])
    )
    with pytest.raises(KeyboardInterrupt), display:
        while display._shown is None:
            time.sleep(0.01)
        monkeypatch.setattr(progress, "POLL_INTERVAL_S", 100.0)
        time.sleep(0.1)
        totals.append(50)  # as if units in progress had never begun
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1].startswith(" 50% · 5 clips · 10/~20 windows")


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
    half = Moment(LiveCounts(160), elapsed_s=11.0, pace=Pace(0, 160, 800.0, seconds=10.0))
    assert seconds_left(half, expected) == 10.0


def at(
    clips: int = 0, windows: int = 0, audio_s: float = 0.0, failures: int = 0, s: float = 0.0
) -> Moment:
    counts = LiveCounts(clips, windows, audio_s, failures)
    pace = Pace(windows, clips + failures, audio_s, seconds=s) if s else None
    return Moment(counts, elapsed_s=s + 3, pace=pace)


@pytest.mark.parametrize(
    ("moment", "expected", "share"),
    [
        (at(windows=50), Expected(100, None), 0.5),
        (at(windows=100), Expected(100, None), 0.99),  # an estimate: not said to be the end
        (at(windows=130), Expected(100, None), 0.99),
        (at(clips=8, failures=2, windows=50), Expected(100, 10), 1.0),
        (at(clips=4, failures=1), Expected(None, 10), 0.5),
        (at(clips=10), Expected(None, 10, is_exact=False), 0.99),
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
        (at(windows=25), Expected(100, None), None),  # too early to tell
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
        (at(3), Expected(40, 20, is_exact=False), "3/~20 clips · 0/~40 windows · 0 s of audio"),
        (at(30), Expected(40, 20, is_exact=False), "30 clips · 0/~40 windows · 0 s of audio"),
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

    with ProgressDisplay(read, Expected(1000, 2000)):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    first, *lines, last = err.splitlines()
    assert out == ""
    assert first == "labelling 2,000 clips"
    assert 1 < len(lines) <= 20  # of the two hundred readings
    assert all(re.match(r"  0% · \d+/2,000 clips · 0/~1,000 windows", line) for line in lines)
    assert re.match(r"100% · \d+/2,000 clips · 0 windows", last)


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


def test_the_first_windows_only_start_the_clock() -> None:
    # The model is loaded for 30 s; then batches of 8 windows take 4 s each, 80 windows in all.
    meter = PaceMeter()
    assert meter.add(29.0, LiveCounts()) is None
    assert meter.add(30.0, LiveCounts(windows=8)) is None
    pace = meter.add(34.0, LiveCounts(windows=16))
    moment = Moment(LiveCounts(windows=16), elapsed_s=34.0, pace=pace)
    assert seconds_left(moment, Expected(80)) == 32.0


def test_between_two_batches_the_time_left_runs_down() -> None:
    meter = PaceMeter()
    counts = LiveCounts(windows=16)
    for at_s, windows in ((0.0, 8), (4.0, 16)):
        meter.add(at_s, LiveCounts(windows=windows))
    left = [
        seconds_left(Moment(counts, at_s, meter.add(at_s, counts)), Expected(80))
        for at_s in (4.0, 5.0, 7.5, 36.0)
    ]
    assert left == [32.0, 31.0, 28.5, None]


def test_the_pace_is_that_of_the_later_half() -> None:
    # The first ten windows are checked in float32, too, and take a second each.
    meter = PaceMeter()
    for window in range(1, 11):
        meter.add(float(window), LiveCounts(windows=window))
    pace = None
    for window in range(11, 41):
        pace = meter.add(10 + (window - 10) / 10, LiveCounts(windows=window))
    assert pace is not None
    assert pace.seconds / pace.windows == pytest.approx(0.1)


class SlowRun:
    """A run by a fake clock: a window a second, after half a minute; items of so many windows."""

    def __init__(self, windows: list[int]) -> None:
        self.now_s = 0.0
        self._windows = windows

    def clock(self) -> float:
        return self.now_s

    def read(self) -> LiveCounts:
        done = max(0, int(self.now_s) - 30)
        counts = LiveCounts(windows=done)
        for windows in self._windows:
            if done < windows:
                break
            done -= windows
            counts.clips += 1
            counts.clip_windows += windows
        return counts


def test_what_a_forecast_expects_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.terminal.progress.POLL_INTERVAL_S", 3600.0)  # only when asked
    run = SlowRun([2] * 50)
    seen: list[LiveCounts] = []

    def forecast(counts: LiveCounts) -> Expected:
        seen.append(counts)
        return Expected(windows=100, items=50)

    display = ProgressDisplay(
        run.read, Expected(900, 50), forecast=forecast, clock=lambda: run.now_s
    )
    with pytest.raises(ValueError, match="broken"), display:
        for second in range(81):
            run.now_s = float(second)
            moment, expected = display._look()
            left = seconds_left(moment, expected)
            assert left is None if second < 33 else left == pytest.approx(130 - second, rel=0.01)
        raise ValueError("broken")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "labelling 50 clips"
    assert last.startswith(" 50% · 25/50 clips · 50/~100 windows")
    assert last.endswith("· 1:20 elapsed · about 50 s left")
    assert seen[-1].clip_windows == 50


def test_the_check_of_the_first_windows_is_not_the_pace_of_the_others() -> None:
    # Batches of 4 take a second; the first 32 windows are checked, which takes 2 s more a window.
    meter, now_s, windows = PaceMeter(), 10.0, 0
    for _ in range(19):
        windows += 4
        checked = min(32, windows)
        now_s = 10.0 + windows / 4 + 2.0 * checked
        counts = LiveCounts(0, windows, 0.0, 0, 0, 0, checked, 2.0 * checked, 32 - checked)
        moment = Moment(counts, now_s, meter.add(now_s, counts))
        left_s = seconds_left(moment, Expected(80))
        if windows > 16:
            assert left_s == pytest.approx((80 - windows) / 4 + 2.0 * (32 - checked))
