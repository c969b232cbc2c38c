"""The process: what it imports, its streams, its folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.result.verify import run_verify
from tests.support.audio_factory import noise, write
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["label", "--help"], 0, "--top-k"),
        (["train", "--help"], 0, "--hold-out"),
        (["train", "-t", "x.csv"], 2, "training.keep is best"),
    ],
)
def test_help_and_wrong_usage_load_nothing_heavy(
    arguments: list[str], code: int, words: str
) -> None:
    script = (
        f"import sys; from pipeline.cli.main import main; code = main({arguments});"
        "heavy = {'torch', 'apache_beam', 'pyarrow', 'av', 'soundfile'} & set(sys.modules);"
        "heavy |= set() if code else {'fsspec', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


def test_python_m_pipeline_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", "--nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such option: --nonsense" in done.stderr


def test_output_that_nobody_reads_is_no_traceback() -> None:
    command = f"{sys.executable} -m pipeline models --json | true"
    # Buffered, as it is by default: the pipe breaks when the buffer is written at the end.
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def in_shell(command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a shell's line, in which ``$E`` is the command."""
    environment = {**os.environ, "E": f"{sys.executable} -m pipeline", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "a.wav", noise(1.0), 16_000)
    return folder


@pytest.mark.parametrize(
    "streams",
    [
        "<&- >&- 2>&-",
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2>/dev/full", marks=pytest.mark.slow),
    ],
    ids=["none at all", "no stdout", "a full log"],
)
def test_a_run_needs_no_standard_streams(
    clips: Path, tiny_model: Path, tmp_path: Path, streams: str
) -> None:
    out = tmp_path / "out"
    label = f"$E label {clips} -o {out} -m {tiny_model} --device cpu --set decode.processes=1"
    done = in_shell(f"{label} {streams}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert run_verify(str(out), quiet=True) == 0


def test_a_log_that_cannot_be_written_costs_its_lines_alone() -> None:
    script = (
        "import logging, sys; from rich.console import Console\n"
        "from pipeline.terminal.std_streams import answer, say, usable_streams\n"
        "with usable_streams():\n"
        "    say('x' * 9999); print('lost', file=sys.stderr, flush=True)\n"
        "    Console(stderr=True).print('lost'); logging.warning('lost'); answer('found')\n"
    )
    done = in_shell(f'{sys.executable} -c "{script}" 2>/dev/full')
    assert (done.returncode, done.stdout) == (0, "found\n")


@pytest.mark.parametrize("arguments", ["models", "models --json", "--help", "--version"])
def test_an_answer_that_cannot_be_written_names_standard_output(arguments: str) -> None:
    done = in_shell(f"$E {arguments} > /dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "earmark: standard output cannot be written: No space left on device. Fix that, or "
        "redirect it.\n",
    )


def test_files_never_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pipeline.terminal.std_streams import usable_streams\n"
        "with usable_streams():\n"
        "    file = open(sys.argv[1], 'w'); print('lost'); print('lost', file=sys.stderr)\n"
        "    os.write(1, b'lost'); os.write(2, b'lost'); file.write(str(file.fileno() > 2))\n"
    )
    path = tmp_path / "file"
    done = in_shell(f'{sys.executable} -c "{script}" {path} <&- >&- 2>&-')
    assert done.returncode == 0
    assert path.read_text() == "True"


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = in_shell(f"rmdir {gone}; $E plan {tmp_path} -m {tmp_path}", cwd=gone)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "earmark: the current folder has been removed; change to another one, then run the "
        "command again\n",
    )


# What a terminal obeys: it clears the screen, sets a title, rings.
EVIL = "evil\x1b[2J\x1b]0;owned\x07\x9b31m[bold] :dog:"


def test_names_of_folders_do_not_command_the_terminal(
    clips: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = tmp_path / EVIL, ["--device", "cpu", "--set", "decode.processes=1"]
    clips = clips.rename(clips.with_name(f"clips {EVIL}"))
    (clips / f"{EVIL}.wav").write_bytes(b"no audio")
    assert cli.main(["label", f"{clips}/", "-o", str(out), "-m", str(tiny_model), *few]) == 3
    assert cli.main(["verify", str(out)]) == 0
    assert cli.main(["export", str(out), "-f", "csv"]) == 0
    assert cli.main(["stats", f"{clips}/", "-o", str(out / "stats"), *few[2:]]) == 3
    next((out / "clips").iterdir()).unlink()
    assert cli.main(["verify", str(out)]) == 3
    assert cli.main(["export", str(out), "-f", "csv"]) == 2
    (out / "run.json").write_text("{}")
    assert cli.main(["verify", str(out)]) == 3
    assert cli.main(["verify", str(tmp_path / f"none {EVIL}")]) == 2
    for said in capsys.readouterr():
        lines = [line for line in said.splitlines() if "evil" in line]
        assert len(lines) >= 4
        assert all("evil\\x1b[2J\\x1b]0;owned\\x07\\x9b31m[bold] :dog:" in line for line in lines)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
