"""Commands run by a user id that nobody has, as in a container with ``--user`` or on OpenShift."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.paths import ROOT

UNKNOWN_ID = 51_234


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may write; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="earmark-test-"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_as_unknown(
    arguments: list[str],
    folder: Path,
    *,
    limit: Callable[[], object] = lambda: None,
    timeout_s: float = 300.0,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder under an unknown user id, with a bare environment.

    ``limit`` is called in the child before it starts. Skip where that id cannot run this Python.
    """
    python = _python_for_others()
    paths = [str(ROOT), sysconfig.get_path("purelib")]
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
    return subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**base, **environment},
        user=UNKNOWN_ID,
        group=UNKNOWN_ID,
        extra_groups=[],
        preexec_fn=limit,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _python_for_others() -> str:
    if os.geteuid() != 0:
        pytest.skip("only root may change to another user id")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin")):
        if python is not None and _can_run(python):
            return python
    pytest.skip(f"another user can run no {version}, or cannot read the checkout")


def _can_run(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", f"import os; os.listdir({str(ROOT)!r})"],
            cwd="/",
            user=UNKNOWN_ID,
            group=UNKNOWN_ID,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0
