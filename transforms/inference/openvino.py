"""AST on a CPU by OpenVINO, in float32, bfloat16, float16 or int8.

    torch module ─convert─▶ OpenVINO model (kept on disk) ─compile─▶ fixed batch, hinted precision
                                   └─quantise─▶ int8, calibrated on windows of the user's audio

The model is converted once per checkpoint and kept (``caches``); compiling it takes a second or two
and is done in every process. OpenVINO is imported when it is needed, and only here. Its telemetry,
which would tell a web address of each import and conversion, is kept from loading.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transforms.errors import ConfigError
from transforms.inference.backbones import (
    Embeddings,
    Features,
    InferenceSettings,
    PooledTransformer,
    Pooling,
    QuantisedModel,
    cpu_has_native_bf16,
    resolve_batch_size,
)
from transforms.models.ast.checkpoints import ModelSpec
from transforms.models.ast.model import ASTModel
from transforms.process import disk_cache
from transforms.process.devices import processor_facts, threads_of
from transforms.records import FloatArray

logger = logging.getLogger(__name__)

INSTALL = "pip install 'earmark[openvino]'"

# Part of every key: a change in how models are converted or quantised raises it.
CONVERSION_VERSION = 2

MODEL_FILE = "model.xml"

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def is_installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def import_library(name: str) -> Any:
    """Import ``openvino`` or ``nncf``, without their telemetry.

    Raises:
        ConfigError: It is not installed, or cannot be loaded.
    """
    try:
        with _without_telemetry():
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{name} cannot be loaded ({error}); {INSTALL}, or use --engine torch"
        ) from error


@functools.cache
def load_core() -> Any:
    """The process's ``openvino.Core``; it lives as long as the process.

    Where a CPU has AMX, a core gives the thread that first uses it another stack for its signal
    handlers, and takes it away when it goes. If another thread lets go of it, the first one is left
    with a stack that is not there, and Ctrl-C ends the process as SIGSEGV does.

    Raises:
        ConfigError: OpenVINO is not installed, or cannot be loaded.
    """
    return import_library("openvino").Core()


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Both libraries do without ``openvino_telemetry`` where it cannot be imported."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say: not to be had
    try:
        yield
    finally:
        del sys.modules[name]


def why_not(device: str, precision: str) -> str | None:
    """Why OpenVINO cannot do it here, with the next step; None if it can.

    Where the hardware lacks a precision, it would compute in another without a word.

    Args:
        device: As torch names it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    """
    if device != "cpu":
        return f"the device is {device}, and it runs on the CPU here; use --device cpu"
    packages = ("openvino", "nncf") if precision == "int8" else ("openvino",)
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        return f"not installed: {', '.join(missing)}; {INSTALL}"
    try:
        core = load_core()
    except ConfigError as error:
        return str(error)
    kind = {"bf16": "BF16", "fp16": "FP16"}.get(precision)
    if kind is not None and kind not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return f"this CPU does not compute in {precision} by itself; use --precision fp32"
    return None


class OpenVinoBackbone:
    """A compiled model; takes batches of one size.

    Args:
        model: An ``openvino.Model`` with one input (batch, num_frames, num_mel_bins).
        settings: How to run it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    """

    def __init__(self, model: Any, settings: InferenceSettings, precision: str) -> None:
        self.name = f"openvino cpu {precision}"
        self.batch_size: int = resolve_batch_size(settings.batch_size, "cpu")
        self._model = model
        self._threads = threads_of(settings.num_processes)
        # What int8 leaves in floating point runs in the fastest type that the chip has.
        floating = "bf16" if cpu_has_native_bf16() else "fp32"
        self._hint = _HINTS[floating if precision == "int8" else precision]
        self._request: Any = None
        self._compile()  # now, so that what cannot be compiled is known before there is any audio

    def embed(self, features: Features) -> Embeddings:
        """Embed a batch of exactly ``batch_size`` windows; see ``Backbone``."""
        if self._request is None:
            self._compile()
        outputs = self._request.infer([np.ascontiguousarray(features)], share_inputs=True)
        return Embeddings(*(np.array(values, np.float32) for values in outputs.values()))

    def start(self, features: Features) -> None:
        """A CPU computes nothing by itself; see ``Backbone``."""

    def shrink(self, batch_size: int) -> None:
        """Take smaller batches; what ran the larger ones gives its memory back at once."""
        self._request = None
        self.batch_size = batch_size

    def _compile(self) -> None:
        _, *shape = self._model.input(0).partial_shape
        self._model.reshape([self.batch_size, *(dimension.get_length() for dimension in shape)])
        options = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            # Decoders and other workers run on the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = load_core().compile_model(self._model, "CPU", options)
        self._request = compiled.create_infer_request()


def load_backbone(
    transformer: ASTModel, spec: ModelSpec, settings: InferenceSettings, precision: str
) -> OpenVinoBackbone:
    """Compile a checkpoint's transformer, converted now or by an earlier run.

    Args:
        transformer: The model without its head; on the CPU, in float32.
        spec: The checkpoint that it is of.
        settings: How to run it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.

    Raises:
        ConfigError: OpenVINO cannot be loaded, or the model for int8 is not there.
        RuntimeError: The model cannot be converted or compiled.
    """
    if precision != "int8":
        model = load_converted(transformer, spec, settings.pooling)
    elif settings.quantised is None or not Path(settings.quantised.path).is_file():
        raise ConfigError(
            "inference.precision is int8, and there is no model that was calibrated for it on this "
            "machine. Run earmark label again, which makes one, or use --precision auto."
        )
    else:
        model = load_core().read_model(settings.quantised.path)
    return OpenVinoBackbone(model, settings, precision)


def load_converted(transformer: ASTModel, spec: ModelSpec, pooling: Pooling) -> Any:
    """A transformer as an ``openvino.Model``, from the cache if it is there."""
    key = disk_cache.make_key(_dependencies(spec, pooling))
    folder = disk_cache.find_folder("converted", key)
    if folder is None:
        model = convert(PooledTransformer(transformer, pooling).eval())
        folder = disk_cache.keep_folder("converted", key, _saver(model))
        if folder is None:
            return model
    return load_core().read_model(folder / MODEL_FILE)


def convert(pooled: PooledTransformer) -> Any:
    """A torch module as an ``openvino.Model`` in float32, for batches of any size."""
    openvino = import_library("openvino")
    config = pooled.transformer.config
    example = torch.zeros(2, config.max_length, config.num_mel_bins)
    shape = openvino.PartialShape([-1, *example.shape[1:]])
    with torch.inference_mode(), warnings.catch_warnings():
        # Of tracing, which OpenVINO does: that checks of shapes are traced as they come out is
        # what is wanted, and that torch will drop it some day is no concern of the user's.
        warnings.simplefilter("ignore")
        return openvino.convert_model(pooled, example_input=example, input=[shape])


def _saver(model: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        openvino = import_library("openvino")
        openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)

    return save


def _dependencies(spec: ModelSpec, pooling: Pooling) -> dict[str, Any]:
    """Everything that a converted model depends on."""
    config = spec.config.to_dict()
    for name in ("id2label", "label2id"):
        del config[name]
    return {
        "conversion": CONVERSION_VERSION,
        "model_sha256": spec.sha256,
        "config": config,
        "pooling": pooling,
        "openvino": importlib.metadata.version("openvino"),
        "torch": importlib.metadata.version("torch"),
    }


def quantise(
    transformer: ASTModel, spec: ModelSpec, pooling: Pooling, windows: FloatArray, scratch: Path
) -> QuantisedModel:
    """A transformer in int8, from the cache if the same windows have been seen before.

    Args:
        transformer: The model without its head; on the CPU, in float32.
        spec: The checkpoint that it is of.
        pooling: What is stored as the embedding.
        windows: Normalised features to calibrate with, (windows, num_frames, num_mel_bins).
        scratch: Where to put the model if it cannot be kept.

    Raises:
        ConfigError: OpenVINO or NNCF cannot be loaded.
        RuntimeError: The model cannot be converted or quantised.
    """
    nncf = import_library("nncf")
    overflow_fix = _overflow_fix()
    digest = hashlib.sha256(windows.tobytes() + overflow_fix.encode()).hexdigest()[:16]
    found = find_quantised(spec, pooling, digest, len(windows))
    if found is not None:
        return found
    model = load_converted(transformer, spec, pooling)
    model.reshape([1, *windows.shape[1:]])
    logging.getLogger("nncf").setLevel(logging.WARNING)
    ranges = import_library("nncf.quantization.range_estimator")
    estimators = ranges.RangeEstimatorParametersSet
    with contextlib.redirect_stdout(io.StringIO()):  # its progress; ours is for answers
        model = nncf.quantize(
            model,
            nncf.Dataset([window[None] for window in windows]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(windows),
            # What is left in floating point costs little here and is worth most: the patches'
            # projection, which sees a range of features that no window shows whole, and attention,
            # which OpenVINO runs as one piece. With the trained small model the largest difference
            # of a score went from 0.042 to 0.006 by it.
            ignored_scope=nncf.IgnoredScope(
                types=["Convolution", "ScaledDotProductAttention"], validate=False
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=estimators.MINMAX,
                overflow_fix=nncf.OverflowFix(overflow_fix),
            ),
        )
    folder = disk_cache.keep_folder("int8", _quantised_key(spec, pooling, digest), _saver(model))
    if folder is None:
        folder = scratch
        _saver(model)(folder)
    return QuantisedModel(str(folder / MODEL_FILE), digest, len(windows))


def _overflow_fix() -> str:
    """Where weights take half of int8's range, in NNCF's words: in all layers, or in the first.

    Where a processor has no instructions that add products up in 32 bits, OpenVINO's are cut to 16.
    On such a one the largest difference of a score went from 0.066 to 0.023 by it with the small
    model of the tests, and from 0.009 to 0.003 with the bundled one.
    """
    facts = processor_facts()
    flags = facts.get("flags") or facts.get("Features", "")  # as Arm calls them
    adds_up = any(name in flags for name in ("vnni", "amx_int8", "asimddp"))
    return "first_layer_only" if adds_up else "enable"


def find_quantised(
    spec: ModelSpec, pooling: Pooling, digest: str, num_windows: int
) -> QuantisedModel | None:
    """The model that was calibrated on certain windows, if this machine still has it.

    Args:
        spec: The checkpoint.
        pooling: What is stored as the embedding.
        digest: As ``quantise`` made it, of the windows and of how weights are kept.
        num_windows: How many they were.
    """
    folder = disk_cache.find_folder("int8", _quantised_key(spec, pooling, digest))
    if folder is None:
        return None
    return QuantisedModel(str(folder / MODEL_FILE), digest, num_windows)


def _quantised_key(spec: ModelSpec, pooling: Pooling, digest: str) -> str:
    nncf = importlib.metadata.version("nncf")
    return disk_cache.make_key(
        {**_dependencies(spec, pooling), "nncf": nncf, "calibration": digest}
    )
