"""Limits of the system that are too small: an error and an end, never a wait for ever."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.audio_factory import write_noise
from tests.support.other_user import open_folder, run_as_unknown

TIMEOUT_S = 120.0
LABEL = (
    "-m pipeline label clips -o out -m model --device cpu --engine torch --overwrite "
    "--set decode.processes=2"
)


@pytest.fixture(scope="module")
def place(tiny_model: Path) -> Iterator[Path]:
    """A folder that all may write, with a model and a few clips."""
    with open_folder() as folder:
        shutil.copytree(tiny_model, folder / "model")
        for number in range(8):
            write_noise(folder / "clips" / f"{number}.wav", seed=number)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most", "words"),
    [
        ("RLIMIT_NPROC", 2, "can't start new thread"),
        ("RLIMIT_NPROC", 5, "can't start new thread"),
        ("RLIMIT_NPROC", 9, "can't start new thread"),
        ("RLIMIT_NPROC", 12, ""),  # the system decides what comes first
        ("RLIMIT_NOFILE", 16, "Too many open files"),
        ("RLIMIT_AS", 2_500_000_000, "failed to map segment"),
        ("RLIMIT_AS", 6_000_000_000, ""),
    ],
)
def test_too_small_a_limit_is_an_error_and_an_end(
    place: Path, name: str, most: int, words: str
) -> None:
    number = getattr(resource, name)
    done = run_as_unknown(
        LABEL.split(),
        place,
        limit=lambda: resource.setrlimit(number, (most, most)),
        timeout_s=TIMEOUT_S,  # a wait for ever is a failure
        HOME="/",
    )
    if words:
        assert done.returncode == 1, done.stderr
        assert words in done.stderr
        assert "raise the system's limit (ulimit -u, -n, -v" in done.stderr
    assert done.returncode == 0 or "earmark: " in done.stderr
