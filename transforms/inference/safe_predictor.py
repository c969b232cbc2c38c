"""Predictions of a batch, whatever happens to single windows of it.

One bad window never costs its batch: a batch that runs out of memory is halved, a batch that fails
otherwise is tried window by window, and a window that fails alone becomes a ``Prediction`` with an
``error``. If no window can be the cause (not even one fits into memory, the device has failed,
nothing has ever worked), the run ends instead: an error row for every item would be wrong, and all
of them would have to be labelled again anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from transforms.errors import DeviceError, EarmarkError, first_line
from transforms.inference.backbones import Features
from transforms.records import Prediction

logger = logging.getLogger(__name__)

# How long to wait for others to free memory before a single window is tried again.
MEMORY_WAITS_S = (1.0, 5.0, 20.0)

RESUME_HINT = "Committed results are kept; run the same command again to resume."


def failed_prediction(engine: str, error: str) -> Prediction:
    """Return a prediction that holds only an error."""
    return Prediction(np.empty(0, np.float32), np.empty(0, np.float32), engine, error)


class SafePredictor:
    """Predicts batches whatever happens to single windows; shared by the threads of a process.

    All windows have one shape, so the memory of a batch depends on its size alone. After running
    out of memory, the size that fits is the limit from then on.

    Args:
        engine: Its name, for failed predictions and messages.
        shrink: Called with the new limit when a batch did not fit.
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
        self._lock = threading.Lock()  # of the limit, which threads may lower at the same time
        self._limit: int | None = None  # windows of a batch; None as long as every batch has fit
        self._too_many: int | None = None  # the batch that did not fit, until that is logged
        self._has_worked = False

    def takes(self, num_windows: int) -> bool:
        """Return whether a batch of this size may fit into memory, as far as is known."""
        return self._limit is None or num_windows <= self._limit

    def __call__(self, features: Features) -> list[Prediction]:
        """Predict a batch; a prediction per window, in order.

        Raises ``DeviceError`` if no window can be the cause: not even one fits into memory, the
        device has failed, or nothing has ever worked, not even a silent window.
        """
        predictions = self._predict_parts(features)
        if not self._has_worked:
            # Any of these windows may be the cause, but not this one.
            self._predict_part(_silence_like(features[:1]))
        if not self._has_worked:
            raise DeviceError(
                f"{self._engine}: the model cannot be run: {predictions[0].error}. Check the "
                "installation of torch and the device's driver, or give another --device. "
                f"{RESUME_HINT}"
            )
        return predictions

    def _predict_parts(self, features: Features) -> list[Prediction]:
        predictions: list[Prediction] = []
        while len(predictions) < len(features):
            start = len(predictions)
            part = features[start : start + (self._limit or len(features))]
            predictions += self._predict_part(part)
        return predictions

    def _predict_part(self, features: Features) -> list[Prediction]:
        found = self._try(features)
        if not isinstance(found, str):
            return found
        if len(features) == 1:
            return self._wait_for_memory(features, found)
        self._lower_limit(len(features))
        return self._predict_parts(features)

    def _try(self, features: Features) -> list[Prediction] | str:
        """Predict a batch; return the error's text if it does not fit into memory."""
        try:
            predictions = self._predict(features)
        except EarmarkError:
            raise
        except Exception as error:  # whatever a model and the libraries below it may raise
            if not _is_out_of_memory(error):
                return self._narrow_down(features, error)
            text = first_line(error)
        else:
            self._record_success()
            return predictions
        # By now the error is gone, and its traceback, which holds the batch's tensors.
        _release_memory()
        return text

    def _narrow_down(self, features: Features, error: Exception) -> list[Prediction]:
        if isinstance(error, torch.AcceleratorError):
            # After an error in a CUDA kernel every further call of the process fails.
            raise DeviceError(
                f"{self._engine}: the device has failed: {first_line(error)}. {RESUME_HINT}"
            ) from error
        if len(features) == 1:
            text = f"{type(error).__name__}: {first_line(error)}"
            return [failed_prediction(self._engine, text)]
        half = len(features) // 2
        return [*self._predict_part(features[:half]), *self._predict_part(features[half:])]

    def _lower_limit(self, num_windows: int) -> None:
        """Halve the batch that did not fit; the limit never rises."""
        with self._lock:
            half = num_windows // 2
            self._limit = half if self._limit is None else min(self._limit, half)
            self._too_many = self._too_many or num_windows
            if self._shrink is not None:
                self._shrink(self._limit)

    def _wait_for_memory(self, features: Features, error: str) -> list[Prediction]:
        """Try a single window again after a while: others may be using the same device."""
        for wait_s in MEMORY_WAITS_S:
            time.sleep(wait_s)
            found = self._try(features)
            if not isinstance(found, str):
                return found
        raise DeviceError(
            f"{self._engine}: out of memory with a single window ({error}). Free the device's "
            "memory (on a GPU, nvidia-smi lists who uses it), or give another --device. "
            f"{RESUME_HINT}"
        )

    def _record_success(self) -> None:
        """Note that the model works, and log a new limit once."""
        self._has_worked = True
        if self._too_many is None:
            return
        with self._lock:
            too_many, self._too_many = self._too_many, None
        if too_many is not None:
            logger.warning(
                "Out of memory on %s with %d windows a batch; continuing with %d. To start with "
                "that: --batch-size %d",
                self._engine,
                too_many,
                self._limit,
                self._limit,
            )


def _silence_like(features: Features) -> Features:
    if isinstance(features, torch.Tensor):
        return torch.zeros_like(features)
    return np.zeros_like(features)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError ("DefaultCPUAllocator: can't allocate memory"),
    # and so does OpenVINO ("std::bad_alloc").
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def _release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
