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


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("RLIMIT_NPROC", most) for most in (1, 2, 3, 4, 6, 8, 12, 16, 24)),
        *(("RLIMIT_NOFILE", most) for most in (8, 12, 16, 20, 24, 32)),
        *(("RLIMIT_AS", most << 20) for most in (200, 500, 1000, 1500, 2000, 3000, 4000)),
    ],
)
def test_too_small_a_limit_is_an_error_and_an_end(place: Path, name: str, most: int) -> None:
    number = getattr(resource, name)
    done = run_as_unknown(
        LABEL.split(),
        place,
        limit=lambda: resource.setrlimit(number, (most, most)),
        timeout_s=TIMEOUT_S,  # a wait for ever is a failure
        HOME="/",
    )
    if done.returncode != 0:
        assert done.stderr.strip(), done.returncode
