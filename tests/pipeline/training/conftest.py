"""Sounds with labels, and ``earmark train`` on them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main as cli
from tests.pipeline.training.small_trainings import (
    KINDS,
    NUM_PER_KIND,
    RATE_HZ,
    SMALL,
    Said,
    Train,
    sets_of,
    sound,
    with_changes,
)
from tests.support import audio_factory


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds with labels; every fourth clip is of fold 1."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "fold"])
        for kind in KINDS:
            for index in range(NUM_PER_KIND):
                samples = sound(kind, rng)
                name = f"{kind}{index}.wav"
                audio_factory.write(folder / name, samples.astype(np.float32), RATE_HZ)
                writer.writerow([name, kind, index % 4])
    return folder / "clips.csv"


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], manifest: Path) -> Train:
    """Runs ``earmark train`` on the manifest with the small model; settings may be changed."""

    def run(output: Path, *options: object, **changes: object) -> Said:
        """Options win over the usual ones; changes are keys with __ for the dot."""
        settings = with_changes(SMALL, changes)
        if "--model" in options:  # the shape is the checkpoint's
            given = {key.replace("__", ".") for key in changes}
            fixed = ("architecture", "model")
            settings = {
                key: value
                for key, value in settings.items()
                if key in given or not key.startswith(fixed)
            }
        arguments = ["train", "-o", str(output), *sets_of(settings), *map(str, options)]
        if "--train" not in options:
            arguments += ["--train", str(manifest)]
        if not {"--validation", "--hold-out"} & set(options):
            arguments += ["--hold-out", "fold=1"]
        code = cli.main(arguments)
        return Said(code, *capfd.readouterr())

    return run
