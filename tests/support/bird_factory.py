"""A small dataset for the examples in the docs: calls of three birds, and a manifest."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.support import audio_factory

Array = npt.NDArray[np.float64]

RATE_HZ = 16_000
DURATION_S = 2.0
CLIPS_PER_BIRD = 8


def write_birds(folder: Path, num_folds: int = 4) -> Path:
    """Write 24 clips of 2 s and ``birds.csv`` (uri, label, fold); return the manifest's path."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    manifest = folder / "birds.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "fold"])
        for name, call in BIRDS.items():
            for number in range(CLIPS_PER_BIRD):
                path = folder / f"{name}{number + 1}.wav"
                samples = 0.3 * call(rng) + 0.01 * rng.standard_normal(times().size)
                audio_factory.write(path, samples.astype(np.float32), RATE_HZ)
                writer.writerow([path.name, name, number % num_folds + 1])
    return manifest


def times() -> Array:
    """Return the time of each sample in seconds."""
    return np.arange(round(DURATION_S * RATE_HZ)) / RATE_HZ


def cuckoo(rng: np.random.Generator) -> Array:
    """Return two notes, the second a third lower, twice."""
    high_hz, samples = rng.uniform(620, 700), np.zeros(times().size)
    for start_s, ratio in ((0.2, 1.0), (0.6, 0.8), (1.2, 1.0), (1.6, 0.8)):
        is_inside = (times() >= start_s) & (times() < start_s + 0.3)
        note_s = times()[is_inside] - start_s
        envelope = np.sin(np.pi * note_s / 0.3)
        samples[is_inside] = envelope * np.sin(2 * np.pi * ratio * high_hz * note_s)
    return samples


def wren(rng: np.random.Generator) -> Array:
    """Return a high trill."""
    trill_hz = rng.uniform(12, 18)
    frequency_hz = 5000 + 1200 * np.sin(2 * np.pi * trill_hz * times())
    samples: Array = np.sin(2 * np.pi * np.cumsum(frequency_hz) / RATE_HZ)
    return samples * np.sin(np.pi * trill_hz * times()) ** 2


def woodpecker(rng: np.random.Generator) -> Array:
    """Return two bursts of drumming."""
    since_blow = (times() * rng.uniform(16, 22)) % 1
    is_drumming = times() % 1.0 < 0.7
    return rng.standard_normal(times().size) * np.exp(-12 * since_blow) * is_drumming


BIRDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "cuckoo": cuckoo,
    "woodpecker": woodpecker,
    "wren": wren,
}
