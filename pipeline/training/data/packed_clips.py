"""Clips as a process that makes batches needs them: where their samples lie, and their labels.

    cache ─clip_cache─▶ SampleFile ─dataset─▶ PackedClips ─▶ batches, in processes of their own

Everything that such a process unpickles of clips is here, and this module imports next to nothing:
there may be many of these processes, and each has to start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from transforms.records import FloatArray, Item

CacheDtype: TypeAlias = Literal["float32", "int16"]

# How samples are stored, little-endian on every machine.
STORED_DTYPES: dict[CacheDtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "int16": np.dtype("<i2"),
}
INT16_SCALE = 32_768.0  # steps of int16 samples from 0 to 1


class Located(Protocol):
    """A clip that knows where it lies in a flat file of samples."""

    @property
    def item(self) -> Item:
        """What it is."""

    @property
    def offset(self) -> int:
        """Its first sample in the file."""

    @property
    def num_samples(self) -> int:
        """How many samples it has."""


class SampleFile:
    """The flat file of a cache, mapped when it is first read; what is pickled is its name alone.

    Args:
        path: The file.
        dtype: What its samples are stored as.
    """

    def __init__(self, path: Path, dtype: CacheDtype) -> None:
        self.path = path
        self.dtype: CacheDtype = dtype
        self._samples: npt.NDArray[Any] | None = None

    def __reduce__(self) -> tuple[type[SampleFile], tuple[Path, CacheDtype]]:
        return SampleFile, (self.path, self.dtype)

    def __repr__(self) -> str:
        return f"SampleFile({str(self.path)!r}, {self.dtype!r})"

    def read_clip(self, clip: Located, start: int, stop: int | None) -> FloatArray:
        """A copy of the samples [start, stop) of a clip, float32, nominally in [-1, 1].

        Args:
            clip: Where it lies.
            start: First sample, counted from the start of the clip.
            stop: One past the last; None for the clip's end.

        Raises:
            ValueError: The clip has not so many.
        """
        stop = clip.num_samples if stop is None else stop
        if not 0 <= start <= stop <= clip.num_samples:
            raise ValueError(
                f"{clip.item.clip_id}: samples {start} to {stop} were asked for; it has "
                f"{clip.num_samples}"
            )
        return self.read(clip.offset + start, clip.offset + stop)

    def read(self, start: int, stop: int) -> FloatArray:
        """A copy of the samples [start, stop) of the file, whatever clip they are of."""
        if self._samples is None:
            self._samples = np.memmap(self.path, STORED_DTYPES[self.dtype], mode="r")
        samples = np.array(self._samples[start:stop], np.float32)
        if self.dtype == "int16":
            samples /= np.float32(INT16_SCALE)
        return samples


@dataclass(frozen=True)
class PackedClips:
    """What making batches needs of clips, in arrays.

    Of millions of clips it takes tens of bytes each where a ``ClipSet`` takes a kilobyte, and
    every process that makes batches has its own.

    Attributes:
        file: Where the samples are.
        offsets: Each clip's first sample in the file, shape (clips,), int64.
        num_samples: How many it has, shape (clips,), int64.
        labels: Indices of the labels of all clips, one clip's behind the other's, int32.
        bounds: Where a clip's labels begin, shape (clips + 1,), int64; the last is where they end.
        num_labels: How many labels there are to have.
    """

    file: SampleFile
    offsets: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    num_labels: int

    def __len__(self) -> int:
        return self.offsets.size

    def samples(self, index: int, start: int, stop: int) -> FloatArray:
        """Samples [start, stop) of a clip, float32; it must have so many."""
        offset = int(self.offsets[index])
        return self.file.read(offset + start, offset + stop)

    def targets(self, indices: npt.NDArray[np.int64]) -> FloatArray:
        """1 where a clip has a label, else 0; shape (indices, labels), float32."""
        targets = np.zeros((indices.size, self.num_labels), np.float32)
        for row, index in zip(targets, indices, strict=True):
            row[self.labels[self.bounds[index] : self.bounds[index + 1]]] = 1.0
        return targets
