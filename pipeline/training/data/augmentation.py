"""Change clips at random while a model learns from them, so that it memorises none.

    waveforms ─shift, speed, gain, sign─▶ ─mix with another clip─▶ KaldiFbank, not normalised
        ─equalizer─mask mels, frames─▶ ─normalise─▶ ─noise─roll─▶ features for the model

The order, and what masks, noise and mixing do, is the original's (YuanGongND/ast
``src/dataloader.py``), which mixes, masks, normalises, adds noise and rolls. The other steps come
where they make most sense. A step whose setting is 0 or false returns its input, bit for bit.

All random numbers come from a generator that the caller passes in, and are drawn on the CPU. So the
same generator gives the same batch on every device.

Shapes in comments: B clips, n samples, T frames, F mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soxr
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from pipeline.config.train import AugmentationSection
from transforms.features.fbank_settings import LOG_FLOOR, FbankSettings

# Mel bins between control points of the equalizer's curve, roughly: 6 points over 128 bins.
_MELS_PER_CONTROL_POINT = 20
# Log-mel values up to here are at the floor, that is, silent. The margin covers float32 rounding.
_FLOOR = math.log(LOG_FLOOR)
_FLOOR_MARGIN = 1e-4
# soxr's fastest recipe, cubic interpolation, takes half the time of the next better one. Its
# artefacts near the Nyquist frequency are just another change to a clip that is to be changed.
_RESAMPLING = "QQ"


@dataclass(frozen=True)
class Augment:
    """All changes to clips that a section of the configuration asks for.

    ``fbank`` has the mean and the standard deviation that normalise the model's features.
    """

    section: AugmentationSection
    fbank: FbankSettings

    def waveforms(
        self, waveforms: Tensor, lengths: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Shift, stretch, amplify and invert clips. ``mix`` comes afterwards.

        Waveforms are (B, n) float32, 0 after a clip's end; lengths are samples of each clip, (B,)
        int64. Both keep their shapes, and no clip becomes too short for features.
        """
        section = self.section
        if section.circular_shift:
            waveforms = shift_circularly(waveforms, lengths, rng)
        changed, changed_lengths = change_speed(waveforms, lengths, section.speed, rng)
        # If a clip would become shorter than a frame, the zeros after it count as its silence.
        least = lengths.clamp(max=self.fbank.frame_samples)
        changed = change_gain(changed, section.gain_db, rng)
        if section.invert:
            changed = invert(changed, rng)
        return changed, torch.maximum(changed_lengths, least)

    def features(self, log_mel: Tensor, lengths: Tensor, rng: np.random.Generator) -> Tensor:
        """Equalize, mask, normalise, add noise and roll.

        ``log_mel`` is the output of ``KaldiFbank`` with ``statistics.without_normalising``, shape
        (B, T, F), padded with 0; ``lengths`` are samples of each clip, (B,) int64, same device.
        """
        section, fbank = self.section, self.fbank
        frames = count_frames(lengths, fbank)
        x = equalize(log_mel, frames, section.equalizer_db, rng)
        x = mask(x, 2, section.masked_mels, rng)
        x = mask(x, 1, section.masked_frames, rng)
        x = (x - fbank.mean) / (2.0 * fbank.std)
        x = add_noise(x, section.feature_noise, rng)
        return roll_frames(x, section.shift_frames, rng)


def shift_circularly(waveforms: Tensor, lengths: Tensor, rng: np.random.Generator) -> Tensor:
    """Roll each clip within its own length by a random number of samples, without its padding."""
    shifted = waveforms.clone()
    for row, length in enumerate(lengths.tolist()):
        shift = int(rng.integers(max(1, length)))
        shifted[row, :length] = torch.roll(waveforms[row, :length], shift)
    return shifted


def change_speed(
    waveforms: Tensor, lengths: Tensor, speed: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Play each clip faster or slower, pitch included, by a factor exp(U(-speed, speed)).

    With a ``speed`` of 0.1 that is up to 10.5 % faster. Waveforms keep their shape (B, n), cut at n
    or padded with 0; lengths (B,) are new.
    """
    if speed == 0.0:
        return waveforms, lengths
    factors = np.exp(rng.uniform(-speed, speed, lengths.shape[0]))
    num_samples = waveforms.shape[1]
    originals = waveforms.cpu().numpy()  # soxr takes numpy arrays only
    changed = np.zeros_like(originals)
    new_lengths = []
    for row, (length, factor) in enumerate(zip(lengths.tolist(), factors.tolist(), strict=True)):
        clip = soxr.resample(originals[row, :length], factor, 1.0, quality=_RESAMPLING)
        clip = clip[:num_samples]
        changed[row, : clip.size] = clip
        new_lengths.append(clip.size)
    return (
        torch.from_numpy(changed).to(waveforms.device),
        torch.tensor(new_lengths, dtype=lengths.dtype, device=lengths.device),
    )


def change_gain(waveforms: Tensor, gain_db: float, rng: np.random.Generator) -> Tensor:
    """Make each clip louder or softer by U(-gain_db, gain_db) decibels."""
    if gain_db == 0.0:
        return waveforms
    factors = 10.0 ** (rng.uniform(-gain_db, gain_db, waveforms.shape[0]) / 20.0)
    return waveforms * _like(waveforms, factors)[:, None]


def invert(waveforms: Tensor, rng: np.random.Generator) -> Tensor:
    """Invert the sign of about half of the clips, which is inaudible."""
    signs = np.where(rng.random(waveforms.shape[0]) < 0.5, -1.0, 1.0)
    return waveforms * _like(waveforms, signs)[:, None]


def mix(
    waveforms: Tensor,
    lengths: Tensor,
    targets: Tensor,
    partners: Tensor,
    partner_lengths: Tensor,
    partner_targets: Tensor,
    ratio: float,
    beta: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix clips with partners, both sounds and labels; ``ValueError`` if their shapes differ.

    A clip's share λ is drawn from Beta(beta, beta), and its partner gets 1 - λ of sound and labels.
    A label that both have gets the sum. As in the original, both are centred on their means before
    mixing, and the mixture afterwards; a longer partner is cut, a shorter one padded with silence.

    Args:
        waveforms: Shape (B, n), float32.
        lengths: Samples of each clip, shape (B,); they stay.
        targets: Share of each label, shape (B, labels), float32.
        ratio: Share of clips that are mixed; the others are unchanged, bit for bit.
        beta: Both parameters of the distribution; with 10, as in the original, λ is mostly near ½.

    Source: YuanGongND/ast ``src/dataloader.py``, after Tokozume et al. 2018, arXiv:1711.10282,
        and Zhang et al. 2018, arXiv:1710.09412.
    """
    for name, ours, theirs in (
        ("partners", waveforms, partners),
        ("partner_lengths", lengths, partner_lengths),
        ("partner_targets", targets, partner_targets),
    ):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name} has the shape {tuple(theirs.shape)}; expected {tuple(ours.shape)}, one "
                "partner per clip"
            )
    drawn = rng.random(waveforms.shape[0]) < ratio
    shares = _like(waveforms, rng.beta(beta, beta, waveforms.shape[0]))[:, None]  # (B, 1)
    if not drawn.any():
        return waveforms, lengths, targets
    is_inside = _positions(waveforms) < lengths[:, None]  # (B, n)
    is_in_both = is_inside & (_positions(waveforms) < partner_lengths[:, None])
    # The partner's mean includes what is cut.
    others = torch.where(is_in_both, _centred(partners, partner_lengths), 0.0)
    mixed = shares * _centred(waveforms, lengths) + (1.0 - shares) * others
    mixed = _centred(mixed, lengths)
    mixed_targets = shares * targets + (1.0 - shares) * partner_targets
    is_mixed = torch.from_numpy(drawn).to(waveforms.device)[:, None]
    return (
        torch.where(is_mixed, mixed, waveforms),
        lengths,
        torch.where(is_mixed, mixed_targets, targets),
    )


def _centred(waveforms: Tensor, lengths: Tensor) -> Tensor:
    """Subtract from each clip the mean of its own samples; padding stays 0."""
    is_inside = _positions(waveforms) < lengths[:, None]
    sums = torch.where(is_inside, waveforms, 0.0).sum(dim=1, keepdim=True)
    means = sums / lengths.clamp(min=1)[:, None]
    return torch.where(is_inside, waveforms - means, 0.0)


def _positions(waveforms: Tensor) -> Tensor:
    return torch.arange(waveforms.shape[1], device=waveforms.device)


def count_frames(lengths: Tensor, fbank: FbankSettings) -> Tensor:
    """Count the frames that clips fill, as ``FbankSettings.count_frames``, but at most T."""
    frames = (lengths - fbank.frame_samples).div(fbank.hop_samples, rounding_mode="floor") + 1
    return frames.clamp(0, fbank.num_frames)


def equalize(
    log_mel: Tensor, frames: Tensor, equalizer_db: float, rng: np.random.Generator
) -> Tensor:
    """Apply a smooth random gain over the mels, as if each clip had another microphone.

    The gain is linear between control points about 20 mels apart, which are normal with mean 0 and
    standard deviation ``equalizer_db``. Padding and silence (values at the logarithm's floor) are
    unchanged. ``log_mel`` are natural logarithms of power, not normalised, shape (B, T, F);
    ``frames`` are those that each clip fills, shape (B,), on the same device.
    """
    if equalizer_db == 0.0:
        return log_mel
    num_clips, num_frames, num_mels = log_mel.shape
    num_points = max(2, round(num_mels / _MELS_PER_CONTROL_POINT))
    # Decibels are ten times the decimal logarithm of power; features are its natural logarithm.
    points = rng.standard_normal((num_clips, 1, num_points)) * equalizer_db * math.log(10.0) / 10.0
    gain = F.interpolate(
        _like(log_mel, points), size=num_mels, mode="linear", align_corners=True
    )  # (B, 1, F)
    is_inside = torch.arange(num_frames, device=log_mel.device) < frames[:, None]  # (B, T)
    sounds = is_inside[:, :, None] & (log_mel > _FLOOR + _FLOOR_MARGIN)  # (B, T, F)
    return torch.where(sounds, (log_mel + gain).clamp_min(_FLOOR), log_mel)


def mask(features: Tensor, axis: int, widest: int, rng: np.random.Generator) -> Tensor:
    """Set one random band per clip to 0 along an axis: 1 for frames, 2 for mels.

    ``features`` (B, T, F) are not normalised. A band may lie in the padding, which is 0 as well.
    Width and start are drawn as in torchaudio's ``mask_along_axis``: as real numbers, each rounded
    down. So a band as wide as ``widest`` has probability 0, and the last position is never masked.

    Source: SpecAugment, Park et al. 2019, arXiv:1904.08779.
    """
    if widest == 0:
        return features
    num_clips, size = features.shape[0], features.shape[axis]
    widths = rng.random(num_clips) * widest
    starts = np.floor(rng.random(num_clips) * np.maximum(0.0, size - widths))
    ends = starts + np.floor(widths)
    shape = [num_clips, 1, 1]
    first = torch.from_numpy(starts).to(features.device, torch.int64).view(shape)
    behind = torch.from_numpy(ends).to(features.device, torch.int64).view(shape)
    shape = [1, 1, 1]
    shape[axis] = size
    position = torch.arange(size, device=features.device).view(shape)
    return features.masked_fill((position >= first) & (position < behind), 0.0)


def add_noise(features: Tensor, feature_noise: float, rng: np.random.Generator) -> Tensor:
    """Add U(0, 1) to each value, scaled by U(0, 1) per clip and by ``feature_noise``.

    Features are normalised, shape (B, T, F). The original's recipe for Speech Commands uses 0.1.
    """
    if feature_noise == 0.0:
        return features
    strengths = rng.random(features.shape[0]) * feature_noise
    noise = torch.from_numpy(rng.random(tuple(features.shape), dtype=np.float32))
    return features + noise.to(features) * _like(features, strengths)[:, None, None]


def roll_frames(features: Tensor, shift_frames: int, rng: np.random.Generator) -> Tensor:
    """Roll each clip's features along time, padding included, by up to ±shift_frames."""
    if shift_frames == 0:
        return features
    shifts = rng.integers(-shift_frames, shift_frames + 1, features.shape[0])
    rolled = [
        torch.roll(clip, shift, dims=0)
        for clip, shift in zip(features, shifts.tolist(), strict=True)
    ]
    return torch.stack(rolled)


def _like(tensor: Tensor, values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).to(tensor)
