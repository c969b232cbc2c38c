"""The choice of an engine, and engines that cannot be used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.transforms.inference.conftest import break_conversion
from transforms.errors import ConfigError, DeviceError
from transforms.inference import backbones, engines, openvino
from transforms.inference.backbones import (
    InferenceSettings,
    QuantisedModel,
)
from transforms.inference.engine import Engine
from transforms.inference.engines import choose_engine

pytestmark = pytest.mark.usefixtures("openvino_as_installed")


def choose(**values: Any) -> str:
    return choose_engine(InferenceSettings(**{"device": "cpu", **values})).name


def with_packages(monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda name: name in there)


def test_auto_is_openvino_on_a_cpu_if_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(precision="fp32") == "openvino cpu fp32"
    assert choose(precision="fp32", engine="torch") == "torch cpu fp32"
    with_packages(monkeypatch)
    assert choose(precision="fp32") == "torch cpu fp32"


def test_on_a_gpu_auto_is_torch_and_int8_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "resolve_device", lambda device: "cuda")
    assert choose(precision="fp32", device="cuda") == "torch cuda fp32"
    with pytest.raises(ConfigError, match=r"int8.*the device is cuda.*use --device cpu"):
        choose(precision="int8", device="cuda")


def test_auto_is_torch_if_openvino_lacks_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PlainCore:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "load_core", PlainCore)
    assert choose(precision="bf16") == "torch cpu bf16"
    assert choose(precision="fp32") == "openvino cpu fp32"
    with pytest.raises(ConfigError, match="does not support bf16 natively; use --precision"):
        choose(precision="bf16", engine="openvino")


@pytest.mark.parametrize(
    ("facts", "is_native"),
    [
        ({"flags": "avx2 avx512f avx512_bf16 avx512vl"}, True),
        ({"flags": "avx512f amx_bf16 amx_tile"}, True),
        ({"flags": "avx2 avx512f avx512vl"}, False),
        ({"Features": "asimd bf16"}, False),  # Arm
        ({}, False),
    ],
)
def test_bfloat16_on_a_cpu_depends_on_the_processor_s_flags(
    facts: dict[str, str], is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "processor_facts", lambda: facts)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)  # private, so they may go
    assert backbones.cpu_has_native_bf16() == is_native
    assert choose(engine="torch") == ("torch cpu bf16" if is_native else "torch cpu fp32")


@pytest.mark.parametrize(
    ("settings", "packages", "words"),
    [
        ({"engine": "onnx"}, (), r"engine is onnx; must be auto or one of openvino, torch\."),
        (
            {"engine": "openvino"},
            (),
            r"openvino: not installed: openvino; run pip install '.\[openvino\]' in ",
        ),
        ({"precision": "int8"}, (), r"precision is int8.*openvino: not installed: openvino, nncf;"),
        ({"precision": "int8"}, ("openvino",), r"not installed: nncf; run pip install"),
        ({"precision": "int8", "engine": "torch"}, (), r"torch: it has no int8; use --precision"),
    ],
)
def test_settings_that_cannot_be_met_are_errors_with_a_next_step(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    packages: tuple[str, ...],
    words: str,
) -> None:
    with_packages(monkeypatch, *packages)
    with pytest.raises(ConfigError, match=words):
        choose(**{"precision": "fp32", **settings})


def test_int8_without_a_calibrated_model_is_an_error() -> None:
    settings = InferenceSettings(quantised=QuantisedModel("/nowhere/model.xml", "0", 1))
    with pytest.raises(ConfigError, match="this machine has no model calibrated for it"):
        openvino.load_backbone(None, None, settings, "int8")  # type: ignore[arg-type]


def test_a_model_that_openvino_cannot_convert_runs_in_torch_with_a_warning_or_is_an_error(
    load: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("EARMARK_CACHE", str(tmp_path))
    break_conversion(monkeypatch)
    assert load("auto", "fp32").name == "torch cpu fp32"
    assert [record.getMessage() for record in caplog.records] == [
        "openvino cpu fp32 cannot run this model (no conversion rule for aten::new_thing), so "
        "torch does. To skip the attempt: --engine torch"
    ]
    with pytest.raises(DeviceError, match="openvino cpu fp32: the model cannot be run: no conver"):
        load("openvino", "fp32")


def test_openvino_sends_no_telemetry() -> None:
    openvino.import_library("openvino")
    telemetry = sys.modules["openvino.tools.ovc.telemetry_utils"].tm
    assert telemetry.__name__ == "openvino.tools.ovc.telemetry_stub"


DESTROYED_IN_A_THREAD = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as under nohup
import torch
from transforms.inference import openvino as openvino_engine
from transforms.inference.backbones import InferenceSettings

openvino = openvino_engine.import_library("openvino")
model = openvino.convert_model(torch.nn.ReLU(), example_input=torch.zeros(2, 3, 4))
model.reshape([-1, 3, 4])
held = [openvino_engine.OpenVinoBackbone(model, InferenceSettings(batch_size=1), "fp32")]
drop = threading.Thread(target=held.clear)
drop.start()
drop.join()
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_works_whichever_threads_used_openvino() -> None:
    # With AMX, destroying the core frees a stack for signal handlers; see load_core.
    done = subprocess.run(
        [sys.executable, "-c", DESTROYED_IN_A_THREAD], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
