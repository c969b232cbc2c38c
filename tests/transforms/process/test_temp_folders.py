"""Temporary files go with the process that made them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.runners.options import temporary_files_in_scratch
from tests.support.paths import ROOT
from transforms.process import temp_folders
from transforms.process.temp_folders import scratch_folder, sweep

# Makes a file in its scratch folder, says where that is, and does what it is told.
MAKE = """
import sys, time
from transforms.process.temp_folders import scratch_folder
(scratch_folder() / "spool.wav").write_bytes(b"x")
print(scratch_folder(), flush=True)
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's temporary folder, of this test alone; this process has no scratch folder yet."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(temp_folders, "_scratch", temp_folders._Scratch())
    yield folder
    temp_folders._scratch.remove()


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def folder_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def killed_process_folder() -> Path:
    """What a killed process leaves."""
    process = start(MAKE + "time.sleep(60)")
    folder = folder_of(process)
    process.kill()
    process.communicate()
    assert (folder / "spool.wav").exists()
    return folder


def test_a_process_has_one_folder_that_only_its_user_can_read(temporary_folder: Path) -> None:
    folder = scratch_folder()
    assert folder == scratch_folder()
    assert list(temporary_folder.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "end", ["", "sys.exit(3)", "raise KeyboardInterrupt", "raise RuntimeError"], ids=str
)
def test_the_folder_goes_with_its_process(end: str, temporary_folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", MAKE + end], cwd=ROOT, capture_output=True, text=True
    )
    assert process.stdout.startswith(str(temporary_folder))
    assert list(temporary_folder.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_that_needs_a_folder(
    temporary_folder: Path,
) -> None:
    dead = killed_process_folder()
    assert scratch_folder() != dead
    assert list(temporary_folder.iterdir()) == [scratch_folder()]


@pytest.mark.parametrize("signals", [(), (signal.SIGSTOP,)], ids=["running", "stopped"])
def test_a_living_process_keeps_its_folder(
    signals: tuple[signal.Signals, ...], temporary_folder: Path
) -> None:
    process = start(MAKE + "time.sleep(60)")
    folder = folder_of(process)
    for each in signals:
        process.send_signal(each)
    sweep()
    assert (folder / "spool.wav").exists()
    process.kill()
    process.communicate()
    sweep()
    assert list(temporary_folder.iterdir()) == []


def test_a_child_does_not_keep_a_dead_parents_folder_alive() -> None:
    child = "import subprocess; subprocess.Popen(['sleep', '5'], stdout=subprocess.DEVNULL);"
    process = start(MAKE + child + "time.sleep(60)")
    folder = folder_of(process)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    sweep()
    assert not folder.exists()


def test_a_forked_process_has_a_folder_of_its_own_and_leaves_the_parents_alone() -> None:
    code = """
import os
child = os.fork()
if child == 0:
    (scratch_folder() / "mine").touch()
    print(scratch_folder(), flush=True)
    sys.exit()
os.waitpid(child, 0)
print(sorted(path.name for path in scratch_folder().iterdir()), flush=True)
"""
    process = subprocess.run(
        [sys.executable, "-c", MAKE + code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    parents, childs, left = process.stdout.splitlines()
    assert parents != childs
    assert left == "['spool.wav']"
    assert not Path(parents).exists()
    assert not Path(childs).exists()


def test_threads_share_the_folder(temporary_folder: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda _: scratch_folder(), range(64)))
    assert folders == set(temporary_folder.iterdir())
    assert len(folders) == 1


def test_a_folder_that_was_cleared_away_is_made_again() -> None:
    first = scratch_folder()
    first.rmdir()
    assert scratch_folder() != first
    assert scratch_folder().is_dir()


def test_temporary_files_of_libraries_can_be_had_there(temporary_folder: Path) -> None:
    dead = killed_process_folder()
    with temporary_files_in_scratch():
        inside = tempfile.mkdtemp()
        sweep()  # it looks in the system's temporary folder still
    assert not dead.exists()
    assert Path(inside).parent == scratch_folder()
    assert list(temporary_folder.iterdir()) == [scratch_folder()]
    assert tempfile.gettempdir() == str(temporary_folder)


def test_only_our_own_folders_go(temporary_folder: Path, tmp_path: Path) -> None:
    prefix = f"earmark-scratch-{os.geteuid()}-"
    kept = {
        f"earmark-scratch-{os.geteuid() + 1}-abcdefgh",
        "earmark-results",
        f"{prefix}my-results",
    }
    for name in kept:
        (temporary_folder / name).mkdir()
    (temporary_folder / f"{prefix}aaaaaaaa").mkdir()
    (temporary_folder / f"{prefix}bbbbbbbb").touch()
    target = tmp_path / "elsewhere"
    target.mkdir()
    (temporary_folder / f"{prefix}cccccccc").symlink_to(target)
    sweep()
    left = {path.name for path in temporary_folder.iterdir()}
    assert left == {*kept, f"{prefix}bbbbbbbb", f"{prefix}cccccccc"}
    assert target.is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_under_our_name_is_left_alone(temporary_folder: Path) -> None:
    theirs = temporary_folder / f"earmark-scratch-{os.geteuid()}-abcdefgh"
    theirs.mkdir()
    os.chown(theirs, 12_345, 12_345)
    sweep()
    assert theirs.is_dir()
    assert scratch_folder() != theirs


def test_a_folder_that_is_swept_before_it_is_locked_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process may sweep in the moment between making and locking: here it always does."""
    real_open, made = temp_folders._open, []

    def sweep_before(path: Path) -> int:
        monkeypatch.setattr(temp_folders, "_open", real_open)
        made.append(path)
        sweep()
        return real_open(path)

    def sweep_after(path: Path) -> int:
        monkeypatch.setattr(temp_folders, "_open", sweep_before)
        made.append(path)
        descriptor = real_open(path)
        path.rmdir()
        return descriptor

    monkeypatch.setattr(temp_folders, "_open", sweep_after)
    folder = scratch_folder()
    assert folder.is_dir()
    assert len(made) == 2
    assert folder not in made
