"""What augmentation does to clips: exactly, within its bounds, and nothing where it is off."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from pipeline.config.train import AugmentationSection
from pipeline.training.data.augmentation import (
    Augment,
    add_noise,
    change_gain,
    change_speed,
    count_frames,
    equalize,
    invert,
    mask,
    mix,
    roll_frames,
    shift_circularly,
)
from transforms.features.fbank import FbankSettings, KaldiFbank
from transforms.features.fbank_settings import without_normalising

FBANK = FbankSettings(num_frames=64, mean=-5.0, std=4.0)
NUM_SAMPLES = FBANK.max_samples
ALL = AugmentationSection(
    mixup_ratio=0.5,
    masked_mels=48,
    masked_frames=20,
    feature_noise=0.1,
    shift_frames=10,
    circular_shift=True,
    gain_db=6.0,
    speed=0.1,
    equalizer_db=4.0,
    invert=True,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_clips(lengths: list[int], num_samples: int = NUM_SAMPLES) -> tuple[Tensor, Tensor]:
    """Noise of these lengths, followed by 0."""
    generator = torch.Generator().manual_seed(1)
    waveforms = 0.1 * torch.randn(len(lengths), num_samples, generator=generator)
    of_clips = torch.tensor(lengths)
    waveforms[torch.arange(num_samples) >= of_clips[:, None]] = 0.0
    return waveforms, of_clips


def make_log_mel(waveforms: Tensor, lengths: Tensor) -> Tensor:
    log_mel: Tensor = KaldiFbank(without_normalising(FBANK))(waveforms, lengths)
    return log_mel


class Scripted:
    """A generator whose uniform draws are given."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self, size: int) -> np.ndarray:
        return np.array([self.draws.pop(0) for _ in range(size)])


# Waveforms


def test_a_circular_shift_rolls_each_clip_within_its_own_length() -> None:
    waveforms = torch.tensor([[1.0, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0]])
    lengths = torch.tensor([4, 6, 1])
    before, shifts = waveforms.clone(), [set[int](), set[int](), set[int]()]
    for seed in range(60):
        shifted = shift_circularly(waveforms, lengths, rng(seed))
        for row, length in enumerate(lengths.tolist()):
            shift = int(shifted[row].eq(waveforms[row, 0]).nonzero()[0])
            expected = np.roll(waveforms[row, :length].numpy(), shift)
            assert shifted[row, :length].tolist() == expected.tolist()
            assert shifted[row, length:].tolist() == [0.0] * (6 - length)
            shifts[row].add(shift)
    assert shifts == [set(range(4)), set(range(6)), {0}]
    assert torch.equal(waveforms, before)


@pytest.mark.parametrize("seed", range(4))
def test_a_change_of_speed_moves_a_tone_by_the_factor_that_it_shortens_the_clip(seed: int) -> None:
    rate, num_samples = 16_000, 16_000
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(num_samples) / rate)[None]
    waveforms = torch.cat((tone, torch.zeros(1, 4000)), dim=1)
    changed, lengths = change_speed(waveforms, torch.tensor([num_samples]), 0.2, rng(seed))
    length = int(lengths)
    factor = num_samples / length
    assert changed.shape == waveforms.shape
    assert math.exp(-0.2) <= factor <= math.exp(0.2)
    assert abs(factor - 1) > 4e-3
    crossings = int((changed[0, : length - 1] * changed[0, 1:length] < 0).sum())
    assert crossings / 2 / length * rate == pytest.approx(1000 * factor, rel=2e-3)
    assert not changed[0, length:].any()


def test_a_slowed_clip_is_cut_where_the_batch_ends_and_no_clip_leaks_into_its_padding() -> None:
    waveforms, lengths = make_clips([NUM_SAMPLES, 4000, 0])
    found = [change_speed(waveforms, lengths, 0.3, rng(seed)) for seed in range(20)]
    assert {changed.shape for changed, _ in found} == {waveforms.shape}
    long, short, empty = zip(*(new.tolist() for _, new in found), strict=True)
    assert max(long) == NUM_SAMPLES
    assert min(long) < 0.9 * NUM_SAMPLES
    assert 4000 * math.exp(-0.3) - 1 <= min(short) < 3500
    assert 4500 < max(short) <= 4000 * math.exp(0.3) + 1
    assert set(empty) == {0}
    for changed, new in found:
        behind = torch.arange(NUM_SAMPLES) >= new[:, None]
        assert not changed[behind].any()


def test_speeds_are_even_on_a_logarithmic_scale() -> None:
    waveforms = torch.ones(400, 3000)
    _, lengths = change_speed(waveforms, torch.full((400,), 1000), 0.5, rng())
    logarithms = (1000 / lengths).log()
    assert logarithms.abs().max() <= 0.5 + 1e-3
    assert logarithms.mean().abs() < 0.05
    assert logarithms.std().item() == pytest.approx(1.0 / math.sqrt(12), abs=0.02)


def test_a_gain_is_one_factor_per_clip_within_its_decibels() -> None:
    waveforms, _ = make_clips([500] * 100, 500)
    changed = change_gain(waveforms, 6.0, rng())
    factors = changed[:, :1] / waveforms[:, :1]
    torch.testing.assert_close(changed, waveforms * factors, atol=1e-6, rtol=1e-5)
    decibels = 20 * factors.log10().flatten()
    assert decibels.abs().max() <= 6.0 + 1e-4
    assert decibels.std().item() == pytest.approx(12 / math.sqrt(12), abs=0.4)
    assert (decibels > 0).sum() in range(35, 66)


def test_about_half_of_the_clips_are_inverted_and_nothing_else_happens() -> None:
    waveforms, _ = make_clips([500] * 200, 500)
    changed = invert(waveforms, rng())
    signs = torch.sign(changed[:, 0] / waveforms[:, 0])
    assert torch.equal(changed, waveforms * signs[:, None])
    assert (signs < 0).sum() in range(75, 126)


# Mixing


def mix_as_the_original(ours: Tensor, theirs: Tensor, share: float) -> Tensor:
    """The original's _wav2fbank, up to the filter bank; clips of shape (1, samples)."""
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    if ours.shape[1] > theirs.shape[1]:
        padded = torch.zeros(1, ours.shape[1])
        padded[0, : theirs.shape[1]] = theirs
        theirs = padded
    else:
        theirs = theirs[:, : ours.shape[1]]
    mixed = share * ours + (1 - share) * theirs
    return mixed - mixed.mean()


def test_mixing_is_that_of_the_original() -> None:
    waveforms, lengths = make_clips([3000, 3000, 3000, 1000], 3000)
    partners, partner_lengths = make_clips([3000, 1200, 400, 2500], 3000)
    partners = torch.where(partners == 0, 0.0, partners.flip(0).roll(7, 1) + 0.05)
    partners[torch.arange(3000) >= partner_lengths[:, None]] = 0.0
    targets, partner_targets = torch.eye(5)[:4], torch.eye(5)[[1, 1, 4, 0]]
    mixed, mixed_lengths, mixed_targets = mix(
        waveforms, lengths, targets, partners, partner_lengths, partner_targets, 1.0, 10.0, rng()
    )
    shares = mixed_targets[torch.arange(4), torch.arange(4)].tolist()
    shares[1] = shares[0]  # of the second both have the same label: found from the sound below
    assert torch.equal(mixed_lengths, lengths)
    for row in (0, 2, 3):
        expected = mix_as_the_original(
            waveforms[row : row + 1, : lengths[row]],
            partners[row : row + 1, : partner_lengths[row]],
            shares[row],
        )
        torch.testing.assert_close(
            mixed[row : row + 1, : lengths[row]], expected, atol=1e-6, rtol=0
        )
        assert not mixed[row, lengths[row] :].any()
    assert mixed_targets[1].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(4), atol=1e-6, rtol=0)
    assert mixed_targets[0, 1].item() == pytest.approx(1 - shares[0], abs=1e-6)


@pytest.mark.parametrize(("beta", "std"), [(10.0, 0.5 / math.sqrt(21)), (1.0, 1 / math.sqrt(12))])
def test_shares_follow_the_beta_distribution(beta: float, std: float) -> None:
    waveforms, lengths = torch.zeros(4000, 8), torch.full((4000,), 8)
    targets, other = torch.ones(4000, 1), torch.zeros(4000, 1)
    _, _, shares = mix(waveforms, lengths, targets, waveforms, lengths, other, 1.0, beta, rng())
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx(std, rel=0.05)


def test_as_many_clips_are_mixed_as_the_ratio_says_and_the_others_keep_every_bit() -> None:
    waveforms, lengths = make_clips([500] * 1000, 500)
    targets, other = torch.ones(1000, 1), torch.zeros(1000, 1)
    partners = waveforms.flip(0)
    mixed, _, mixed_targets = mix(
        waveforms, lengths, targets, partners, lengths, other, 0.3, 10.0, rng()
    )
    is_mixed = mixed_targets[:, 0] < 1
    assert is_mixed.sum() in range(250, 351)
    assert torch.equal(mixed[~is_mixed], waveforms[~is_mixed])
    assert (mixed[is_mixed] != waveforms[is_mixed]).any(dim=1).all()


def test_partners_of_another_shape_are_refused() -> None:
    waveforms, lengths = make_clips([500, 300], 500)
    targets = torch.eye(2)
    with pytest.raises(ValueError, match=r"partners has the shape \(2, 400\); expected \(2, 500\)"):
        mix(waveforms, lengths, targets, waveforms[:, :400], lengths, targets, 0.5, 10.0, rng())
    with pytest.raises(ValueError, match=r"partner_targets has the shape \(2, 1\); expected"):
        mix(waveforms, lengths, targets, waveforms, lengths, targets[:, :1], 0.5, 10.0, rng())


# Features


@pytest.mark.parametrize(("axis", "widest"), [(1, 40), (2, 1), (2, 24), (2, 48), (2, 500)])
@pytest.mark.parametrize("seed", range(5))
def test_a_mask_is_torchaudio_s(
    monkeypatch: pytest.MonkeyPatch, axis: int, widest: int, seed: int
) -> None:
    features = 1 + torch.rand(1, 64, 128)
    draws = rng(seed).random(2)
    found = mask(features, axis, widest, Scripted(*draws))  # type: ignore[arg-type]
    left = draws.tolist()
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.full(size, left.pop(0)))
    # Theirs is frequency first.
    theirs = torchaudio.functional.mask_along_axis(
        features.transpose(1, 2), min(widest, 128), 0.0, axis=3 - axis
    )
    if widest <= 128:
        assert torch.equal(found, theirs.transpose(1, 2))
    else:  # theirs lets such a mask begin before the first mel
        assert (found == 0).all(dim=1).sum() == min(128, int(draws[0] * widest))


def test_masks_are_one_band_per_clip_up_to_the_widest_and_anywhere() -> None:
    features = torch.ones(3000, 6, 20)
    for masked, size in (
        (mask(features, 2, 8, rng())[:, 0], 20),
        (mask(features.transpose(1, 2), 1, 8, rng())[:, :, 0], 20),
    ):
        is_masked = masked == 0
        widths = is_masked.sum(dim=1)
        assert widths.unique().tolist() == list(range(8))  # 8 itself comes up with probability 0
        edges = is_masked.int().diff(dim=1).abs().sum(dim=1)
        assert (edges <= 2).all()
        # torchaudio's way never reaches the last place: it rounds down width and start apart.
        assert is_masked.any(dim=0).tolist() == [True] * 19 + [False]
        assert widths.float().mean().item() == pytest.approx(3.5, abs=0.2)
        assert masked.shape == (3000, size)


def test_noise_is_even_up_to_a_strength_of_its_own_per_clip() -> None:
    features = torch.zeros(500, 40, 30)
    noise = add_noise(features, 0.2, rng())
    strengths = noise.flatten(1).amax(dim=1)
    assert noise.min() >= 0.0
    assert strengths.max() <= 0.2
    assert strengths.mean().item() == pytest.approx(0.1, abs=0.01)
    relative = noise / strengths[:, None, None]
    assert relative.mean().item() == pytest.approx(0.5, abs=0.01)
    assert relative.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_frames_are_rolled_by_any_number_up_to_the_furthest_either_way() -> None:
    features = torch.arange(12.0)[None, :, None].expand(300, 12, 2)
    rolled = roll_frames(features, 3, rng())
    shifts = set()
    for clip in rolled:
        shift = int((clip[:, 0] == 0).nonzero()[0])
        assert clip[:, 1].tolist() == np.roll(np.arange(12.0), shift).tolist()
        shifts.add((shift + 6) % 12 - 6)
    assert shifts == {-3, -2, -1, 0, 1, 2, 3}


def test_frames_are_counted_as_the_features_count_them() -> None:
    lengths = [0, 1, 399, 400, 559, 560, 5000, NUM_SAMPLES, NUM_SAMPLES + 5000]
    found = count_frames(torch.tensor(lengths), FBANK).tolist()
    assert found == [min(64, FBANK.count_frames(length)) for length in lengths]


def test_an_equalizer_is_a_line_between_control_points_for_all_frames_of_a_clip() -> None:
    log_mel = torch.randn(3, 64, 121, generator=torch.Generator().manual_seed(0))
    changed = equalize(log_mel, torch.tensor([64, 30, 0]), 3.0, rng())
    curves = changed - log_mel
    # 121 mels have 6 control points, 24 apart.
    for clip, frames in ((0, 64), (1, 30)):
        curve = curves[clip, 0]
        points = curve[::24].numpy()
        expected = np.interp(np.arange(121), np.arange(0, 121, 24), points)
        np.testing.assert_allclose(curve.numpy(), expected, atol=2e-6)
        torch.testing.assert_close(
            curves[clip, :frames], curve.expand(frames, 121), atol=2e-6, rtol=0
        )
        assert np.abs(points).max() > 0.1
    assert torch.equal(changed[1, 30:], log_mel[1, 30:])
    assert torch.equal(changed[2], log_mel[2])
    assert not torch.allclose(curves[0, 0], curves[1, 0])


def test_an_equalizer_does_what_the_same_gain_does_to_the_sound() -> None:
    waveforms, lengths = make_clips([NUM_SAMPLES])
    waveforms = 10 * waveforms  # far above the floor everywhere
    log_mel = make_log_mel(waveforms, lengths)
    ten_times = make_log_mel(waveforms * math.sqrt(10), lengths)

    class TenDecibels(np.random.Generator):
        def standard_normal(self, size: tuple[int, ...]) -> np.ndarray:  # type: ignore[override]
            return np.ones(size)

    frames = count_frames(lengths, FBANK)
    found = equalize(log_mel, frames, 10.0, TenDecibels(np.random.PCG64()))
    # float32 loses a little where a frame has next to nothing of a mel.
    torch.testing.assert_close(found, ten_times, atol=5e-3, rtol=0)
    # The mel between two bins of the transform holds nothing that could become louder.
    assert torch.equal(found[:, :, 3], log_mel[:, :, 3])


def test_an_equalizer_makes_nothing_quieter_than_silence() -> None:
    waveforms, lengths = make_clips([NUM_SAMPLES])
    silence = make_log_mel(torch.zeros_like(waveforms), lengths)
    frames = count_frames(lengths, FBANK)
    assert torch.equal(equalize(silence, frames, 10.0, rng()), silence)
    almost = equalize(silence + 0.01, frames, 10.0, rng())
    assert almost.min() == silence.min()
    assert almost.max() > silence.max() + 1


# All of it


def test_without_augmentation_every_bit_stays() -> None:
    augment = Augment(AugmentationSection(), FBANK)
    waveforms, lengths = make_clips([NUM_SAMPLES, 4000, 100])
    changed, changed_lengths = augment.waveforms(waveforms, lengths, rng())
    assert torch.equal(changed, waveforms)
    assert torch.equal(changed_lengths, lengths)
    features = augment.features(make_log_mel(waveforms, lengths), lengths, rng())
    assert torch.equal(features, KaldiFbank(FBANK)(waveforms, lengths))


LENGTHS = torch.full((4,), 6000)
PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "speed": lambda x: change_speed(x, LENGTHS, 0.0, rng())[0],
    "mix": lambda x: mix(x, LENGTHS, x, x.flip(0), LENGTHS, x.flip(0), 0.0, 10.0, rng())[0],
    "targets": lambda x: mix(x, LENGTHS, x, x.flip(0), LENGTHS, x.flip(0), 0.0, 10.0, rng())[2],
    "gain": lambda x: change_gain(x, 0.0, rng()),
    "equalizer": lambda x: equalize(x[:, :, None], torch.full((4,), 3), 0.0, rng())[:, :, 0],
    "mels": lambda x: mask(x[:, None], 2, 0, rng())[:, 0],
    "frames": lambda x: mask(x[:, None], 1, 0, rng())[:, 0],
    "noise": lambda x: add_noise(x[:, None], 0.0, rng())[:, 0],
    "roll": lambda x: roll_frames(x[:, None], 0, rng())[:, 0],
}


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())
def test_a_setting_of_zero_changes_nothing(piece: Callable[[Tensor], Tensor]) -> None:
    waveforms, _ = make_clips([6000] * 4)
    assert torch.equal(piece(waveforms), waveforms)


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    augment = Augment(ALL, FBANK)
    waveforms, lengths = make_clips([NUM_SAMPLES, 4000, 700])

    def run(seed: int) -> list[Tensor]:
        generator = rng(seed)
        changed, new = augment.waveforms(waveforms, lengths, generator)
        return [changed, new, augment.features(make_log_mel(changed, new), new, generator)]

    assert all(torch.equal(*pair) for pair in zip(run(5), run(5), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(run(5), run(6), strict=True))


def test_shapes_types_and_padding_are_preserved() -> None:
    augment = Augment(ALL, FBANK)
    waveforms, lengths = make_clips([NUM_SAMPLES, 4000, 400, 0])
    for seed in range(10):
        generator = rng(seed)
        changed, new = augment.waveforms(waveforms, lengths, generator)
        assert (changed.shape, changed.dtype) == (waveforms.shape, torch.float32)
        assert (new.shape, new.dtype) == (lengths.shape, torch.int64)
        assert (count_frames(new, FBANK) > 0).tolist() == [True, True, True, False]
        assert not changed[torch.arange(NUM_SAMPLES) >= new[:, None]].any()
        log_mel = make_log_mel(changed, new)
        features = augment.features(log_mel, new, generator)
        assert (features.shape, features.dtype) == ((4, 64, 128), torch.float32)
        assert features.isfinite().all()


def test_masks_come_before_normalising_and_have_the_value_of_padding() -> None:
    section = AugmentationSection(masked_mels=60, masked_frames=30)
    waveforms, lengths = make_clips([NUM_SAMPLES] * 8)
    plain = KaldiFbank(FBANK)(waveforms, lengths)
    features = Augment(section, FBANK).features(make_log_mel(waveforms, lengths), lengths, rng())
    is_masked = features != plain
    assert 0.1 < is_masked.float().mean() < 0.7
    padding = torch.tensor(5.0) / 8.0
    assert torch.equal(features[is_masked], padding.expand(int(is_masked.sum())))


def test_noise_comes_after_normalising_and_the_roll_after_the_noise() -> None:
    section = AugmentationSection(feature_noise=0.3, shift_frames=5)
    waveforms, lengths = make_clips([NUM_SAMPLES] * 4)
    log_mel = make_log_mel(waveforms, lengths)
    features = Augment(section, FBANK).features(log_mel, lengths, rng(2))
    generator = rng(2)
    noisy = add_noise((log_mel + 5.0) / 8.0, 0.3, generator)
    assert torch.equal(features, roll_frames(noisy, 5, generator))


def test_a_clip_of_one_frame_keeps_it_when_it_is_played_faster() -> None:
    augment = Augment(AugmentationSection(speed=0.5), FBANK)
    waveforms, lengths = make_clips([400, 399, 1000])
    found = [augment.waveforms(waveforms, lengths, rng(seed))[1].tolist() for seed in range(20)]
    one_frame, less, more = zip(*found, strict=True)
    assert min(one_frame) == 400
    assert min(less) == 399
    assert min(more) < 700


@pytest.mark.gpu
def test_a_gpu_is_given_the_same_draws(needs_gpu: None) -> None:
    augment = Augment(ALL, FBANK)
    waveforms, lengths = make_clips([NUM_SAMPLES, 4000, 700])
    here, new = augment.waveforms(waveforms, lengths, rng())
    there, new_there = augment.waveforms(waveforms.cuda(), lengths.cuda(), rng())
    assert new_there.tolist() == new.tolist()
    torch.testing.assert_close(there.cpu(), here, atol=1e-6, rtol=0)
    log_mel = make_log_mel(here, new)
    features = augment.features(log_mel, new, rng())
    features_there = augment.features(log_mel.cuda(), new.cuda(), rng())
    torch.testing.assert_close(features_there.cpu(), features, atol=1e-5, rtol=0)
