"""Trainings of a few thousand weights that learn to tell tones from noise."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

RATE_HZ = 16_000
KINDS = ("tone", "clicks", "noise")
NUM_PER_KIND = 8

# Small enough for a second per training, and able to learn these sounds by heart.
SMALL = {
    "architecture.hidden_size": 32,
    "architecture.num_hidden_layers": 2,
    "architecture.num_attention_heads": 2,
    "model.max_length": 64,
    "model.num_mel_bins": 64,
    "training.epochs": 6,
    "training.batch_size": 6,
    "training.precision": "fp32",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.003,
    "schedule.kind": "cosine",
}
AUGMENTED = {
    "augmentation.mixup_ratio": 0.5,
    "augmentation.masked_mels": 8,
    "augmentation.masked_frames": 8,
    "augmentation.circular_shift": "true",
    "augmentation.gain_db": 3.0,
    "augmentation.speed": 0.1,
    "augmentation.equalizer_db": 1.0,
    "augmentation.invert": "true",
    "augmentation.patch_drop": 0.25,
    "augmentation.feature_noise": 0.1,
    "augmentation.shift_frames": 2,
    "architecture.hidden_dropout_prob": 0.1,
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


Train = Callable[..., Said]


def sound(kind: str, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Half a second of one kind, each time another."""
    noise = rng.standard_normal(RATE_HZ // 2)
    if kind == "noise":
        return 0.3 * noise
    if kind == "tone":
        frequency_hz = 1000 * rng.uniform(0.9, 1.1)
        time_s = np.arange(noise.size) / RATE_HZ
        return 0.4 * np.sin(2 * np.pi * frequency_hz * time_s) + 0.02 * noise
    return 0.5 * noise * (np.arange(noise.size) % 2000 < 100) * rng.uniform(0.8, 1.2)


def with_changes(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **{key.replace("__", "."): value for key, value in changes.items()}}


def sets_of(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def as_keywords(settings: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in settings.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict[str, str]]:
    """The table without the times, which differ from run to run."""
    with (folder / "history.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
