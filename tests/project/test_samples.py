"""The sample sounds: one for each class, and equal to those that their script makes."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from tests.support.paths import ROOT

FOLDER = ROOT / "samples"
AUDIO = sorted(p for p in FOLDER.iterdir() if p.suffix in {".wav", ".flac", ".ogg", ".mp3"})
MAX_TOTAL_BYTES = 2_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Import ``samples/make_samples.py`` from its file: the folder is not a package."""
    spec = importlib.util.spec_from_file_location("make_samples", FOLDER / "make_samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_samples", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def remade(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("samples")
    script.make_samples(folder)
    return folder


def test_there_is_one_for_each_class(shared_data: Path) -> None:
    with (shared_data / "esc10" / "esc10.csv").open(newline="") as lines:
        classes = {row["label"] for row in csv.DictReader(lines)}
    assert sorted(path.stem for path in AUDIO) == sorted(classes)


def test_they_are_small_and_have_the_variety_of_real_datasets(remade: Path) -> None:
    assert [path.name for path in AUDIO] == sorted(path.name for path in remade.iterdir())
    assert sum(path.stat().st_size for path in AUDIO) < MAX_TOTAL_BYTES
    infos = [soundfile.info(path) for path in AUDIO]
    assert {path.suffix for path in AUDIO} == {".wav", ".flac", ".ogg", ".mp3"}
    assert {"VORBIS", "OPUS", "MPEG_LAYER_III", "PCM_16", "PCM_24"} <= {
        info.subtype for info in infos
    }
    assert len({info.samplerate for info in infos}) >= 4
    assert {info.channels for info in infos} == {1, 2}


@pytest.mark.parametrize("path", AUDIO, ids=lambda path: path.name)
def test_a_sample_is_five_seconds_of_sound(path: Path) -> None:
    samples, rate_hz = soundfile.read(path, always_2d=True)
    assert len(samples) / rate_hz == pytest.approx(5.0, abs=0.1)
    assert 0.1 < np.abs(samples).max() < 0.999  # neither faint nor clipped
    assert np.sqrt(np.mean(samples**2)) > 0.005


@pytest.mark.parametrize("path", AUDIO, ids=lambda path: path.name)
def test_a_sample_is_what_the_script_makes(path: Path, remade: Path) -> None:
    kept, rate_hz = soundfile.read(path, always_2d=True)
    made, made_rate_hz = soundfile.read(remade / path.name, always_2d=True)
    assert (made_rate_hz, made.shape[1]) == (rate_hz, kept.shape[1])
    if path.suffix in {".wav", ".flac"}:
        # The last bit may round differently with another numpy.
        np.testing.assert_allclose(made, kept, rtol=0, atol=2 / 32768)
        return
    # Another version of an encoder loses other details and may pad differently.
    assert abs(len(made) - len(kept)) <= 0.1 * rate_hz
    length = min(len(made), len(kept))
    error = np.sqrt(np.mean((made[:length] - kept[:length]) ** 2))
    assert error <= 0.5 * np.sqrt(np.mean(kept**2))
