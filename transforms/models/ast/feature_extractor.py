"""transformers' ``ASTFeatureExtractor``, over the same ``extract_fbank`` that runs use."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transforms.errors import FeatureError
from transforms.features.fbank import INT16_SCALE, check_values, extract_fbank
from transforms.features.fbank_settings import FbankSettings, without_normalising
from transforms.models.ast.config_files import load_features, write_json
from transforms.models.ast.files import FEATURES_NAME
from transforms.records import FloatArray
from transforms.storage import urls

_logger = logging.getLogger(__name__)

# Decoders overshoot full scale by a little; a float this large is 16-bit audio left unscaled.
_SUSPICIOUS_PEAK = 16.0


class BatchFeature(dict[str, Any]):
    """The output of ``ASTFeatureExtractor``: a dict whose ``input_values`` is also an attribute."""

    @property
    def input_values(self) -> Any:
        """A list of arrays (num_frames, num_mel_bins), or one array or tensor (B, …, …)."""
        return self["input_values"]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the tensors in place, as ``torch.Tensor.to`` does, and return itself."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(*args, **kwargs)
        return self


class ASTFeatureExtractor:
    """transformers' extractor, with the same arguments, attributes, outputs and numbers.

    Where the original is silently wrong, this one raises: ``ValueError`` for a wrong call (rate,
    shape, type, unknown argument) and ``FeatureError`` for samples without usable features
    (empty, shorter than 25 ms, NaN, infinite, integers beyond 16 bits). As in the original, audio
    longer than ``max_length`` frames is cut, but with a warning.

    Args:
        sampling_rate: Rate of the audio in Hz.
        max_length: Frames of the features; shorter audio is padded, longer audio cut.
        do_normalize: Apply ``(x - mean) / (2 · std)`` to the log-mel values.
        padding_value, padding_side: Only kept in the file: padding is 0, before normalising, on
            the right.
        feature_size, return_attention_mask: Only kept in the file: 1; AST takes no mask of frames.

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
        _ = self.settings  # raises for values out of range

    @property
    def settings(self) -> FbankSettings:
        """The same settings for ``extract_fbank`` and ``KaldiFbank``."""
        settings = FbankSettings(
            sample_rate_hz=self.sampling_rate,
            num_mel_bins=self.num_mel_bins,
            num_frames=self.max_length,
            mean=self.mean,
            std=self.std,
        )
        return settings if self.do_normalize else without_normalising(settings)

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
                stereo. Floats must be in [-1, 1]; integers are 16-bit and divided by 32768.
            sampling_rate: Rate of ``raw_speech`` in Hz. Without it a wrong rate goes unnoticed.
            return_tensors: ``"np"`` or ``"pt"`` for one array or tensor; None for a list of arrays.
            **unknown: Refused, where transformers ignores them.

        Returns:
            ``input_values``: always a batch, each of shape (max_length, num_mel_bins), float32.
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
        """Return the attributes and ``feature_extractor_type``, as transformers writes them."""
        return {**vars(self), "feature_extractor_type": "ASTFeatureExtractor"}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, which transformers reads too; return its path."""
        folder = os.fspath(save_directory)
        write_json(folder, FEATURES_NAME, self.to_dict())
        return [urls.join(folder, FEATURES_NAME)]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read ``preprocessor_config.json`` from a folder or from the hub.

        Keys that the constructor does not know are ignored.

        Args:
            pretrained_model_name_or_path: A local or remote folder, or a hub id, optionally
                ``id@revision``.
            revision: Replaces the one in the id.
            **overrides: Constructor arguments that replace what the file says.

        Raises:
            ModelError: There is no such file, or it does not describe an AST extractor.
        """
        features = load_features(os.fspath(pretrained_model_name_or_path), revision)
        names = inspect.signature(ASTFeatureExtractor).parameters
        known = {name: features[name] for name in names if name in features}
        return cls(**{**known, **overrides})

    def __repr__(self) -> str:
        return f"ASTFeatureExtractor {json.dumps(self.to_dict(), indent=2, sort_keys=True)}"

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            _logger.warning(
                "sampling_rate was not given to ASTFeatureExtractor, which assumes %d Hz. Give it, "
                "so that a wrong rate is noticed.",
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
            check_values(samples)
            features = extract_fbank(samples[: settings.max_samples], settings)
        except FeatureError as error:
            raise FeatureError(f"{name}: {error}") from error
        _warn_of_doubts(name, clip, samples, settings)
        return features


def _each_clip(
    raw_speech: npt.NDArray[Any] | Tensor | Sequence[Any],
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the clips of a call, each with its name in error messages."""
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
            raise ValueError(f"{name} is not a vector of numbers: {error}") from error
    if vector.ndim != 1:
        raise ValueError(
            f"{name} has the shape {vector.shape}; a clip is one-dimensional (mono). Mix the "
            "channels of stereo audio down; give a batch as a list of 1-D arrays."
        )
    return vector


def _to_float32(clip: npt.NDArray[Any]) -> FloatArray:
    """Convert samples to [-1, 1]: floats unchanged, integers as 16-bit."""
    if clip.size == 0 or np.issubdtype(clip.dtype, np.floating):
        with np.errstate(over="ignore"):  # infinite in float32, which check_values finds
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
            "%s reaches %.4g, but floats must be in [-1, 1]. If it holds 16-bit values, divide "
            "them by 32768.",
            name,
            np.abs(samples).max(),
        )
