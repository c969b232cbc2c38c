"""A run that is killed or interrupted in the middle: what stays, and what the next run makes of it.

``benchmarks/reliability/kill_runs.py`` does so again and again, with real recordings; a few of its
rounds are played here, and what it looks for is shown to be found.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.reliability.kill_runs import (
    INTERRUPTED,
    Bench,
    BrokenPromiseError,
    Run,
    Setup,
    Untouched,
    check_same_rows,
    check_whole,
    committed_files,
    make_bench,
    num_commits,
    random_round,
    signal_round,
    together_round,
)
from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.state import wait_for_writers
from pipeline.result.verify import run_verify
from tests.support.audio_factory import write_noise
from tests.support.labelling import read_rows, small_config, wait_until
from tests.support.model_factory import write_tiny_model
from tests.support.paths import ROOT
from transforms.errors import OutputError

NUM_CLIPS, WINDOWS_PER_UNIT = 40, 4
NUM_UNITS = NUM_CLIPS // WINDOWS_PER_UNIT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found through Linux's /proc"
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("clips")
    for index in range(NUM_CLIPS):
        write_noise(folder / f"{index:02}.wav", seed=index)
    return folder


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that takes a unit long enough to be met in the middle of it."""
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, hidden_size=64, frequency_stride=10, time_stride=10)


def config_of(model: Path, clips: Path, out: Path) -> RunConfig:
    units = {"windows": WINDOWS_PER_UNIT}
    return small_config(model, out, clips, units=units, decode={"processes": 2})


@pytest.fixture
def start(
    slow_model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Run]]:
    """Starts runs into ``tmp_path / "out"``, up to a number of commits; none outlives the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    setup = Setup([clips], slow_model, tmp_path / "tmp", WINDOWS_PER_UNIT)
    runs: list[Run] = []

    def start_run(count: int) -> Run:
        run = Run(setup, tmp_path / "out", "--engine", "torch", "--batch-size", "2", cold=True)
        runs.append(run)
        wait_until(lambda: num_commits(run.out) >= count or run.exit_code() is not None, "commits")
        assert run.exit_code() is None, f"the run ended too early: {run.words()}"
        return run

    yield start_run
    for run in runs:
        run.end()


def test_a_run_killed_twice_gives_what_an_uninterrupted_one_gives(
    start: Callable[[int], Run], slow_model: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(2)
    assert len(first.processes()) > 1  # decoders are at work, and must go with it
    first.send(signal.SIGKILL, to_group=False)
    assert first.wait() == -signal.SIGKILL
    before = committed_files(out)
    assert 2 <= num_commits(out) < NUM_UNITS
    assert not (out / "_SUCCESS").exists()

    second = start(num_commits(out) + 2)
    second.send(signal.SIGKILL, to_group=True)
    assert second.wait() == -signal.SIGKILL
    between = committed_files(out)
    assert before.items() < between.items()
    assert num_commits(out) < NUM_UNITS

    assert run_label(config_of(slow_model, clips, out), []) == 0
    assert between.items() < committed_files(out).items()
    assert run_verify(str(out)) == 0
    assert not list((out / "_staging").rglob("*.*"))
    assert run_label(config_of(slow_model, clips, tmp_path / "whole"), []) == 0
    assert committed_files(out).keys() == committed_files(tmp_path / "whole").keys()
    check_same_rows(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)],
    ids=["Ctrl-C in a terminal", "SIGTERM"],
)
def test_an_interrupted_run_says_how_to_go_on_and_leaves_nothing_behind(
    start: Callable[[int], Run],
    slow_model: Path,
    clips: Path,
    tmp_path: Path,
    number: signal.Signals,
    to_group: bool,
) -> None:
    out = tmp_path / "out"
    run = start(2)
    run.send(number, to_group=to_group)
    assert run.wait() == 130
    assert run.words().endswith(INTERRUPTED)
    assert "Traceback" not in run.words()
    assert "KeyboardInterrupt" not in run.words()
    assert not (out / "_SUCCESS").exists()
    assert not list((out / "_staging").rglob("*.*"))
    before = committed_files(out)
    assert 2 <= num_commits(out) < NUM_UNITS
    assert run_label(config_of(slow_model, clips, out), []) == 0
    assert before.items() < committed_files(out).items()
    assert len(read_rows(out, "clips")) == NUM_CLIPS


HOLD = """
import sys, time
from transforms.results.commits import hold_commits
hold_commits(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def worker_that_outlives_its_run(tmp_path: Path) -> Iterator[Callable[[float], None]]:
    """Starts a process that may commit to ``tmp_path / "out"`` for a number of seconds."""
    started = []

    def start_worker(seconds: float) -> None:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), str(seconds)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"

    yield start_worker
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_waits_for_workers_that_may_still_commit(
    worker_that_outlives_its_run: Callable[[float], None],
    slow_model: Path,
    clips: Path,
    tmp_path: Path,
) -> None:
    began_s = time.monotonic()
    worker_that_outlives_its_run(2.0)
    wait_for_writers(str(tmp_path / "out"))
    assert 2.0 < time.monotonic() - began_s < 30.0
    assert run_label(config_of(slow_model, clips, tmp_path / "out"), []) == 0
    wait_for_writers(str(tmp_path / "out"))  # a run that has ended is waited for by nobody


def test_a_run_is_refused_when_such_workers_do_not_end(
    worker_that_outlives_its_run: Callable[[float], None],
    slow_model: Path,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.result.state.WRITERS_PATIENCE_S", 0.2)
    worker_that_outlives_its_run(120.0)
    with pytest.raises(OutputError, match=r"still write to .*; stop them, then run this command"):
        run_label(config_of(slow_model, clips, tmp_path / "out"), [])
    assert not list((tmp_path / "out").rglob("*.*"))


# --- Rounds of the benchmark ---------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        folder = tmp_path_factory.mktemp("bench")
        yield make_bench(folder, sorted(clips.iterdir()), seed=1, windows_per_unit=4)


@pytest.mark.slow
@pytest.mark.parametrize("play", [random_round, signal_round, together_round])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_round_of_kills_breaks_no_promise(
    bench: Bench, play: Callable[[Bench, int], None], number: int
) -> None:
    play(bench, number)
    assert sum(bench.tally.kills.values()) > 0


@pytest.fixture(scope="module")
def whole(slow_model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "out"
    assert run_label(config_of(slow_model, clips, out), []) == 0
    return out


def rewrite(path: Path, change: Callable[[list[Any]], Any]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def move_a_number(rows: list[Any]) -> None:
    rows[0]["embedding"][0] += 2e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), "39 rows, 40"),
        (lambda rows: rows.append(rows[0]), "41 rows, 40"),
        (move_a_number, "off"),
        (lambda rows: rows[0]["labels"].reverse(), "is another"),
    ],
    ids=["a row lost", "a row twice", "a number moved", "labels in another order"],
)
def test_the_benchmark_finds_other_rows(
    whole: Path, tmp_path: Path, change: Callable[[list[Any]], Any], words: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    check_same_rows(out, whole)
    rewrite(min(out.glob("clips/*")), change)
    with pytest.raises(BrokenPromiseError, match=words):
        check_same_rows(out, whole)


def test_the_benchmark_finds_files_that_were_left_and_parts_written_again(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "_commits" / ".x.json.tmp").touch()
    with pytest.raises(BrokenPromiseError, match=r"too many \['_commits/\.x\.json\.tmp'\]"):
        check_whole(out, whole, Setup([], tmp_path, tmp_path, 1))
    untouched = Untouched(out)
    untouched.look()
    part = min(out.glob("windows/*"))
    rewrite(part, lambda rows: None)
    with pytest.raises(BrokenPromiseError, match="has been written again"):
        untouched.look()
    part.unlink()
    with pytest.raises(BrokenPromiseError, match="is gone"):
        untouched.look()
