"""Clips as the processes that make batches need them: places of samples, and labels.

There may be many such processes, and each has to start. So everything of clips that is pickled for
them is defined here, and this module imports next to nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

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


@dataclass(frozen=True, slots=True)
class CachedClip:
    """A decoded clip and where it lies in its cache.

    Attributes:
        offset: Its first sample, counted through all files of the cache.
        content_sha256: Hex digest of the encoded bytes (the whole file, for a segment).
        warning: The fault of a clip that was decoded all the same, or None.
        labels: Indices of its labels, each once. Empty until the labels to learn are known.
    """

    item: Item
    offset: int
    num_samples: int
    content_sha256: str
    warning: str | None = None
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampleFiles:
    """The samples of a cache, in a file per unit, addressed as if the files were one.

    ``starts`` are the numbers of samples before each file.
    """

    folder: Path
    names: tuple[str, ...]
    starts: tuple[int, ...]
    dtype: CacheDtype

    def read_clip(self, clip: CachedClip) -> FloatArray:
        """Read the samples of a clip, float32, nominally in [-1, 1]."""
        return self.read(clip.offset, clip.offset + clip.num_samples)

    def read(self, start: int, stop: int) -> FloatArray:
        """Read samples [start, stop) of one file; ``OSError`` if it is gone or became shorter."""
        number = bisect_right(self.starts, start) - 1
        path, stored = self.folder / self.names[number], STORED_DTYPES[self.dtype]
        offset = (start - self.starts[number]) * stored.itemsize
        raw = np.fromfile(path, stored, stop - start, offset=offset)
        if raw.size < stop - start:
            raise OSError(
                f"{path} has become shorter: {raw.size} of {stop - start} samples could be read. "
                "Run the same command again to decode its clips again."
            )
        samples = raw.astype(np.float32, copy=False)
        if self.dtype == "int16":
            samples /= np.float32(INT16_SCALE)
        return samples


@dataclass(frozen=True)
class PackedClips:
    """The facts of clips from which batches are made, in arrays.

    A clip takes tens of bytes here and a kilobyte in a ``ClipSet``. With millions of clips that
    matters, because every process that makes batches holds its own.

    Attributes:
        offsets: Each clip's first sample in the files, shape (clips,).
        num_samples: Its number of samples, shape (clips,).
        labels: Indices of the labels of all clips, one clip after the other.
        bounds: Where each clip's labels begin, shape (clips + 1,); the last is where they end.
    """

    files: SampleFiles
    offsets: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    num_labels: int

    def __len__(self) -> int:
        return self.offsets.size

    def samples(self, index: int, start: int, stop: int) -> FloatArray:
        """Read samples [start, stop) of a clip, which must have them, float32."""
        offset = int(self.offsets[index])
        return self.files.read(offset + start, offset + stop)

    def targets(self, indices: npt.NDArray[np.int64]) -> FloatArray:
        """Return 1 where a clip has a label, else 0; shape (indices, labels), float32."""
        targets = np.zeros((indices.size, self.num_labels), np.float32)
        for row, index in zip(targets, indices, strict=True):
            row[self.labels[self.bounds[index] : self.bounds[index + 1]]] = 1.0
        return targets
