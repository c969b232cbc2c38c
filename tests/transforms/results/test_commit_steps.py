"""Kills between any two steps of repairing a result, committing a unit, finishing a run.

Each job is done once to the end, in a process of its own that counts its steps on disk. Then it is
done again once for each step, by a process that kills itself before it, and what is left must keep
its promises.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config.label import RunConfig
from pipeline.graph import RunTotals
from pipeline.labelling.plan import make_plan
from pipeline.labelling.run import prepare_output, run_label
from pipeline.result.state import heal, read_result
from pipeline.result.verify import run_verify
from tests.support.disk_steps import on_each_step
from tests.support.labelling import check_commits, small_config
from tests.support.unit_factory import (
    clip_events,
    failure_event,
    file_unit,
    row_settings,
    unit_events,
)
from transforms.records import Carried, UnitEnd, UnitEvent, WorkUnit
from transforms.results import write_units as commit_step
from transforms.results.write_units import CommitSettings, OpenUnit
from transforms.storage import writing

OTHER, OLD, NEW = "0" * 20, "a" * 20, "b" * 20

# A process that only imports, and forks for each job: no thread of any library is in the way.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "tests.transforms.results.test_commit_steps"])

Job = Callable[[], object]
State = list[tuple[str, int]]


# --- Killing -------------------------------------------------------------------------------


def state_of(folder: Path) -> State:
    """Return names and sizes of the files; random parts of names are left out."""
    return sorted(
        (re.sub(r"\.[0-9a-f]{32}\.tmp$", ".tmp", str(path.relative_to(folder))), size_of(path))
        for path in folder.rglob("*")
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def count_steps(job: Job, folder: Path, report: Path) -> None:
    steps: list[int] = []
    on_each_step(folder, steps.append)
    job()
    report.write_text(str(len(steps)))


def kill_before(job: Job, folder: Path, wanted: int) -> None:
    """Do the job up to a step."""

    def kill(step: int) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    on_each_step(folder, kill)
    job()


def in_a_process(target: Callable[..., None], *arguments: object) -> int | None:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def every_kill(job: Job, before: Path, out: Path, at_least: int = 1) -> Iterator[int]:
    """Lays ``before`` out as ``out``, has the job killed before a step, and so on with every step.

    In the end ``out`` is what the job makes when nobody kills it.
    """
    lay_out(before, out)
    report = out.parent / "steps.txt"
    assert in_a_process(count_steps, job, out, report) == 0
    num_steps = int(report.read_text())
    assert num_steps >= at_least
    for step in range(1, num_steps + 1):
        lay_out(before, out)
        assert in_a_process(kill_before, job, out, step) == -signal.SIGKILL
        yield step
    lay_out(before, out)
    job()


def lay_out(before: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(before, out, copy_function=shutil.copy2)


# --- What must hold ------------------------------------------------------------------------


def facts_of(out: Path, unit_id: str) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.glob(f"*/{unit_id}.*")
    }


def rows_of(out: Path, unit_id: str) -> dict[str, list[dict[str, Any]]]:
    return {
        part.name: pq.read_table(part / f"{unit_id}.parquet").to_pylist()
        for part in (out / name for name in ("windows", "clips", "errors"))
        if (part / f"{unit_id}.parquet").exists()
    }


# --- Committing a unit ---------------------------------------------------------------------


def settings_for(out: Path) -> CommitSettings:
    return CommitSettings(str(out), "run", "f" * 64, "m" * 64, row_settings())


@dataclasses.dataclass(frozen=True)
class CommitJob:
    """Commits a unit as the sink does."""

    out: Path
    events: tuple[UnitEvent, ...]
    row_group_rows: int = 4096

    @property
    def unit(self) -> WorkUnit:
        return next(event.unit for event in self.events if isinstance(event, UnitEnd))

    def __call__(self) -> None:
        commit_step.ROW_GROUP_ROWS = self.row_group_rows
        staging = Path(writing.staging_path(str(self.out), "run"))
        unit = OpenUnit(settings_for(self.out), staging, self.unit.unit_id)
        for event in self.events:
            unit.add(event)
        unit.commit()
        staging.rmdir()
        staging.parent.rmdir()


def new_unit(out: Path) -> CommitJob:
    return CommitJob(out, tuple(unit_events(file_unit(NEW, 4), failed=[2])))


def unit_of_several_row_groups_with_a_late_failure(out: Path) -> CommitJob:
    """A clip fails after some of its windows have been staged."""
    unit = file_unit(NEW, 3)
    events = [
        *clip_events(NEW, 0, unit.items[0], 3),
        *clip_events(NEW, 1, unit.items[1], 3)[:-1],
        failure_event(NEW, 1, unit.items[1]),
        *clip_events(NEW, 2, unit.items[2], 3),
        UnitEnd(unit, 3),
    ]
    return CommitJob(out, tuple(events), row_group_rows=2)


def unit_that_replaces_another(out: Path) -> CommitJob:
    unit = dataclasses.replace(old_unit(), unit_id=NEW, replaces=(OLD,))
    return CommitJob(out, tuple(unit_events(unit)))


def retry_that_carries_rows_over(out: Path) -> CommitJob:
    items = (old_unit().items[1], old_unit().items[3])
    unit = WorkUnit(NEW, "files", items, replaces=(OLD,), carried=Carried(OLD))
    return CommitJob(out, tuple(unit_events(unit, failed=[1])))


def old_unit() -> WorkUnit:
    return file_unit(OLD, 4)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A result with two units; failures in the one that may be replaced."""
    folder = tmp_path / "before"
    CommitJob(folder, tuple(unit_events(file_unit(OTHER, 2), failed=[0])))()
    CommitJob(folder, tuple(unit_events(old_unit(), failed=[1, 3])))()
    return folder


@pytest.mark.parametrize(
    "make_job",
    [
        new_unit,
        unit_of_several_row_groups_with_a_late_failure,
        unit_that_replaces_another,
        retry_that_carries_rows_over,
    ],
)
def test_a_unit_whose_commit_is_killed_is_there_whole_or_not_at_all(
    make_job: Callable[[Path], CommitJob], before: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    lay_out(before, whole)
    make_job(whole)()
    job, others = make_job(out), facts_of(before, OTHER)
    replaced = set(job.unit.replaces)
    outcomes = []
    for _ in every_kill(job, before, out, at_least=15):
        state = read_result(str(out))
        is_there = NEW in state.commits
        outcomes.append(is_there)
        check_commits(out)
        assert set(state.commits) == {OTHER, *({NEW, OLD} - replaced if is_there else {OLD})}
        heal(state)
        if not is_there:  # the next run reads the unit again
            assert rows_of(out, OLD) == rows_of(before, OLD)
            job()
        check_commits(out)
        assert state_of(out) == state_of(whole)
        assert rows_of(out, NEW) == rows_of(whole, NEW)
        assert facts_of(out, OTHER) == others
    assert state_of(out) == state_of(whole)
    # At first it is absent; once present, it stays.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


# --- Healing -------------------------------------------------------------------------------


def heal_output(out: Path) -> None:
    heal(read_result(str(out)))


def test_healing_that_is_killed_is_done_by_the_next_run(before: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    retry_that_carries_rows_over(before)()
    # Left by kills and accidents: a replaced unit, a unit without a part, parts without a commit,
    # files that were being written, staged files.
    CommitJob(before, tuple(unit_events(old_unit(), failed=[1])))()
    damaged, orphan = "c" * 20, "d" * 20
    for unit_id in (damaged, orphan):
        CommitJob(before, tuple(unit_events(file_unit(unit_id, 2), failed=[0])))()
    (before / "clips" / f"{damaged}.parquet").unlink()
    (before / "_commits" / f"{orphan}.json").unlink()
    for folder in (before, before / "_commits", before / "windows"):
        (folder / f".{NEW}.json.{'0' * 32}.tmp").write_bytes(b"{")
    (before / "_staging" / "run-1").mkdir(parents=True)
    (before / "_staging" / "run-1" / f"{NEW}.windows.parquet").write_bytes(b"PAR1")
    (before / "clips" / "mine.txt").write_text("not Earmark's")
    kept = {unit_id: facts_of(before, unit_id) for unit_id in (OTHER, NEW)}
    for _ in every_kill(partial(heal_output, out), before, out, at_least=10):
        heal_output(out)
        assert {unit_id: facts_of(out, unit_id) for unit_id in kept} == kept
        left = {path.name for path in out.rglob("*") if path.is_file()}
        wanted = {Path(name).name for facts in kept.values() for name in facts}
        assert left == {*wanted, "mine.txt"}
        assert not (out / "_staging").exists()
    assert set(read_result(str(out)).commits) == set(kept)


# --- Starting and finishing a run ----------------------------------------------------------


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    clips = tmp_path / "input"
    clips.mkdir()
    for index in range(4):
        soundfile.write(clips / f"{index}.wav", [0.1 * (index + 1)] * 16_000, 16_000)
    return small_config(tiny_model, tmp_path / "out", clips)


@pytest.fixture
def finished(config: RunConfig, tmp_path: Path) -> Path:
    """A finished result of ``config``."""
    assert run_label(config, []) == 0
    finished = tmp_path / "before"
    (tmp_path / "out").rename(finished)
    return finished


def assert_success_means_whole(out: Path, num_units: int) -> None:
    if (out / "_SUCCESS").exists():
        assert json.loads((out / "run.json").read_text())["status"] == "done"
        assert len(read_result(str(out)).commits) == num_units
        check_commits(out)


def test_overwriting_that_is_killed_never_looks_finished_and_goes_on(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    num_units = len(read_result(str(finished)).commits)
    assert num_units == 2
    config = config.model_copy(update={"overwrite": True})
    lay_out(finished, out)
    job = partial(prepare_output, make_plan(config))
    for _ in every_kill(job, finished, out, at_least=10):
        check_commits(out)
        assert_success_means_whole(out, num_units)
        prepare_output(make_plan(config))
        assert {path.name for path in out.iterdir()} == {"run.json"}
        assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert run_label(config, []) == 0
    assert run_verify(str(out)) == 0
    assert [name for name, _ in state_of(out)] == [name for name, _ in state_of(finished)]
    capsys.readouterr()


def test_a_run_that_is_killed_while_it_brings_a_damaged_result_in_order_goes_on(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, names = tmp_path / "out", [name for name, _ in state_of(finished)]
    damaged, other = sorted(read_result(str(finished)).commits)
    (finished / "clips" / f"{damaged}.parquet").unlink()
    kept = facts_of(finished, other)
    lay_out(finished, out)
    job = partial(prepare_output, make_plan(config))
    for step in every_kill(job, finished, out):
        assert step == 1 or not (out / "_SUCCESS").exists()
        prepare_output(make_plan(config))
        assert set(read_result(str(out)).commits) == {other}
        assert facts_of(out, other) == kept
    assert run_label(config, []) == 0
    assert run_verify(str(out)) == 0
    assert [name for name, _ in state_of(out)] == names
    assert facts_of(out, other) == kept
    capsys.readouterr()


def test_a_run_that_is_killed_while_it_finishes_is_finished_by_the_next(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, names = tmp_path / "out", [name for name, _ in state_of(finished)]
    (finished / "_SUCCESS").unlink()
    lay_out(finished, out)
    plan = make_plan(config)
    assert plan.units == ()
    finish = prepare_output(plan)
    shutil.rmtree(finished)
    out.rename(finished)
    units = {unit_id: facts_of(finished, unit_id) for unit_id in read_result(str(finished)).commits}
    for _ in every_kill(partial(finish, RunTotals()), finished, out):
        assert_success_means_whole(out, len(units))
        assert run_label(config, []) == 0
        assert [name for name, _ in state_of(out)] == names
        assert {unit_id: facts_of(out, unit_id) for unit_id in units} == units
    assert run_verify(str(out)) == 0
    capsys.readouterr()
