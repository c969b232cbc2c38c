"""The features against two other implementations, and the properties they must have."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import apache_beam as beam
import kaldi_native_fbank as knf
import numpy as np
import pytest
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

from tests.support.unit_factory import make_item, make_window
from tests.transforms.features.signals import RATE_HZ, SIGNALS, noise, read_recordings, voice
from transforms.errors import ConfigError, FeatureError
from transforms.features import fbank
from transforms.features import threads as threads_module
from transforms.features.fbank import ExtractFbank, FbankSettings, KaldiFbank, extract_fbank
from transforms.features.threads import feature_threads
from transforms.records import Failure, FloatArray, ItemFailure, UnitEnd, Window, WorkUnit

SETTINGS = FbankSettings()
RAW = FbankSettings(mean=0.0, std=0.5)  # (x - 0) / (2 · 0.5): log-mel values as they are
LOG_FLOOR = math.log(np.finfo(np.float32).eps)
PAD = 4.2677393 / (2 * 4.5689974)  # (0 - mean) / (2 · std)
SILENCE = (LOG_FLOOR + 4.2677393) / (2 * 4.5689974)


@pytest.fixture(scope="session")
def recordings(esc10: list[Path]) -> list[FloatArray]:
    return read_recordings(esc10[::80])


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
    # The fallback computes in float64, as we do here: only the rounding of the filters remains.
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
    for samples in recordings:
        assert_close_to_numpy_fallback(samples, hf_without_torchaudio)


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
    """Clips of all lengths, followed by noise and NaN that must not matter."""
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


def test_int16_equals_its_scaled_floats() -> None:
    integers = (noise(16_000) * 32767).astype(np.int16)
    floats = (integers / 32768.0).astype(np.float32)
    np.testing.assert_array_equal(batched_fbank(integers), batched_fbank(floats))


def test_forward_reads_no_values_so_it_never_waits_for_the_device() -> None:
    # Fake tensors have no values: reading one would raise.
    with FakeTensorMode():
        features = KaldiFbank(SETTINGS)(torch.zeros(3, 16_000), torch.tensor([16_000, 9, 400]))
    assert features.shape == (3, 1024, 128)


def test_autocast_does_not_affect_the_features() -> None:
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
    with pytest.raises(ValueError, match=r"converted to torch.bfloat16; features need float32"):
        KaldiFbank(SETTINGS).to(torch.bfloat16)(torch.zeros(1, 500))


@pytest.mark.gpu
def test_the_device_gives_the_numbers_of_the_cpu(needs_gpu: None) -> None:
    on_cpu = KaldiFbank(SETTINGS)(*ragged_batch())
    module, batch = KaldiFbank(SETTINGS).to("cuda"), ragged_batch("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = module(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=0, atol=2e-4)


# --- ExtractFbank


ITEM = make_item("/a.wav")


def window(index: int, data: FloatArray | None, error: str | None = None) -> Window:
    return make_window(ITEM, index, num_windows=7, data=data, error=error)


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
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads; on some processors several round differently."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_window_without_features_passes_with_the_reason(on_device: bool) -> None:
    refused = {
        "no samples": np.zeros(0, np.float32),
        "10 samples": np.zeros(10, np.float32),
        "500 of 500 samples are NaN": np.full(500, np.nan, np.float32),
        "longer than the 164080": np.zeros(200_000, np.float32),
    }
    found = run_step([window(3, samples) for samples in refused.values()], on_device)
    for message, each in zip(refused, found, strict=True):
        assert message in each.error
        assert each == window(3, None, error=each.error)


def test_windows_keep_their_samples_for_a_device_that_makes_features() -> None:
    (found,) = run_step([window(0, voice(2000))], on_device=True)
    np.testing.assert_array_equal(found.data, voice(2000))
    assert found.error is None


def test_features_made_ahead_keep_the_order_of_all_elements(
    torch_threads: Callable[[int], None],
) -> None:
    torch_threads(1)
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
            assert actual.with_data(None) == element.with_data(None)


def test_features_made_ahead_keep_their_beam_window_and_timestamp() -> None:
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


def test_feature_threads_leave_torch_s_own_threads_alone(
    torch_threads: Callable[[int], None],
) -> None:
    torch_threads(2)
    ahead = {feature_threads().submit(torch.get_num_threads).result() for _ in range(9)}
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (ahead, torch.get_num_threads(), later) == ({1}, 2, [2])


def test_threads_that_ask_at_once_get_the_same_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    another_starts_too = threading.Barrier(2)

    def start(num_threads: int) -> object:
        started.append(num_threads)
        with contextlib.suppress(threading.BrokenBarrierError):
            another_starts_too.wait(0.2)
        return object()

    monkeypatch.setattr(threads_module, "_start_threads", functools.cache(start))
    monkeypatch.setattr(threads_module, "threads_of", lambda num_processes: 12 // num_processes)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: feature_threads(3), range(4)))
    assert (len(set(found)), started) == (1, [4])


def test_processes_share_the_cores_that_make_features(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    threads = feature_threads()

    def counting(num_processes: int) -> ThreadPoolExecutor:
        asked.append(num_processes)
        return threads

    monkeypatch.setattr(fbank, "feature_threads", counting)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        windows = pipeline | beam.Create([window(0, noise(2000, 1))], reshuffle=False)
        _ = windows | ExtractFbank(SETTINGS, num_processes=3)
    assert asked == [3]


def test_everything_else_passes_unchanged() -> None:
    elements = [
        ItemFailure("u", 1, Failure(ITEM, "decode", "DecodeError", "no audio")),
        window(0, None, error="from an earlier step"),
        window(1, voice(2000), error="from an earlier step"),
        UnitEnd(WorkUnit("u", "files", (ITEM,)), 2),
    ]
    found = run_step(elements)
    assert [found[0], found[1], found[3]] == [elements[0], elements[1], elements[3]]
    np.testing.assert_array_equal(found[2].data, voice(2000))
    assert found[2].error == "from an earlier step"
