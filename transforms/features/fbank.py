"""Samples into the features AST was trained on: normalised Kaldi log-mel filter banks.

In the flow, ``ExtractFbank`` follows ``windows`` and precedes ``inference``: a ``Window`` comes
with samples and leaves with features. The recipe is the reference's, step by step: mono samples
in [-1, 1] (not ×2¹⁵), frames of 25 ms every 10 ms that lie wholly inside the window
(``snip_edges``), per-frame mean removal, pre-emphasis 0.97, symmetric Hann window, 512-point
power spectrum, 128 Kaldi mel triangles from 20 Hz to half the rate, log with floor 2⁻²³, no
dither, zero rows appended up to ``num_frames``, then ``(x - mean) / (2 · std)``. Zero rows come
before the normalisation, so padding is +0.467 and digital silence −1.278 with AudioSet's
statistics: padding is not silence.

Three doors lead to the same numbers: ``extract_fbank`` (one window, torchaudio's own function),
``KaldiFbank`` (a batch, on any device; ``DeviceFbank`` feeds it), and ``ASTFeatureExtractor``
(the interface of transformers). This is the only module that imports torchaudio.

Source: Gong et al. 2021, arXiv:2104.01778; YuanGongND/ast ``src/dataloader.py``; transformers
``feature_extraction_audio_spectrogram_transformer.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import torch
from apache_beam.pvalue import PCollection
from apache_beam.utils.windowed_value import WindowedValue
from torch import Tensor

from transforms.errors import FeatureError
from transforms.features.fbank_settings import (
    FRAME_LENGTH_MS,
    FRAME_SHIFT_MS,
    LOG_FLOOR,
    MAX_FEATURE_THREADS,
)
from transforms.features.fbank_settings import FbankSettings as FbankSettings
from transforms.process.devices import Sender, threads_of
from transforms.process.stage_times import timed
from transforms.records import FloatArray, ItemFailure, UnitEnd, Window

try:
    from torchaudio.compliance import kaldi
except (ImportError, OSError) as error:  # OSError: its library was built for another torch
    raise ImportError(
        f"torchaudio does not load beside torch {torch.__version__}: {error}. torchaudio 2.11 "
        "needs torch 2.11 or 2.12, both from the same index (both CUDA 13.0 builds, or both "
        "CPU-only builds)."
    ) from error

_logger = logging.getLogger(__name__)

LOW_FREQUENCY_HZ = 20.0
PREEMPHASIS = 0.97
INT16_SCALE = 1.0 / 32768.0
# Squares of larger samples, summed over a frame, leave float32's range and give infinite features.
MAX_ABSOLUTE_SAMPLE = 1e15
# Decoders overshoot full scale by a little; a float this large is 16-bit audio left unscaled.
_SUSPICIOUS_PEAK = 16.0
_CONFIG_NAME = "preprocessor_config.json"

_Element = Window | ItemFailure | UnitEnd


# Counts up whenever features come out differently; part of a result's fingerprint.
FEATURES_VERSION = 1


def check_samples(samples: FloatArray, settings: FbankSettings) -> None:
    """Refuse samples that would give no features, or wrong ones, on any device.

    Args:
        samples: One window, mono, float32.
        settings: The checkpoint's.

    Raises:
        FeatureError: Not one-dimensional, shorter than a frame, longer than the window, or holding
            NaN, infinity or values beyond ±1e15.
    """
    if samples.ndim != 1:
        raise FeatureError(
            f"samples have the shape {samples.shape}; must be one-dimensional (mono). "
            "Mix the channels down first."
        )
    _check_length(samples, settings)
    if samples.size > settings.max_samples:
        raise FeatureError(
            f"a window of {samples.size} samples ({samples.size / settings.sample_rate_hz:.3f} s) "
            f"is longer than the {settings.max_samples} that {settings.num_frames} frames hold; "
            "nothing is cut silently. Cut the clip into windows first."
        )
    _check_values(samples)


def extract_fbank(
    samples: FloatArray, settings: FbankSettings, out: FloatArray | None = None
) -> FloatArray:
    """Compute the features of one window with torchaudio, as the reference does.

    Args:
        samples: Mono samples in [-1, 1], shape (num_samples,), at ``settings.sample_rate_hz``;
            between one frame and ``settings.max_samples`` of them.
        settings: The checkpoint's.
        out: Where to put the features, or None for an array of their own.

    Returns:
        Normalised log-mel features, shape (num_frames, num_mel_bins), float32. Frames that the
        samples do not fill hold the value of padding, as in training.

    Raises:
        FeatureError: See ``check_samples``; also when the samples are not float32.
    """
    if samples.dtype != np.float32:
        raise FeatureError(f"samples are {samples.dtype}; must be float32 in [-1, 1].")
    check_samples(samples, settings)
    return _normalise(_log_mel(samples, settings), settings, out)


class KaldiFbank(torch.nn.Module):
    """``extract_fbank`` for a whole batch, on any device, with window and filters kept there.

    Nothing in ``forward`` waits for the device, so it can precede the model in its stream. For
    the same reason it cannot look at values: what ``check_samples`` refuses must be refused
    before. A NaN sample makes its own frames NaN and no others. Working memory is about 7 MB per
    1024 frames of the batch in float32.

    Matrix products in TF32 (``torch.set_float32_matmul_precision("high")``) move a feature by at
    most 1e-4; autocast is switched off inside, because bfloat16 would move it by more.

    Args:
        settings: The checkpoint's.
        dtype: Type of the computation and of the features: float32, or float64 in tests.
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
        # Not persistent: they follow from the settings and have no place in a checkpoint.
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel_filters", _mel_filters(settings).to(dtype), persistent=False)
        self.register_buffer("frame_ends", frame_ends + settings.frame_samples, persistent=False)

    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the features of a batch of windows.

        Args:
            samples: Shape (B, n) with ``frame_samples`` ≤ n ≤ ``max_samples``; mono, float32 in
                [-1, 1] or int16. What lies beyond a row's length has no influence.
            lengths: Samples that count in each row, shape (B,), int64, on the same device; None
                means n for all. A length under one frame gives nothing but padding.

        Returns:
            Normalised log-mel features, shape (B, num_frames, num_mel_bins).

        Raises:
            ValueError: Shape, type or device of an argument does not fit.
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
                f"KaldiFbank was turned into {self.window.dtype}; features need float32. "
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


class BatchFeature(dict[str, Any]):
    """What ``ASTFeatureExtractor`` returns: a dict with ``input_values``, also as an attribute."""

    @property
    def input_values(self) -> Any:
        """A list of arrays (num_frames, num_mel_bins), or one array or tensor (B, …, …)."""
        return self["input_values"]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the tensors as ``torch.Tensor.to`` does, in place; returns itself."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(*args, **kwargs)
        return self


class ASTFeatureExtractor:
    """transformers' extractor of the same name: same arguments, attributes, outputs and numbers.

    Where the original is silently wrong, this one raises: ``ValueError`` for a wrong call (rate,
    shape, type, unknown argument) and ``FeatureError`` for samples without usable features
    (empty, shorter than a frame, NaN, infinite, integers beyond 16 bits). As in the original,
    audio longer than ``max_length`` frames is cut, but a warning says so.

    Args:
        feature_size: Kept for the file's sake; always 1.
        sampling_rate: Rate of the audio in Hz.
        num_mel_bins: Mel filters.
        max_length: Frames of the features; shorter audio is padded, longer is cut.
        padding_value: Kept for the file's sake: frames are padded with 0 before normalising.
        do_normalize: Apply ``(x - mean) / (2 · std)``.
        mean: Mean of the log-mel values.
        std: Their standard deviation.
        return_attention_mask: Kept for the file's sake: AST takes no mask of frames.
        padding_side: Kept for the file's sake: padding is on the right.

    Raises:
        ConfigError: A value is out of range.
    """

    model_input_names = ("input_values", "attention_mask")

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = False,
        padding_side: str = "right",
    ) -> None:
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.padding_value = padding_value
        self.do_normalize = do_normalize
        self.mean = mean
        self.std = std
        self.return_attention_mask = return_attention_mask
        self.padding_side = padding_side
        if padding_value != 0.0 or return_attention_mask or padding_side != "right":
            _logger.warning(
                "ASTFeatureExtractor: padding_value=%r, return_attention_mask=%r and "
                "padding_side=%r have no effect, as in transformers: features are padded on the "
                "right with 0 before normalising, without a mask.",
                padding_value,
                return_attention_mask,
                padding_side,
            )
        _ = self.settings  # out of range here rather than at the first call

    @property
    def settings(self) -> FbankSettings:
        """The same facts, as ``extract_fbank`` and ``KaldiFbank`` take them."""
        return FbankSettings(
            sample_rate_hz=self.sampling_rate,
            num_mel_bins=self.num_mel_bins,
            num_frames=self.max_length,
            mean=self.mean,
            std=self.std,
        )

    def __call__(
        self,
        raw_speech: npt.NDArray[Any] | Tensor | Sequence[Any],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **unknown: object,
    ) -> BatchFeature:
        """Turn one clip, or a batch of clips, into features.

        Args:
            raw_speech: One clip: a 1-D array, 1-D tensor or list of numbers. A batch: a list of
                those, of any lengths. A 2-D array or tensor is refused: it may be a batch or
                stereo. Floats are taken to be in [-1, 1]; integers as 16-bit and divided by 32768.
            sampling_rate: Rate of ``raw_speech`` in Hz. Give it: without it a wrong rate passes.
            return_tensors: ``"np"`` or ``"pt"`` for one array or tensor; None for a list of arrays.
            **unknown: Refused, where transformers ignores them.

        Returns:
            ``input_values``: always a batch, each of shape (max_length, num_mel_bins), float32.

        Raises:
            ValueError: The call is wrong: rate, shape, type or an unknown argument.
            FeatureError: A clip is empty, shorter than 25 ms, or holds NaN, infinity or integers
                beyond 16 bits.
        """
        if unknown:
            raise ValueError(
                f"unknown arguments {sorted(unknown)}; a call takes raw_speech, sampling_rate and "
                "return_tensors. max_length and the like belong to the constructor."
            )
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; must be None, 'np' or 'pt'")
        self._check_rate(sampling_rate)
        settings = self.settings
        features = [self._extract(name, clip, settings) for name, clip in _each_clip(raw_speech)]
        if return_tensors is None:
            return BatchFeature(input_values=features)
        batch = np.stack(features)
        return BatchFeature(
            input_values=batch if return_tensors == "np" else torch.from_numpy(batch)
        )

    def to_dict(self) -> dict[str, Any]:
        """The attributes and ``feature_extractor_type``, as transformers writes them."""
        return {**vars(self), "feature_extractor_type": "ASTFeatureExtractor"}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, which transformers reads too; returns its path."""
        path = Path(save_directory) / _CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", "utf-8")
        return [str(path)]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read ``preprocessor_config.json`` from a folder or from the hub.

        What the constructor does not know in it has no effect.

        Args:
            pretrained_model_name_or_path: A local or remote folder, or a hub id, optionally
                ``id@revision``.
            revision: Branch, tag or commit on the hub, instead of the one in the id.
            **overrides: Constructor arguments that replace what the file says.

        Raises:
            ModelError: There is no such file, or it does not describe an AST extractor.
        """
        from transforms.models.ast import (
            checkpoints,  # lazy: features need no checkpoint to be computed
        )

        features = checkpoints.load_features(os.fspath(pretrained_model_name_or_path), revision)
        names = inspect.signature(ASTFeatureExtractor).parameters
        known = {name: features[name] for name in names if name in features}
        return cls(**{**known, **overrides})

    def __repr__(self) -> str:
        return f"ASTFeatureExtractor {json.dumps(self.to_dict(), indent=2, sort_keys=True)}"

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            _logger.warning(
                "sampling_rate was not given to ASTFeatureExtractor: the audio is taken to be at "
                "%d Hz. Give it, so that a wrong rate is found.",
                self.sampling_rate,
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate is {sampling_rate}; the model was trained at {self.sampling_rate} "
                "Hz. Resample the audio first."
            )

    def _extract(self, name: str, clip: npt.NDArray[Any], settings: FbankSettings) -> FloatArray:
        try:
            samples = _to_float32(clip)
            _check_length(samples, settings)
            _check_values(samples)
        except FeatureError as error:
            raise FeatureError(f"{name}: {error}") from error
        _warn_of_doubts(name, clip, samples, settings)
        log_mel = _log_mel(samples[: settings.max_samples], settings)
        return _normalise(log_mel, settings) if self.do_normalize else log_mel


def _mel_filters(settings: FbankSettings) -> Tensor:
    """Kaldi's mel triangles, shape (fft // 2 + 1, num_mel_bins), float32.

    torchaudio's own, so that the reference's rounding is ours too. The last row, the bin at half
    the rate, lies outside every triangle. Bin 3 of 128 falls between two bins of the transform
    and is empty: a constant in the features, as in training.
    """
    filters, _ = kaldi.get_mel_banks(
        settings.num_mel_bins,
        settings.fft_samples,
        float(settings.sample_rate_hz),
        LOW_FREQUENCY_HZ,
        0.0,  # highest frequency: half the rate
        100.0,  # the next three describe a warping that a factor of 1 switches off
        -500.0,
        1.0,
    )
    return torch.nn.functional.pad(filters, (0, 1)).T.contiguous()


def _log_mel(samples: FloatArray, settings: FbankSettings) -> FloatArray:
    """Log-mel frames of checked samples, zero rows appended, not normalised."""
    # torch warns of arrays it may not write to, and records may come with such.
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
    return log_mel


def _normalise(
    log_mel: FloatArray, settings: FbankSettings, out: FloatArray | None = None
) -> FloatArray:
    centred = np.subtract(log_mel, settings.mean, out=out)
    return np.divide(centred, settings.std * 2, out=centred)


def _check_length(samples: npt.NDArray[Any], settings: FbankSettings) -> None:
    if samples.size < settings.frame_samples:
        found = f"{samples.size} samples" if samples.size else "no samples"
        raise FeatureError(
            f"{found}; at least {settings.frame_samples} are needed, one frame of 25 ms at "
            f"{settings.sample_rate_hz} Hz."
        )


def _check_values(samples: FloatArray) -> None:
    peak = float(np.abs(samples).max())
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


def _each_clip(
    raw_speech: npt.NDArray[Any] | Tensor | Sequence[Any],
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The clips of a call with the name each has in an error message."""
    if isinstance(raw_speech, (list, tuple)) and raw_speech and _is_clip(raw_speech[0]):
        for index, clip in enumerate(raw_speech):
            name = f"raw_speech[{index}]"
            yield name, _as_vector(name, clip)
    else:
        yield "raw_speech", _as_vector("raw_speech", raw_speech)


def _is_clip(value: object) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim > 0
    return isinstance(value, (list, tuple))


def _as_vector(name: str, clip: npt.NDArray[Any] | Tensor | Sequence[Any]) -> npt.NDArray[Any]:
    if isinstance(clip, Tensor):
        clip = clip.detach().cpu()
        # numpy has no bfloat16.
        vector = clip.float().numpy() if clip.is_floating_point() else clip.numpy()
    else:
        try:
            vector = np.asarray(clip)
        except ValueError as error:
            raise ValueError(f"{name} is no vector of numbers: {error}") from error
    if vector.ndim != 1:
        raise ValueError(
            f"{name} has the shape {vector.shape}; a clip is one-dimensional (mono). Mix the "
            "channels of stereo audio down; give a batch as a list of 1-D arrays."
        )
    return vector


def _to_float32(clip: npt.NDArray[Any]) -> FloatArray:
    """Samples in [-1, 1]: floats as they are, integers as 16-bit."""
    if clip.size == 0 or np.issubdtype(clip.dtype, np.floating):
        with np.errstate(over="ignore"):  # infinite in float32: found by the check of values
            return clip.astype(np.float32, copy=False)
    if not np.issubdtype(clip.dtype, np.signedinteger) or clip.dtype.itemsize < 2:
        raise ValueError(
            f"samples are {clip.dtype}; must be floats in [-1, 1] or 16-bit integers. Convert "
            "them first: (x - 128) / 128 for unsigned 8-bit audio."
        )
    lowest, highest = int(clip.min()), int(clip.max())
    if lowest < -32768 or highest > 32767:
        raise FeatureError(
            f"integer samples reach from {lowest} to {highest}; 16-bit audio ends at -32768 and "
            "32767. Divide 24-bit audio by 2**23 and 32-bit audio by 2**31 first."
        )
    return clip.astype(np.float32) * np.float32(INT16_SCALE)


def _warn_of_doubts(
    name: str, clip: npt.NDArray[Any], samples: FloatArray, settings: FbankSettings
) -> None:
    num_frames = settings.count_frames(samples.size)
    if num_frames > settings.num_frames:
        _logger.warning(
            "%s has %d frames; only the first %d are used (max_length), as in transformers. Cut "
            "longer audio into windows.",
            name,
            num_frames,
            settings.num_frames,
        )
    if np.issubdtype(clip.dtype, np.floating) and np.abs(samples).max() > _SUSPICIOUS_PEAK:
        _logger.warning(
            "%s reaches %.4g, but floats are taken to be in [-1, 1]. If it holds 16-bit values, "
            "divide them by 32768.",
            name,
            np.abs(samples).max(),
        )


class DeviceFbank:
    """``KaldiFbank`` for windows that lie on the host, of any lengths; used where a model runs.

    Args:
        settings: The checkpoint's.
        device: Where to compute.
    """

    # Working memory of about 7 MB a window is for this many at a time.
    MAX_WINDOWS = 16

    def __init__(self, settings: FbankSettings, device: torch.device) -> None:
        self._settings = settings
        self._fbank = KaldiFbank(settings).to(device)
        self._send = Sender(device)
        self._is_pinned = device.type == "cuda"

    @timed("fbank")
    @torch.inference_mode()
    def __call__(self, windows: Sequence[FloatArray]) -> Tensor:
        """Compute the features of a batch.

        Args:
            windows: Samples that ``check_samples`` lets pass, each of shape (num_samples,).

        Returns:
            Normalised log-mel features on the device, (batch, num_frames, num_mel_bins).
        """
        shape = (len(windows), self._settings.max_samples)
        # What lies beyond a window's length has no influence, and need not be zero.
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


# Windows whose features are made before their turn: two batches of a CPU, and work for all threads.
WINDOWS_AHEAD = 8


_starting_threads = threading.Lock()


def feature_threads(num_processes: int = 1) -> ThreadPoolExecutor:
    """The process's threads for features; in each of them torch computes with one thread.

    Several threads on one window gain little, and lose much where decoders run on the same cores:
    each step of it then waits for the slowest (15 to 100 ms a window instead of 5, on two cores).

    Args:
        num_processes: Processes that share this machine's cores.
    """
    with _starting_threads:  # else two threads that ask first would each start a pool
        return _start_threads(min(threads_of(num_processes), MAX_FEATURE_THREADS))


@functools.cache
def _start_threads(num_threads: int) -> ThreadPoolExecutor:
    num_torch_threads = torch.get_num_threads()
    threads = ThreadPoolExecutor(
        num_threads,
        thread_name_prefix="earmark-features",
        initializer=_compute_alone,
    )
    # Torch's setting is of the thread that sets it, and what threads start with that come after:
    # so all of these are started now, and what others start with is as before.
    all_started = threading.Barrier(num_threads)
    list(threads.map(lambda _: all_started.wait(), range(num_threads)))
    torch.set_num_threads(num_torch_threads)
    return threads


def _compute_alone() -> None:
    """Let torch compute in this thread with no other."""
    torch.get_num_threads()  # a thread's first call takes over what others were set to
    torch.set_num_threads(1)


def _with_features(window: Window, settings: FbankSettings, out: FloatArray | None) -> Window:
    """The window with features (in ``out``) for samples, or with the reason why not.

    None as ``out`` leaves it the samples: they are only looked at.
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

    Windows in, windows out, in the same order; on a CPU their features are made by several threads,
    some windows ahead of the model. A window that cannot have features travels on with
    ``error`` set and no data, because the windows of a clip are counted. Failures, unit ends and
    windows that already carry an error pass unchanged.

    Args:
        settings: The checkpoint's.
        on_device: Says, where the step runs, whether features are made later by the device
            (``DeviceFbank``); windows then keep their samples, and are only looked at here.
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
        """Wire the step."""
        step = beam.ParDo(self._step)
        # Said to Beam explicitly: it reads no annotations that are kept as text.
        step = step.with_input_types(_Element).with_output_types(_Element)
        features: PCollection[_Element] = elements | "Compute features" >> step
        return features


@dataclasses.dataclass
class _Begun:
    """An element on its way through the step, and where in Beam's time it belongs."""

    element: _Element | Future[Window]
    window: Any
    timestamp: Any

    def finish(self) -> WindowedValue:
        """The element; waits for its features."""
        element = self.element
        if isinstance(element, Future):
            with timed("fbank"):
                element = element.result()
        return WindowedValue(element, self.timestamp, (self.window,))


class _ExtractFbankFn(beam.DoFn):
    """Runs some elements behind: their features are made while the model computes."""

    def __init__(
        self, settings: FbankSettings, on_device: Callable[[], bool], num_processes: int
    ) -> None:
        self._settings = settings
        self._asks_on_device = on_device
        self._num_processes = num_processes
        self._on_device = False
        self._begun: deque[_Begun] = deque()
        # Parts of one array, the last one first: a batch of neighbours needs no copy.
        self._free: list[FloatArray] = []

    def setup(self) -> None:
        self._on_device = self._asks_on_device()

    def start_bundle(self) -> None:
        self._begun.clear()  # a bundle before this one may have failed halfway

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
