"""The engine: features in, predictions out.

The backbone (``backbones``, ``engines``) computes the pooled embedding on the accelerator, in the
requested precision. The head runs separately, in float32 on the embedding exactly as it is stored,
so that stored embeddings reproduce the score of every class.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transforms.errors import EarmarkError
from transforms.inference.backbones import (
    Backbone,
    Embeddings,
    Features,
    InferenceSettings,
    Pending,
    TorchBackbone,
    embed_windows,
    resolve_device,
    start_windows,
)
from transforms.inference.engines import load_backbone
from transforms.inference.precision_check import PrecisionCheck, surroundings
from transforms.inference.safe_predictor import SafePredictor, failed_prediction
from transforms.models.ast.checkpoints import Activation, ModelSpec, load_model
from transforms.models.ast.model import ASTForAudioClassification, ASTMLPHead
from transforms.process.stage_times import LabellingStage, timed
from transforms.records import FloatArray, Prediction

MakeFeatures = Callable[[Sequence[FloatArray]], Features]

NOT_FINITE = "the model gave NaN or infinite values"


class Engine:
    """A backbone with its head; shared by the threads of a process.

    Args:
        head: The classifier; it runs on the CPU, in float32.
        activation: ``sigmoid`` for independent classes, ``softmax`` for exclusive ones.
        embedding_dtype: Type the embedding is stored in, ``float32`` or ``float16``.
        check: Checks the first predictions, or None.
        stage: Stage that its time counts for.

    Attributes:
        name: Engine, device and precision, as recorded in commits.
        make_features: Makes a batch from what ``RunInference`` collects: the features of windows,
            or their samples if the device makes the features.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ASTMLPHead,
        activation: Activation,
        embedding_dtype: str = "float32",
        check: PrecisionCheck | None = None,
        stage: LabellingStage = "model",
    ) -> None:
        self.name = backbone.name
        self.backbone = backbone
        self.head = head.to("cpu", torch.float32).eval()
        self.activation = activation
        self._hidden_size = head.dense.in_features
        self.embedding_dtype = np.dtype(embedding_dtype)
        self.lock = threading.Lock()
        self.predict_safely = SafePredictor(self.predict, self.name, self._shrink)
        self.make_features: MakeFeatures = join_features
        self._check = check
        self._stage = stage

    def label(self, features: Features) -> list[Prediction]:
        """Predict a batch and check the first predictions; raises what ``SafePredictor`` does."""
        return self._checked(features, self.predict_safely(features))

    def begin(self, features: Features) -> Callable[[], list[Prediction]] | None:
        """Start a batch on a device that computes asynchronously.

        Returns:
            A function that waits for the predictions and returns or raises what ``label`` does.
            None if there is no such device, or if it refused the batch: ``label`` finds out why.
        """
        if not self.predict_safely.takes(len(features)):
            return None
        try:
            with timed("queue"), self.lock:
                pending = start_windows(self.backbone, features)
        except EarmarkError:
            raise
        except Exception:  # whatever a model and the libraries below it may raise
            return None
        return None if pending is None else functools.partial(self._finish, features, pending)

    def _finish(self, features: Features, pending: Pending) -> list[Prediction]:
        try:
            with timed(self._stage):
                embeddings = pending()
            predictions = self._read(features, embeddings)
        except EarmarkError:
            raise
        except Exception:  # as in begin
            return self.label(features)
        return self._checked(features, predictions)

    def _checked(self, features: Features, predictions: list[Prediction]) -> list[Prediction]:
        return predictions if self._check is None else self._check(features, predictions)

    def predict(self, features: Features) -> list[Prediction]:
        """Compute a prediction per window, in order; with an error if it is not finite.

        Raises ``RuntimeError`` if the model's output has the wrong shape.
        """
        return self._read(features, self._embed(features))

    def _read(self, features: Features, embeddings: Embeddings) -> list[Prediction]:
        """Make predictions of embeddings: ``pooled`` is scored, ``stored`` is kept."""
        pooled = stored = embeddings.pooled.astype(self.embedding_dtype)
        if embeddings.patch_mean is not None:
            stored = embeddings.patch_mean.astype(self.embedding_dtype)
        _check_shape("embedding", pooled, (len(features), self._hidden_size))
        _check_shape("stored embedding", stored, pooled.shape)
        scores = score_embeddings(self.head, pooled, self.activation)
        finite = np.ones(len(features), np.bool_)
        for values in (pooled, stored, scores):
            finite &= np.isfinite(values).all(axis=1)
        if isinstance(features, np.ndarray):
            # The features too, because int8 turns NaN into a number. Features that a device made of
            # checked samples are finite.
            finite &= np.isfinite(features.reshape(len(features), -1)).all(axis=1)
        return [
            Prediction(stored[i], scores[i], self.name)
            if finite[i]
            else failed_prediction(self.name, NOT_FINITE)
            for i in range(len(features))
        ]

    def _shrink(self, batch_size: int) -> None:
        with self.lock:
            self.backbone.shrink(batch_size)

    def _embed(self, features: Features) -> Embeddings:
        with timed("queue"), self.lock, timed(self._stage):
            return embed_windows(self.backbone, features)


def join_features(windows: Sequence[FloatArray]) -> FloatArray:
    """Stack windows into a batch, without copying if they are rows of one array, as most are."""
    whole = windows[0].base
    if isinstance(whole, np.ndarray) and whole.shape[1:] == windows[0].shape:
        first = (windows[0].ctypes.data - whole.ctypes.data) // windows[0].nbytes
        part = whole[first : first + len(windows)]
        if [_place(window) for window in windows] == [_place(each) for each in part]:
            return part
    return np.stack(windows)


def _place(array: FloatArray) -> tuple[int, tuple[int, ...]]:
    """Return the address and layout of an array's memory."""
    return array.ctypes.data, array.strides


def load_engine(
    model: ASTForAudioClassification, spec: ModelSpec, settings: InferenceSettings
) -> Engine:
    """Load the engine that the settings ask for; it owns the model, a result of ``load_model``.

    Raises:
        ConfigError: The settings cannot be met.
        DeviceError: An engine requested by name cannot run this model.
        RuntimeError: The model does not fit onto the device; also MemoryError.
    """
    backbone = load_backbone(model.audio_spectrogram_transformer, spec, settings)
    return Engine(
        backbone,
        model.classifier,
        spec.activation,
        settings.embedding_dtype,
        _make_check(spec, settings, backbone.name),
    )


def load_reference(spec: ModelSpec, settings: InferenceSettings) -> Engine:
    """Load plain torch in float32 on the same device, the reference for other engines."""
    model = load_model(spec)
    plain = replace(settings, compile=False, num_processes=1)
    backbone = TorchBackbone(model.audio_spectrogram_transformer, plain, "fp32")
    return Engine(backbone, model.classifier, spec.activation, stage="check")


def _make_check(spec: ModelSpec, settings: InferenceSettings, name: str) -> PrecisionCheck | None:
    device = resolve_device(settings.device)
    if settings.check_windows == 0 or name == f"torch {device} fp32":
        return None
    depends_on = {
        "model_sha256": spec.sha256,
        "activation": spec.activation,
        "engine": name,
        "pooling": settings.pooling,
        "embedding_dtype": settings.embedding_dtype,
        "calibration": settings.quantised and settings.quantised.digest,
        **surroundings(device),
    }
    return PrecisionCheck(
        lambda: load_reference(spec, settings).predict, settings.check_windows, depends_on
    )


def _check_shape(name: str, values: npt.NDArray[np.floating], expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise RuntimeError(f"the model gave an {name} of shape {values.shape}, not {expected}")


def score_embeddings(
    head: nn.Module, embeddings: npt.NDArray[np.floating], activation: Activation
) -> FloatArray:
    """Compute the score of every class from stored embeddings, as the pipeline does.

    ``head`` is the classifier, in float32 on the CPU. Embeddings (batch, hidden_size) in float32 or
    float16 give scores (batch, num_labels) in [0, 1].
    """
    with torch.inference_mode():
        logits = head(torch.from_numpy(embeddings.astype(np.float32)))
        scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=-1)
        array: FloatArray = scores.numpy()
    return array
