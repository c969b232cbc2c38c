"""Interrupts: heard at any time, one exit code, one message, nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from tests.support.fake_commands import Calls
from tests.support.paths import ROOT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_beam_wraps_is_one_all_the_same(
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def interrupted(folder: str, quiet: bool) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt as error:
            logging.exception("KeyboardInterrupt [while running 'Label']")
            raise RuntimeError("KeyboardInterrupt [while running 'Label']") from error
        return 0

    monkeypatch.setattr(sys.modules["pipeline.result.verify"], "run_verify", interrupted)
    before = signal.getsignal(number)
    assert cli.main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "earmark: interrupted; run the same command again to resume\n"
    assert signal.getsignal(number) is before


def ignore_sigint() -> None:
    """What a shell does for a command in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    ("number", "before"),
    [(signal.SIGINT, None), (signal.SIGINT, ignore_sigint), (signal.SIGTERM, None)],
    ids=["SIGINT", "SIGINT, ignored at first", "SIGTERM"],
)
def test_an_interrupt_is_one_from_the_first_line_on(
    tmp_path: Path,
    tiny_model: Path,
    number: signal.Signals,
    before: Callable[[], None] | None,
    delay_s: float,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "label", tmp_path, "-o", tmp_path / "out",
         "-m", tiny_model],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
    )  # fmt: skip
    try:
        while not catches(process.pid, signal.SIGTERM):  # which Python by itself does not
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(number)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said == ("", "earmark: interrupted; run the same command again to resume\n")


def test_an_interrupt_that_a_callback_swallows_comes_again(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Swallowing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def run(*_: object) -> int:
        Swallowing()  # gone at once; what its end raises is ignored
        time.sleep(10)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "earmark: interrupted; run the same command again to resume\n"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_the_entry_imports_next_to_nothing_before_it_handles_interrupts() -> None:
    code = "import sys, pipeline.__main__; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    ours = {name for name in imported if name.startswith(("pipeline", "transforms"))}
    assert ours == {"pipeline", "pipeline.__main__", "pipeline.exit_codes"}
    assert imported & {"typer", "rich", "pydantic", "yaml", "numpy"} == set()


INTERRUPTED_AT_WORK = """
import atexit, sys, threading, time
import pipeline.cli.main
from pipeline.__main__ import main
from transforms.process.temp_folders import scratch_folder

def run():
    print(scratch_folder(), flush=True)
    threading.Thread(target=time.sleep, args=[float(sys.argv[1])]).start()
    return 130

pipeline.cli.main.main = run
if "no-private-name" in sys.argv:
    del atexit._run_exitfuncs
sys.exit(main())
"""


@pytest.mark.parametrize(
    "arguments",
    [["60"], ["0.2", "no-private-name"]],
    ids=["at once", "without Python's private function"],
)
def test_an_interrupted_command_leaves_no_temporary_folder(
    arguments: list[str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_WORK, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("earmark-scratch-")
    assert not folder.exists()
