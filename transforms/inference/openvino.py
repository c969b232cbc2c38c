"""The OpenVINO backbone: AST on a CPU in float32, bfloat16, float16 or int8.

    torch module ─convert─▶ OpenVINO model (kept on disk) ─compile─▶ fixed batch, hinted precision
                                   └─quantise─▶ int8, calibrated on windows of the user's audio

Every process compiles the model, which takes a second or two. OpenVINO is imported on demand, and
only here. Its telemetry, which would report each import and conversion to a web address, is
prevented from loading.
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
from collections.abc import Iterator
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

INSTALL = "run pip install '.[openvino]' in Earmark's checkout"

# Part of every cache key; increased whenever conversion or quantisation changes.
CONVERSION_VERSION = 2

MODEL_FILE = "model.xml"

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def is_installed(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def import_library(name: str) -> Any:
    """Import ``openvino`` or ``nncf`` without telemetry; ``ConfigError`` if that is impossible."""
    try:
        with _without_telemetry():
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{name} cannot be loaded ({error}); {INSTALL}, or use --engine torch"
        ) from error


@functools.cache
def load_core() -> Any:
    """Return the process's ``openvino.Core``, which lives as long as the process.

    On a CPU with AMX, OpenVINO's CPU plugin gives the thread that first uses the core a new stack
    for signal handlers, and frees it when the core is destroyed. If another thread destroys the
    core, the first thread's stack is gone, and Ctrl-C ends the process with SIGSEGV. Raises what
    ``import_library`` does.
    """
    return import_library("openvino").Core()


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Make ``openvino_telemetry`` impossible to import; both libraries work without it."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the import then fails
    try:
        yield
    finally:
        del sys.modules[name]


def why_not(device: str, precision: str) -> str | None:
    """Return why OpenVINO cannot do it here, with the next step; None if it can.

    If the hardware lacks a precision, OpenVINO would silently compute in another.
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
        return f"this CPU does not support {precision} natively; use --precision fp32"
    return None


class OpenVinoBackbone:
    """A compiled ``openvino.Model``, which accepts batches of one size.

    Its one input has the shape (batch, num_frames, num_mel_bins).
    """

    def __init__(self, model: Any, settings: InferenceSettings, precision: str) -> None:
        self.name = f"openvino cpu {precision}"
        self.batch_size: int = resolve_batch_size(settings.batch_size, "cpu")
        self._model = model
        self._threads = threads_of(settings.num_processes)
        # The parts that int8 leaves in floating point run in the chip's fastest type.
        floating = "bf16" if cpu_has_native_bf16() else "fp32"
        self._hint = _HINTS[floating if precision == "int8" else precision]
        self._request: Any = None
        self._compile()  # now, to fail before there is any audio

    def embed(self, features: Features) -> Embeddings:
        """Embed a batch of exactly ``batch_size`` windows; see ``Backbone``."""
        if self._request is None:
            self._compile()
        outputs = self._request.infer([np.ascontiguousarray(features)], share_inputs=True)
        return Embeddings(*(np.array(values, np.float32) for values in outputs.values()))

    def start(self, features: Features) -> None:
        """Return None: a CPU does not compute asynchronously; see ``Backbone``."""

    def shrink(self, batch_size: int) -> None:
        """Accept smaller batches, and free the memory of the larger ones at once."""
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
    """Compile a transformer (on the CPU, in float32), converted now or by an earlier run.

    Raises:
        ConfigError: OpenVINO cannot be loaded, or the model for int8 does not exist.
        RuntimeError: The model cannot be converted or compiled.
    """
    if precision != "int8":
        model = load_converted(transformer, spec, settings.pooling)
    elif settings.quantised is None or not Path(settings.quantised.path).is_file():
        raise ConfigError(
            "inference.precision is int8, and this machine has no model calibrated for it. Run "
            "earmark label again, which makes one, or use --precision auto."
        )
    else:
        model = load_core().read_model(settings.quantised.path)
    return OpenVinoBackbone(model, settings, precision)


def load_converted(transformer: ASTModel, spec: ModelSpec, pooling: Pooling) -> Any:
    """Convert a transformer to an ``openvino.Model``, or load it from the cache."""
    key = disk_cache.make_key(_dependencies(spec, pooling))
    folder = disk_cache.find_folder("converted", key)
    if folder is None:
        model = convert(PooledTransformer(transformer, pooling).eval())
        folder = disk_cache.keep_folder("converted", key, functools.partial(_save, model))
        if folder is None:
            return model
    return load_core().read_model(folder / MODEL_FILE)


def convert(pooled: PooledTransformer) -> Any:
    """Convert a torch module to an ``openvino.Model`` in float32, for batches of any size."""
    openvino = import_library("openvino")
    config = pooled.transformer.config
    example = torch.zeros(2, config.max_length, config.num_mel_bins)
    shape = openvino.PartialShape([-1, *example.shape[1:]])
    with torch.inference_mode(), warnings.catch_warnings():
        # Warnings about tracing, which OpenVINO uses: shape checks may be traced as constants, and
        # the user need not know that torch will drop tracing some day.
        warnings.simplefilter("ignore")
        return openvino.convert_model(pooled, example_input=example, input=[shape])


def _save(model: Any, folder: Path) -> None:
    import_library("openvino").save_model(model, folder / MODEL_FILE, compress_to_fp16=False)


def _dependencies(spec: ModelSpec, pooling: Pooling) -> dict[str, Any]:
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
    """Quantise a transformer to int8, or load it from the cache if the windows are the same.

    Args:
        transformer: On the CPU, in float32.
        windows: Normalised features to calibrate with, (windows, num_frames, num_mel_bins).
        scratch: Folder for the model if the cache cannot keep it.

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
    with contextlib.redirect_stdout(io.StringIO()):  # hides its progress display
        model = nncf.quantize(
            model,
            nncf.Dataset([window[None] for window in windows]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(windows),
            # These stay in floating point, which costs little and gains most: the patches'
            # projection, because no window shows the whole range of its features, and attention,
            # which OpenVINO runs as one operation. With the trained small model this reduced the
            # largest difference of a score from 0.042 to 0.006.
            ignored_scope=nncf.IgnoredScope(
                types=["Convolution", "ScaledDotProductAttention"], validate=False
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=estimators.MINMAX,
                overflow_fix=nncf.OverflowFix(overflow_fix),
            ),
        )
    save = functools.partial(_save, model)
    folder = disk_cache.keep_folder("int8", _quantised_key(spec, pooling, digest), save)
    if folder is None:
        folder = scratch
        save(folder)
    return QuantisedModel(str(folder / MODEL_FILE), digest, len(windows))


def _overflow_fix() -> str:
    """Return which layers use half of int8's range, in NNCF's terms: all, or only the first.

    On a processor without instructions that accumulate products in 32 bits, OpenVINO's sums
    saturate at 16 bits. There, half the range in all layers reduced the largest difference of a
    score from 0.066 to 0.023 with the small model of the tests, and from 0.009 to 0.003 with the
    bundled one.
    """
    facts = processor_facts()
    flags = facts.get("flags") or facts.get("Features", "")  # Arm's name for them
    adds_up = any(name in flags for name in ("vnni", "amx_int8", "asimddp"))
    return "first_layer_only" if adds_up else "enable"


def find_quantised(
    spec: ModelSpec, pooling: Pooling, digest: str, num_windows: int
) -> QuantisedModel | None:
    """Find the ``QuantisedModel`` with this digest; None if this machine does not have it."""
    folder = disk_cache.find_folder("int8", _quantised_key(spec, pooling, digest))
    if folder is None:
        return None
    return QuantisedModel(str(folder / MODEL_FILE), digest, num_windows)


def _quantised_key(spec: ModelSpec, pooling: Pooling, digest: str) -> str:
    nncf = importlib.metadata.version("nncf")
    return disk_cache.make_key(
        {**_dependencies(spec, pooling), "nncf": nncf, "calibration": digest}
    )
