"""Synthetic and recorded signals for tests of features: mono, float32, 16 kHz."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from transforms.records import FloatArray

RATE_HZ = 16_000


def noise(num_samples: int, seed: int = 0, level: float = 0.1) -> FloatArray:
    generator = np.random.default_rng(seed)
    return (level * generator.standard_normal(num_samples)).astype(np.float32)


def tone(num_samples: int, frequency_hz: float = 440.0) -> FloatArray:
    time_s = np.arange(num_samples) / RATE_HZ
    return (0.5 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def chirp(num_samples: int) -> FloatArray:
    time_s = np.arange(num_samples) / RATE_HZ
    rise = (7000.0 - 50.0) / time_s[-1]
    phase = 2 * np.pi * (50.0 * time_s + 0.5 * rise * time_s**2)
    return (0.5 * np.sin(phase)).astype(np.float32)


def voice(num_samples: int) -> FloatArray:
    """Harmonics of a gliding pitch, in syllables, over a little noise."""
    time_s = np.arange(num_samples) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(140.0 + 30.0 * np.sin(2 * np.pi * 0.7 * time_s)) / RATE_HZ
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3.0 * time_s), 0.0, 1.0)
    return (0.2 * harmonics * syllables + noise(num_samples, 1, 1e-3)).astype(np.float32)


SIGNALS: dict[str, Callable[[int], FloatArray]] = {
    "noise": noise,
    "tone": tone,
    "chirp": chirp,
    "voice": voice,
    "silence": lambda n: np.zeros(n, np.float32),
    "impulse": lambda n: np.eye(1, n, n // 2, dtype=np.float32)[0],
}


def read_recordings(paths: Iterable[Path]) -> list[FloatArray]:
    """Read audio files, mixed down and resampled."""
    clips = []
    for path in paths:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append(soxr.resample(samples.mean(axis=1), rate_hz, RATE_HZ).astype(np.float32))
    return clips
