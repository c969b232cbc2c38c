"""A run that is killed or interrupted in the middle: what stays, and what the next run makes of it.

The runs under test are real processes, found by a mark in their environment: decoders live in
sessions of their own, so that a process group would not name them all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config import RunConfig
from pipeline.run import run_label
from pipeline.verify import run_verify
from tests.model_factory import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
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
    return RunConfig(
        inputs=(str(clips),),
        output=str(out),
        quiet=True,
        model={"name": str(model)},
        inference={"precision": "fp32", "device": "cpu", "batch_size": 2},
        units={"windows": WINDOWS_PER_UNIT},
        decode={"processes": 2},
    )


class Run:
    """``earmark label`` in a process of its own, in a session of its own."""

    def __init__(self, model: Path, clips: Path, out: Path) -> None:
        self.mark = f"EARMARK_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        command = [sys.executable, "-m", "pipeline", "label", str(clips), "--output", str(out)]
        options = ["--model", str(model), "--device", "cpu", "--precision", "fp32"]
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


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_S:g} s in vain for {what}")
        time.sleep(0.005)


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


def rows_of(out: Path, part: str) -> list[dict[str, Any]]:
    rows = [
        row for path in (out / part).glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["clip_id"], row.get("window_index", 0)))


def assert_same_rows(out: Path, expected: Path) -> None:
    for part in ("windows", "clips"):
        found, wanted = rows_of(out, part), rows_of(expected, part)
        assert [without_numbers(row) for row in found] == [without_numbers(row) for row in wanted]
        for numbers in (embedding_of, scores_of):
            np.testing.assert_allclose(
                [numbers(row) for row in found], [numbers(row) for row in wanted], rtol=0, atol=1e-5
            )


def without_numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "embedding": None, "labels": [label["name"] for label in row["labels"]]}


def embedding_of(row: dict[str, Any]) -> list[float]:
    return list(row["embedding"])


def scores_of(row: dict[str, Any]) -> list[float]:
    return [label["score"] for label in row["labels"]]


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
    assert_same_rows(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("kill", "number"),
    [(Run.kill_group, signal.SIGINT), (Run.kill_process, signal.SIGTERM)],
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
    assert stderr.endswith("earmark: interrupted; the same command goes on from here\n")
    assert "Traceback" not in stderr
    assert "KeyboardInterrupt" not in stderr
    assert not (out / "_SUCCESS").exists()
    assert not list((out / "_staging").rglob("*.*"))
    before = committed_files(out)
    assert 2 <= len(commits_of(out)) < NUM_UNITS
    assert run_label(config_of(slow_model, clips, out), []) == 0
    assert before.items() < committed_files(out).items()
    assert len(rows_of(out, "clips")) == NUM_CLIPS
