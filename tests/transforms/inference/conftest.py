"""A checkpoint, its engines, and features to give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transforms.inference import openvino
from transforms.inference.backbones import InferenceSettings, QuantisedModel
from transforms.inference.engine import Engine, load_engine
from transforms.models.ast.checkpoints import ModelSpec, load_model, resolve_model
from transforms.records import FloatArray


def features(num: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 0.5, (num, 1024, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> ModelSpec:
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="module")
def quantised(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> QuantisedModel:
    transformer = load_model(spec).audio_spectrogram_transformer
    folder = tmp_path_factory.mktemp("int8")
    return openvino.quantise(transformer, spec, "pooler_output", features(8, 1), folder)


@pytest.fixture
def load(spec: ModelSpec, request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Loads an engine on the CPU, in batches of four unless told otherwise."""

    def load_one(engine: str, precision: str, **changes: Any) -> Engine:
        if precision == "int8":
            changes["quantised"] = request.getfixturevalue("quantised")
        values = {"device": "cpu", "batch_size": 4, **changes}
        settings = InferenceSettings(precision=precision, engine=engine, **values)  # type: ignore[arg-type]
        return load_engine(load_model(spec), spec, settings)

    return load_one


def break_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pooled: Any) -> Any:
        raise RuntimeError("no conversion rule for aten::new_thing\nand a page more")

    monkeypatch.setattr(openvino, "convert", refuse)
