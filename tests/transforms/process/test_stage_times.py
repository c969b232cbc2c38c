"""Stopwatches: a thread's stages add up to its time, and no time is counted twice."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from transforms.process import stage_times as module
from transforms.process.stage_times import NO_SECONDS, StageClocks, StageSeconds, timed


class Clock:
    """Time as the test says it is."""

    now_s = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    return clock


@pytest.fixture
def clocks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> StageClocks:
    """The stopwatches of a new process."""
    clocks = StageClocks()
    monkeypatch.setattr(module, "stage_clocks", clocks)
    return clocks


def spend(clock: Clock, stage: module.Stage, seconds: float) -> None:
    with timed(stage):
        clock.now_s += seconds


def test_the_stages_of_a_thread_are_all_of_its_time(clock: Clock, clocks: StageClocks) -> None:
    clocks.begin(num_decoders=2)
    clock.now_s += 0.5
    spend(clock, "fbank", 3.0)
    with timed("queue"):
        clock.now_s += 1.0
        spend(clock, "copy", 2.0)
        spend(clock, "model", 10.0)
    clock.now_s += 0.25
    spend(clock, "write", 4.0)
    lap = clocks.lap()
    assert lap == StageSeconds(
        fbank_s=3.0,
        copy_s=2.0,
        model_s=10.0,
        queue_s=1.0,
        write_s=4.0,
        other_s=0.75,
        process_s=20.75,
        decoder_s=41.5,
    )
    assert lap.labelling_s == 20.75


def test_a_stage_that_raises_is_over(clock: Clock, clocks: StageClocks) -> None:
    clocks.begin(num_decoders=1)
    with pytest.raises(ValueError, match="broken"), timed("model"):
        clock.now_s += 1.0
        raise ValueError("broken")
    clock.now_s += 2.0
    lap = clocks.lap()
    assert (lap.model_s, lap.other_s) == (1.0, 2.0)


def test_a_lap_within_a_stage_takes_what_there_is_of_it(clock: Clock, clocks: StageClocks) -> None:
    clocks.begin(num_decoders=1)
    with timed("write"):
        clock.now_s += 1.0
        first = clocks.lap()
        clock.now_s += 2.0
    second = clocks.lap()
    assert (first.write_s, second.write_s) == (1.0, 2.0)
    assert clocks.lap() == NO_SECONDS


def test_time_between_bundles_is_nobodys(clock: Clock, clocks: StageClocks) -> None:
    spend(clock, "load", 5.0)
    clock.now_s += 100.0
    clocks.begin(num_decoders=1)
    clock.now_s += 1.0
    first = clocks.lap()
    assert (first.load_s, first.labelling_s, first.process_s) == (5.0, 1.0, 1.0)
    spend(clock, "write", 0.5)  # the end of a bundle, behind its last commit
    clock.now_s += 100.0
    clocks.begin(num_decoders=1)
    clock.now_s += 1.0
    second = clocks.lap()
    assert (second.write_s, second.other_s, second.process_s) == (0.5, 1.0, 1.0)


def test_what_the_background_did_goes_out_once(clock: Clock, clocks: StageClocks) -> None:
    clocks.begin(num_decoders=1)
    for seconds in (StageSeconds(read_s=2.0), StageSeconds(read_s=1.0, decode_s=4.0)):
        thread = threading.Thread(target=clocks.add, args=(seconds,))
        thread.start()
        thread.join()
    assert clocks.lap() == StageSeconds(read_s=3.0, decode_s=4.0)
    assert clocks.lap() == NO_SECONDS


def test_two_threads_of_a_process_share_its_time(clock: Clock, clocks: StageClocks) -> None:
    """Both label for 10 s, one in two laps: 20 s of threads, 10 s of the process."""
    laps: list[StageSeconds] = []
    turns = [threading.Event(), threading.Event()]

    def label() -> None:
        clocks.begin(num_decoders=4)
        turns[0].set()
        turns[1].wait(10)
        laps.append(clocks.lap())

    other = threading.Thread(target=label)
    other.start()
    turns[0].wait(10)
    clocks.begin(num_decoders=4)
    clock.now_s += 6.0
    laps.append(clocks.lap())
    clock.now_s += 4.0
    laps.append(clocks.lap())
    turns[1].set()
    other.join()
    total = sum(laps, NO_SECONDS)
    assert (total.labelling_s, total.process_s, total.decoder_s) == (20.0, 10.0, 40.0)


def test_a_new_run_starts_with_nothing(clock: Clock, clocks: StageClocks) -> None:
    spend(clock, "model", 3.0)
    clocks.add(StageSeconds(read_s=1.0))
    clocks.reset()
    clocks.begin(num_decoders=1)
    assert clocks.lap() == NO_SECONDS
