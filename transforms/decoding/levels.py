"""Level statistics of a clip, added up block by block as it is decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transforms.records import ClipFacts, FloatArray, Note

CLIPPED_AT = 0.999
SILENT_MEAN_SQUARE = 1e-6  # −60 dBFS
LEVEL_FRAME_S = 0.02


class LevelMeter:
    """Level statistics over all channels, at the source's rate.

    A silent frame is 20 ms (``round(0.02 * rate)`` samples) whose RMS over all channels is below
    −60 dBFS. A partial frame at the end counts as a frame. ``notes`` has the changes of rate or
    channels on the way.
    """

    def __init__(self) -> None:
        self.duration_s = 0.0
        self.notes: list[Note] = []
        self._first_format: tuple[int, int] | None = None
        self._format: tuple[int, int] = (0, 0)
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

    def add(self, rate: int, samples: FloatArray, energy: npt.NDArray[np.float64]) -> None:
        """Add finite samples of shape (num_samples, num_channels).

        ``energy``, of shape (num_samples,), is the sum of squares over the channels.
        """
        if (rate, samples.shape[1]) != self._format:
            self._change_format(rate, samples.shape[1])
        if not len(samples):
            return
        peak = max(float(samples.max()), -float(samples.min()))
        self._peak = max(self._peak, peak)
        if peak >= CLIPPED_AT:
            self._num_clipped += int(np.count_nonzero(np.abs(samples) >= CLIPPED_AT))
        self._energy += float(energy.sum())
        self._num_values += samples.size
        self._count_frames(rate, samples.shape[1], energy)
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

    def _count_frames(self, rate: int, channels: int, energy: npt.NDArray[np.float64]) -> None:
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
        silent_below = SILENT_MEAN_SQUARE * frame_samples * channels
        self._num_silent += int(np.count_nonzero(whole.sum(axis=1) < silent_below))
        self._num_frames += num_whole
        rest = energy[num_whole * frame_samples :]
        self._partial_energy, self._partial_samples = float(rest.sum()), len(rest)

    def _partial_frame(self) -> tuple[int, int]:
        """Return the frame that is not full yet, as (1 or 0 frames, 1 or 0 of them silent)."""
        if not self._partial_samples:
            return 0, 0
        silent_below = SILENT_MEAN_SQUARE * self._partial_samples * self._format[1]
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


def finite_part(samples: FloatArray) -> tuple[FloatArray, npt.NDArray[np.float64], bool]:
    """Return the samples before the first NaN or infinity, their energy, and whether there is one.

    The energy has shape (num_samples,): the sum of squares over the channels, in float64, which
    float32 values cannot overflow.
    """
    with np.errstate(all="ignore"):
        energy = np.square(samples[:, 0], dtype=np.float64)
        for channel in range(1, samples.shape[1]):
            energy += np.square(samples[:, channel], dtype=np.float64)
    if math.isfinite(float(energy.sum())):
        return samples, energy, False
    first_bad = int(np.argmin(np.isfinite(energy)))
    return samples[:first_bad], energy[:first_bad], True
