"""A run that is killed or interrupted in the middle: what stays, and what the next run makes of it.

``benchmarks/reliability/kill_runs.py`` does so again and again, with real recordings; a few of its
rounds are played here, and what it looks for is shown to be found.

The runs under test are real processes, found by a mark in their environment: decoders live in
sessions of their own, so that a process group would not name them all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from benchmarks.reliability.kill_runs import (
    Bench,
    BrokenPromiseError,
    Setup,
    Untouched,
    check_same_rows,
    check_whole,
    make_bench,
    random_round,
    signal_round,
    together_round,
)
from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.state import wait_for_writers
from pipeline.result.verify import run_verify
from tests.support.labelling import assert_same_rows, read_rows, small_config, wait_until
from tests.support.model_factory import write_tiny_model
from tests.support.paths import ROOT
from transforms.errors import OutputError

RATE_HZ = 16_000
NUM_CLIPS, WINDOWS_PER_UNIT = 40, 4
NUM_UNITS = NUM_CLIPS // WINDOWS_PER_UNIT
PATIENCE_S = 120.0

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found through Linux's /proc"
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("clips")
    for index in range(NUM_CLIPS):
        noise = np.random.default_rng(index).normal(0, 0.1, RATE_HZ)
        soundfile.write(folder / f"{index:02}.wav", noise, RATE_HZ, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that takes a unit long enough to be met in the middle of it."""
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, hidden_size=64, frequency_stride=10, time_stride=10)


def config_of(model: Path, clips: Path, out: Path) -> RunConfig:
    units = {"windows": WINDOWS_PER_UNIT}
    return small_config(model, out, clips, units=units, decode={"processes": 2})


class Run:
    """``earmark label`` in a process of its own, in a session of its own."""

    def __init__(self, model: Path, clips: Path, out: Path) -> None:
        self.mark = f"EARMARK_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        command = [sys.executable, "-m", "pipeline", "label", str(clips), "--output", str(out)]
        options = [
            "--model",
            str(model),
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--engine",
            "torch",
        ]
        sets = [f"units.windows={WINDOWS_PER_UNIT}", "decode.processes=2", "inference.batch_size=2"]
        self.process = subprocess.Popen(
            [*command, *options, *(word for text in sets for word in ("--set", text))],
            cwd=ROOT,
            env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out = out

    def wait_for_commits(self, count: int) -> None:
        def are_there() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"the run ended too early: {self.process.communicate()[1]}")
            return len(commits_of(self.out)) >= count

        wait_until(are_there, f"{count} commits")

    def kill_group(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill_process(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int, str]:
        """Exit code and stderr, once every process of the run has gone."""
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        wait_until(lambda: not processes_with(self.mark), "every process to end")
        return self.process.returncode, stderr


@pytest.fixture
def start(slow_model: Path, clips: Path, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Starts runs into ``tmp_path / "out"``; none outlives the test."""
    runs: list[Run] = []

    def start_run() -> Run:
        runs.append(Run(slow_model, clips, tmp_path / "out"))
        return runs[-1]

    yield start_run
    for run in runs:
        for pid in processes_with(run.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


def processes_with(mark: str) -> list[int]:
    """Processes (no zombies: those have no environment) that were started with a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def commits_of(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "_commits").glob("*.json"))


def committed_files(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of everything that belongs to a commit."""
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for unit_id in commits_of(out)
        for path in out.glob(f"*/{unit_id}.*")
    }


def test_a_run_killed_twice_gives_what_an_uninterrupted_one_gives(
    start: Callable[[], Run], slow_model: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start()
    first.wait_for_commits(2)
    assert len(processes_with(first.mark)) > 1  # decoders are at work, and must go with it
    first.kill_process(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    before = committed_files(out)
    assert 2 <= len(commits_of(out)) < NUM_UNITS
    assert not (out / "_SUCCESS").exists()

    second = start()
    second.wait_for_commits(len(commits_of(out)) + 2)
    second.kill_group(signal.SIGKILL)
    assert second.finish()[0] == -signal.SIGKILL
    between = committed_files(out)
    assert before.items() < between.items()
    assert len(commits_of(out)) < NUM_UNITS

    assert run_label(config_of(slow_model, clips, out), []) == 0
    assert between.items() < committed_files(out).items()
    assert run_verify(str(out)) == 0
    assert not list((out / "_staging").rglob("*.*"))
    assert run_label(config_of(slow_model, clips, tmp_path / "whole"), []) == 0
    assert commits_of(out) == commits_of(tmp_path / "whole")
    for part in ("windows", "clips"):
        assert_same_rows(read_rows(out, part), read_rows(tmp_path / "whole", part))


@pytest.mark.parametrize(
    ("kill", "number"),
    [
        (Run.kill_group, signal.SIGINT),
        pytest.param(Run.kill_process, signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C in a terminal", "SIGTERM"],
)
def test_an_interrupted_run_says_how_to_go_on_and_leaves_nothing_behind(
    start: Callable[[], Run],
    slow_model: Path,
    clips: Path,
    tmp_path: Path,
    kill: Callable[[Run, signal.Signals], None],
    number: signal.Signals,
) -> None:
    out = tmp_path / "out"
    run = start()
    run.wait_for_commits(2)
    kill(run, number)
    code, stderr = run.finish()
    assert code == 130
    assert stderr.endswith("earmark: interrupted; run the same command again to resume\n")
    assert "Traceback" not in stderr
    assert "KeyboardInterrupt" not in stderr
    assert not (out / "_SUCCESS").exists()
    assert not list((out / "_staging").rglob("*.*"))
    before = committed_files(out)
    assert 2 <= len(commits_of(out)) < NUM_UNITS
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


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def first(out: Path, pattern: str) -> Path:
    return min(out.glob(pattern))


def moved(table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    rows[0]["embedding"][0] += 2e-5
    return pa.Table.from_pylist(rows, schema=table.schema)


def relabelled(table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    rows[0]["labels"].reverse()
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.slice(1), "39 rows, 40"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "41 rows, 40"),
        (moved, "off"),
        (relabelled, "is another"),
    ],
    ids=["a row lost", "a row twice", "a number moved", "labels in another order"],
)
def test_the_benchmark_finds_other_rows(
    whole: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table], words: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    check_same_rows(out, whole)
    rewrite(first(out, "clips/*"), change)
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
    part = first(out, "windows/*")
    shutil.copy2(part, tmp_path / "copy")
    (tmp_path / "copy").replace(part)
    with pytest.raises(BrokenPromiseError, match="has been written again"):
        untouched.look()
    part.unlink()
    with pytest.raises(BrokenPromiseError, match="is gone"):
        untouched.look()
