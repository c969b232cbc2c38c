"""The features that AST was trained on: normalised Kaldi log-mel filter banks.

The recipe is the reference's: mono samples in [-1, 1] (not ×2¹⁵), frames of 25 ms every 10 ms that
lie wholly inside the window (``snip_edges``), per-frame mean removal, pre-emphasis 0.97, symmetric
Hann window, 512-point power spectrum, 128 Kaldi mel triangles from 20 Hz to half the rate, log with
floor 2⁻²³, no dither, zero rows appended up to ``num_frames``, then ``(x - mean) / (2 · std)``.
Zero rows are appended before the normalisation, so with AudioSet's statistics padding is +0.467 and
digital silence −1.278: padding is not silence.

Two functions give the same numbers: ``extract_fbank`` (one window, with torchaudio's own function;
``ASTFeatureExtractor`` calls it too) and ``KaldiFbank`` (a batch, on any device; ``DeviceFbank``
feeds it). This is the only module that imports torchaudio.

Source: Gong et al. 2021, arXiv:2104.01778; YuanGongND/ast ``src/dataloader.py``; transformers
``feature_extraction_audio_spectrogram_transformer.py``.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.pvalue import PCollection
from apache_beam.utils.windowed_value import WindowedValue
from torch import Tensor

from transforms.errors import FeatureError
from transforms.features.fbank_settings import FRAME_LENGTH_MS, FRAME_SHIFT_MS, LOG_FLOOR
from transforms.features.fbank_settings import FbankSettings as FbankSettings
from transforms.features.threads import feature_threads
from transforms.process.devices import Sender
from transforms.process.stage_times import timed
from transforms.records import FloatArray, ItemFailure, UnitEnd, Window

try:
    from torchaudio.compliance import kaldi
except (ImportError, OSError) as error:  # OSError: built for another torch
    raise ImportError(
        f"torchaudio does not load beside torch {torch.__version__}: {error}. torchaudio 2.11.0 "
        "needs torch 2.11 or 2.12, both from the same index (both CUDA 13.0 builds, or both "
        "CPU-only builds)."
    ) from error

LOW_FREQUENCY_HZ = 20.0
PREEMPHASIS = 0.97
INT16_SCALE = 1.0 / 32768.0
# Squares of larger samples, summed over a frame, leave float32's range and give infinite features.
MAX_ABSOLUTE_SAMPLE = 1e15
# Increased whenever the features change; part of a result's fingerprint.
FEATURES_VERSION = 1
# Windows whose features are made ahead: two batches of a CPU, and work for all threads.
WINDOWS_AHEAD = 8

_Element = Window | ItemFailure | UnitEnd


def check_samples(samples: FloatArray, settings: FbankSettings) -> None:
    """Refuse samples of a window that would give no features, or wrong ones, on any device.

    Raises:
        FeatureError: The samples are not one-dimensional, shorter than a frame, longer than the
            window, or contain NaN, infinity or values beyond ±1e15.
    """
    if samples.ndim != 1:
        raise FeatureError(
            f"samples have the shape {samples.shape}; must be one-dimensional (mono). "
            "Mix the channels down first."
        )
    if samples.size < settings.frame_samples:
        found = f"{samples.size} samples" if samples.size else "no samples"
        raise FeatureError(
            f"{found}; at least {settings.frame_samples} are needed, one frame of 25 ms at "
            f"{settings.sample_rate_hz} Hz."
        )
    if samples.size > settings.max_samples:
        raise FeatureError(
            f"a window of {samples.size} samples ({samples.size / settings.sample_rate_hz:.3f} s) "
            f"is longer than the {settings.max_samples} that {settings.num_frames} frames hold; "
            "nothing is cut silently. Cut the clip into windows first."
        )
    check_values(samples)


def check_values(samples: FloatArray) -> None:
    """Raise ``FeatureError`` for NaN, infinity and values beyond ±1e15."""
    peak = float(np.abs(samples).max(initial=0.0))
    if peak <= MAX_ABSOLUTE_SAMPLE:  # false for NaN
        return
    bad = np.flatnonzero(~np.isfinite(samples))
    if bad.size == 0:
        raise FeatureError(
            f"samples reach {peak:.3g}; must be in [-1, 1]. Beyond ±{MAX_ABSOLUTE_SAMPLE:.0e} "
            "the features overflow."
        )
    raise FeatureError(
        f"{bad.size} of {samples.size} samples are NaN or infinite, the first at index {bad[0]}; "
        "all must be finite. The file holds such values, or an earlier step made them."
    )


def extract_fbank(
    samples: FloatArray, settings: FbankSettings, out: FloatArray | None = None
) -> FloatArray:
    """Compute the features of one window with torchaudio, as the reference does.

    Args:
        samples: Mono samples in [-1, 1], shape (num_samples,), at ``settings.sample_rate_hz``;
            between one frame and ``settings.max_samples`` of them.
        out: Array to write the features into, or None for a new one.

    Returns:
        Shape (num_frames, num_mel_bins). Frames that the samples do not fill are padding.

    Raises:
        FeatureError: See ``check_samples``; also if the samples are not float32.
    """
    if samples.dtype != np.float32:
        raise FeatureError(f"samples are {samples.dtype}; must be float32 in [-1, 1].")
    check_samples(samples, settings)
    # torch warns about read-only arrays, which records may hold.
    samples = np.require(samples, requirements=("C", "W"))
    frames = kaldi.fbank(
        torch.from_numpy(samples).unsqueeze(0),
        sample_frequency=settings.sample_rate_hz,
        frame_length=FRAME_LENGTH_MS,
        frame_shift=FRAME_SHIFT_MS,
        low_freq=LOW_FREQUENCY_HZ,
        num_mel_bins=settings.num_mel_bins,
        preemphasis_coefficient=PREEMPHASIS,
        window_type="hanning",
        dither=0.0,
        use_energy=False,
    )
    log_mel = np.zeros((settings.num_frames, settings.num_mel_bins), np.float32)
    log_mel[: frames.shape[0]] = frames.numpy()
    centred = np.subtract(log_mel, settings.mean, out=out)
    return np.divide(centred, settings.std * 2, out=centred)


class KaldiFbank(torch.nn.Module):
    """``extract_fbank`` for a whole batch, on any device, with window and filters kept there.

    Nothing in ``forward`` waits for the device, so it can precede the model in its stream. For
    the same reason it cannot check values: call ``check_samples`` first. A NaN sample makes its
    own frames NaN and no others. Working memory is about 7 MB per 1024 frames of the batch in
    float32.

    Matrix products in TF32 (``torch.set_float32_matmul_precision("high")``) change a feature by at
    most 1e-4. Autocast is disabled inside, because bfloat16 would change it by more. ``dtype`` is
    the type of the computation and of the features: float32, or float64 in tests.
    """

    window: Tensor
    mel_filters: Tensor
    frame_ends: Tensor

    def __init__(
        self, settings: FbankSettings | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.settings = settings = settings or FbankSettings()
        window = torch.hann_window(settings.frame_samples, periodic=False, dtype=dtype)
        frame_ends = torch.arange(settings.num_frames) * settings.hop_samples
        # Not persistent: derived from the settings, so they do not belong in a checkpoint.
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel_filters", _mel_filters(settings).to(dtype), persistent=False)
        self.register_buffer("frame_ends", frame_ends + settings.frame_samples, persistent=False)

    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the normalised log-mel features of windows, (B, num_frames, num_mel_bins).

        Args:
            samples: Shape (B, n) with ``frame_samples`` ≤ n ≤ ``max_samples``; mono, float32 in
                [-1, 1] or int16. Samples beyond a row's length are ignored.
            lengths: Valid samples of each row, shape (B,), int64, on the same device; None means n
                for all. A length under one frame gives only padding.

        Raises:
            ValueError: Shape, type or device of an argument is wrong.
        """
        self._check_arguments(samples, lengths)
        settings = self.settings
        with torch.autocast(samples.device.type, enabled=False):
            log_mel = self._log_mel(samples)  # (B, T, num_mel_bins)
            num_computed = log_mel.shape[1]
            if lengths is not None:
                inside = self.frame_ends[:num_computed] <= lengths[:, None]  # (B, T)
                log_mel = torch.where(inside[:, :, None], log_mel, 0.0)
            padding = (0, 0, 0, settings.num_frames - num_computed)
            log_mel = torch.nn.functional.pad(log_mel, padding)  # (B, num_frames, num_mel_bins)
            return (log_mel - settings.mean) / (2.0 * settings.std)

    def _log_mel(self, samples: Tensor) -> Tensor:
        settings = self.settings
        waveforms = samples.to(self.window.dtype)
        if samples.dtype == torch.int16:
            waveforms = waveforms * INT16_SCALE
        frames = waveforms.unfold(1, settings.frame_samples, settings.hop_samples)  # (B, T, frame)
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat((frames[:, :, :1], frames[:, :, :-1]), dim=2)
        frames = (frames - PREEMPHASIS * previous) * self.window
        spectrum = torch.fft.rfft(frames, n=settings.fft_samples)  # (B, T, fft // 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        mel: Tensor = power @ self.mel_filters  # (B, T, num_mel_bins)
        return mel.clamp_min(LOG_FLOOR).log()

    def _check_arguments(self, samples: Tensor, lengths: Tensor | None) -> None:
        settings = self.settings
        if self.window.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"KaldiFbank was converted to {self.window.dtype}; features need float32. "
                "Convert the model, not this module."
            )
        if samples.dtype not in (self.window.dtype, torch.float32, torch.int16):
            raise ValueError(f"samples are {samples.dtype}; must be float32 or int16")
        if samples.ndim != 2:
            raise ValueError(f"samples have the shape {tuple(samples.shape)}; must be (batch, n)")
        if not settings.frame_samples <= samples.shape[1] <= settings.max_samples:
            raise ValueError(
                f"samples have the shape {tuple(samples.shape)}; the second must be in "
                f"[{settings.frame_samples}, {settings.max_samples}] (one frame, "
                f"{settings.num_frames} frames)"
            )
        if lengths is not None and (
            lengths.shape != samples.shape[:1] or lengths.device != samples.device
        ):
            raise ValueError(
                f"lengths have the shape {tuple(lengths.shape)} on {lengths.device}; must be "
                f"({samples.shape[0]},) on {samples.device}, like the samples"
            )


def _mel_filters(settings: FbankSettings) -> Tensor:
    """Return Kaldi's mel triangles, shape (fft // 2 + 1, num_mel_bins), float32.

    They are torchaudio's own, and so have the reference's rounding. The last row, the bin at half
    the rate, lies outside every triangle. Bin 3 of 128 falls between two bins of the transform and
    is empty: a constant in the features, as in training.
    """
    filters, _ = kaldi.get_mel_banks(
        settings.num_mel_bins,
        settings.fft_samples,
        float(settings.sample_rate_hz),
        LOW_FREQUENCY_HZ,
        0.0,  # highest frequency: half the rate
        100.0,  # these three describe a warping that a factor of 1 disables
        -500.0,
        1.0,
    )
    return torch.nn.functional.pad(filters, (0, 1)).T.contiguous()


class DeviceFbank:
    """``KaldiFbank`` on the model's device, for windows in host memory, of any lengths."""

    # Windows computed at once, each of which takes about 7 MB of working memory.
    MAX_WINDOWS = 16

    def __init__(self, settings: FbankSettings, device: torch.device) -> None:
        self._settings = settings
        self._fbank = KaldiFbank(settings).to(device)
        self._send = Sender(device)
        self._is_pinned = device.type == "cuda"

    @timed("fbank")
    @torch.inference_mode()
    def __call__(self, windows: Sequence[FloatArray]) -> Tensor:
        """Compute features (batch, num_frames, num_mel_bins) on the device.

        ``check_samples`` must have accepted each window, of shape (num_samples,).
        """
        shape = (len(windows), self._settings.max_samples)
        # KaldiFbank ignores samples beyond a window's length, so they need not be zero.
        samples = torch.empty(shape, pin_memory=self._is_pinned)
        for row, window in zip(samples.numpy(), windows, strict=True):
            row[: window.size] = window
        lengths = self._send(torch.tensor([window.size for window in windows]))
        parts = zip(
            self._send(samples).split(self.MAX_WINDOWS),
            lengths.split(self.MAX_WINDOWS),
            strict=True,
        )
        return torch.cat([self._fbank(*part) for part in parts])


def _with_features(window: Window, settings: FbankSettings, out: FloatArray | None) -> Window:
    """Replace a window's samples by features (in ``out``), or by the error that prevents them.

    If ``out`` is None, the samples are only checked.
    """
    if window.error is not None or window.data is None:
        return window
    try:
        if out is None:
            check_samples(window.data, settings)
            return window
        return window.with_data(extract_fbank(window.data, settings, out))
    except FeatureError as error:
        return dataclasses.replace(window, data=None, error=str(error))


@beam.typehints.with_input_types(_Element)
@beam.typehints.with_output_types(_Element)
class ExtractFbank(beam.PTransform[PCollection[_Element], PCollection[_Element]]):
    """Replace the samples of each window by its features.

    In: windows. Out: the same windows in the same order. On a CPU several threads make their
    features, some windows ahead of the model. A window without features passes with ``error`` set
    and no data, because the windows of a clip are counted. Failures, unit ends and windows that
    already have an error pass unchanged.

    Args:
        on_device: Returns, on the worker, whether the device makes the features later
            (``DeviceFbank``). Windows then keep their samples, which are only checked here.
        num_processes: Processes that share this machine's cores.
    """

    def __init__(
        self,
        settings: FbankSettings,
        on_device: Callable[[], bool] = lambda: False,
        num_processes: int = 1,
    ) -> None:
        super().__init__()
        self._step = _ExtractFbankFn(settings, on_device, num_processes)

    def expand(self, elements: PCollection[_Element]) -> PCollection[_Element]:
        """Apply the transform."""
        features: PCollection[_Element] = elements | "Compute features" >> beam.ParDo(self._step)
        return features


@dataclasses.dataclass
class _Begun:
    """An element inside the step, with its Beam window and timestamp."""

    element: _Element | Future[Window]
    window: Any
    timestamp: Any

    def finish(self) -> WindowedValue:
        element = self.element
        if isinstance(element, Future):
            with timed("fbank"):
                element = element.result()
        return WindowedValue(element, self.timestamp, (self.window,))


class _ExtractFbankFn(beam.DoFn):
    """Holds back some elements, whose features are made while the model computes."""

    def __init__(
        self, settings: FbankSettings, on_device: Callable[[], bool], num_processes: int
    ) -> None:
        self._settings = settings
        self._asks_on_device = on_device
        self._num_processes = num_processes
        self._on_device = False
        self._begun: deque[_Begun] = deque()
        # Rows of one array, the last first: a batch of neighbours needs no copy.
        self._free: list[FloatArray] = []

    def setup(self) -> None:
        self._on_device = self._asks_on_device()

    def start_bundle(self) -> None:
        self._begun.clear()  # an earlier bundle may have failed halfway

    def process(
        self,
        element: _Element,
        window: Any = beam.DoFn.WindowParam,
        timestamp: Any = beam.DoFn.TimestampParam,
    ) -> Iterator[WindowedValue]:
        self._begun.append(_Begun(self._begin(element), window, timestamp))
        while len(self._begun) > (0 if self._on_device else WINDOWS_AHEAD):
            yield self._begun.popleft().finish()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        while self._begun:
            yield self._begun.popleft().finish()

    def _begin(self, element: _Element) -> _Element | Future[Window]:
        if not isinstance(element, Window):
            return element
        if self._on_device:
            return _with_features(element, self._settings, None)
        if not self._free:
            shape = (WINDOWS_AHEAD, self._settings.num_frames, self._settings.num_mel_bins)
            self._free = list(np.empty(shape, np.float32))[::-1]
        threads = feature_threads(self._num_processes)
        return threads.submit(_with_features, element, self._settings, self._free.pop())
