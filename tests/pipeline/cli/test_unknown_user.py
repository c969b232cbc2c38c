"""A user id without a name, a home or a folder for caches, as containers have them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.result.verify import run_verify
from tests.pipeline.training.small_trainings import SMALL, sets_of
from tests.support.audio_factory import write_noise
from tests.support.other_user import open_folder, run_as_unknown

# As Docker and OpenShift set it, and not at all.
HOMES = [{"HOME": "/"}, {}]


@pytest.fixture
def place(tiny_model: Path) -> Iterator[Path]:
    """A folder that all may write, with a model and six clips of two kinds."""
    with open_folder() as folder:
        shutil.copytree(tiny_model, folder / "model")
        rows = ["uri,label,fold"]
        for number in range(6):
            write_noise(folder / "clips" / f"{number}.wav", 0.5, seed=number)
            kind = "rain" if number % 2 else "wind"
            rows.append(f"{number}.wav,{kind},{number // 2}")
        (folder / "clips" / "list.csv").write_text("\n".join(rows))
        yield folder


def earmark(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_as_unknown(["-m", "pipeline", *arguments], place, **environment)


def label(place: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    few = ["--device", "cpu", "--engine", "torch", "--set", "decode.processes=1"]
    return earmark(place, "label", "clips", "-o", "out", "-m", "model", *few, *more, **environment)


def left(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"model", "clips", "out", "trained"}


@pytest.mark.slow  # torch's compiler takes a while
@pytest.mark.parametrize("home", HOMES, ids=["/", "none"])
def test_a_user_without_a_name_labels_with_a_compiled_model(
    place: Path, home: dict[str, str]
) -> None:
    done = label(place, "--set", "inference.compile=true", **home)
    assert done.returncode == 0, done.stderr
    assert ("cannot compile" in done.stderr) == (shutil.which("g++") is None), done.stderr
    assert run_verify(str(place / "out"), quiet=True) == 0
    assert "~" not in left(place)


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(place: Path) -> None:
    done = label(place, "--set", "inference.compile=true", TORCHINDUCTOR_CACHE_DIR="/proc/none")
    assert done.returncode == 0, done.stderr
    assert "torch cannot compile the model here" in done.stderr
    assert "so it runs uncompiled" in done.stderr
    assert run_verify(str(place / "out"), quiet=True) == 0
    assert left(place) == set()


@pytest.mark.parametrize("home", HOMES, ids=["/", "none"])
def test_a_user_without_a_name_trains(place: Path, home: dict[str, str]) -> None:
    settings = sets_of(SMALL | {"training.epochs": 1, "training.batch_size": 2})
    data = ["--train", "clips/list.csv", "--hold-out", "fold=0", "--device", "cpu"]
    done = earmark(place, "train", *data, "-o", "trained", *settings, **home)
    assert done.returncode == 0, done.stderr
    assert (place / "trained" / "model.safetensors").is_file()
    assert left(place) == set()
