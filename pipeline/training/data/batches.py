"""Which clips an epoch consists of, in which order, and the batches made of them.

A batch is a pure function of the seed, the stage, the epoch and the step. So an epoch can be made
again after an interruption, and it does not matter which process makes which batch. Such a process
imports this module and no more than what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler

from pipeline.training.data.augmentation import Augment, mix
from pipeline.training.data.packed_clips import PackedClips

Purpose = Literal["order", "clips", "features", "tokens", "weights"]
_PURPOSES: dict[Purpose, int] = {"order": 0, "clips": 1, "features": 2, "tokens": 3, "weights": 4}

# Of the original's gen_weight_file.py: a clip's weight is the sum over its labels of this.
_BALANCE, _BALANCE_OFFSET = 1000.0, 0.01


class Batch(NamedTuple):
    """What the model is shown at once.

    Attributes:
        waveforms: Shape (B, samples), float32; 0 behind a clip's end.
        lengths: Samples of each clip, shape (B,), int64.
        targets: Share of each label, shape (B, labels), float32.
    """

    waveforms: Tensor
    lengths: Tensor
    targets: Tensor


@dataclass(frozen=True)
class BatchSettings:
    """How batches are made.

    Attributes:
        batch_size: Clips in a batch; the last of an epoch may have fewer.
        window_samples: Longest stretch of a clip that the model takes.
        sampler: ``shuffle``: each clip once. ``balanced``: as many draws as clips, with
            replacement, rare labels as often as common ones.
        seed: Everything that is drawn follows from it.
        stage: Number of the stage, so that two stages do not see the same batches.
    """

    batch_size: int
    window_samples: int
    sampler: Literal["shuffle", "balanced"]
    seed: int
    stage: int

    def steps(self, num_clips: int) -> int:
        """Batches of an epoch."""
        return -(-num_clips // self.batch_size)

    def rng(self, purpose: Purpose, epoch: int, step: int = 0) -> np.random.Generator:
        """The source of what is drawn for one purpose in one step."""
        return np.random.default_rng((self.seed, self.stage, _PURPOSES[purpose], epoch, step))


def order_of_epoch(
    clips: PackedClips, settings: BatchSettings, epoch: int
) -> npt.NDArray[np.int64]:
    """Indices of an epoch's clips, in order; ``epoch`` counts from 0."""
    rng = settings.rng("order", epoch)
    if settings.sampler == "shuffle":
        return rng.permutation(len(clips))
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    weights = balancing_weights(clips)
    drawn = WeightedRandomSampler(weights.tolist(), len(clips), generator=generator)
    return np.fromiter(drawn, np.int64, len(clips))


def balancing_weights(clips: PackedClips) -> npt.NDArray[np.float64]:
    """How often to draw each clip: Σ over its labels of 1000 / (clips of the label + 0.01).

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
    """The batch of some clips: cut, changed and mixed as the augmentation says.

    Args:
        clips: All of them, as mixing draws partners from all.
        indices: Which make the batch.
        augment: What to do to waveforms.
        window_samples: Longest stretch of a clip.
        rng: Draws everything.
    """
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
        stretch = _draw_stretch(clips, int(index), window_samples, rng)
        waveforms[row, : stretch.size] = stretch
        lengths[row] = stretch.size
    changed, lengths_now = augment.waveforms(
        torch.from_numpy(waveforms), torch.from_numpy(lengths), rng
    )
    return Batch(changed, lengths_now, torch.from_numpy(clips.targets(indices)))


def _draw_stretch(
    clips: PackedClips, index: int, window_samples: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """All of a clip, or of a longer one a window from anywhere in it."""
    num_samples = int(clips.num_samples[index])
    spare = num_samples - window_samples
    start = int(rng.integers(spare + 1)) if spare > 0 else 0
    return clips.samples(index, start, min(start + window_samples, num_samples))


class BatchLoader:
    """Gives the batches of an epoch, made ahead in processes of their own where there are any.

    Args:
        clips: What to train on.
        augment: What to do to waveforms.
        settings: How batches are made.
        num_processes: Processes that make batches; with 0 they are made when they are taken.
    """

    def __init__(
        self, clips: PackedClips, augment: Augment, settings: BatchSettings, num_processes: int
    ) -> None:
        self.num_steps = settings.steps(len(clips))
        self._sampler = _StepsOfEpoch(clips, settings)
        self._loader: DataLoader[Batch] = DataLoader(
            _Batches(clips, augment, settings),
            batch_size=None,
            sampler=self._sampler,
            num_workers=num_processes,
            # Never a fork: the process that trains may hold a GPU.
            multiprocessing_context="forkserver" if num_processes else None,
            persistent_workers=bool(num_processes),
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0."""
        self._sampler.epoch = epoch
        return iter(self._loader)


_Step = tuple[int, int, npt.NDArray[np.int64]]


class _StepsOfEpoch(Sampler[_Step]):
    """Epoch, step, and which clips make its batch."""

    def __init__(self, clips: PackedClips, settings: BatchSettings) -> None:
        self.epoch = 0
        self._clips, self._settings = clips, settings

    def __iter__(self) -> Iterator[_Step]:
        size = self._settings.batch_size
        order = order_of_epoch(self._clips, self._settings, self.epoch)
        for step in range(len(self)):
            yield self.epoch, step, order[step * size : (step + 1) * size]

    def __len__(self) -> int:
        return self._settings.steps(len(self._clips))


class _Batches(Dataset[Batch]):
    """Batches by epoch, step and clips."""

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


def window_batches(
    stretches: Sequence[npt.NDArray[np.float32]], batch_size: int, window_samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Waveforms (B, window_samples) and lengths (B,) of some windows, in order and unchanged."""
    for start in range(0, len(stretches), batch_size):
        rows = stretches[start : start + batch_size]
        waveforms = np.zeros((len(rows), window_samples), np.float32)
        for row, stretch in zip(waveforms, rows, strict=True):
            row[: stretch.size] = stretch
        yield torch.from_numpy(waveforms), torch.tensor([stretch.size for stretch in rows])
