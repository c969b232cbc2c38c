"""The backbone of an engine: its interface, and plain torch behind it.

A backbone turns features into pooled embeddings. It knows nothing of heads, scores and failing
windows. Requested devices and precisions are resolved here for all backbones.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from transforms.errors import ConfigError, first_line
from transforms.models.ast.model import ASTModel
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS
from transforms.process.devices import Sender, processor_facts, threads_of, torch_device
from transforms.process.stage_times import StageSeconds, stage_clocks, timed
from transforms.process.user import settle_user
from transforms.records import FloatArray

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["auto", "torch", "openvino"]
Pooling = Literal["pooler_output", "patch_mean"]

# A batch of normalised features, (batch, num_frames, num_mel_bins), float32: an array on the host,
# or a tensor if a device made them.
Features = FloatArray | Tensor

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Large enough to keep the device busy, small enough that AST base's activations
# (about 60 MB a window in float32) stay far below what the smallest devices hold.
CPU_BATCH_SIZE = 4
ACCELERATOR_BATCH_SIZE = 64


@dataclass(frozen=True)
class QuantisedModel:
    """A backbone in int8, calibrated on one dataset; see ``openvino.quantise``.

    Attributes:
        path: The model's ``.xml`` on this machine.
        digest: Hex digest of the calibration windows and of the range of the weights.
    """

    path: str
    digest: str
    windows: int


@dataclass(frozen=True)
class InferenceSettings:
    """How to run the model.

    Attributes:
        precision: Precision of the backbone; the head is always float32. ``auto``: bf16 if the
            chip has it natively, fp16 on older GPUs, else fp32.
        device: ``auto`` prefers cuda, then mps, then cpu. A missing device that was requested by
            name is an error, never a silent fall-back.
        engine: ``auto`` is the best one installed.
        batch_size: Windows per call; None for the device's default.
        pooling: The embedding to store: AST's own (the mean of the class and distillation tokens)
            or the mean of the patch tokens. Scores always come from AST's own.
        compile: Whether torch compiles the model; None: on cuda.
        check_windows: Windows of each process that plain torch also computes in float32, if engine
            or precision differ from that; 0 for none.
        features_on: Where features are made: ``host``, by torchaudio, a window at a time;
            ``device``, in batches, on the model's device; ``auto``: on the device if it is cuda.
        num_processes: Processes that share this machine's cores.
        quantised: The model for int8; other precisions need none.
    """

    precision: Precision = "auto"
    device: DeviceName = "auto"
    engine: EngineName = "auto"
    batch_size: int | None = None
    pooling: Pooling = "pooler_output"
    embedding_dtype: Literal["float32", "float16"] = "float32"
    compile: bool | None = None
    check_windows: int = 0
    features_on: Literal["auto", "host", "device"] = "auto"
    num_processes: int = 1
    quantised: QuantisedModel | None = None


def resolve_device(device: DeviceName, key: str = "inference.device") -> str:
    """Return the device to run on, as torch names it.

    Raises ``ConfigError``, which names ``key``, if the device was requested by name and this
    machine does not have it.
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


def makes_features_on_device(settings: InferenceSettings) -> bool:
    """Return whether the model's device makes the features."""
    if settings.features_on == "auto":
        return resolve_device(settings.device) == "cuda"
    return settings.features_on == "device"


def resolve_precision(precision: Precision, device: str) -> str:
    """Return the precision to run in: ``fp32``, ``bf16``, ``fp16`` or, if requested, ``int8``."""
    if precision != "auto":
        return precision
    if device == "cuda":
        # Before compute capability 8.0 (Ampere) bf16 is emulated, and slower than fp16.
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if device == "cpu" and cpu_has_native_bf16():
        return "bf16"
    return "fp32"


def cpu_has_native_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    flags = processor_facts().get("flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_batch_size(batch_size: int | None, device: str) -> int:
    """Return the number of windows per call."""
    if batch_size is not None:
        return batch_size
    return CPU_BATCH_SIZE if device == "cpu" else ACCELERATOR_BATCH_SIZE


@dataclass(frozen=True)
class Embeddings:
    """The output of a backbone, of shape (batch, hidden_size).

    ``pooled`` is the input of the head; ``patch_mean`` is None unless it is to be stored.
    """

    pooled: FloatArray
    patch_mean: FloatArray | None = None

    def __getitem__(self, windows: slice) -> Self:
        patch_mean = None if self.patch_mean is None else self.patch_mean[windows]
        return type(self)(self.pooled[windows], patch_mean)


Pending = Callable[[], Embeddings]


class Backbone(Protocol):
    """Executes the transformer below the head; ``name`` is recorded (``openvino cpu bf16``)."""

    name: str

    @property
    def batch_size(self) -> int | None:
        """The only batch size that it accepts, or None if it accepts any."""

    def embed(self, features: Features) -> Embeddings:
        """Embed a batch.

        Raises:
            RuntimeError: Any error of the library below.
            MemoryError: The batch does not fit; may also be a RuntimeError that says so.
        """

    def start(self, features: Features) -> Pending | None:
        """Start a batch and return a function that waits for it; raises what ``embed`` does.

        Return None if the device does not compute asynchronously.
        """

    def shrink(self, batch_size: int) -> None:
        """Accept batches of this size from now on, because a larger one did not fit."""


def embed_windows(backbone: Backbone, features: Features) -> Embeddings:
    """Embed any number of windows; for a fixed batch size, the last batch is padded."""
    parts = [backbone.embed(part) for part in _parts(backbone.batch_size, features)]
    return _join(parts, len(features))


def start_windows(backbone: Backbone, features: Features) -> Pending | None:
    """Start any number of windows; None if the device does not compute asynchronously."""
    started: list[Pending] = []
    for part in _parts(backbone.batch_size, features):
        pending = backbone.start(part)
        if pending is None:
            return None
        started.append(pending)
    return lambda: _join([pending() for pending in started], len(features))


def _parts(size: int | None, features: Features) -> Iterator[Features]:
    """Yield batches of a fixed size, the last one padded, or everything if ``size`` is None."""
    if size is None:
        yield features
        return
    for start in range(0, len(features), size):
        yield _pad(features[start : start + size], size)


def _pad(features: Features, size: int) -> Features:
    missing = size - len(features)
    if missing <= 0:
        return features
    if isinstance(features, Tensor):
        return nn.functional.pad(features, (0, 0, 0, 0, 0, missing))
    return np.concatenate([features, np.zeros((missing, *features.shape[1:]), np.float32)])


def _join(parts: Sequence[Embeddings], num_windows: int) -> Embeddings:
    if len(parts) == 1:
        return parts[0][:num_windows]
    means = [part.patch_mean for part in parts if part.patch_mean is not None]
    joined = Embeddings(
        np.concatenate([part.pooled for part in parts]), np.concatenate(means) if means else None
    )
    return joined[:num_windows]


class PooledTransformer(nn.Module):
    """The transformer as every engine runs it; ``patch_mean`` adds a second embedding."""

    def __init__(self, transformer: ASTModel, pooling: Pooling) -> None:
        super().__init__()
        self.transformer = transformer
        self.has_patch_mean = pooling == "patch_mean"

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Embed features (B, T, F): one tensor (B, D), or two."""
        if not self.has_patch_mean:
            return (self.transformer.embed(features),)
        output = self.transformer(features, return_dict=True)
        patches = output.last_hidden_state[:, NUM_PREFIX_TOKENS:].mean(dim=1)
        return output.pooler_output, patches


class TorchBackbone:
    """Plain torch, or torch's compiler.

    When compiled, every batch has the same size: each new shape would be compiled again, and after
    eight of them torch silently returns to uncompiled code. The transformer is given on the CPU in
    float32; it is moved, and converted to ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, transformer: ASTModel, settings: InferenceSettings, precision: str) -> None:
        self.device = torch_device(resolve_device(settings.device))
        self.name = f"torch {self.device.type} {precision}"
        self.batch_size: int | None = None
        self._dtype = TORCH_DTYPES[precision]
        self._send = Sender(self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads_of(settings.num_processes))
        pooled = PooledTransformer(transformer, settings.pooling).eval()
        self._run: Callable[[Tensor], tuple[Tensor, ...]] = pooled.to(self.device, self._dtype)
        wants_compiler = settings.compile is None and self.device.type == "cuda"
        if settings.compile or wants_compiler:
            shape = (transformer.config.max_length, transformer.config.num_mel_bins)
            self._compile(resolve_batch_size(settings.batch_size, self.device.type), shape)

    @torch.inference_mode()
    def embed(self, features: Features) -> Embeddings:
        """Embed a batch; see ``Backbone``.

        A GPU computes asynchronously, and fetching the result waits for it. So the stage ``copy``
        is the conversion of the features and their transfer to the device; the transfer back counts
        as the model's time.
        """
        with timed("copy"):
            batch = self._to_device(features)
        with true_float32:
            outputs = self._run(batch)
        return Embeddings(*(output.float().cpu().numpy() for output in outputs))

    @torch.inference_mode()
    def start(self, features: Features) -> Pending | None:
        """Start a batch on a GPU; the stage ``copy`` is then all the work of starting one."""
        if self.device.type != "cuda":
            return None
        with timed("copy"), torch.cuda.device(self.device):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            batch = self._to_device(features)
            began.record()
            with true_float32:
                outputs = self._run(batch)
            # Into pinned memory, which torch allocates for non-blocking copies.
            fetched = [output.float().to("cpu", non_blocking=True) for output in outputs]
            ended.record()
        return functools.partial(_fetch, fetched, began, ended)

    def shrink(self, batch_size: int) -> None:
        """Compile for smaller batches, if compiled."""
        if self.batch_size is not None:
            self.batch_size = batch_size

    def _to_device(self, features: Features) -> Tensor:
        if isinstance(features, Tensor):
            return features.to(self.device, self._dtype)
        return self._send(torch.from_numpy(features)).to(self._dtype)

    def _compile(self, batch_size: int, shape: tuple[int, int]) -> None:
        """Compile and try it; if it fails, stay uncompiled and log that."""
        plain = self._run
        settle_user()  # a worker may run under a user id without a name
        self.batch_size = batch_size
        try:
            self._run = torch.compile(plain, dynamic=False)
            self.embed(np.zeros((batch_size, *shape), np.float32))
        except (torch.OutOfMemoryError, MemoryError):
            return  # not the compiler's fault; the first real batch fails likewise, and is halved
        except Exception as error:  # whatever a missing or outdated compiler may raise
            self._run, self.batch_size = plain, None
            logger.warning(
                "torch cannot compile the model here (%s), so it runs uncompiled. To skip the "
                "attempt: --set inference.compile=false",
                first_line(error),
            )


def _fetch(
    outputs: Sequence[Tensor], began: torch.cuda.Event, ended: torch.cuda.Event
) -> Embeddings:
    since_s = time.perf_counter()
    ended.synchronize()
    waited_s = time.perf_counter() - since_s
    computed_s = began.elapsed_time(ended) / 1000.0
    stage_clocks.add(StageSeconds(device_ahead_s=max(0.0, computed_s - waited_s)))
    return Embeddings(*(output.numpy() for output in outputs))


class _TrueFloat32:
    """Disables TF32 in place of float32, which torch allows for convolutions on cuda.

    All threads share torch's switch, so it is off while any of them wants it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_wanting_off = 0
        self._before: bool | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_wanting_off += 1
            if self._num_wanting_off == 1:
                # torch refuses to answer if the program has set the newer ``fp32_precision``, and
                # then the program's choice stands.
                with contextlib.suppress(RuntimeError):
                    self._before = torch.backends.cudnn.allow_tf32
                    torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._num_wanting_off -= 1
            if self._num_wanting_off == 0 and self._before is not None:
                torch.backends.cudnn.allow_tf32, self._before = self._before, None


true_float32 = _TrueFloat32()
