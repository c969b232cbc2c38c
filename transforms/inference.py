"""Run AST on features: the engine that computes embeddings, and the handler RunInference calls.

The engine computes the pooled embedding on the accelerator, in the precision asked for. The
head runs apart, in float32 on the embedding exactly as it is stored, so that every class's
score can be had back from stored embeddings. One bad window never takes its batch along: a
batch that runs out of memory is halved, one that fails otherwise is tried window by window, and
what fails alone becomes a ``Prediction`` with an ``error``. Where no window can be the cause (not
even one fits into memory, the device is gone, nothing has ever worked) the run ends instead:
an error row for every item there is would be a lie, and would have to be done again anyway.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from apache_beam.ml.inference.base import ModelHandler
from torch import nn

from transforms.checkpoints import ModelSpec, load_model
from transforms.errors import ConfigError, DeviceError, EarmarkError
from transforms.records import FloatArray, Prediction
from transforms.spectrogram_transformer import ASTForAudioClassification
from transforms.stage_clocks import timed

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["auto", "torch", "openvino"]
Activation = Literal["sigmoid", "softmax"]
Pooling = Literal["pooler_output", "patch_mean"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Large enough to keep the device busy, small enough that AST base's activations
# (about 60 MB a window in float32) stay far below what the smallest devices hold.
CPU_BATCH_SIZE = 4
ACCELERATOR_BATCH_SIZE = 64

# How long to wait for others to give memory back, before a single window is tried again.
MEMORY_WAITS_S = (1.0, 5.0, 20.0)


@dataclass(frozen=True)
class InferenceSettings:
    """How to run the model.

    Attributes:
        precision: Of the backbone; the head is always float32. ``auto``: bf16 where the chip
            has it natively, fp16 on older GPUs, else fp32.
        device: ``auto`` takes cuda, then mps, then cpu. One that is asked for by name and absent
            is an error, never a silent fall-back.
        engine: What executes the model; ``auto`` takes the best that is installed.
        batch_size: Windows per call; None lets the device decide.
        pooling: What is stored as the embedding: AST's own (the mean of the class and
            distillation tokens) or the mean of the patch tokens. Scores always come from
            AST's own.
        embedding_dtype: Type the embedding is stored in.
    """

    precision: Precision = "auto"
    device: DeviceName = "auto"
    engine: EngineName = "auto"
    batch_size: int | None = None
    pooling: Pooling = "pooler_output"
    embedding_dtype: Literal["float32", "float16"] = "float32"


def resolve_device(device: DeviceName, key: str = "inference.device") -> str:
    """The device to run on, as torch names it.

    Args:
        device: What is asked for.
        key: The configuration's key that says so, for the error.

    Raises:
        ConfigError: The device was asked for by name and this machine has none.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if (device == "cuda" and not has_cuda) or (device == "mps" and not has_mps):
        found = [name for name, there in (("cuda", has_cuda), ("mps", has_mps)) if there]
        raise ConfigError(
            f"{key} is {device}; this machine has {', '.join([*found, 'cpu'])}. "
            "Use --device auto, or install the driver and a torch built for it."
        )
    return device


def resolve_precision(precision: Precision, device: str) -> str:
    """The precision to run in: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: int8, which the torch engine does not offer.
    """
    if precision == "int8":
        raise ConfigError(
            "inference.precision is int8; the torch engine offers fp32, bf16 and fp16. "
            "Use --precision auto."
        )
    if precision != "auto":
        return precision
    if device == "cuda":
        # Before compute capability 8.0 (Ampere) bf16 is emulated, and slower than fp16.
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if device == "cpu" and _cpu_has_native_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_engine(engine: EngineName) -> str:
    """The engine to run.

    Raises:
        ConfigError: The engine was asked for by name and cannot run here.
    """
    if engine == "openvino":
        installed = importlib.util.find_spec("openvino") is not None
        raise ConfigError(
            "inference.engine is openvino, which this version cannot run "
            f"(openvino is {'installed' if installed else 'not installed'}). Use --engine auto."
        )
    return "torch"


def resolve_batch_size(batch_size: int | None, device: str) -> int:
    """The number of windows per call."""
    if batch_size is not None:
        return batch_size
    return CPU_BATCH_SIZE if device == "cpu" else ACCELERATOR_BATCH_SIZE


def check_settings(settings: InferenceSettings) -> None:
    """Find out before any work whether this machine can do what is asked for.

    Raises:
        ConfigError: It cannot; names the setting and what is there.
    """
    resolve_engine(settings.engine)
    resolve_precision(settings.precision, resolve_device(settings.device))


NOT_FINITE = "the model gave NaN or infinite values"
GO_ON = "What is committed stays; the same command goes on from there."


class TorchEngine(nn.Module):
    """A loaded model on its device, in its precision; shared by the threads of a process.

    Attributes:
        name: What commits record: engine, device and precision.
    """

    def __init__(
        self, model: ASTForAudioClassification, activation: Activation, settings: InferenceSettings
    ) -> None:
        super().__init__()
        self.device = torch.device(resolve_device(settings.device))
        precision = resolve_precision(settings.precision, self.device.type)
        self.dtype = TORCH_DTYPES[precision]
        self.name = f"{resolve_engine(settings.engine)} {self.device.type} {precision}"
        self.pooling = settings.pooling
        self.embedding_dtype = np.dtype(settings.embedding_dtype)
        self.activation = activation
        self.backbone = model.audio_spectrogram_transformer.to(self.device, self.dtype).eval()
        self.head = model.classifier.to("cpu", torch.float32).eval()
        self.lock = threading.Lock()
        self.predict_safely = SafePredictor(self.predict, self.name)

    @torch.inference_mode()
    def predict(self, features: FloatArray) -> list[Prediction]:
        """Embeddings and scores of a batch.

        Args:
            features: Shape (batch, num_frames, num_mel_bins), float32, normalised.

        Returns:
            A prediction per window, in order; one that is not finite has an error.

        Raises:
            RuntimeError: The model's output has another shape than it must.
        """
        pooled, stored = self._embed(features)
        _check_shape("embedding", pooled, (len(features), *self.head.layernorm.normalized_shape))
        _check_shape("stored embedding", stored, pooled.shape)
        scores = score_embeddings(self.head, pooled, self.activation)
        finite = np.ones(len(features), np.bool_)
        for values in (pooled, stored, scores):
            finite &= np.isfinite(values).all(axis=1)
        return [
            Prediction(stored[i], scores[i], self.name)
            if finite[i]
            else failed_prediction(self.name, NOT_FINITE)
            for i in range(len(features))
        ]

    def _embed(
        self, features: FloatArray
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Pooled embeddings and those to store (the same, unless patches are pooled).

        A GPU works on its own time, and fetching what it has computed waits for it: so the stage
        ``model`` lasts until the embeddings are here, their short way back included. ``copy`` is
        converting the features to the precision and sending them to the device.
        """
        with timed("queue"), self.lock:
            with timed("copy"):
                batch = torch.from_numpy(features).to(self.device, self.dtype)
            return self._embed_batch(batch)

    @timed("model")
    def _embed_batch(
        self, batch: torch.Tensor
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        if self.pooling == "pooler_output":
            pooled = self._as_stored(self.backbone.embed(batch))
            return pooled, pooled
        output = self.backbone(batch)
        # Tokens 0 and 1 are the class and distillation tokens.
        patches = output.last_hidden_state[:, 2:].mean(dim=1)
        return self._as_stored(output.pooler_output), self._as_stored(patches)

    def _as_stored(self, embedding: torch.Tensor) -> npt.NDArray[np.floating]:
        return embedding.float().cpu().numpy().astype(self.embedding_dtype)


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
        predict: The engine's own prediction of a batch, of shape (batch, num_frames, num_mel_bins).
        engine: Its name, for predictions that carry an error and for messages.
    """

    def __init__(self, predict: Callable[[FloatArray], list[Prediction]], engine: str) -> None:
        self._predict = predict
        self._engine = engine
        self._most: int | None = None  # windows that a batch may have; None: no limit met yet
        self._too_many: int | None = None  # the batch that met it, while that is still to be said
        self._has_worked = False

    def __call__(self, features: FloatArray) -> list[Prediction]:
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
            self._predict_part(np.zeros_like(features[:1]))
        if not self._has_worked:
            raise DeviceError(
                f"{self._engine}: the model cannot be run: {predictions[0].error}. Check the "
                "installation of torch and the device's driver, or give another --device. "
                f"{GO_ON}"
            )
        return predictions

    def _predict_part(self, features: FloatArray) -> list[Prediction]:
        try:
            predictions = self._predict(features)
        except EarmarkError:
            raise
        except Exception as error:  # whatever a model and the libraries below it may raise
            if not _is_out_of_memory(error):
                return self._narrow_down(features, error)
            text = _first_line(error)
        else:
            self._has_worked = True
            self._tell_limit(len(features))
            return predictions
        # Here the error and its traceback, which hold the batch's tensors, are gone.
        return self._predict_in_parts(features, text)

    def _narrow_down(self, features: FloatArray, error: Exception) -> list[Prediction]:
        if isinstance(error, torch.AcceleratorError):
            # What CUDA says of a kernel sticks to the process: every call from here on fails.
            raise DeviceError(
                f"{self._engine}: the device has failed: {_first_line(error)}. {GO_ON}"
            ) from error
        if len(features) == 1:
            text = f"{type(error).__name__}: {_first_line(error)}"
            return [failed_prediction(self._engine, text)]
        half = len(features) // 2
        return [*self._predict_part(features[:half]), *self._predict_part(features[half:])]

    def _predict_in_parts(self, features: FloatArray, error: str) -> list[Prediction]:
        """Predict what did not fit into memory."""
        _release_memory()
        if len(features) == 1:
            return self._wait_for_memory(features, error)
        self._too_many = self._too_many or len(features)
        half = self._most = len(features) // 2
        predictions = self._predict_part(features[:half])
        while len(predictions) < len(features):
            start = len(predictions)
            predictions += self._predict_part(features[start : start + self._most])
        return predictions

    def _wait_for_memory(self, features: FloatArray, error: str) -> list[Prediction]:
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


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError ("DefaultCPUAllocator: can't allocate memory").
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def _release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


class ASTModelHandler(ModelHandler[Any, Any, TorchEngine]):
    """Gives ``RunInference`` an AST checkpoint: features in, predictions out.

    An example is an array of shape (num_frames, num_mel_bins), or None, which gives None back:
    so that records without features can travel with the others, keyed by ``KeyedModelHandler``.
    The batch size is fixed, because Beam's own tuning grows batches until memory ends.

    Args:
        spec: The checkpoint.
        settings: How to run it.
    """

    def __init__(self, spec: ModelSpec, settings: InferenceSettings) -> None:
        batch_size = resolve_batch_size(settings.batch_size, _likely_device(settings.device))
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._spec = spec
        self._settings = settings

    @timed("load")
    def load_model(self) -> TorchEngine:
        """Load the checkpoint; once per process, by Beam's own keeping.

        Raises:
            ModelError: Its files have gone or changed since the run was planned.
            DeviceError: The device cannot hold it.
        """
        model = load_model(self._spec)
        try:
            return TorchEngine(model, self._spec.activation, self._settings)
        except (RuntimeError, MemoryError) as error:
            device = resolve_device(self._settings.device)
            raise DeviceError(
                f"{device}: the model cannot be loaded onto it: {_first_line(error)}. Free the "
                "device's memory (on a GPU, nvidia-smi lists who uses it), or give another "
                f"--device. {GO_ON}"
            ) from error

    def run_inference(
        self,
        batch: Sequence[FloatArray | None],
        model: TorchEngine,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[Prediction | None]:
        """Predict what has features; None stays None."""
        features = [example for example in batch if example is not None]
        predictions = iter(model.predict_safely(np.stack(features)) if features else ())
        return [None if example is None else next(predictions) for example in batch]

    def get_num_bytes(self, batch: Sequence[FloatArray | None]) -> int:
        """Bytes of features in the batch; Beam's default would pickle it to find out."""
        return sum(example.nbytes for example in batch if example is not None)

    def get_metrics_namespace(self) -> str:
        """Where RunInference's own counters are found."""
        return "earmark"


def _likely_device(device: DeviceName) -> str:
    """The device a worker will take: the one asked for, else this machine's own."""
    return resolve_device("auto") if device == "auto" else device
