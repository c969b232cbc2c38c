"""Run AST on features: the engine that computes predictions, and the handler RunInference calls.

The backbone (``backbones``, ``engines``) computes the pooled embedding on the accelerator, in the
precision asked for. The head runs apart, in float32 on the embedding exactly as it is stored, so
that every class's score can be had back from stored embeddings. One bad window never takes its
batch along: a batch that runs out of memory is halved, one that fails otherwise is tried window by
window, and what fails alone becomes a ``Prediction`` with an ``error``. Where no window can be the
cause (not even one fits into memory, the device is gone, nothing has ever worked) the run ends
instead: an error row for every item there is would be a lie, and have to be done again anyway.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from apache_beam.ml.inference.base import ModelHandler
from torch import nn

from transforms.errors import DeviceError, EarmarkError
from transforms.inference.backbones import (
    Activation,
    Backbone,
    DeviceName,
    Embeddings,
    Features,
    InferenceSettings,
    Pending,
    TorchBackbone,
    embed_windows,
    first_line,
    makes_features_on_device,
    resolve_batch_size,
    resolve_device,
    start_windows,
)
from transforms.inference.engines import load_backbone
from transforms.inference.precision_check import PrecisionCheck, surroundings
from transforms.models.ast.checkpoints import ModelSpec, load_model
from transforms.models.ast.model import ASTForAudioClassification, ASTMLPHead
from transforms.process.devices import torch_device
from transforms.process.stage_times import LabellingStage, timed
from transforms.records import FloatArray, PendingBatch, PendingPrediction, Prediction

logger = logging.getLogger(__name__)

# How long to wait for others to give memory back, before a single window is tried again.
MEMORY_WAITS_S = (1.0, 5.0, 20.0)

MakeFeatures = Callable[[Sequence[FloatArray]], Features]

NOT_FINITE = "the model gave NaN or infinite values"
GO_ON = "What is committed stays; the same command goes on from there."


class Engine:
    """A backbone with its head, in the words of predictions; shared by the threads of a process.

    Args:
        backbone: What computes embeddings.
        head: The classifier; it runs on the CPU, in float32.
        activation: ``sigmoid`` for independent classes, ``softmax`` for exclusive ones.
        embedding_dtype: Type the embedding is stored in, ``float32`` or ``float16``.
        check: What looks at the first predictions, or None.
        stage: What its time counts as.

    Attributes:
        name: What commits record: engine, device and precision.
        make_features: Makes a batch of what ``RunInference`` collects: windows' features, or
            samples where the device makes features itself.
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
        """Predictions of a batch, whatever happens to single windows; the first ones are checked.

        Raises:
            DeviceError: No window can be the cause; see ``SafePredictor``.
        """
        return self._checked(features, self.predict_safely(features))

    def begin(self, features: Features) -> Callable[[], list[Prediction]] | None:
        """Give a batch to a device that computes by itself.

        Returns:
            What waits for the predictions that ``label`` gives, and may raise what that does. None
            where there is no such device, or where it did not take the batch: ``label`` finds out
            what is wrong with it.
        """
        pending = self._start(features)
        return None if pending is None else functools.partial(self._finish, features, pending)

    def _start(self, features: Features) -> Pending | None:
        if not self.predict_safely.takes(len(features)):
            return None
        try:
            with timed("queue"), self.lock:
                return start_windows(self.backbone, features)
        except EarmarkError:
            raise
        except Exception:  # whatever a model and the libraries below it may raise
            return None

    def _finish(self, features: Features, pending: Pending) -> list[Prediction]:
        try:
            with timed(self._stage):
                embeddings = pending()
            predictions = self._read(features, *self._convert(embeddings))
        except EarmarkError:
            raise
        except Exception:  # as in _start
            return self.label(features)
        return self._checked(features, predictions)

    def _checked(self, features: Features, predictions: list[Prediction]) -> list[Prediction]:
        return predictions if self._check is None else self._check(features, predictions)

    def predict(self, features: Features) -> list[Prediction]:
        """Embeddings and scores of a batch.

        Args:
            features: Normalised; see ``Features``.

        Returns:
            A prediction per window, in order; one that is not finite has an error.

        Raises:
            RuntimeError: The model's output has another shape than it must.
        """
        return self._read(features, *self._embed(features))

    def _read(
        self,
        features: Features,
        pooled: npt.NDArray[np.floating],
        stored: npt.NDArray[np.floating],
    ) -> list[Prediction]:
        """What embeddings say."""
        _check_shape("embedding", pooled, (len(features), self._hidden_size))
        _check_shape("stored embedding", stored, pooled.shape)
        scores = score_embeddings(self.head, pooled, self.activation)
        finite = np.ones(len(features), np.bool_)
        for values in (pooled, stored, scores):
            finite &= np.isfinite(values).all(axis=1)
        if isinstance(features, np.ndarray):
            # The features too, because int8 makes a number of NaN. What a device has made of
            # samples that were looked at is finite.
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

    def _embed(
        self, features: Features
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        with timed("queue"), self.lock, timed(self._stage):
            embeddings = embed_windows(self.backbone, features)
        return self._convert(embeddings)

    def _convert(
        self, embeddings: Embeddings
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Pooled embeddings and those to store (the same, unless patches are pooled)."""
        pooled = embeddings.pooled.astype(self.embedding_dtype)
        if embeddings.patch_mean is None:
            return pooled, pooled
        return pooled, embeddings.patch_mean.astype(self.embedding_dtype)


def join_features(windows: Sequence[FloatArray]) -> FloatArray:
    """Arrays of one shape as one with an axis more; without a copy where it is there already.

    ``fbank`` puts the features of windows that follow each other into one array, which most batches
    are a part of.
    """
    whole = windows[0].base
    if isinstance(whole, np.ndarray) and whole.shape[1:] == windows[0].shape:
        first = (windows[0].ctypes.data - whole.ctypes.data) // windows[0].nbytes
        part = whole[first : first + len(windows)]
        if [_place(window) for window in windows] == [_place(each) for each in part]:
            return part
    return np.stack(windows)


def _place(array: FloatArray) -> tuple[int, tuple[int, ...]]:
    """Where an array's numbers lie in memory."""
    return array.ctypes.data, array.strides


def load_engine(
    model: ASTForAudioClassification, spec: ModelSpec, settings: InferenceSettings
) -> Engine:
    """The engine that the settings ask for.

    Args:
        model: The checkpoint as ``load_model`` gives it; it is the engine's from here on.
        spec: The checkpoint.
        settings: How to run it.

    Raises:
        ConfigError: The settings cannot be met.
        DeviceError: An engine that was asked for by name cannot run this model.
        RuntimeError: The device cannot hold it; also MemoryError.
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
    """Plain torch in float32 on the same device, which other engines are checked against."""
    model = load_model(spec)
    plain = replace(settings, compile=False, num_processes=1)
    backbone = TorchBackbone(model.audio_spectrogram_transformer, plain, "fp32")
    return Engine(backbone, model.classifier, spec.activation, stage="check")


def _make_check(spec: ModelSpec, settings: InferenceSettings, name: str) -> PrecisionCheck | None:
    device = resolve_device(settings.device)
    if settings.check_windows == 0 or name == f"torch {device} fp32":
        return None

    def load_predict() -> Callable[[FloatArray], list[Prediction]]:
        return load_reference(spec, settings).predict

    depends_on = {
        "model_sha256": spec.sha256,
        "activation": spec.activation,
        "engine": name,
        "pooling": settings.pooling,
        "embedding_dtype": settings.embedding_dtype,
        "calibration": settings.quantised and settings.quantised.digest,
        **surroundings(device),
    }
    return PrecisionCheck(load_predict, settings.check_windows, depends_on)


def _check_shape(name: str, values: npt.NDArray[np.floating], expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise RuntimeError(f"the model gave an {name} of shape {values.shape}, not {expected}")


def score_embeddings(
    head: nn.Module, embeddings: npt.NDArray[np.floating], activation: Activation
) -> FloatArray:
    """Every class's score from stored embeddings, as the pipeline itself computes it.

    Args:
        head: The classifier: LayerNorm and Linear, float32, on the CPU.
        embeddings: Shape (batch, hidden_size), float32 or float16.
        activation: ``sigmoid`` for independent classes, ``softmax`` for exclusive ones.

    Returns:
        Shape (batch, num_labels), float32, in [0, 1].
    """
    with torch.inference_mode():
        logits = head(torch.from_numpy(embeddings.astype(np.float32)))
        scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=-1)
        array: FloatArray = scores.numpy()
    return array


def failed_prediction(engine: str, error: str) -> Prediction:
    """A prediction that says why there is none."""
    return Prediction(np.empty(0, np.float32), np.empty(0, np.float32), engine, error)


class SafePredictor:
    """Predicts batches whatever happens to single windows of them.

    All windows have one shape, so that the memory of a batch follows from its size alone. Out of
    memory halves the batch, and what fits is kept to from then on. Any other failure is narrowed
    down to the windows that cause it, and those become predictions with an error.

    Args:
        predict: The engine's own prediction of a batch.
        engine: Its name, for predictions that carry an error and for messages.
        shrink: Told how many windows a batch may have from now on, where one did not fit.
    """

    def __init__(
        self,
        predict: Callable[[Features], list[Prediction]],
        engine: str,
        shrink: Callable[[int], None] | None = None,
    ) -> None:
        self._predict = predict
        self._engine = engine
        self._shrink = shrink
        self._most: int | None = None  # windows that a batch may have; None: no limit met yet
        self._too_many: int | None = None  # the batch that met it, while that is still to be said
        self._has_worked = False

    def takes(self, num_windows: int) -> bool:
        """Whether a batch of so many windows may fit into memory, for all that is known."""
        return self._most is None or num_windows <= self._most

    def __call__(self, features: Features) -> list[Prediction]:
        """Predict a batch; a prediction per window, in order.

        Raises:
            DeviceError: No window can be the cause: there is not enough memory for a single one,
                the device has failed, or nothing has ever worked, a silent window included.
        """
        predictions: list[Prediction] = []
        while len(predictions) < len(features):
            start = len(predictions)
            predictions += self._predict_part(
                features[start : start + (self._most or len(features))]
            )
        if not self._has_worked:
            # Any of these windows may be at fault, but not this one.
            self._predict_part(_silence_like(features[:1]))
        if not self._has_worked:
            raise DeviceError(
                f"{self._engine}: the model cannot be run: {predictions[0].error}. Check the "
                "installation of torch and the device's driver, or give another --device. "
                f"{GO_ON}"
            )
        return predictions

    def _predict_part(self, features: Features) -> list[Prediction]:
        try:
            predictions = self._predict(features)
        except EarmarkError:
            raise
        except Exception as error:  # whatever a model and the libraries below it may raise
            if not _is_out_of_memory(error):
                return self._narrow_down(features, error)
            text = first_line(error)
        else:
            self._has_worked = True
            self._tell_limit(len(features))
            return predictions
        # Here the error and its traceback, which hold the batch's tensors, are gone.
        return self._predict_in_parts(features, text)

    def _narrow_down(self, features: Features, error: Exception) -> list[Prediction]:
        if isinstance(error, torch.AcceleratorError):
            # What CUDA says of a kernel sticks to the process: every call from here on fails.
            raise DeviceError(
                f"{self._engine}: the device has failed: {first_line(error)}. {GO_ON}"
            ) from error
        if len(features) == 1:
            text = f"{type(error).__name__}: {first_line(error)}"
            return [failed_prediction(self._engine, text)]
        half = len(features) // 2
        return [*self._predict_part(features[:half]), *self._predict_part(features[half:])]

    def _predict_in_parts(self, features: Features, error: str) -> list[Prediction]:
        """Predict what did not fit into memory."""
        _release_memory()
        if len(features) == 1:
            return self._wait_for_memory(features, error)
        self._too_many = self._too_many or len(features)
        half = self._most = len(features) // 2
        if self._shrink is not None:
            self._shrink(half)
        predictions = self._predict_part(features[:half])
        while len(predictions) < len(features):
            start = len(predictions)
            predictions += self._predict_part(features[start : start + self._most])
        return predictions

    def _wait_for_memory(self, features: Features, error: str) -> list[Prediction]:
        """Try a single window again after a while: others may be using the same device."""
        for wait_s in MEMORY_WAITS_S:
            time.sleep(wait_s)
            try:
                predictions = self._predict(features)
            except EarmarkError:
                raise
            except Exception as again:  # as in _predict_part
                if not _is_out_of_memory(again):
                    return self._narrow_down(features, again)
            else:
                self._has_worked = True
                self._tell_limit(1)
                return predictions
            _release_memory()
        raise DeviceError(
            f"{self._engine}: out of memory with a single window ({error}). Free the device's "
            "memory (on a GPU, nvidia-smi lists who uses it), or give another --device. "
            f"{GO_ON}"
        )

    def _tell_limit(self, num_windows: int) -> None:
        """Say once what a batch that was too large has come to."""
        if self._too_many is not None:
            logger.warning(
                "Out of memory on %s with %d windows a batch; going on with %d. To begin so: "
                "--batch-size %d",
                self._engine,
                self._too_many,
                num_windows,
                num_windows,
            )
            self._too_many = None


def _silence_like(features: Features) -> Features:
    if isinstance(features, torch.Tensor):
        return torch.zeros_like(features)
    return np.zeros_like(features)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError ("DefaultCPUAllocator: can't allocate memory"),
    # and so does OpenVINO (it passes on "std::bad_alloc").
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def _release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


class ASTModelHandler(ModelHandler[Any, Any, Engine]):
    """Gives ``RunInference`` an AST checkpoint: features in, predictions out.

    An example is an array of shape (num_frames, num_mel_bins), or None, which gives None back:
    so that records without features can travel with the others, keyed by ``KeyedModelHandler``.
    The batch size is fixed, because Beam's own tuning grows batches until memory ends.

    Args:
        spec: The checkpoint.
        settings: How to run it.
        make_features: Given where features may be made by the device: makes, for a device, what
            turns a batch's samples into its features. Where they are made there
            (``makes_features_on_device``), an example is the samples of a window instead, of shape
            (num_samples,), as ``fbank.check_samples`` lets them pass.
        runs_ahead: Give predictions that a device is still computing, as ``PendingPrediction``,
            so that it has the next batch before it is done with this one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: InferenceSettings,
        *,
        make_features: Callable[[torch.device], MakeFeatures] | None = None,
        runs_ahead: bool = False,
    ) -> None:
        batch_size = resolve_batch_size(settings.batch_size, _likely_device(settings.device))
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._spec = spec
        self._settings = settings
        self._make_features = make_features
        self._runs_ahead = runs_ahead

    @timed("load")
    def load_model(self) -> Engine:
        """Load the checkpoint; once per process, by Beam's own keeping.

        Raises:
            ModelError: Its files have gone or changed since the run was planned.
            DeviceError: The device cannot hold it.
        """
        model = load_model(self._spec)
        try:
            engine = load_engine(model, self._spec, self._settings)
            if self._make_features is not None and makes_features_on_device(self._settings):
                device = torch_device(resolve_device(self._settings.device))
                engine.make_features = self._make_features(device)
            return engine
        except EarmarkError:
            raise
        except (RuntimeError, MemoryError) as error:
            where = resolve_device(self._settings.device)
            raise DeviceError(
                f"{where}: the model cannot be loaded onto it: {first_line(error)}. Free the "
                "device's memory (on a GPU, nvidia-smi lists who uses it), or give another "
                f"--device. {GO_ON}"
            ) from error

    def run_inference(
        self,
        batch: Sequence[FloatArray | None],
        model: Engine,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[Prediction | PendingPrediction | None]:
        """Predict what has features; None stays None."""
        examples = [example for example in batch if example is not None]
        if not examples:
            return [None] * len(batch)
        found = iter(self._predict(examples, model))
        return [None if example is None else next(found) for example in batch]

    def _predict(
        self, examples: Sequence[FloatArray], engine: Engine
    ) -> Sequence[Prediction | PendingPrediction]:
        features = engine.make_features(examples)
        begun = engine.begin(features) if self._runs_ahead else None
        if begun is None:
            return engine.label(features)
        pending = PendingBatch(begun)
        return [PendingPrediction(pending, index) for index in range(len(examples))]

    def get_num_bytes(self, batch: Sequence[FloatArray | None]) -> int:
        """Bytes of examples in the batch; Beam's default would pickle it to find out."""
        return sum(example.nbytes for example in batch if example is not None)

    def get_metrics_namespace(self) -> str:
        """Where RunInference's own counters are found."""
        return "earmark"


def _likely_device(device: DeviceName) -> str:
    """The device a worker will take: the one asked for, else this machine's own."""
    return resolve_device("auto") if device == "auto" else device
