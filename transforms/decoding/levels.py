"""Level statistics of a clip, added up block by block as it is decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transforms.records import ClipFacts, FloatArray, Note

CLIPPED_AT = 0.999
SILENT_MEAN_SQUARE = 1e-6  # −60 dBFS
LEVEL_FRAME_S = 0.02
MAX_MIX_LOSS_DB = 15.0


class FinitePart(NamedTuple):
    """The samples before the first NaN or infinity, and their energy.

    Attributes:
        samples: Shape (num_samples, num_channels).
        energy: Sum of squares over the channels, shape (num_samples,).
        channel_energy: Sum of squares of each channel, shape (num_channels,).
        is_cut: Whether there is a NaN or infinity.
    """

    samples: FloatArray
    energy: npt.NDArray[np.float64]
    channel_energy: npt.NDArray[np.float64]
    is_cut: bool


class LevelMeter:
    """Level statistics over all measured channels, at the source's rate.

    A silent frame is 20 ms (``round(0.02 * rate)`` samples) whose RMS over these channels is below
    −60 dBFS. A partial frame at the end counts as a frame. ``notes`` has the changes of the
    source's rate or channels on the way.
    """

    def __init__(self) -> None:
        self.duration_s = 0.0
        self.notes: list[Note] = []
        self._first_format: tuple[int, int] | None = None
        self._format: tuple[int, int] = (0, 0)
        self._num_measured = 0  # channels
        self._run_start_s = 0.0
        self._run_samples = 0
        self._peak = 0.0
        self._energy = 0.0
        self._num_values = 0
        self._num_clipped = 0
        self._num_frames = 0
        self._num_silent = 0
        self._partial_energy = 0.0
        self._partial_samples = 0

    def add(self, rate: int, channels: int, part: FinitePart) -> None:
        """Add the measured channels of a stretch of the source.

        ``channels`` is how many the source has there: one of them may be measured alone.
        """
        samples = part.samples
        if (rate, channels) != self._format:
            self._change_format(rate, channels)
        self._num_measured = samples.shape[1]
        if not len(samples):
            return
        peak = max(float(samples.max()), -float(samples.min()))
        self._peak = max(self._peak, peak)
        if peak >= CLIPPED_AT:
            self._num_clipped += int(np.count_nonzero(np.abs(samples) >= CLIPPED_AT))
        self._energy += float(part.channel_energy.sum())
        self._num_values += samples.size
        self._count_frames(rate, part.energy)
        self._run_samples += len(samples)
        self.duration_s = self._run_start_s + self._run_samples / rate

    def _change_format(self, rate: int, channels: int) -> None:
        if self._first_format is None:
            self._first_format = (rate, channels)
        else:
            words = (
                f"at {self.duration_s:.1f} s the audio changes from "
                f"{_format_words(*self._format)} to {_format_words(rate, channels)}"
            )
            self.notes.append(Note("format_changes", words))
        self._close_partial_frame()
        self._format = (rate, channels)
        self._run_start_s, self._run_samples = self.duration_s, 0

    def _count_frames(self, rate: int, energy: npt.NDArray[np.float64]) -> None:
        frame_samples = max(round(LEVEL_FRAME_S * rate), 1)
        if self._partial_samples:
            head = energy[: frame_samples - self._partial_samples]
            self._partial_energy += float(head.sum())
            self._partial_samples += len(head)
            energy = energy[len(head) :]
            if self._partial_samples < frame_samples:
                return
            self._close_partial_frame()
        num_whole = len(energy) // frame_samples
        whole = energy[: num_whole * frame_samples].reshape(num_whole, frame_samples)
        silent_below = SILENT_MEAN_SQUARE * frame_samples * self._num_measured
        self._num_silent += int(np.count_nonzero(whole.sum(axis=1) < silent_below))
        self._num_frames += num_whole
        rest = energy[num_whole * frame_samples :]
        self._partial_energy, self._partial_samples = float(rest.sum()), len(rest)

    def _partial_frame(self) -> tuple[int, int]:
        """Return the frame that is not full yet, as (1 or 0 frames, 1 or 0 of them silent)."""
        if not self._partial_samples:
            return 0, 0
        silent_below = SILENT_MEAN_SQUARE * self._partial_samples * self._num_measured
        return 1, int(self._partial_energy < silent_below)

    def _close_partial_frame(self) -> None:
        frames, silent = self._partial_frame()
        self._num_frames += frames
        self._num_silent += silent
        self._partial_energy, self._partial_samples = 0.0, 0

    def facts(self, content_sha256: str, notes: Sequence[Note] = ()) -> ClipFacts:
        """Return the facts of what has been added so far, with a warning made of the notes."""
        frames, silent = self._partial_frame()
        rate, channels = self._first_format or (0, 0)
        return ClipFacts(
            duration_s=self.duration_s,
            sample_rate_hz=rate,
            channels=channels,
            peak_dbfs=_decibels(self._peak),
            rms_dbfs=_decibels(math.sqrt(self._energy / max(self._num_values, 1))),
            clipped_ratio=self._num_clipped / max(self._num_values, 1),
            silent_ratio=(self._num_silent + silent) / max(self._num_frames + frames, 1),
            content_sha256=content_sha256,
            warning="; ".join(note.words for note in notes) or None,
            warning_kinds=tuple(dict.fromkeys(note.kind for note in notes)),
        )


def _format_words(rate: int, channels: int) -> str:
    return f"{rate} Hz, {channels} channel{'' if channels == 1 else 's'}"


def _decibels(amplitude: float) -> float:
    return 20.0 * math.log10(amplitude) if amplitude > 0.0 else -math.inf


class ChannelEnergies:
    """The energy of each channel of a clip, and of their mean where that is added too."""

    def __init__(self) -> None:
        self._of_channels: npt.NDArray[np.float64] = np.zeros(1)
        self._of_mix = 0.0

    @property
    def num_channels(self) -> int:
        """The largest number of channels so far, at least 1."""
        return len(self._of_channels)

    @property
    def loudest(self) -> int:
        """The channel with most energy, from 1; the first of equals."""
        return int(np.argmax(self._of_channels)) + 1

    def add(self, part: FinitePart, mix: FloatArray | None = None) -> None:
        """Add a stretch; ``mix``, of shape (num_samples,), is the mean of its channels."""
        energy = part.channel_energy
        missing = len(energy) - self.num_channels
        if missing > 0:
            self._of_channels = np.pad(self._of_channels, (0, missing))
        self._of_channels[: len(energy)] += energy
        if len(energy) == 1:
            self._of_mix += float(energy[0])
        elif mix is not None:
            # In float32, as it is many times faster, and decibels need no more digits.
            self._of_mix += float(np.dot(mix, mix))

    def mix_warning(self) -> str | None:
        """Return how much mixing down loses against the loudest channel, if that is too much."""
        loudest = float(self._of_channels[self.loudest - 1])
        if loudest <= self._of_mix * 10.0 ** (MAX_MIX_LOSS_DB / 10.0):
            return None
        loss = "everything"
        if self._of_mix > 0.0:
            loss = f"{10.0 * math.log10(loudest / self._of_mix):.1f} dB"
        return (
            f"mixing down to mono loses {loss} against channel {self.loudest}, the loudest of "
            f"{self.num_channels}; to label that one alone: --set decode.channel=loudest"
        )


def finite_part(samples: FloatArray) -> FinitePart:
    """Return the part of the samples before the first NaN or infinity, with its energy."""
    part = _measure(samples)
    if math.isfinite(float(part.channel_energy.sum())):
        return part
    first_bad = int(np.argmin(np.isfinite(part.energy)))
    return _measure(samples[:first_bad])._replace(is_cut=True)


def _measure(samples: FloatArray) -> FinitePart:
    """Compute the energies in float64, which float32 values cannot overflow."""
    channel_energy = np.empty(samples.shape[1])
    with np.errstate(all="ignore"):
        energy = np.square(samples[:, 0], dtype=np.float64)
        channel_energy[0] = energy.sum()
        for channel in range(1, samples.shape[1]):
            squares = np.square(samples[:, channel], dtype=np.float64)
            channel_energy[channel] = squares.sum()
            energy += squares
    return FinitePart(samples, energy, channel_energy, False)
