"""The settings of features, which the checkpoint fixes; ``fbank`` computes the features.

A file of its own, because the processes that augment clips for training need the settings but none
of the libraries that compute features.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from transforms.errors import ConfigError

FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LOG_FLOOR = 2.0**-23  # float32's epsilon, as in torchaudio

# Threads of a process that make features; fewer on a machine with fewer cores.
MAX_FEATURE_THREADS = 8


@dataclass(frozen=True)
class FbankSettings:
    """The settings of a checkpoint's features. Defaults: AST on AudioSet.

    Features have the shape (num_frames, num_mel_bins). ``mean`` and ``std`` are those of the
    log-mel values of the training set; features are divided by twice ``std``. ``ConfigError`` if a
    value is out of range.
    """

    sample_rate_hz: int = 16_000
    num_mel_bins: int = 128
    num_frames: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self) -> None:
        for name, least in (("sample_rate_hz", 1000), ("num_mel_bins", 4), ("num_frames", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name} of the features is {value!r}; must be an integer of at least {least}. "
                    f"It comes from the checkpoint's preprocessor_config.json."
                )
        if not math.isfinite(self.mean):
            raise ConfigError(f"mean of the features is {self.mean!r}; must be a finite number.")
        if not (math.isfinite(self.std) and self.std > 0.0):
            raise ConfigError(
                f"std of the features is {self.std!r}; must be a finite number above 0."
            )

    @property
    def frame_samples(self) -> int:
        """Samples in a 25 ms frame (400 at 16 kHz), rounded down as in Kaldi."""
        return int(self.sample_rate_hz * FRAME_LENGTH_MS * 0.001)

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next, 10 ms (160 at 16 kHz), rounded down."""
        return int(self.sample_rate_hz * FRAME_SHIFT_MS * 0.001)

    @property
    def fft_samples(self) -> int:
        """Length of the Fourier transform: the power of two that holds a frame (512)."""
        return 1 << (self.frame_samples - 1).bit_length()

    @property
    def max_samples(self) -> int:
        """Samples that fill ``num_frames`` exactly (164,080 for 1024 frames)."""
        return (self.num_frames - 1) * self.hop_samples + self.frame_samples

    def count_frames(self, num_samples: int) -> int:
        """Count the frames that lie wholly inside ``num_samples``, even beyond ``num_frames``."""
        if num_samples < self.frame_samples:
            return 0
        return 1 + (num_samples - self.frame_samples) // self.hop_samples


def without_normalising(settings: FbankSettings) -> FbankSettings:
    """Return settings that leave log-mel values unchanged: (x − 0) / (2 · 0.5)."""
    return dataclasses.replace(settings, mean=0.0, std=0.5)
