"""``.ci/run``, with stand-ins for the tools: what it runs, when it fails, how it is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.labelling import wait_until
from tests.support.paths import ROOT

# A python3 whose environments hold tools that note how they are called. One of them may fail, and
# the tests may take long.
PYTHON = """#!/usr/bin/env bash
[[ $2 == venv ]] || exit 0
mkdir -p .venv/bin
for tool in pip python ruff mypy; do
  cat >.venv/bin/$tool <<'END'
#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$LOG"
if [[ $2 == pytest ]]; then sleep "${TESTS_TAKE_S:-0}"; fi
[[ $(basename "$0") != "${FAILING:-}" ]]
END
  chmod +x .venv/bin/$tool
done
"""
CALLS = {
    "pip install -e .[dev]",
    "ruff format --check .",
    "ruff check .",
    "mypy ",
    "python -m pytest -n auto",
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this one's script and README, and the stand-ins on the path."""
    folder = tmp_path / "repository"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    shutil.copy(ROOT / "README.md", folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("failing", ["", "pip", "ruff", "mypy", "python"])
def test_ci_runs_the_readmes_commands_and_fails_if_one_fails(
    failing: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", failing)
    done = subprocess.run([repository / ".ci" / "run"], capture_output=True, text=True)
    assert (done.returncode == 0) == (failing == ""), done.stdout
    assert set(calls(tmp_path)) <= CALLS
    if failing not in ("pip", "ruff"):  # nothing follows these
        assert set(calls(tmp_path)) == CALLS
    assert list((tmp_path / "tmp").iterdir()) == []


def test_ci_stops_its_tests_when_it_is_stopped(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTS_TAKE_S", "300")
    process = subprocess.Popen(
        [repository / ".ci" / "run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(lambda: "python -m pytest -n auto" in calls(tmp_path), "the tests to start")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # ends when nothing holds its output open any more
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "tmp").iterdir()) == []
