"""The features against three other implementations, and the properties they must have."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import apache_beam as beam
import kaldi_native_fbank as knf
import numpy as np
import pytest
import soundfile
import soxr
import torch
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, IntervalWindow, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torchaudio.compliance import kaldi
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as hf_module,
)

from tests.support.fake_hub import COMMIT, FakeHub, serve_hub, use_hub
from transforms.errors import ConfigError, FeatureError, ModelError
from transforms.features import fbank
from transforms.features.fbank import (
    ASTFeatureExtractor,
    ExtractFbank,
    FbankSettings,
    KaldiFbank,
    extract_fbank,
)
from transforms.records import (
    ClipFacts,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    UnitEnd,
    Window,
    WorkUnit,
)
from transforms.storage import writing

SETTINGS = FbankSettings()
RAW = FbankSettings(mean=0.0, std=0.5)  # (x - 0) / (2 · 0.5): log-mel values as they are
RATE_HZ = 16_000
LOG_FLOOR = math.log(np.finfo(np.float32).eps)
PAD = 4.2677393 / (2 * 4.5689974)  # (0 - mean) / (2 · std)
SILENCE = (LOG_FLOOR + 4.2677393) / (2 * 4.5689974)
EMPTY_BIN = 3


def noise(num_samples: int, seed: int = 0, level: float = 0.1) -> FloatArray:
    generator = np.random.default_rng(seed)
    return (level * generator.standard_normal(num_samples)).astype(np.float32)


def tone(num_samples: int, frequency_hz: float = 440.0) -> FloatArray:
    time_s = np.arange(num_samples) / RATE_HZ
    return (0.5 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def chirp(num_samples: int) -> FloatArray:
    time_s = np.arange(num_samples) / RATE_HZ
    rise = (7000.0 - 50.0) / time_s[-1]
    phase = 2 * np.pi * (50.0 * time_s + 0.5 * rise * time_s**2)
    return (0.5 * np.sin(phase)).astype(np.float32)


def voice(num_samples: int) -> FloatArray:
    """Harmonics of a gliding pitch, in syllables, over a little noise."""
    time_s = np.arange(num_samples) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(140.0 + 30.0 * np.sin(2 * np.pi * 0.7 * time_s)) / RATE_HZ
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3.0 * time_s), 0.0, 1.0)
    return (0.2 * harmonics * syllables + noise(num_samples, 1, 1e-3)).astype(np.float32)


SIGNALS: dict[str, Callable[[int], FloatArray]] = {
    "noise": noise,
    "tone": tone,
    "chirp": chirp,
    "voice": voice,
    "silence": lambda n: np.zeros(n, np.float32),
    "impulse": lambda n: np.eye(1, n, n // 2, dtype=np.float32)[0],
}


@pytest.fixture(scope="session")
def recordings(esc10: list[Path]) -> list[FloatArray]:
    """One in twenty of the real clips: mono, 16 kHz."""
    clips = []
    for path in esc10[::20]:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append(soxr.resample(samples.mean(axis=1), rate_hz, RATE_HZ).astype(np.float32))
    return clips


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The CUDA device; without one the test skips, or fails where REQUIRE_GPU=1 asks for it."""
    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1 is set and there is no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def hf_without_torchaudio(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """transformers' module, made to use its numpy implementation."""
    monkeypatch.setattr(hf_module, "is_speech_available", lambda: False)
    return hf_module


def torchaudio_fbank(samples: FloatArray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    return kaldi.fbank(
        torch.from_numpy(samples).to(dtype).unsqueeze(0),
        htk_compat=True,
        sample_frequency=RATE_HZ,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    ).numpy()


def batched_fbank(samples: FloatArray, module: KaldiFbank | None = None) -> np.ndarray:
    return (module or KaldiFbank(SETTINGS))(torch.from_numpy(samples)[None])[0].numpy()


# --- against other implementations


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("num_samples", [400, 16_000, 164_080])
def test_against_torchaudio_in_float32(name: str, num_samples: int) -> None:
    samples = SIGNALS[name](num_samples)
    expected = torchaudio_fbank(samples)
    found = batched_fbank(samples, KaldiFbank(RAW))[: len(expected)]
    difference = np.abs(found - expected)
    assert difference.max() <= (2e-2 if name == "chirp" else 2e-3)
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("name", SIGNALS)
def test_against_torchaudio_in_float64(name: str) -> None:
    samples = SIGNALS[name](32_000)
    expected = torchaudio_fbank(samples, torch.float64)
    found = batched_fbank(samples, KaldiFbank(RAW, torch.float64))[: len(expected)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_against_torchaudio_on_recordings(recordings: list[FloatArray]) -> None:
    for samples in recordings:
        expected = torchaudio_fbank(samples)
        padded = np.pad(expected, ((0, 1024 - len(expected)), (0, 0)))
        raw = extract_fbank(samples, RAW)
        np.testing.assert_array_equal(raw, padded)
        difference = np.abs(batched_fbank(samples, KaldiFbank(RAW)) - padded)
        assert difference.max() <= 2e-3
        assert difference.mean() < 1e-4


def native_fbank(samples: FloatArray, num_mel_bins: int) -> np.ndarray:
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = RATE_HZ
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = num_mel_bins
    options.use_energy = False
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(RATE_HZ, samples.tolist())
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


def assert_close_to_native(samples: FloatArray) -> None:
    # Kaldi itself refuses more bins: at 127 and 128 some filters are empty.
    narrow = FbankSettings(num_mel_bins=120, mean=0.0, std=0.5)
    expected = native_fbank(samples, 120)
    difference = np.abs(extract_fbank(samples, narrow)[: len(expected)] - expected)
    assert difference.max() <= 3e-2
    assert np.quantile(difference, 0.999) <= 1e-2
    assert difference.mean() <= 3e-4


@pytest.mark.parametrize("name", SIGNALS)
def test_against_kaldi_native_fbank(name: str) -> None:
    assert_close_to_native(SIGNALS[name](32_000))


def test_against_kaldi_native_fbank_on_recordings(recordings: list[FloatArray]) -> None:
    for samples in recordings[::2]:
        assert_close_to_native(samples)


def test_extractor_equals_transformers_bit_for_bit(recordings: list[FloatArray]) -> None:
    batch = [*recordings, voice(1000), noise(164_080)]
    expected = hf_module.ASTFeatureExtractor()(batch, sampling_rate=RATE_HZ, return_tensors="np")
    found = ASTFeatureExtractor()(batch, sampling_rate=RATE_HZ, return_tensors="np")
    np.testing.assert_array_equal(found.input_values, expected.input_values)
    np.testing.assert_array_equal(extract_fbank(batch[0], SETTINGS), expected.input_values[0])


def assert_close_to_numpy_fallback(
    samples: FloatArray, module: ModuleType, largest: float = 2e-3
) -> None:
    extractor = module.ASTFeatureExtractor()
    assert hasattr(extractor, "mel_filters"), "the fallback is not in use"
    expected = extractor(samples, sampling_rate=RATE_HZ)["input_values"][0]
    for found in (extract_fbank(samples, SETTINGS), batched_fbank(samples)):
        difference = np.abs(found - expected)
        assert difference.max() <= largest
        assert difference.mean() <= 2e-5
    # The fallback computes in float64. So do we here, and nothing but the filters' rounding stays.
    in_float64 = KaldiFbank(SETTINGS, torch.float64)(torch.from_numpy(samples).double()[None])[0]
    assert np.abs(in_float64.numpy() - expected).max() <= 2e-4


@pytest.mark.filterwarnings("ignore:At least one mel filter")  # bin 3, as everywhere
@pytest.mark.parametrize("name", SIGNALS)
def test_against_the_numpy_fallback_of_transformers(
    name: str, hf_without_torchaudio: ModuleType
) -> None:
    # Between the side lobes of a pure sweep float32 itself, torchaudio's too, is off by this much.
    largest = 4e-3 if name == "chirp" else 2e-3
    assert_close_to_numpy_fallback(SIGNALS[name](48_000), hf_without_torchaudio, largest)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_against_the_numpy_fallback_on_recordings(
    recordings: list[FloatArray], hf_without_torchaudio: ModuleType
) -> None:
    for samples in recordings[::4]:
        assert_close_to_numpy_fallback(samples, hf_without_torchaudio)


def test_other_checkpoint_against_transformers() -> None:
    arguments = {"max_length": 128, "mean": -6.845978, "std": 5.5654526}
    expected = hf_module.ASTFeatureExtractor(**arguments)(tone(16_000), sampling_rate=RATE_HZ)
    found = ASTFeatureExtractor(**arguments)(tone(16_000), sampling_rate=RATE_HZ)
    assert found.input_values[0].shape == (128, 128)
    np.testing.assert_array_equal(found["input_values"][0], expected["input_values"][0])


# --- properties


@pytest.mark.parametrize(
    ("num_samples", "num_frames"),
    [(400, 1), (559, 1), (560, 2), (16_000, 98), (160_000, 998), (164_079, 1023), (164_080, 1024)],
)
def test_number_of_frames(num_samples: int, num_frames: int) -> None:
    features = extract_fbank(noise(num_samples), SETTINGS)
    assert features.shape == (1024, 128)
    assert features.dtype == np.float32
    is_padding = (features == features.dtype.type(PAD)).all(axis=1)
    assert (~is_padding).sum() == SETTINGS.count_frames(num_samples) == num_frames
    assert is_padding[num_frames:].all()


def test_padding_and_silence_are_different_constants() -> None:
    for features in (
        extract_fbank(np.zeros(16_000, np.float32), SETTINGS),
        batched_fbank(np.zeros(16_000, np.float32)),
    ):
        np.testing.assert_allclose(features[:98], SILENCE, rtol=0, atol=2e-7)
        np.testing.assert_allclose(features[98:], PAD, rtol=0, atol=1e-7)
    assert round(SILENCE, 4) == -1.2776
    assert round(PAD, 4) == 0.4670


@pytest.mark.parametrize("name", SIGNALS)
def test_the_empty_filter_is_constant(name: str) -> None:
    column = extract_fbank(SIGNALS[name](32_000), SETTINGS)[:198, EMPTY_BIN]
    np.testing.assert_allclose(column, SILENCE, rtol=0, atol=2e-7)


@settings(max_examples=20, deadline=None)
@given(gain=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_gain_adds_its_logarithm_above_the_floor(gain: float, seed: int) -> None:
    samples = noise(8000, seed)
    before = extract_fbank(samples, RAW)[:48]
    after = extract_fbank((samples * np.float32(gain)).astype(np.float32), RAW)[:48]
    above = (before > LOG_FLOOR + 0.1) & (after > LOG_FLOOR + 0.1)
    assert above.any()
    np.testing.assert_allclose((after - before)[above], 2 * math.log(gain), rtol=0, atol=2e-3)


@pytest.mark.parametrize("offset", [-0.5, 0.01, 0.3])
def test_a_constant_offset_changes_nothing(offset: float) -> None:
    samples = noise(16_000)
    shifted = samples + np.float32(offset)
    difference = extract_fbank(shifted, RAW) - extract_fbank(samples, RAW)
    assert np.abs(difference).max() <= 2e-2


def test_a_shift_by_one_hop_is_a_shift_by_one_frame() -> None:
    samples = voice(16_000)
    late, early = extract_fbank(samples, RAW)[:98], extract_fbank(samples[160:], RAW)[:97]
    np.testing.assert_allclose(late[1:], early, rtol=0, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(400, 8000))
def test_what_follows_changes_no_earlier_frame(length: int) -> None:
    samples = noise(8000)
    whole, prefix = extract_fbank(samples, RAW), extract_fbank(samples[:length], RAW)
    num_frames = SETTINGS.count_frames(length)
    np.testing.assert_allclose(prefix[:num_frames], whole[:num_frames], rtol=0, atol=1e-4)
    assert (prefix[num_frames:] == 0.0).all()


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.floats(-45.0, 15.0),
    length=st.integers(400, 2000),
    seed=st.integers(0, 2**16),
)
def test_accepted_samples_never_give_nan_or_infinity(
    exponent: float, length: int, seed: int
) -> None:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], length)
    samples = np.clip(signs * 10.0**exponent, -9.99e14, 9.99e14).astype(np.float32)
    assert np.isfinite(extract_fbank(samples, SETTINGS)).all()
    assert np.isfinite(batched_fbank(samples)).all()


@pytest.mark.filterwarnings("error")
def test_input_is_not_changed_and_may_be_read_only() -> None:
    samples = noise(16_000)
    kept = samples.copy()
    samples.setflags(write=False)
    from_read_only = extract_fbank(samples, SETTINGS)
    np.testing.assert_array_equal(samples, kept)
    np.testing.assert_array_equal(from_read_only, extract_fbank(kept, SETTINGS))


def test_a_strided_view_is_read_in_its_order() -> None:
    samples = noise(16_000)
    expected = extract_fbank(np.ascontiguousarray(samples[::-1]), SETTINGS)
    np.testing.assert_array_equal(extract_fbank(samples[::-1], SETTINGS), expected)


# --- extract_fbank refuses


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "no samples; at least 400 are needed"),
        (np.zeros(399, np.float32), "399 samples; at least 400 are needed"),
        (np.zeros(164_081, np.float32), r"164081 samples \(10.255 s\) is longer than the 164080"),
        (np.zeros((2, 1000), np.float32), r"shape \(2, 1000\); must be one-dimensional"),
        (np.zeros(1000, np.float64), "float64; must be float32"),
        (np.zeros(1000, np.int16), "int16; must be float32"),
        (np.full(500, np.nan, np.float32), "500 of 500 samples are NaN or infinite, .* index 0;"),
        (np.full(500, -1e20, np.float32), r"reach 1e\+20; must be in \[-1, 1\]"),
    ],
    ids=["empty", "short", "long", "stereo", "float64", "int16", "nan", "huge"],
)
def test_unusable_samples_are_refused(samples: FloatArray, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        extract_fbank(samples, SETTINGS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_anywhere_is_found(value: float) -> None:
    samples = noise(1000)
    samples[999] = value  # behind the last frame, where the features would not show it
    with pytest.raises(FeatureError, match=r"1 of 1000 samples .* the first at index 999"):
        extract_fbank(samples, SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0.0}, "std of the features is 0.0"),
        ({"std": math.nan}, "std of the features is nan"),
        ({"mean": math.inf}, "mean of the features is inf"),
        ({"num_frames": 0}, "num_frames of the features is 0; must be an integer of at least 1"),
        ({"num_mel_bins": 3}, "num_mel_bins of the features is 3"),
        ({"sample_rate_hz": "16000"}, "sample_rate_hz of the features is '16000'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FbankSettings(**arguments)


# --- KaldiFbank


RAGGED = [164_080, 400, 399, 16_000, 559, 560, 100_000, 0]


def ragged_batch(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of all lengths; what lies behind a clip is noise and NaN that must not matter."""
    samples = np.stack([noise(164_080, seed) for seed in range(len(RAGGED))])
    for row, length in enumerate(RAGGED):
        samples[row, length + 7 :] = np.nan
    return torch.from_numpy(samples).to(device), torch.tensor(RAGGED, device=device)


def test_a_ragged_batch_equals_its_clips_alone() -> None:
    samples, lengths = ragged_batch()
    features = KaldiFbank(SETTINGS)(samples, lengths).numpy()
    assert features.dtype == np.float32
    for row, length in enumerate(RAGGED):
        if length < 400:
            assert (features[row] == np.float32(PAD)).all()
        else:
            alone = extract_fbank(samples[row, :length].numpy(), SETTINGS)
            np.testing.assert_allclose(features[row], alone, rtol=0, atol=2e-4)


def test_a_batch_narrower_than_the_window_is_padded() -> None:
    samples = torch.from_numpy(np.stack([noise(16_000), tone(16_000)]))
    features = KaldiFbank(SETTINGS)(samples, torch.tensor([16_000, 8_000])).numpy()
    assert features.shape == (2, 1024, 128)
    expected = extract_fbank(samples[1, :8_000].numpy(), SETTINGS)
    np.testing.assert_allclose(features[1], expected, rtol=0, atol=2e-4)


def test_int16_equals_its_scaled_floats() -> None:
    integers = (noise(16_000) * 32767).astype(np.int16)
    floats = (integers / 32768.0).astype(np.float32)
    np.testing.assert_array_equal(batched_fbank(integers), batched_fbank(floats))


def test_forward_reads_no_values_so_it_never_waits_for_the_device() -> None:
    # Fake tensors have no values: whatever asked for one would raise.
    with FakeTensorMode():
        features = KaldiFbank(SETTINGS)(torch.zeros(3, 16_000), torch.tensor([16_000, 9, 400]))
    assert features.shape == (3, 1024, 128)


def test_autocast_does_not_reach_the_features() -> None:
    samples = noise(16_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batched_fbank(samples)
    np.testing.assert_array_equal(found, batched_fbank(samples))


def test_the_module_adds_nothing_to_a_checkpoint() -> None:
    assert KaldiFbank(SETTINGS).state_dict() == {}
    assert list(KaldiFbank(SETTINGS).parameters()) == []


@pytest.mark.parametrize(
    ("samples", "lengths", "message"),
    [
        (torch.zeros(16_000), None, r"shape \(16000,\); must be \(batch, n\)"),
        (torch.zeros(2, 399), None, r"must be in \[400, 164080\]"),
        (torch.zeros(2, 164_081), None, r"must be in \[400, 164080\]"),
        (torch.zeros(2, 500, dtype=torch.int32), None, "int32; must be float32 or int16"),
        (torch.zeros(2, 500, dtype=torch.float16), None, "float16; must be float32 or int16"),
        (torch.zeros(2, 500), torch.tensor([500]), r"shape \(1,\) on cpu; must be \(2,\) on cpu"),
        (torch.zeros(1, 500), torch.zeros(1, device="meta"), r"on meta; must be \(1,\) on cpu"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    samples: torch.Tensor, lengths: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KaldiFbank(SETTINGS)(samples, lengths)


def test_a_module_cast_with_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"turned into torch.bfloat16; features need float32"):
        KaldiFbank(SETTINGS).to(torch.bfloat16)(torch.zeros(1, 500))


@pytest.mark.gpu
def test_the_device_gives_the_numbers_of_the_cpu(cuda: torch.device) -> None:
    on_cpu = KaldiFbank(SETTINGS)(*ragged_batch())
    module, batch = KaldiFbank(SETTINGS).to(cuda), ragged_batch(cuda)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = module(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=0, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIGNALS)
def test_the_device_gives_the_numbers_of_torchaudio(name: str, cuda: torch.device) -> None:
    samples = SIGNALS[name](164_080)
    found = KaldiFbank(RAW).to(cuda)(torch.from_numpy(samples)[None].to(cuda))[0].cpu().numpy()
    expected = torchaudio_fbank(samples)
    difference = np.abs(found - expected)
    assert difference.mean() < 1e-4
    if name != "chirp":
        assert difference.max() <= 2e-3
    # What float32 rounds off is a share of a frame's loudest band. Between the side lobes of a pure
    # sweep there is little else: torchaudio's own float32 is 0.014 off its float64 there.
    energy, expected_energy = np.exp(found, dtype=np.float64), np.exp(expected, dtype=np.float64)
    loudest = expected_energy.max(axis=1, keepdims=True)
    assert (np.abs(energy - expected_energy) / loudest).max() <= 5e-6


# --- ASTFeatureExtractor


SINGLE_FORMS: dict[str, Callable[[FloatArray], object]] = {
    "float32 array": lambda x: x,
    "float64 array": lambda x: x.astype(np.float64),
    "list of floats": lambda x: x.tolist(),
    "tuple of floats": lambda x: tuple(x.tolist()),
    "list of numpy scalars": list,
    "float32 tensor": torch.from_numpy,
    "float64 tensor": lambda x: torch.from_numpy(x).double(),
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "batch of one": lambda x: [x],
    "batch of one list": lambda x: [x.tolist()],
    "batch of one tensor": lambda x: [torch.from_numpy(x)],
}


@pytest.mark.parametrize("form", SINGLE_FORMS)
def test_every_form_of_a_clip_gives_the_same(form: str) -> None:
    samples = voice(2000)
    features = ASTFeatureExtractor()(SINGLE_FORMS[form](samples), sampling_rate=RATE_HZ)
    assert len(features["input_values"]) == 1
    np.testing.assert_array_equal(features.input_values[0], extract_fbank(samples, SETTINGS))


INTEGER_FORMS: dict[str, Callable[[np.ndarray], object]] = {
    "int16 array": lambda x: x,
    "int32 array": lambda x: x.astype(np.int32),
    "int64 array": lambda x: x.astype(np.int64),
    "list of integers": lambda x: x.tolist(),
    "int16 tensor": torch.from_numpy,
    "batch of one int16 array": lambda x: [x],
}


@pytest.mark.parametrize("form", INTEGER_FORMS)
def test_integers_are_scaled_from_16_bit(form: str) -> None:
    integers = np.concatenate(([-32768, 32767], voice(2000) * 32767)).astype(np.int16)
    features = ASTFeatureExtractor()(INTEGER_FORMS[form](integers), sampling_rate=RATE_HZ)
    expected = extract_fbank((integers / 32768.0).astype(np.float32), SETTINGS)
    np.testing.assert_array_equal(features.input_values[0], expected)


@pytest.mark.parametrize(
    "halve", [lambda x: x.astype(np.float16), lambda x: torch.from_numpy(x).bfloat16()]
)
def test_half_precision_is_widened(halve: Callable[[FloatArray], object]) -> None:
    samples = np.round(voice(2000) * 64).astype(np.float32) / 64  # exact in both half types
    features = ASTFeatureExtractor()(halve(samples), sampling_rate=RATE_HZ)
    np.testing.assert_array_equal(features.input_values[0], extract_fbank(samples, SETTINGS))


def test_a_ragged_list_is_a_batch_in_order() -> None:
    clips = [voice(2000), torch.from_numpy(noise(400)), tone(16_000).tolist()]
    found = ASTFeatureExtractor()(clips, sampling_rate=RATE_HZ, return_tensors="pt")
    assert isinstance(found["input_values"], torch.Tensor)
    assert found.input_values.shape == (3, 1024, 128)
    for clip, features in zip(clips, found.input_values, strict=True):
        expected = extract_fbank(np.asarray(clip, np.float32), SETTINGS)
        np.testing.assert_array_equal(features.numpy(), expected)


def test_forms_of_the_result() -> None:
    extractor = ASTFeatureExtractor()
    as_list = extractor(voice(2000), sampling_rate=RATE_HZ)["input_values"]
    as_array = extractor(voice(2000), sampling_rate=RATE_HZ, return_tensors="np")["input_values"]
    as_tensor = extractor(voice(2000), sampling_rate=RATE_HZ, return_tensors="pt")
    assert isinstance(as_list, list)
    assert as_array.shape == (1, 1024, 128)
    assert {**as_tensor}.keys() == {"input_values"}  # model(**features) works
    assert as_tensor.to(torch.float64)["input_values"].dtype == torch.float64
    np.testing.assert_array_equal(as_list[0], as_array[0])


def test_without_normalising() -> None:
    extractor = ASTFeatureExtractor(do_normalize=False)
    features = extractor(voice(2000), sampling_rate=RATE_HZ).input_values[0]
    np.testing.assert_array_equal(features, extract_fbank(voice(2000), RAW))


STEREO = np.zeros((2, 1000), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_rate": 44_100}, "sampling_rate is 44100; the model was trained at 16000 Hz"),
        ({"raw_speech": STEREO}, r"raw_speech has the shape \(2, 1000\)"),
        ({"raw_speech": STEREO.T}, r"raw_speech has the shape \(1000, 2\)"),
        ({"raw_speech": STEREO[:1]}, r"raw_speech has the shape \(1, 1000\)"),
        ({"raw_speech": STEREO[None]}, r"raw_speech has the shape \(1, 2, 1000\)"),
        ({"raw_speech": torch.zeros(2, 1000)}, r"raw_speech has the shape \(2, 1000\)"),
        ({"raw_speech": [voice(500), STEREO]}, r"raw_speech\[1\] has the shape \(2, 1000\)"),
        ({"raw_speech": (voice(500), RATE_HZ)}, r"raw_speech\[1\] has the shape \(\)"),
        ({"raw_speech": np.float32(0.5)}, r"raw_speech has the shape \(\)"),
        ({"raw_speech": [0.1, [0.2, 0.3]]}, "raw_speech is no vector of numbers"),
        ({"raw_speech": ["dog.wav"] * 500}, "must be floats"),
        ({"raw_speech": np.zeros(500, np.uint8)}, "uint8; must be floats .* or 16-bit integers"),
        ({"raw_speech": np.zeros(500, np.int8)}, "int8; must be floats .* or 16-bit integers"),
        ({"raw_speech": np.zeros(500, bool)}, "bool; must be floats"),
        ({"raw_speech": np.zeros(500, complex)}, "complex128; must be floats"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'; must be None, 'np' or 'pt'"),
        ({"max_length": 512, "padding": True}, r"unknown arguments \['max_length', 'padding'\]"),
    ],
)
def test_a_wrong_call_is_refused(arguments: dict, message: str) -> None:
    call = {"raw_speech": voice(500), "sampling_rate": RATE_HZ, **arguments}
    with pytest.raises(ValueError, match=message):
        ASTFeatureExtractor()(**call)


@pytest.mark.parametrize(
    ("raw_speech", "message"),
    [
        ([], "raw_speech: no samples"),
        (np.zeros(0), "raw_speech: no samples"),
        ([voice(500), np.zeros(0)], r"raw_speech\[1\]: no samples"),
        (np.zeros(399), "raw_speech: 399 samples; at least 400"),
        (np.full(500, np.nan), "raw_speech: 500 of 500 samples are NaN"),
        (np.full(500, 1e300), "raw_speech: 500 of 500 samples are NaN or infinite"),
        (np.full(500, np.inf, np.float16), "raw_speech: 500 of 500"),
        (np.full(500, 40_000), "integer samples reach from 40000 to 40000; 16-bit audio ends"),
        (np.full(500, 32_768), "integer samples reach from 32768 to 32768"),
        (np.full(500, -32_769), "integer samples reach from -32769 to -32769"),
        ([voice(500), [10**6] * 500], r"raw_speech\[1\]: integer samples reach"),
    ],
)
def test_samples_without_features_are_refused(raw_speech: object, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        ASTFeatureExtractor()(raw_speech, sampling_rate=RATE_HZ)


def test_a_missing_rate_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ASTFeatureExtractor()(voice(500))
    assert "sampling_rate was not given" in caplog.text


def test_long_audio_is_cut_as_in_transformers_but_said(caplog: pytest.LogCaptureFixture) -> None:
    samples = noise(164_080 + 160)
    found = ASTFeatureExtractor()(samples, sampling_rate=RATE_HZ).input_values[0]
    assert "raw_speech has 1025 frames; only the first 1024 are used" in caplog.text
    expected = hf_module.ASTFeatureExtractor()(samples, sampling_rate=RATE_HZ)["input_values"][0]
    np.testing.assert_array_equal(found, expected)


def test_samples_that_make_no_further_frame_are_not_worth_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ASTFeatureExtractor()(noise(164_080 + 159), sampling_rate=RATE_HZ)
    assert caplog.text == ""


def test_floats_of_16_bit_size_are_said(caplog: pytest.LogCaptureFixture) -> None:
    ASTFeatureExtractor()(voice(500) * np.float32(32768), sampling_rate=RATE_HZ)
    assert "floats are taken to be in [-1, 1]" in caplog.text


def test_attributes_and_dict_are_those_of_transformers() -> None:
    ours, theirs = ASTFeatureExtractor(), hf_module.ASTFeatureExtractor()
    assert ours.to_dict() == theirs.to_dict()
    assert ours.settings == SETTINGS
    assert repr(ours).startswith("ASTFeatureExtractor {")


@pytest.mark.parametrize(
    "arguments",
    [{"padding_value": 1.0}, {"return_attention_mask": True}, {"padding_side": "left"}],
)
def test_arguments_without_effect_are_said(
    arguments: dict, caplog: pytest.LogCaptureFixture
) -> None:
    ASTFeatureExtractor(**arguments)
    assert "have no effect" in caplog.text


def test_out_of_range_arguments_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="std of the features is 0"):
        ASTFeatureExtractor(std=0)


CHANGED = {"max_length": 128, "mean": -6.8, "std": 5.5, "do_normalize": False, "num_mel_bins": 64}


def test_what_is_saved_loads_here_and_in_transformers(tmp_path: Path) -> None:
    saved = ASTFeatureExtractor(**CHANGED)
    paths = saved.save_pretrained(tmp_path / "model")
    assert paths == [str(tmp_path / "model" / "preprocessor_config.json")]
    loaded = ASTFeatureExtractor.from_pretrained(tmp_path / "model")
    assert loaded.to_dict() == saved.to_dict()
    theirs = hf_module.ASTFeatureExtractor.from_pretrained(tmp_path / "model")
    assert theirs.to_dict() == saved.to_dict()


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    theirs = hf_module.ASTFeatureExtractor(**CHANGED)
    theirs.save_pretrained(tmp_path)
    loaded = ASTFeatureExtractor.from_pretrained(str(tmp_path), max_length=256)
    assert loaded.to_dict() == {**theirs.to_dict(), "max_length": 256}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no preprocessor_config.json"),
        ("{", "preprocessor_config.json cannot be read as JSON"),
        ("[]", "preprocessor_config.json holds a list; expected a JSON object"),
        (
            json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}),
            "is 'WhisperFeatureExtractor'; expected ASTFeatureExtractor",
        ),
    ],
)
def test_a_folder_without_an_ast_extractor_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        ASTFeatureExtractor.from_pretrained(tmp_path)


def test_a_mistyped_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing: there is no such folder"):
        ASTFeatureExtractor.from_pretrained(tmp_path / "missing")


def test_a_remote_folder_is_read() -> None:
    saved = ASTFeatureExtractor(**CHANGED)
    content = json.dumps({**saved.to_dict(), "unknown_to_us": 1}).encode()
    writing.write_bytes("memory://fbank/model/preprocessor_config.json", content)
    loaded = ASTFeatureExtractor.from_pretrained("memory://fbank/model", max_length=256)
    assert loaded.to_dict() == {**saved.to_dict(), "max_length": 256}


def test_a_remote_folder_without_the_file_is_refused() -> None:
    with pytest.raises(ModelError, match="model memory://fbank/none: there is no preprocessor"):
        ASTFeatureExtractor.from_pretrained("memory://fbank/none")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine whose model has a feature extractor and nothing else."""
    ASTFeatureExtractor(**CHANGED).save_pretrained(tmp_path / "hub")
    with serve_hub(tmp_path / "hub") as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.parametrize(
    ("source", "revision", "asked_for"),
    [
        ("org/tiny", None, "/api/models/org/tiny"),
        ("org/tiny@v1", None, "/api/models/org/tiny/revision/v1"),
        ("org/tiny", "v1", "/api/models/org/tiny/revision/v1"),
        ("org/tiny@v9", "v1", "/api/models/org/tiny/revision/v1"),
    ],
)
def test_a_hub_id_may_carry_a_revision(
    source: str, revision: str | None, asked_for: str, hub: type[FakeHub]
) -> None:
    loaded = ASTFeatureExtractor.from_pretrained(source, revision=revision)
    # The client's first request in a process may be about the process, not about a model.
    asked = [request.split()[1].partition("?")[0] for request in hub.requests]
    assert next(path for path in asked if path.startswith("/api/models/")) == asked_for
    assert loaded.to_dict() == ASTFeatureExtractor(**CHANGED).to_dict()


def test_an_extractor_fetched_before_is_found_without_a_network(hub: type[FakeHub]) -> None:
    before = ASTFeatureExtractor.from_pretrained("org/tiny")
    hub.status = 503
    after = ASTFeatureExtractor.from_pretrained(f"org/tiny@{COMMIT}")
    assert after.to_dict() == before.to_dict()


# --- ExtractFbank


FACTS = ClipFacts(1.0, 44_100, 2, -3.0, -20.0, 0.0, 0.1, "0" * 64)
ITEM = Item("/a.wav", "/a.wav")


def window(index: int, data: FloatArray | None, error: str | None = None) -> Window:
    return Window("u", 0, ITEM, index, 0.0, 1.0, data, facts=FACTS, num_windows=7, error=error)


_collected: list = []


def collect(actual: list) -> None:
    _collected[:] = actual


def run_step(elements: list, on_device: bool = False) -> list:
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        step = ExtractFbank(SETTINGS, lambda: on_device)
        features = pipeline | beam.Create(elements, reshuffle=False) | step
        assert_that(features, collect)
    return list(_collected)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As features are made in a run; on some processors several round sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_windows_come_out_with_features_and_all_else_unchanged(one_thread: None) -> None:
    found = run_step([window(0, voice(2000)), window(1, noise(164_080))])
    assert [each.window_index for each in found] == [0, 1]
    np.testing.assert_array_equal(found[0].data, extract_fbank(voice(2000), SETTINGS))
    np.testing.assert_array_equal(found[1].data, extract_fbank(noise(164_080), SETTINGS))
    assert [each.with_data(None) for each in found] == [window(0, None), window(1, None)]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros(10, np.float32), "10 samples"),
        (np.full(500, np.nan, np.float32), "500 of 500 samples are NaN"),
        (np.zeros(200_000, np.float32), "longer than the 164080"),
    ],
)
def test_a_window_without_features_travels_on_with_the_reason(
    samples: FloatArray, message: str
) -> None:
    for on_device in (False, True):
        (found,) = run_step([window(3, samples)], on_device)
        assert message in found.error
        assert found == window(3, None, error=found.error)


def test_windows_keep_their_samples_for_a_device_that_makes_features() -> None:
    (found,) = run_step([window(0, voice(2000))], on_device=True)
    np.testing.assert_array_equal(found.data, voice(2000))
    assert found.error is None


def test_features_made_ahead_come_in_order_with_all_between_them(one_thread: None) -> None:
    clips = [
        [*(window(index, noise(2000 + 100 * index, seed)) for index in range(4)), end]
        for seed, end in enumerate(UnitEnd(WorkUnit(f"{n}", "files", (ITEM,)), 4) for n in range(9))
    ]
    elements = [element for clip in clips for element in clip]
    found = run_step(elements)
    assert len(found) == len(elements)
    for actual, element in zip(found, elements, strict=True):
        if isinstance(element, UnitEnd):
            assert actual == element
        else:
            np.testing.assert_array_equal(actual.data, extract_fbank(element.data, SETTINGS))


def test_features_made_ahead_keep_their_place_in_beam_s_time() -> None:
    windows = [window(index, noise(2000, index)) for index in range(12)]

    def place(
        element: Window,
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        fixed: IntervalWindow = beam.DoFn.WindowParam,
    ) -> tuple[int, float, float]:
        return element.window_index, float(timestamp), float(fixed.start)

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        places = (
            pipeline
            | beam.Create(windows, reshuffle=False)
            | beam.Map(lambda window: TimestampedValue(window, 10 * window.window_index))
            | beam.WindowInto(FixedWindows(60))
            | ExtractFbank(SETTINGS)
            | beam.Map(place)
        )
        assert_that(places, equal_to([(n, 10.0 * n, 10.0 * n // 60 * 60) for n in range(12)]))


def test_threads_for_features_leave_torch_s_own_alone(two_threads: None) -> None:
    ahead = {fbank.feature_threads().submit(torch.get_num_threads).result() for _ in range(9)}
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (ahead, torch.get_num_threads(), later) == ({1}, 2, [2])


def test_threads_that_ask_at_once_get_the_same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    another_starts_too = threading.Barrier(2)

    def start(num_threads: int) -> object:
        started.append(num_threads)
        with contextlib.suppress(threading.BrokenBarrierError):
            another_starts_too.wait(0.2)
        return object()

    monkeypatch.setattr(fbank, "_start_threads", functools.cache(start))
    monkeypatch.setattr(fbank, "threads_of", lambda num_processes: 12 // num_processes)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fbank.feature_threads(3), range(4)))
    assert (len(set(found)), started) == (1, [4])


def test_processes_share_the_cores_that_make_features(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    threads = fbank.feature_threads()

    def counting(num_processes: int) -> ThreadPoolExecutor:
        asked.append(num_processes)
        return threads

    monkeypatch.setattr(fbank, "feature_threads", counting)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        windows = pipeline | beam.Create([window(0, noise(2000, 1))], reshuffle=False)
        _ = windows | ExtractFbank(SETTINGS, num_processes=3)
    assert asked == [3]


def test_a_window_that_already_failed_is_left_as_it_is() -> None:
    (found,) = run_step([window(0, voice(2000), error="from an earlier step")])
    np.testing.assert_array_equal(found.data, voice(2000))
    assert found.error == "from an earlier step"


def test_everything_else_passes_unchanged() -> None:
    elements = [
        ItemFailure("u", 1, Failure(ITEM, "decode", "DecodeError", "no audio")),
        window(0, None, error="from an earlier step"),
        UnitEnd(WorkUnit("u", "files", (ITEM,)), 2),
    ]
    assert run_step(elements) == elements
