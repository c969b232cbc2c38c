"""Mean and standard deviation of features: whatever the split, the same figures."""

from __future__ import annotations

import math

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that
from hypothesis import given
from hypothesis import strategies as st

from tests.support.unit_factory import FACTS, file_unit, make_item, make_window
from tests.transforms.features.signals import noise
from transforms.errors import FeatureError
from transforms.features.fbank import FbankSettings, extract_fbank
from transforms.features.fbank_settings import without_normalising
from transforms.features.statistics import (
    ORIGINAL_BATCH_WINDOWS,
    FeatureStatistics,
    MeasureFeatures,
    Moments,
    _MeasureFn,
    mean_and_std,
    measure_as_original,
    measure_window,
    sum_statistics,
)
from transforms.records import Failure, FloatArray, ItemFailure, UnitEnd, Window

SETTINGS = FbankSettings(num_frames=128)


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1.0, -1e6]),
    seed=st.integers(0, 99),
)
def test_any_split_and_order_gives_the_moments_of_the_whole(
    sizes: list[int], offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(offset, 3.0, size) for size in sizes]
    whole = np.concatenate(arrays)
    in_turn = sum((Moments.of(array) for array in arrays), Moments())
    order = rng.permutation(len(arrays))
    half = len(arrays) // 2
    in_halves = sum((Moments.of(arrays[i]) for i in order[:half]), Moments()) + sum(
        (Moments.of(arrays[i]) for i in order[half:]), Moments()
    )
    for found in (in_turn, in_halves):
        assert found.count == whole.size
        if whole.size:
            assert found.mean == pytest.approx(whole.mean(), rel=1e-12)
            assert found.std == pytest.approx(whole.std(), rel=1e-9)


def test_an_empty_array_has_no_spread() -> None:
    assert Moments.of(np.empty(0)) == Moments()
    assert math.isnan(Moments().std)
    with pytest.raises(FeatureError, match="no window has features"):
        mean_and_std(FeatureStatistics())


def test_padding_does_not_count() -> None:
    samples = noise(16_000)
    features = extract_fbank(samples, without_normalising(SETTINGS))
    filled = features[: SETTINGS.count_frames(16_000)].astype(np.float64)
    assert filled.shape[0] == 98 < features.shape[0]
    found = measure_window(samples, SETTINGS)
    assert found.count == filled.size
    assert found.mean == pytest.approx(filled.mean(), rel=1e-12)
    assert found.std == pytest.approx(filled.std(), rel=1e-12)
    others = FbankSettings(num_frames=128, mean=3.0, std=7.0)  # ignored
    assert measure_window(samples, others) == found


class _Scripted(np.random.Generator):
    """A generator whose plain draws are given: mixed or not, then width and start of the masks."""

    def __init__(self, draws: list[float]) -> None:
        super().__init__(np.random.PCG64(5))
        self._draws = iter(draws)

    def random(self) -> float:  # type: ignore[override]
        return next(self._draws)


def test_as_original_mixes_masks_and_counts_padding() -> None:
    samples, partner = noise(16_000), noise(12_000, seed=1)
    # Mixed; 0.5 · 24 mels from 0.25 · (128 − 12); 0.25 · 192 frames from 0.5 · (128 − 48).
    rng = _Scripted([0.3, 0.5, 0.25, 0.25, 0.5])
    found = measure_as_original(samples, partner, rng, SETTINGS)
    share = np.random.Generator(np.random.PCG64(5)).beta(10, 10)
    audio = samples - samples.mean()
    other = np.pad(partner - partner.mean(), (0, 4000))
    mixed = share * audio + (1 - share) * other
    features = extract_fbank(
        (mixed - mixed.mean()).astype(np.float32), without_normalising(SETTINGS)
    ).astype(np.float64)
    features[:, 29:41] = 0.0
    features[40:88] = 0.0
    assert found.count == 128 * 128
    assert found.mean == pytest.approx(features.mean(), rel=1e-6)
    assert found.std == pytest.approx(features.std(), rel=1e-6)


def test_as_original_without_mixing_is_the_window_itself() -> None:
    samples = noise(16_000)
    found = measure_as_original(samples, noise(16_000, 1), _Scripted([0.7, 0, 0, 0, 0]), SETTINGS)
    features = extract_fbank(
        (samples - samples.mean()).astype(np.float32), without_normalising(SETTINGS)
    )
    assert found == Moments.of(features)


def test_as_original_is_the_mean_over_batches_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    windows = [rng.normal(rng.normal(), 1 + rng.random(), 16) for _ in range(1700)]
    parts = [
        FeatureStatistics(
            moments=(moments := Moments.of(values)),
            windows=1,
            originals=np.array([[index * 7919 % 1700, moments.mean, moments.squares]]),
        )
        for index, values in enumerate(windows)
    ]
    shuffled = [parts[i] for i in rng.permutation(len(parts))]
    nested = sum_statistics([sum_statistics(shuffled[:600]), sum_statistics(shuffled[600:])])
    order = np.argsort([index * 7919 % 1700 for index in range(1700)])
    batches = [
        torch.tensor(np.stack([windows[i] for i in chosen]))
        for chosen in (order[:ORIGINAL_BATCH_WINDOWS], order[ORIGINAL_BATCH_WINDOWS:])
    ]
    expected = [np.mean([float(act(b)) for b in batches]) for act in (torch.mean, torch.std)]
    assert mean_and_std(nested) == pytest.approx(tuple(expected), rel=1e-9)
    assert mean_and_std(sum_statistics(parts)) == pytest.approx(tuple(expected), rel=1e-12)


# --- The transform ---------------------------------------------------------------------------


def measure(
    elements: list[Window | ItemFailure | UnitEnd], as_original: bool = False
) -> FeatureStatistics:
    step = _MeasureFn(SETTINGS, as_original)
    step.start_bundle()
    return sum_statistics([found for element in elements for found in step.process(element)])


def window_of(name: str, samples: FloatArray | None, **changes: object) -> Window:
    return make_window(make_item(name), num_windows=1, data=samples, **changes)


def test_clips_windows_and_failures_are_counted_separately() -> None:
    failure = Failure(make_item("/b.wav"), "decode", "NotAudio", "no audio in it")
    cut_short = Failure(make_item("/c.tar"), "read", "TarError", "cut short", is_container=True)
    bad = np.full(16_000, np.inf, np.float32)
    found = measure(
        [
            window_of("/a.wav", noise(16_000), item_index=0),
            ItemFailure("u", 1, failure),
            # A clip with several bad windows is one failure.
            make_window(make_item("/d.wav"), 0, item_index=2, data=bad),
            make_window(make_item("/d.wav"), 1, item_index=2, data=bad, num_windows=2),
            ItemFailure("u", 3, cut_short),
            UnitEnd(file_unit("u", 4), 4),
        ]
    )
    assert (found.windows, found.clips, found.failures, found.broken_containers) == (1, 1, 3, 1)
    assert found.audio_s == FACTS.duration_s
    assert found.example == "/b.wav: no audio in it"
    assert found.moments == measure_window(noise(16_000), SETTINGS)


def test_as_original_does_not_depend_on_other_units() -> None:
    one = [window_of(f"/{i}.wav", noise(16_000, i), item_index=i, unit_id="1") for i in range(6)]
    two = [window_of(f"/x{i}.wav", noise(9_000, i), item_index=i, unit_id="2") for i in range(6)]
    apart = sum_statistics([measure(list(unit), as_original=True) for unit in (one, two)])
    mixed = measure([w for pair in zip(one, two, strict=True) for w in pair], as_original=True)
    assert mean_and_std(mixed) == pytest.approx(mean_and_std(apart), rel=1e-12)
    assert mean_and_std(mixed) != pytest.approx(mean_and_std(measure([*one, *two])), rel=1e-3)


def test_it_is_a_transform_from_windows_to_statistics() -> None:
    windows = [window_of(f"/{i}.wav", noise(16_000, i), item_index=i) for i in range(4)]
    expected = measure(list(windows))

    def check(found: list[FeatureStatistics]) -> None:
        (total,) = found
        assert total.windows == 4
        assert mean_and_std(total) == pytest.approx(mean_and_std(expected), rel=1e-12)

    with test_pipeline.TestPipeline() as pipeline:
        total = (
            pipeline
            | beam.Create(windows)
            | MeasureFeatures(SETTINGS)
            | beam.CombineGlobally(sum_statistics)
        )
        assert_that(total, check)
