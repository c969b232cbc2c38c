"""The clips of an epoch, their order, and the batches made of them.

A batch is a pure function of the seed, the stage, the epoch and the step. So an epoch can be
repeated after an interruption, and any process can make any batch. Such a process imports this
module and little else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from pipeline.training.data.augmentation import Augment, mix
from pipeline.training.data.packed_clips import PackedClips

Purpose = Literal["order", "clips", "features", "tokens", "weights"]
_PURPOSES: dict[Purpose, int] = {"order": 0, "clips": 1, "features": 2, "tokens": 3, "weights": 4}

# A clip's weight is the sum over its labels of this; from the original's gen_weight_file.py.
_BALANCE, _BALANCE_OFFSET = 1000.0, 0.01


class Batch(NamedTuple):
    """One batch of clips, with the share of each label, shape (B, labels), as targets.

    Waveforms have shape (B, samples) and are 0 after a clip's end; lengths (B,) are int64.
    """

    waveforms: Tensor
    lengths: Tensor
    targets: Tensor


@dataclass(frozen=True)
class BatchSettings:
    """Settings of batches.

    Attributes:
        batch_size: Clips in a batch; the last of an epoch may have fewer.
        window_samples: Longest excerpt of a clip that the model takes.
        sampler: ``shuffle`` takes each clip once. ``balanced`` draws as many clips as there are,
            with replacement, and rare labels as often as common ones.
        stage: Number of the stage, so that two stages see different batches.
    """

    batch_size: int
    window_samples: int
    sampler: Literal["shuffle", "balanced"]
    seed: int
    stage: int

    def rng(self, purpose: Purpose, epoch: int, step: int = 0) -> np.random.Generator:
        """Return the generator for one purpose in one step."""
        return np.random.default_rng((self.seed, self.stage, _PURPOSES[purpose], epoch, step))


def order_of_epoch(
    clips: PackedClips, settings: BatchSettings, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the indices of an epoch's clips in order; ``epoch`` counts from 0."""
    rng = settings.rng("order", epoch)
    if settings.sampler == "shuffle":
        return rng.permutation(len(clips))
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    weights = balancing_weights(clips)
    drawn = WeightedRandomSampler(weights.tolist(), len(clips), generator=generator)
    return np.fromiter(drawn, np.int64, len(clips))


def balancing_weights(clips: PackedClips) -> npt.NDArray[np.float64]:
    """Return how often to draw each clip: Σ over its labels of 1000 / (clips of the label + 0.01).

    Source: YuanGongND/ast egs/audioset/gen_weight_file.py.
    """
    of_label = _BALANCE / (np.bincount(clips.labels, minlength=clips.num_labels) + _BALANCE_OFFSET)
    owners = np.repeat(np.arange(len(clips)), np.diff(clips.bounds))
    sums = np.bincount(owners, of_label[clips.labels], minlength=len(clips))
    return sums.astype(np.float64)


def make_batch(
    clips: PackedClips, indices: npt.NDArray[np.int64], augment: Augment, window_samples: int,
    rng: np.random.Generator,
) -> Batch:  # fmt: skip
    """Make a batch of some clips, cut and changed; mixing draws partners from all ``clips``."""
    batch = _augmented(clips, indices, augment, window_samples, rng)
    section = augment.section
    if not section.mixup_ratio:
        return batch
    partners = rng.integers(len(clips), size=indices.size)
    other = _augmented(clips, partners, augment, window_samples, rng)
    return Batch(*mix(*batch, *other, section.mixup_ratio, section.mixup_beta, rng))


def _augmented(
    clips: PackedClips, indices: npt.NDArray[np.int64], augment: Augment, window_samples: int,
    rng: np.random.Generator,
) -> Batch:  # fmt: skip
    waveforms = np.zeros((indices.size, window_samples), np.float32)
    lengths = np.empty(indices.size, np.int64)
    for row, index in enumerate(indices):
        excerpt = _draw_excerpt(clips, int(index), window_samples, rng)
        waveforms[row, : excerpt.size] = excerpt
        lengths[row] = excerpt.size
    changed, lengths_now = augment.waveforms(
        torch.from_numpy(waveforms), torch.from_numpy(lengths), rng
    )
    return Batch(changed, lengths_now, torch.from_numpy(clips.targets(indices)))


def _draw_excerpt(
    clips: PackedClips, index: int, window_samples: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Read a clip; of a clip longer than the window, a window from a random place."""
    num_samples = int(clips.num_samples[index])
    spare = num_samples - window_samples
    start = int(rng.integers(spare + 1)) if spare > 0 else 0
    return clips.samples(index, start, min(start + window_samples, num_samples))


class BatchLoader:
    """Gives the batches of an epoch, prefetched by processes; with 0, made on demand."""

    def __init__(
        self, clips: PackedClips, augment: Augment, settings: BatchSettings, num_processes: int
    ) -> None:
        self._clips, self._settings = clips, settings
        self.num_steps = -(-len(clips) // settings.batch_size)  # rounded up
        self._steps: list[_Step] = []  # of the current epoch
        self._loader: DataLoader[Batch] = DataLoader(
            _Batches(clips, augment, settings),
            batch_size=None,
            sampler=self._steps,
            num_workers=num_processes,
            # Never fork: the training process may hold a GPU.
            multiprocessing_context="forkserver" if num_processes else None,
            persistent_workers=bool(num_processes),
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Return the batches of an epoch, counted from 0."""
        size = self._settings.batch_size
        order = order_of_epoch(self._clips, self._settings, epoch)
        self._steps[:] = [
            (epoch, step, order[step * size : (step + 1) * size]) for step in range(self.num_steps)
        ]
        return iter(self._loader)


_Step = tuple[int, int, npt.NDArray[np.int64]]


class _Batches(Dataset[Batch]):
    def __init__(self, clips: PackedClips, augment: Augment, settings: BatchSettings) -> None:
        self._clips, self._augment, self._settings = clips, augment, settings

    def __getitem__(self, key: _Step) -> Batch:
        epoch, step, indices = key
        return make_batch(
            self._clips,
            indices,
            self._augment,
            self._settings.window_samples,
            self._settings.rng("clips", epoch, step),
        )
