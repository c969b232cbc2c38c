"""Batches that run out of memory or fail, and the windows that are saved."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from transforms.errors import DeviceError
from transforms.inference import safe_predictor
from transforms.inference.safe_predictor import SafePredictor
from transforms.records import FloatArray, Prediction


def features(num: int) -> FloatArray:
    return np.random.default_rng(0).normal(0, 0.5, (num, 4, 3)).astype(np.float32)


def predict_each(batch: FloatArray) -> list[Prediction]:
    return [Prediction(row[0, :2], row[0, :1], "e") for row in batch]


class MemoryLimit:
    """Predicts batches up to a size, and runs out of memory beyond it."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.sizes = limit, error, list[int]()

    def __call__(self, batch: FloatArray) -> list[Prediction]:
        self.sizes.append(len(batch))
        if len(batch) > self.limit:
            raise self.error
        return predict_each(batch)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_this_batch_and_later_ones_in_order(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    batch, predict = features(8), MemoryLimit(2, error)
    safe = SafePredictor(predict, "torch cuda bf16")
    predictions = safe(batch)
    assert predict.sizes == [8, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal([p.embedding for p in predictions], batch[:, 0, :2])
    predict.sizes = []
    assert len(safe(batch[:5])) == 5
    assert predict.sizes == [2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory on torch cuda bf16 with 8 windows a batch; continuing with 2. To start with "
        "that: --batch-size 2"
    ]


def test_a_lower_limit_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    predict = MemoryLimit(4, MemoryError())
    safe = SafePredictor(predict, "e")
    assert len(safe(features(8))) == 8
    predict.limit = 1
    assert len(safe(features(3))) == 3
    limits = [record.getMessage().partition(";")[2] for record in caplog.records]
    assert limits == [
        " continuing with 4. To start with that: --batch-size 4",
        " continuing with 1. To start with that: --batch-size 1",
    ]


def test_a_single_window_waits_for_memory_and_then_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(safe_predictor.time, "sleep", waited.append)
    safe = SafePredictor(MemoryLimit(0, torch.OutOfMemoryError("CUDA out of memory")), "e")
    with pytest.raises(DeviceError, match=r"e: out of memory with a single window \(CUDA out of"):
        safe(features(2))
    assert waited == [1.0, 5.0, 20.0]


class InTurn:
    """Raises an error in each call, or predicts where it is None; afterwards it predicts."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.sizes = list(errors), list[int]()

    def __call__(self, batch: FloatArray) -> list[Prediction]:
        self.sizes.append(len(batch))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return predict_each(batch)


@pytest.mark.parametrize(
    ("second", "outcome"),
    [
        (None, "None"),
        (torch.OutOfMemoryError("CUDA out of memory"), "None"),
        (RuntimeError("could not create a primitive"), "RuntimeError: could not create"),
        (KeyError("mask"), "KeyError: 'mask'"),
    ],
)
def test_after_waiting_for_memory_a_window_is_like_any_other(
    monkeypatch: pytest.MonkeyPatch, second: Exception | None, outcome: str
) -> None:
    monkeypatch.setattr(safe_predictor, "MEMORY_WAITS_S", (0.0, 0.0))
    predict = InTurn(torch.OutOfMemoryError("CUDA out of memory"), second)
    (prediction,) = SafePredictor(predict, "e")(features(1))
    assert str(prediction.error).startswith(outcome)


@pytest.mark.parametrize("before", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_device_that_fails_ends_the_run_whatever_came_before(
    monkeypatch: pytest.MonkeyPatch, before: Exception | None
) -> None:
    # CUDA repeats such an error for every call of the process: no window is the cause.
    monkeypatch.setattr(safe_predictor, "MEMORY_WAITS_S", (0.0, 0.0))
    predict = InTurn(before, torch.AcceleratorError("CUDA error: an illegal memory access"))
    safe = SafePredictor(predict, "torch cuda bf16")
    with pytest.raises(DeviceError, match="torch cuda bf16: the device has failed: CUDA error: an"):
        for _ in range(2):
            safe(features(1))
    assert predict.sizes == [1, 1]


def test_a_poisoned_window_is_isolated_and_the_rest_is_kept() -> None:
    sizes: list[int] = []

    def predict(batch: FloatArray) -> list[Prediction]:
        sizes.append(len(batch))
        if (batch == 99).any():
            raise ValueError("bad window\nwith a long story")
        return predict_each(batch)

    safe, batch = SafePredictor(predict, "e"), features(5)
    batch[3] = 99
    # That the first window fails does not mean that the model never works: silence is tried, once.
    for _ in range(2):
        assert [p.error for p in safe(batch[3:4])] == ["ValueError: bad window"]
    assert sizes == [1, 1, 1]
    errors = [p.error for p in safe(batch)]
    assert errors == [None, None, None, "ValueError: bad window", None]


def test_a_model_that_has_never_worked_ends_the_run() -> None:
    predict = InTurn(*[ValueError("no kernel")] * 9)
    with pytest.raises(DeviceError, match="e: the model cannot be run: ValueError: no kernel"):
        SafePredictor(predict, "e")(features(3))


def test_the_limit_of_one_thread_is_not_raised_by_another() -> None:
    """A large batch runs out of memory after a small one has lowered the limit below its half."""
    large_started, small_done = threading.Event(), threading.Event()

    def predict(batch: FloatArray) -> list[Prediction]:
        if len(batch) == 16:
            large_started.set()
            assert small_done.wait(30)
        if len(batch) > 1:
            raise MemoryError
        return predict_each(batch)

    limits: list[int] = []
    safe = SafePredictor(predict, "e", shrink=limits.append)
    batch, found = features(16), list[Prediction]()
    large = threading.Thread(target=lambda: found.extend(safe(batch)))
    large.start()
    assert large_started.wait(30)
    assert len(safe(features(2))) == 2
    small_done.set()
    large.join(30)
    np.testing.assert_array_equal([p.embedding for p in found], batch[:, 0, :2])
    assert limits == [1, 1]
    assert not safe.takes(2)
