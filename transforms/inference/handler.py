"""``ASTModelHandler``, through which ``RunInference`` runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from apache_beam.ml.inference.base import ModelHandler

from transforms.errors import DeviceError, EarmarkError, first_line
from transforms.inference.backbones import (
    InferenceSettings,
    makes_features_on_device,
    resolve_batch_size,
    resolve_device,
)
from transforms.inference.engine import Engine, MakeFeatures, load_engine
from transforms.inference.safe_predictor import RESUME_HINT
from transforms.models.ast.checkpoints import ModelSpec, load_model
from transforms.process.devices import torch_device
from transforms.process.stage_times import timed
from transforms.records import FloatArray, PendingBatch, PendingPrediction, Prediction


class ASTModelHandler(ModelHandler[Any, Any, Engine]):
    """Runs an AST checkpoint for ``RunInference``: features in, predictions out.

    An example is an array of shape (num_frames, num_mel_bins), or None, for which the result is
    None. So records without features can pass with the others, keyed by ``KeyedModelHandler``. The
    batch size is fixed, because Beam's own tuning enlarges batches until memory is exhausted.

    Args:
        make_features: If the device may make the features: returns, for a device, a function from
            a batch's samples to its features. If the device does make them
            (``makes_features_on_device``), an example is the samples of a window, of shape
            (num_samples,), which ``fbank.check_samples`` has accepted.
        runs_ahead: Return predictions that a device is still computing, as ``PendingPrediction``,
            so that it has the next batch before it has finished this one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: InferenceSettings,
        *,
        make_features: Callable[[torch.device], MakeFeatures] | None = None,
        runs_ahead: bool = False,
    ) -> None:
        # The worker's device, or the best guess of it.
        device = resolve_device("auto") if settings.device == "auto" else settings.device
        batch_size = resolve_batch_size(settings.batch_size, device)
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._spec = spec
        self._settings = settings
        self._make_features = make_features
        self._runs_ahead = runs_ahead

    @timed("load")
    def load_model(self) -> Engine:
        """Load the checkpoint; Beam calls this once per process.

        Raises:
            ModelError: The files have gone or changed since the run was planned.
            DeviceError: The model does not fit onto the device.
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
                f"--device. {RESUME_HINT}"
            ) from error

    def run_inference(
        self,
        batch: Sequence[FloatArray | None],
        model: Engine,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[Prediction | PendingPrediction | None]:
        """Predict the examples with features; None stays None."""
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
        """Namespace of RunInference's own counters."""
        return "earmark"
