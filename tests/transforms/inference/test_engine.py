"""The engine and the handler: scores, embeddings, and what passes through."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that

from tests.support.model_factory import write_tiny_model
from tests.transforms.inference.conftest import features
from transforms.errors import ConfigError
from transforms.inference.backbones import (
    Embeddings,
    InferenceSettings,
    resolve_batch_size,
    resolve_device,
    resolve_precision,
)
from transforms.inference.engine import NOT_FINITE, Engine, join_features
from transforms.inference.engines import choose_engine
from transforms.inference.handler import ASTModelHandler
from transforms.models.ast.checkpoints import ModelSpec, resolve_model
from transforms.records import FloatArray, Prediction

FP32 = InferenceSettings(precision="fp32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def engine(spec: ModelSpec) -> Engine:
    return ASTModelHandler(spec, FP32).load_model()


def test_consecutive_rows_are_stacked_without_a_copy() -> None:
    whole = features(4)
    for start, stop in ((0, 4), (1, 3), (3, 4)):
        joined = join_features(list(whole)[start:stop])
        np.testing.assert_array_equal(joined, whole[start:stop])
        assert np.shares_memory(joined, whole)


@pytest.mark.parametrize(
    "pick",
    [
        lambda whole: [whole[1], whole[0]],
        lambda whole: [whole[0], whole[2]],
        lambda whole: [whole[3], whole[0].copy()],
        lambda whole: [whole[0], features(1, seed=1)[0]],
        lambda whole: [whole[0].copy(), whole[1]],
        lambda whole: [whole[0, :128].T, whole[1, :128].T],
        lambda whole: [whole[0, ::-1], whole[1, ::-1]],
    ],
)
def test_windows_from_different_arrays_are_stacked_by_a_copy(
    pick: Callable[[FloatArray], list[FloatArray]],
) -> None:
    windows = pick(features(4))
    np.testing.assert_array_equal(join_features(windows), np.stack(windows))


def test_softmax_models_score_with_a_softmax(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", problem_type="single_label_classification")
    engine = ASTModelHandler(resolve_model(str(folder)), FP32).load_model()
    assert engine.predict(features(1))[0].scores.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 32), (2, 31)])
def test_an_output_of_another_shape_is_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(Engine, "_embed", lambda self, batch: Embeddings(np.zeros(shape)))
    with pytest.raises(RuntimeError, match=re.escape(f"of shape {shape}, not (2, 32)")):
        engine.predict(features(2))


def test_a_stored_embedding_that_is_not_finite_is_an_error_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The patches' mean is stored; the scores come from another vector, which may be finite.
    stored = np.zeros((3, 32), np.float32)
    stored[1, 0] = np.inf
    monkeypatch.setattr(Engine, "_embed", lambda *_: Embeddings(np.zeros_like(stored), stored))
    assert [p.error for p in engine.predict(features(3))] == [None, NOT_FINITE, None]


def test_a_missing_device_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=r"inference\.device is cuda; this machine has"):
        resolve_device("cuda")


def test_automatic_settings() -> None:
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "mps") == "fp32"
    assert choose_engine(InferenceSettings(device="cpu", precision="fp32")).engine == "torch"
    assert (resolve_batch_size(3, "cpu"), resolve_batch_size(None, "cuda")) == (3, 64)


def test_run_inference_passes_records_without_features(spec: ModelSpec) -> None:
    batch = features(6)
    elements = [(str(i), None if i % 3 == 1 else batch[i]) for i in range(6)]

    def check(actual: list[tuple[str, Prediction | None]]) -> None:
        assert [key for key, _ in actual] == [key for key, _ in elements]
        assert [p is None for _, p in actual] == [i % 3 == 1 for i in range(6)]

    with TestPipeline(runner="FnApiRunner") as pipeline:
        predictions = (
            pipeline
            | beam.Create([elements])
            | beam.FlatMap(list)
            | RunInference(KeyedModelHandler(ASTModelHandler(spec, FP32)))
        )
        assert_that(predictions, check)


def test_the_handler_counts_bytes_without_pickling(spec: ModelSpec) -> None:
    handler = ASTModelHandler(spec, FP32)
    assert handler.get_num_bytes([features(1)[0], None]) == 1024 * 128 * 4
    assert handler.batch_elements_kwargs() == {"min_batch_size": 4, "max_batch_size": 4}


@pytest.mark.gpu
def test_half_precision_on_a_gpu_stays_close_to_float32(spec: ModelSpec, needs_gpu: None) -> None:
    gpu = ASTModelHandler(spec, InferenceSettings(device="cuda")).load_model()
    cpu = ASTModelHandler(spec, FP32).load_model()
    batch = features(8)
    np.testing.assert_allclose(
        [p.scores for p in gpu.predict(batch)], [p.scores for p in cpu.predict(batch)], atol=0.02
    )
