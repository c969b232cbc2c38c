"""Faulty disks, and inputs that change: a run says why it ends, and the next one resumes.

The disks are real: file systems of a few hundred kilobytes, mounted in a namespace of its own, that
fill up, turn read-only, or belong to somebody else while the real command is running.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main as cli
from pipeline.result.verify import run_verify
from tests.support.audio_factory import noise, write
from tests.support.labelling import assert_same_rows, check_commits, read_rows, rows_by_name
from tests.support.paths import ROOT
from transforms.results import write_units as commit_module
from transforms.results.commits import PARTS

RATE = 16_000
NUM_CLIPS = 24
SETTINGS = (
    *("--precision", "fp32", "--device", "cpu", "--batch-size", "2"),
    *("--engine", "torch"),
    *("--set", "units.windows=2", "--set", "decode.processes=1"),
)


def write_clips(folder: Path, num: int = NUM_CLIPS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        write(folder / f"{index:02}.wav", noise(0.5, seed=index), RATE)
    return folder


def files_of(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def assert_same_result(out: Path, other: Path) -> None:
    for part in PARTS:
        assert_same_rows(read_rows(out, part), read_rows(other, part))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the same command without faults."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    arguments = ["label", str(clips), "-o", str(out), "-m", str(tiny_model), "-q", *SETTINGS]
    assert cli.main(arguments) == 0
    return out


# --- Disks ---------------------------------------------------------------------------------


class Namespace:
    """A mount namespace of its own; commands run in it, its files can be read from outside.

    Attributes:
        disk: A folder to mount something on.
    """

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self._holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo; exec sleep 600"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.works = bool(self._holder.stdout and self._holder.stdout.readline())

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()

    def _inside(self, *command: str | Path) -> list[str]:
        # fmt: off
        return ["nsenter", "--target", str(self._holder.pid), "--user", "--mount",
                "--preserve-credentials", f"--wd={ROOT}", "--", *map(str, command)]
        # fmt: on

    def do(self, *command: str | Path) -> bool:
        done = subprocess.run(self._inside(*command), check=False, capture_output=True)
        return done.returncode == 0

    def mount(self, options: str) -> None:
        assert self.do("mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk)

    def remount(self, options: str) -> None:
        for _ in range(100):  # refused while a file is open for writing
            if self.do("mount", "-o", f"remount,{options}", self.disk):
                return
            time.sleep(0.02)
        raise AssertionError(f"cannot remount with {options}")

    def outside(self, path: Path) -> Path:
        """Return the path from outside to a path inside."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._inside(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "EARMARK_DEBUG": "", **environment},
        )  # fmt: skip


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("there are no unshare and nsenter here (util-linux)")
    disk = tmp_path / "disk"
    disk.mkdir()
    space = Namespace(disk)
    if not space.works or not space.do("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk):
        space.close()
        pytest.skip("this machine lets nobody mount in a namespace of their own")
    space.do("umount", disk)
    yield space
    space.close()


def label_command(source: Path, out: Path, model: Path) -> list[str | Path]:
    return [sys.executable, "-m", "pipeline", "label", source, "-o", out, "-m", model, *SETTINGS]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=180)
    assert "Traceback" not in said, said
    return process.returncode, said


def last_words(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("earmark: "))


def assert_goes_on(
    space: Namespace, command: list[str | Path], out: Path, undisturbed: Path
) -> None:
    """Check that the same command completes the result and leaves nothing behind."""
    code, said = finish(space.start(*command))
    assert code == 0, said
    code, said = finish(space.start(sys.executable, "-m", "pipeline", "verify", out))
    assert code == 0, said
    there = space.outside(out)
    check_commits(there)
    assert_same_result(there, undisturbed)
    assert files_of(there) == files_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8k", "40k", "80k", "120k", "160k", "200k"])
def test_a_disk_that_fills_up_ends_the_run_and_room_completes_it(
    namespace: Namespace, tiny_model: Path, clips: Path, undisturbed: Path, size: str
) -> None:
    namespace.mount(f"size={size}")
    out = namespace.disk / "out"
    command = label_command(clips, out, tiny_model)
    code, said = finish(namespace.start(*command))
    assert code == 1, said
    words = last_words(said)
    assert words.startswith(f"earmark: {out} cannot be written: No space left on device. Make room")
    assert (
        "MiB are free), then run the same command again to resume: what is committed stays" in words
    )
    num_commits = check_commits(namespace.outside(out))
    assert num_commits < NUM_CLIPS / 2
    assert num_commits > 0 or size in ("8k", "40k")
    namespace.remount("size=64m")
    assert_goes_on(namespace, command, out, undisturbed)


def stop_at_first_commit(process: subprocess.Popen[str], out: Path) -> None:
    """Stop the process as soon as it has committed something."""
    deadline = time.monotonic() + 120
    while not list((out / "_commits").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_disk_that_turns_read_only_in_the_middle_ends_the_run(
    namespace: Namespace, tiny_model: Path, clips: Path, undisturbed: Path, is_gone: bool
) -> None:
    # As Linux does when a disk fails, or somebody removes the output.
    namespace.mount("size=64m")
    out = namespace.disk / "out"
    command = label_command(clips, out, tiny_model)
    process = namespace.start(*command)
    stop_at_first_commit(process, namespace.outside(out))
    if is_gone:
        shutil.rmtree(namespace.outside(out))
    else:
        namespace.remount("ro")
    os.kill(process.pid, signal.SIGCONT)
    code, said = finish(process)
    assert code == 1, said
    assert str(out) in last_words(said)
    if not is_gone:
        assert "cannot be written: Read-only file system. Make it writable" in last_words(said)
        assert 0 < check_commits(namespace.outside(out)) < NUM_CLIPS / 2
        namespace.remount("rw")
    assert_goes_on(namespace, command, out, undisturbed)


@pytest.mark.slow
def test_a_full_folder_for_temporary_files_ends_the_run(
    namespace: Namespace, tiny_model: Path, tmp_path: Path
) -> None:
    # Members of a tar larger than 64 MiB go there. The fault is the machine's, not an item's.
    folder = tmp_path / "tar"
    folder.mkdir()
    write(folder / "small.wav", noise(0.5), RATE)
    with (folder / "large.wav").open("wb") as file:
        file.write((folder / "small.wav").read_bytes())
        file.truncate(70 << 20)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("large.wav", "small.wav"):
            archive.add(folder / name, name)
    namespace.mount("size=10m")
    out = tmp_path / "out"
    command = label_command(tmp_path / "a.tar", out, tiny_model)
    code, said = finish(namespace.start(*command, TMPDIR=str(namespace.disk)))
    assert code == 1, said
    assert "No space left on device" in last_words(said)
    assert not rows_by_name(out, "errors")
    namespace.remount("size=200m")
    code, said = finish(namespace.start(*command, TMPDIR=str(namespace.disk)))
    assert code == 0, said
    assert len(rows_by_name(out, "clips")) == 2
    assert not list(namespace.outside(namespace.disk).iterdir())


# --- Permissions ---------------------------------------------------------------------------

COMMANDS = """
import json, sys
from pipeline.cli import main as cli
for arguments in json.loads(sys.argv[1]):
    print("code", cli.main(arguments), file=sys.stderr, flush=True)
"""


def run_without_privileges(*commands: list[str]) -> list[tuple[int, str]]:
    """Run commands that are bound by permissions, unlike root's; return codes and output."""
    # Root, without the two capabilities that override permissions.
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    prefix = drop if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "EARMARK_DEBUG": ""},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    found = []
    said: list[str] = []
    for line in done.stderr.splitlines():
        if line.startswith("code "):
            found.append((int(line.removeprefix("code ")), "\n".join(said)))
            said = []
        else:
            said.append(line)
    return found


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose permissions may be removed; they are restored at the end, for its removal."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may do everything, and there is no setpriv here (util-linux)")
    yield tmp_path
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_what_may_not_be_read_or_written_is_named(open_folder: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, open_folder / "model"))
    clips = write_clips(open_folder / "clips", 3)
    (clips / "01.wav").chmod(0)
    closed = write_clips(open_folder / "half" / "closed", 2).parent
    write(closed / "open.wav", noise(0.5), RATE)
    (closed / "closed").chmod(0)
    hidden = Path(shutil.copytree(tiny_model, open_folder / "hidden"))
    (hidden / "model.safetensors").chmod(0)
    locked = open_folder / "locked"
    locked.mkdir(mode=0o555)
    mine = open_folder / "mine"

    def label(source: Path, out: Path, model: Path = model) -> list[str]:
        return ["label", str(source), "-o", str(out), "-m", str(model), "-q", *SETTINGS]

    results = run_without_privileges(
        label(clips, locked / "out"),
        label(clips, locked),
        label(clips, mine / "a", hidden),
        label(closed / "closed", mine / "b"),
        label(clips / "01.wav", mine / "c"),
        [*label(clips, mine / "d"), "--max-failed", "0.5"],
        [*label(closed, mine / "e"), "--max-failed", "0.5"],
    )
    codes, words = zip(*results, strict=True)
    assert codes == (2, 2, 2, 2, 3, 0, 3), results
    assert f"{locked}/out cannot be written: Permission denied. Give another --output" in words[0]
    assert f"{locked} cannot be written: " in words[1]
    assert "Permission denied" in words[1]
    assert "model.safetensors cannot be read: " in words[2]
    assert "Permission denied" in words[2]
    assert f"{closed}/closed" in words[3]
    assert "Permission denied" in words[3]
    for out in ("a", "b"):
        assert not (mine / out).exists()
    assert not list(locked.iterdir())
    (error,) = rows_by_name(mine / "d", "errors").values()
    assert error["message"] == f"Permission denied: {clips}/01.wav"
    assert len(rows_by_name(mine / "d", "clips")) == 2
    (error,) = rows_by_name(mine / "e", "errors").values()
    assert error["message"] == f"Permission denied: {closed}/closed"
    # Once corrected, the same command with --retry-failed does the rest.
    (clips / "01.wav").chmod(0o644)
    ((code, said),) = run_without_privileges([*label(clips, mine / "d"), "--retry-failed"])
    assert code == 0, said
    assert len(rows_by_name(mine / "d", "clips")) == 3


# --- Inputs that change in the middle of the run ---------------------------------------------


@pytest.fixture
def own_clips(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips")


class Label:
    """Runs ``earmark label`` in this process, and something else after the first commit."""

    def __init__(self, model: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.source, self.monkeypatch = model, source, monkeypatch

    def __call__(self, out: Path, *options: str) -> int:
        arguments = ["label", str(self.source), "-o", str(out), "-m", str(self.model), "-q"]
        return cli.main([*arguments, *SETTINGS, *options])

    def disturbed(self, out: Path, disturb: Callable[[], Any], *options: str) -> int:
        commit = commit_module.OpenUnit.commit
        todo = [disturb]

        def commit_and_disturb(unit: commit_module.OpenUnit) -> Any:
            committed = commit(unit)
            if todo:
                todo.pop()()
            return committed

        with self.monkeypatch.context() as patched:
            patched.setattr(commit_module.OpenUnit, "commit", commit_and_disturb)
            code = self(out, *options)
        assert not todo
        return code


@pytest.fixture
def label(tiny_model: Path, own_clips: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    monkeypatch.delenv("EARMARK_DEBUG", raising=False)
    return Label(tiny_model, own_clips, monkeypatch)


def rewrite(path: Path, duration_s: float, seed: int) -> None:
    """Write other content under the same name in place, as an editor or a download does."""
    write(path, noise(duration_s, seed=seed), RATE)


def test_files_removed_in_the_middle_are_errors_and_then_vanished(
    label: Label, own_clips: Path, tmp_path: Path
) -> None:
    def remove() -> None:
        for index in range(12, NUM_CLIPS):
            (own_clips / f"{index:02}.wav").unlink()

    out = tmp_path / "out"
    assert label.disturbed(out, remove) == 3
    errors, clips = rows_by_name(out, "errors"), rows_by_name(out, "clips")
    assert len(errors) + len(clips) == NUM_CLIPS
    assert errors
    for (name, _), row in errors.items():
        assert int(name[:2]) >= 12
        assert str(own_clips / name) in row["message"]
        assert "no such file" in row["message"].lower()
    assert check_commits(out) == NUM_CLIPS / 2
    assert run_verify(str(out), quiet=True) == 0
    assert label(out) == 0  # what is not there any more is no failure of this run
    write_clips(own_clips)
    assert label(out, "--retry-failed") == 0
    fresh = tmp_path / "fresh"
    assert label(fresh) == 0
    assert_same_result(out, fresh)


def test_files_that_change_in_the_middle_are_done_again_by_the_next_run(
    label: Label, own_clips: Path, tmp_path: Path
) -> None:
    def change() -> None:
        for index in range(0, NUM_CLIPS, 4):  # some have been read, some not
            path = own_clips / f"{index:02}.wav"
            rewrite(path, 0.5, 100 + index)  # of the same size
            rewrite(own_clips / f"{index + 1:02}.wav", 1.5, 100 + index)  # grown
            content = (own_clips / f"{index + 2:02}.wav").read_bytes()
            (own_clips / f"{index + 2:02}.wav").write_bytes(content[:9_000])  # cut short
            replaced = own_clips / "new.part"
            rewrite(replaced, 0.7, 200 + index)
            replaced.rename(own_clips / f"{index + 3:02}.wav")  # replaced as a whole

    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert label.disturbed(out, change) == 0
    # A row is always of one version of its file, whichever.
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in own_clips.iterdir()}
    read_new = [row["content_sha256"] in hashes for row in rows_by_name(out, "clips").values()]
    assert True in read_new
    assert False in read_new
    assert check_commits(out) == NUM_CLIPS / 2
    assert label(out) == 0
    assert label(fresh) == 0
    assert_same_result(out, fresh)
    now = {row["content_sha256"] for row in rows_by_name(out, "clips").values()}
    assert now == hashes
    assert run_verify(str(out), quiet=True) == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}
    assert label(out) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}


@pytest.mark.parametrize("kept_ratio", [0.0, 0.7])
def test_a_tar_cut_in_the_middle_of_the_run_is_said_and_then_redone(
    label: Label, own_clips: Path, tmp_path: Path, kept_ratio: float
) -> None:
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted(own_clips.iterdir()):
            archive.add(path, path.name)
    whole, stat = shard.read_bytes(), shard.stat()
    label.source = shard
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    code = label.disturbed(out, lambda: os.truncate(shard, int(len(whole) * kept_ratio)))
    assert code == 3
    assert rows_by_name(out, "errors")
    check_commits(out)
    assert run_verify(str(out), quiet=True) == 0
    # Written again, with the time it had: only a retry knows; with another time, any run does.
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert label(out, "--retry-failed") == 0
    assert label(fresh) == 0
    assert_same_result(out, fresh)
    assert len(rows_by_name(out, "clips")) == NUM_CLIPS
    assert np.isfinite([row["embedding"] for row in rows_by_name(out, "windows").values()]).all()
