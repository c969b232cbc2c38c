"""Does a run that is killed anywhere, any number of times, end as one that was left alone?

    python -m benchmarks.reliability.kill_runs [--rounds 50] [--data ../shared/data/esc10/audio]

Real recordings, half of them loose, half in two tars with ``.json`` siblings, one of them
compressed, and one long recording that goes through a temporary file. They are labelled with a
small random model, first undisturbed, then again and again:

- **random**: the process group (in a quarter of the kills the main process alone) gets SIGKILL at
  a random moment after the first commit, then the next run one to four times more, also before its
  first commit; then a run is left to finish.
- **aimed**: a run is killed just before its first step on disk below the output, the next just
  before its second, and so on to the end (``tests/support/disk_steps.py``): for new results, for
  ``--retry-failed`` and for ``--overwrite``.
- **signals**: SIGINT to the group and SIGTERM to the main process; exit code 130 and the words.
- **together**: two runs on one output; the second must say why not, and whichever is killed, the
  next run must finish.

After each round: the rows are those of the undisturbed run (keys, labels, and numbers to 1e-5), in
the same files and no other; ``earmark verify`` finds nothing; what was committed before a kill is
the same file afterwards, to the nanosecond; the runs' temporary folder is empty, /dev/shm too;
no process of theirs lives.

Most runs are forked from a process that has the libraries loaded already, one round in five is
started as users start it. Prints a table, writes ``kill_runs.json`` beside this file; the exit
code is 1 if a promise was broken. See ``benchmarks/README.md`` for the figures.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import getpass
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.support.disk_steps import on_each_step
from tests.support.labelling import facts, numbers, read_rows
from tests.support.model_factory import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("windows", "clips", "errors", "_commits")
TOLERANCE = 1e-5
PATIENCE_S = 300.0
GOES_BY_ITSELF_S = 30.0  # decoders see that their parent has gone
LONG_RECORDING_BYTES = 66 << 20  # beyond ``ReadLimits.spool_bytes``
WINDOWS_PER_UNIT = 20
AIMED_RECORDINGS = 8  # three units: loose files, a tar, a compressed tar
COLD_EVERY = 5
TORCH_FOLDERS = {f"torchinductor_{getpass.getuser()}"}
INTERRUPTED = "earmark: interrupted; run the same command again to resume\n"


class BrokenPromiseError(Exception):
    """What was found instead of what must be."""


def must(holds: bool, words: str) -> None:
    """Raise ``BrokenPromiseError`` unless it holds."""
    if not holds:
        raise BrokenPromiseError(words)


# --- Input ---------------------------------------------------------------------------------


def make_input(recordings: list[Path], folder: Path, *, with_long: bool) -> list[Path]:
    """Half of the recordings loose, a quarter in a tar, a quarter in a compressed tar."""
    half, three_quarters = len(recordings) // 2, len(recordings) * 3 // 4
    loose = folder / "loose"
    loose.mkdir(parents=True)
    for recording in recordings[:half]:
        shutil.copyfile(recording, loose / recording.name)
    plain, packed = folder / "plain.tar", folder / "packed.tar.gz"
    with tarfile.open(plain, "w") as tar:
        for recording in recordings[half:three_quarters]:
            add_recording(tar, recording.name, recording.read_bytes())
        if with_long:
            add_recording(tar, "long.wav", long_recording(recordings))
    with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
        for recording in recordings[three_quarters:]:
            add_recording(tar, recording.name, recording.read_bytes())
    return [loose, plain, packed]


def add_recording(tar: tarfile.TarFile, name: str, audio: bytes) -> None:
    """A member and its ``.json`` sibling."""
    facts = json.dumps({"label": name.rpartition("-")[2].partition(".")[0]}).encode()
    for member, data in ((name, audio), (name.rpartition(".")[0] + ".json", facts)):
        info = tarfile.TarInfo(member)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def long_recording(recordings: list[Path]) -> bytes:
    """As many recordings in a row as make a file that does not stay in memory."""
    pieces: list[np.ndarray[Any, np.dtype[np.int16]]] = []
    num_bytes, rate_hz = 0, 0
    while num_bytes < LONG_RECORDING_BYTES:
        samples, rate_hz = soundfile.read(recordings[len(pieces) % len(recordings)], dtype="int16")
        pieces.append(samples)
        num_bytes += samples.nbytes
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(pieces), rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


# --- Runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What every run of a part of the benchmark has in common.

    Attributes:
        inputs: What is labelled.
        model: The model's folder.
        temporary: The runs' TMPDIR.
        windows_per_unit: How much is committed at once.
    """

    inputs: list[Path]
    model: Path
    temporary: Path
    windows_per_unit: int

    def arguments(self, out: Path, *options: str) -> list[str]:
        """What ``earmark`` is called with."""
        sets = [f"units.windows={self.windows_per_unit}", "decode.processes=1"]
        return [
            *("label", *map(str, self.inputs), "--output", str(out), "--model", str(self.model)),
            *("--device", "cpu", "--precision", "fp32"),
            *(word for text in sets for word in ("--set", text)),
            *options,
        ]


_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(
    ["pipeline.labelling.run", "pipeline.cli.main", "transforms.label_audio"]
)


class Run:
    """A run that is on: in a session of its own, its processes marked in their environment."""

    def __init__(
        self, setup: Setup, out: Path, *options: str, cold: bool = False, kill_before: int = 0
    ) -> None:
        self.out, self.began_s = out, time.monotonic()
        self._mark = f"EARMARK_KILL_RUNS={uuid.uuid4().hex}"
        # Not in TMPDIR: that must be empty in the end.
        self._log = setup.temporary.parent / f"log-{self._mark[-32:]}"
        name, _, value = self._mark.partition("=")
        environment = {name: value, "TMPDIR": str(setup.temporary)}
        arguments = setup.arguments(out, *options)
        self._cold: subprocess.Popen[bytes] | None = None
        if cold:
            with self._log.open("wb") as log:
                self._cold = subprocess.Popen(
                    [sys.executable, "-m", "pipeline", *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.pid = self._cold.pid
            return
        self._process = _warm.Process(
            target=label_in_this_process,
            args=(arguments, environment, str(self._log), str(out), kill_before),
        )
        self._process.start()
        self.pid = self._process.pid or 0

    def exit_code(self) -> int | None:
        """Of the main process; negative for a signal, None while it lives."""
        return self._cold.poll() if self._cold is not None else self._process.exitcode

    def send(self, number: signal.Signals, *, to_group: bool) -> None:
        """A signal; nothing happens if the run has come to its end."""
        with contextlib.suppress(ProcessLookupError):
            if to_group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, once every process of the run has gone."""
        wait_until(lambda: self.exit_code() is not None, "the run to end", PATIENCE_S)
        wait_until(lambda: not self.processes(), "decoders to end", GOES_BY_ITSELF_S)
        return self.exit_code() or 0

    def words(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def processes(self) -> list[int]:
        """Its processes: not zombies, which have no environment."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    folder.name.isdigit()
                    and self._mark.encode() in (folder / "environ").read_bytes()
                ):
                    found.append(int(folder.name))
        return found

    def end(self) -> None:
        """Kill what is left of it, and forget what it said."""
        self.send(signal.SIGKILL, to_group=True)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.unlink(missing_ok=True)


def label_in_this_process(
    arguments: list[str], environment: dict[str, str], log: str, out: str, kill_before: int
) -> None:
    """``earmark`` in a process that was forked for it alone.

    Args:
        arguments: Its command line.
        environment: Added to the environment.
        log: File for what it prints.
        out: The output.
        kill_before: Kill the process group before this step below the output; 0 for never.
    """
    os.setsid()
    os.environ.update(environment)
    tempfile.tempdir = None
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from pipeline.cli.main import main

    if kill_before:

        def kill(number: int) -> None:
            if number == kill_before:
                os.killpg(0, signal.SIGKILL)

        on_each_step(Path(out), kill)
    code = main(arguments)
    atexit._run_exitfuncs()  # multiprocessing leaves them out
    sys.exit(code)


def wait_until(condition: Callable[[], bool], what: str, patience_s: float) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        must(time.monotonic() < deadline, f"waited {patience_s:g} s in vain for {what}")
        time.sleep(0.003)


# --- What must hold ------------------------------------------------------------------------


def num_commits(out: Path) -> int:
    return len(list((out / "_commits").glob("*.json")))


def committed_files(out: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and bytes of everything that belongs to a commit, by its path in the output."""
    found = {}
    for commit in (out / "_commits").glob("*.json"):
        for path in out.glob(f"*/{commit.stem}.*"):
            status = path.stat()
            found[str(path.relative_to(out))] = (
                status.st_ino,
                status.st_mtime_ns,
                path.read_bytes(),
            )
    return found


def files_below(folder: Path) -> set[str]:
    """Paths of files and folders."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_same_rows(out: Path, whole: Path, *, with_unit_ids: bool = True) -> None:
    """The rows of both are the same."""
    for part in ("windows", "clips", "errors"):
        found, wanted = read_rows(out, part), read_rows(whole, part)
        must(len(found) == len(wanted), f"{part}: {len(found)} rows, {len(wanted)} were expected")
        for one, other in zip(found, wanted, strict=True):
            a, b = facts(one), facts(other)
            if not with_unit_ids:
                a["unit_id"] = b["unit_id"] = None
            must(a == b, f"{part}: the row of {one['clip_id']} is another: {a} instead of {b}")
            distance = np.max(np.abs(np.subtract(numbers(one), numbers(other))), initial=0.0)
            must(distance <= TOLERANCE, f"{part}: numbers of {one['clip_id']} are {distance} off")


def check_whole(out: Path, whole: Path, setup: Setup) -> None:
    """A finished result is like the undisturbed one, and nothing is left beside it."""
    check_same_names(files_below(out), files_below(whole))
    check_same_rows(out, whole)
    check_verified(out)
    check_no_temporary_files(setup)


def check_same_names(found: Iterable[str], wanted: Iterable[str]) -> None:
    """The same files, or as many in each folder."""
    more, fewer = Counter(found) - Counter(wanted), Counter(wanted) - Counter(found)
    must(not more and not fewer, f"files: too many {sorted(more)}, lost {sorted(fewer)}")


def folders_of(out: Path) -> list[str]:
    """The folder of each file, once for each."""
    return [name.rpartition("/")[0] or name for name in files_below(out)]


def check_verified(out: Path) -> None:
    from pipeline.result.verify import run_verify

    with contextlib.redirect_stdout(io.StringIO()) as words:
        code = run_verify(str(out))
    must(code == 0, f"earmark verify: {words.getvalue()}")


def check_no_temporary_files(setup: Setup) -> None:
    # torch makes an empty folder for its compiler, always of the same name.
    left = sorted(path for path in files_below(setup.temporary) if path not in TORCH_FOLDERS)
    must(not left, f"temporary files were left: {left[:5]}")


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


class Untouched:
    """Remembers what has been committed, and sees to it that it stays as it is."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._files: dict[str, tuple[int, int, bytes]] = {}

    def look(self) -> None:
        """Call when no run is on."""
        now = committed_files(self._out)
        for path, before in self._files.items():
            must(path in now, f"{path} was committed and is gone")
            must(now[path] == before, f"{path} was committed and has been written again")
        self._files = now


# --- Rounds --------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has been done and what has come of it.

    Attributes:
        rounds: By kind.
        kills: By kind.
        steps: Aimed kills, by scenario.
        broken: Kind, number and words of each broken promise.
    """

    rounds: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    steps: dict[str, int] = field(default_factory=dict)
    broken: list[tuple[str, int, str]] = field(default_factory=list)


@dataclass
class Bench:
    """What the rounds work with; ``whole`` is the undisturbed result."""

    setup: Setup
    folder: Path
    whole: Path
    tally: Tally
    seed: int

    def new_output(self) -> Path:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        return out

    @contextlib.contextmanager
    def start(self, out: Path, *options: str, **how: Any) -> Iterator[Run]:
        run = Run(self.setup, out, *options, **how)
        try:
            yield run
        finally:
            run.end()

    def finish(self, out: Path, *options: str, code: int = 0, **how: Any) -> None:
        with self.start(out, *options, **how) as run:
            found = run.wait()
            must(found == code, f"exit code {found} instead of {code}: {run.words()[-1500:]}")

    def wait_for_commits(self, run: Run, count: int) -> bool:
        """Whether so many commits came before the run ended."""

        def there_or_over() -> bool:
            return num_commits(run.out) >= count or run.exit_code() is not None

        wait_until(there_or_over, f"{count} commits", PATIENCE_S)
        return run.exit_code() is None


def make_bench(
    folder: Path,
    recordings: list[Path],
    seed: int,
    *,
    windows_per_unit: int = WINDOWS_PER_UNIT,
    with_long: bool = False,
) -> Bench:
    """Lay out input and model in a folder, and have the undisturbed run."""
    os.environ["OMP_NUM_THREADS"] = "1"  # runs share the machine; read when a library is loaded
    model = write_tiny_model(folder / "model")
    (folder / "tmp").mkdir()
    inputs = make_input(recordings, folder / "input", with_long=with_long)
    setup = Setup(inputs, model, folder / "tmp", windows_per_unit)
    bench = Bench(setup, folder, folder / "whole", Tally(), seed)
    bench.finish(bench.whole, cold=True)
    check_whole(bench.whole, bench.whole, setup)
    return bench


def random_round(bench: Bench, number: int) -> None:
    """Kills at random moments, then a run to the end."""
    rng = random.Random(f"{bench.seed} {number}")
    out, cold = bench.new_output(), number % COLD_EVERY == 0
    total, untouched, start_s = num_commits(bench.whole), Untouched(out), 1.0
    num_kills = rng.randint(1, 4)
    for kill in range(num_kills):
        with bench.start(out, cold=cold) as run:
            before = num_commits(out)
            early = kill > 0 and (rng.random() < 0.35 or total - before < 3)
            if early:
                time.sleep(rng.uniform(0, start_s))  # while it starts, heals and plans
            else:
                alive = bench.wait_for_commits(
                    run, rng.randint(before + 1, max(before + 1, total - 3))
                )
                must(alive, f"the run ended before it was killed: {run.words()[-1500:]}")
                start_s = time.monotonic() - run.began_s if kill == 0 else start_s
                time.sleep(rng.uniform(0, 0.7))
            to_group = rng.random() < 0.75
            run.send(signal.SIGKILL, to_group=to_group)
            died = run.wait() == -signal.SIGKILL
        untouched.look()
        must(died or (out / "_SUCCESS").exists(), "a run ended without SIGKILL and unfinished")
        moment = "too late" if not died else "early" if early else "after commits"
        bench.tally.kills[f"{moment}, {'group' if to_group else 'main process'}"] += 1
    bench.finish(out, cold=cold)
    untouched.look()
    check_whole(out, bench.whole, bench.setup)


def signal_round(bench: Bench, number: int) -> None:
    """SIGINT as from a terminal, or SIGTERM as from a scheduler; then a run to the end."""
    rng = random.Random(f"{bench.seed} signal {number}")
    out, untouched = bench.new_output(), Untouched(bench.folder / "out")
    kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
    code, words = _interrupt(bench, out, kind, rng, cold=number < 2)
    while code == 0:  # the signal came after the run had ended
        bench.tally.kills[f"too late, {kind.name}"] += 1
        shutil.rmtree(out)
        code, words = _interrupt(bench, out, kind, rng, cold=False)
    must(code == 130, f"{kind.name}: exit code {code} instead of 130: {words[-1500:]}")
    must(words.endswith(INTERRUPTED), f"{kind.name}: it does not say how to go on: {words[-500:]}")
    must("Traceback" not in words, f"{kind.name}: a traceback: {words[-1500:]}")
    must(not list((out / "_staging").rglob("*")), f"{kind.name}: staged files were left")
    check_no_temporary_files(bench.setup)
    bench.tally.kills[kind.name] += 1
    untouched.look()
    bench.finish(out)
    untouched.look()
    check_whole(out, bench.whole, bench.setup)


def _interrupt(
    bench: Bench, out: Path, kind: signal.Signals, rng: random.Random, *, cold: bool
) -> tuple[int, str]:
    """Start a run and interrupt it after some commits; its exit code and words."""
    total = num_commits(bench.whole)
    with bench.start(out, cold=cold) as run:
        must(bench.wait_for_commits(run, rng.randint(1, total - 4)), "it ended too early")
        time.sleep(rng.uniform(0, 0.5))
        run.send(kind, to_group=kind == signal.SIGINT)
        return run.wait(), run.words()


def together_round(bench: Bench, number: int) -> None:
    """Two runs on one output: the second is refused, and one of them is killed."""
    out = bench.new_output()
    untouched = Untouched(out)
    with bench.start(out) as first:
        must(bench.wait_for_commits(first, 1), "it ended too early")
        first.send(signal.SIGSTOP, to_group=True)  # so that only the second could change anything
        before = (files_below(out), committed_files(out))
        with bench.start(out, *(("--overwrite",) if number % 2 else ())) as second:
            if number % 3 == 2:
                time.sleep(0.2)
                second.send(signal.SIGKILL, to_group=True)
                bench.tally.kills["the second of two"] += 1
                second.wait()
            else:
                code, words = second.wait(), second.words()
                must(code == 2, f"the second run's exit code is {code} instead of 2: {words}")
                must("another run is writing to" in words, f"it does not say why not: {words}")
        must(before == (files_below(out), committed_files(out)), "the second run changed something")
        first.send(signal.SIGCONT, to_group=True)
        if number % 3 == 0:
            first.send(signal.SIGKILL, to_group=True)
            bench.tally.kills["the first of two"] += 1
            first.wait()
        else:
            must(first.wait() == 0, f"the first run did not finish: {first.words()[-1500:]}")
    untouched.look()
    bench.finish(out)
    untouched.look()
    check_whole(out, bench.whole, bench.setup)


@dataclass(frozen=True)
class Scenario:
    """What aimed kills interrupt.

    Attributes:
        name: For the table.
        prepare: Lays out what is there before; None for nothing.
        options: Of the run that is killed.
        names_differ: A run after a kill may name its units otherwise, as it retries a retry.
    """

    name: str
    prepare: Callable[[Path], None] | None
    options: tuple[str, ...]
    names_differ: bool = False


def aimed_rounds(bench: Bench, scenario: Scenario) -> None:
    """Kill before step 1, 2, 3, … until a run has fewer steps than that."""
    whole = bench.folder / "aimed-whole"
    shutil.rmtree(whole, ignore_errors=True)
    if scenario.prepare:
        scenario.prepare(whole)
    bench.finish(whole, *scenario.options, code=0)
    step = 0
    while True:
        step += 1
        out = bench.new_output()
        if scenario.prepare:
            scenario.prepare(out)
        try:
            untouched = Untouched(out)
            with bench.start(out, *scenario.options, kill_before=step) as run:
                code = run.wait()
                must(code in (0, -signal.SIGKILL), f"exit code {code}: {run.words()[-1500:]}")
            if code == 0:
                break
            bench.tally.kills["aimed"] += 1
            check_success_is_true(out, whole)
            if not scenario.prepare:
                untouched.look()
            bench.finish(out, *scenario.options)
            if not scenario.prepare:
                untouched.look()
            if scenario.names_differ:
                check_same_names(folders_of(out), folders_of(whole))
            else:
                check_same_names(files_below(out), files_below(whole))
            check_same_rows(out, whole, with_unit_ids=not scenario.names_differ)
            check_verified(out)
            check_no_temporary_files(bench.setup)
        except BrokenPromiseError as error:
            report_broken(bench.tally, f"aimed, {scenario.name}", step, error)
        bench.tally.rounds[f"aimed, {scenario.name}"] += 1
        show(f"aimed, {scenario.name}: step {step}")
    bench.tally.steps[scenario.name] = step - 1


def check_success_is_true(out: Path, whole: Path) -> None:
    """Where ``_SUCCESS`` is, everything is."""
    if (out / "_SUCCESS").exists():
        check_verified(out)
        num_clips = len(read_rows(out, "clips")) + len(read_rows(out, "errors"))
        expected = len(read_rows(whole, "clips")) + len(read_rows(whole, "errors"))
        must(num_clips == expected, f"_SUCCESS with {num_clips} items instead of {expected}")


def scenarios(bench: Bench) -> Iterator[Scenario]:
    """A new result; failed items tried again; everything anew over what is there."""
    yield Scenario("a new result", None, ())
    loose = bench.setup.inputs[0]
    broken = sorted(loose.iterdir())[0]
    audio = broken.read_bytes()
    before = bench.folder / "aimed-before"
    broken.write_bytes(b"no audio")
    bench.finish(before, "--max-failed", "1")
    broken.write_bytes(audio)

    def lay_out(out: Path) -> None:
        shutil.copytree(before, out, copy_function=shutil.copy2)

    yield Scenario("a unit done again", lay_out, ())  # the file has changed
    yield Scenario("--overwrite", lay_out, ("--overwrite",))
    # Failed for good: tried again, each time.
    broken.write_bytes(b"no audio")
    shutil.rmtree(before)
    bench.finish(before, "--max-failed", "1")
    retry = ("--retry-failed", "--max-failed", "1")
    yield Scenario("--retry-failed", lay_out, retry, names_differ=True)
    broken.write_bytes(audio)


def report_broken(tally: Tally, kind: str, number: int, error: Exception) -> None:
    words = str(error) if isinstance(error, BrokenPromiseError) else traceback.format_exc()
    tally.broken.append((kind, number, words))
    print(f"\nBROKEN: {kind} {number}: {words}", flush=True)


def show(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_rounds(bench: Bench, kind: str, count: int, play: Callable[[Bench, int], None]) -> None:
    """Each round for itself: a broken promise in one does not stop the others."""
    for number in range(count):
        try:
            play(bench, number)
        except BrokenPromiseError as error:
            report_broken(bench.tally, kind, number, error)
        bench.tally.rounds[kind] += 1
        show(f"{kind}: {number + 1} of {count}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every part, and its figures."""
    recordings = sorted(arguments.data.glob("*.*"))
    must(
        len(recordings) >= 24, f"{arguments.data} has {len(recordings)} recordings, not 24 or more"
    )
    began_s, shared = time.monotonic(), shared_memory()
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as name:
        folder = Path(name)
        bench = make_bench(folder, recordings, arguments.seed, with_long=True)
        tally, setup = bench.tally, bench.setup
        sizes = {
            "items": len(read_rows(bench.whole, "clips")),
            "windows": len(read_rows(bench.whole, "windows")),
            "units": num_commits(bench.whole),
        }
        run_rounds(bench, "signals", arguments.signals, signal_round)
        run_rounds(bench, "together", arguments.together, together_round)
        run_rounds(bench, "random", arguments.rounds, random_round)
        if not arguments.no_aimed:
            few = make_input(recordings[:AIMED_RECORDINGS], folder / "few", with_long=False)
            aimed = dataclasses.replace(bench, setup=dataclasses.replace(setup, inputs=few))
            for scenario in scenarios(aimed):
                aimed_rounds(aimed, scenario)
    new = shared_memory() - shared
    if new:
        report_broken(
            tally, "shared memory", 0, BrokenPromiseError(f"left in /dev/shm: {sorted(new)}")
        )
    return {
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began_s),
        **sizes,
        "rounds": dict(tally.rounds),
        "kills": dict(tally.kills),
        "aimed_steps": tally.steps,
        "broken": tally.broken,
    }


def print_tables(result: dict[str, Any]) -> None:
    """Markdown."""
    broken = Counter(kind for kind, *_ in result["broken"])
    print("\n| rounds | number | broken promises |\n|---|---:|---:|")
    for kind, count in result["rounds"].items():
        print(f"| {kind} | {count:,} | {broken[kind]} |")
    print("\n| kills | number |\n|---|---:|")
    for kind, count in sorted(result["kills"].items()):
        print(f"| {kind} | {count:,} |")


def main() -> None:
    """Kill, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--signals", type=int, default=8, help="rounds with SIGINT and SIGTERM")
    parser.add_argument("--together", type=int, default=6, help="rounds with two runs at once")
    parser.add_argument("--no-aimed", action="store_true", help="leave the aimed kills out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/esc10/audio"))
    arguments = parser.parse_args()
    result = run(arguments)
    print_tables(result)
    for name, value in result.items():
        if name not in ("rounds", "kills", "broken"):
            print(f"{name}: {value}")
    for broken in result["broken"]:
        print("BROKEN:", *broken)
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if result["broken"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
