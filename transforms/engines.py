"""The engines there are, which of them is to run, and the backbone that it gives.

Another engine is a function from a loaded transformer to a ``Backbone``, and an entry in
``ENGINES``; head, activation and safety are ``inference``'s and the same for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transforms import openvino_engine
from transforms.backbones import (
    Backbone,
    InferenceSettings,
    TorchBackbone,
    first_line,
    resolve_device,
    resolve_precision,
)
from transforms.checkpoints import ModelSpec
from transforms.errors import ConfigError, DeviceError
from transforms.spectrogram_transformer import ASTModel

logger = logging.getLogger(__name__)

Loader = Callable[[ASTModel, ModelSpec, InferenceSettings, str], Backbone]


def _load_torch(
    transformer: ASTModel, spec: ModelSpec, settings: InferenceSettings, precision: str
) -> Backbone:
    return TorchBackbone(transformer, settings, precision)


# Name to what loads it. On a CPU ``auto`` takes the last that can do what is asked for.
ENGINES: Mapping[str, Loader] = {
    "torch": _load_torch,
    "openvino": openvino_engine.load_backbone,
}


@dataclass(frozen=True)
class EngineChoice:
    """What will compute.

    Attributes:
        engine: A key of ``ENGINES``.
        device: As torch names it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    """

    engine: str
    device: str
    precision: str

    @property
    def name(self) -> str:
        """As commits record it."""
        return f"{self.engine} {self.device} {self.precision}"

    @property
    def is_reference(self) -> bool:
        """Whether it is what others are checked against: torch in float32."""
        return self.engine == "torch" and self.precision == "fp32"


def choose_engine(settings: InferenceSettings) -> EngineChoice:
    """Settle what is asked for against what this machine has.

    Raises:
        ConfigError: It cannot be met; names the setting and what is there.
    """
    if settings.engine not in ("auto", *ENGINES):
        raise ConfigError(
            f"inference.engine is {settings.engine}; must be auto or one of {', '.join(ENGINES)}."
        )
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    problem = _why_not_openvino(settings, device, precision)
    if problem is None and settings.engine != "torch":
        return EngineChoice("openvino", device, precision)
    if settings.engine == "openvino":
        raise ConfigError(f"inference.engine is openvino, and {problem}. Or use --engine auto.")
    if precision == "int8":
        raise ConfigError(
            "inference.precision is int8, which the engine openvino alone offers, and "
            f"{problem or 'inference.engine is torch; use --engine auto'}. Or use --precision auto."
        )
    return EngineChoice("torch", device, precision)


def _why_not_openvino(settings: InferenceSettings, device: str, precision: str) -> str | None:
    """Why OpenVINO cannot do it here, with the next step; None if it can."""
    if device != "cpu":
        return f"the device is {device}, where it does not run here; use --device cpu"
    packages = ("openvino", "nncf") if precision == "int8" else ("openvino",)
    missing = [name for name in packages if not openvino_engine.is_installed(name)]
    if missing:
        return f"{' and '.join(missing)} is not installed; {openvino_engine.INSTALL}"
    try:
        if settings.engine == "openvino":
            openvino_engine.import_library("openvino")
        lacking = openvino_engine.lacks(precision)
    except ConfigError as error:
        return str(error)
    return lacking and f"{lacking}; use --precision fp32"


def check_settings(settings: InferenceSettings) -> None:
    """Find out before any work whether this machine can do what is asked for.

    Raises:
        ConfigError: It cannot; names the setting and what is there.
    """
    choose_engine(settings)


def load_backbone(transformer: ASTModel, spec: ModelSpec, settings: InferenceSettings) -> Backbone:
    """The backbone that the settings ask for; ``auto`` falls back on torch, with a warning.

    Args:
        transformer: The model without its head; on the CPU, in float32. It is the backbone's.
        spec: The checkpoint that it is of.
        settings: How to run it.

    Raises:
        ConfigError: The settings cannot be met.
        DeviceError: An engine that was asked for by name cannot run this model.
        RuntimeError: The device cannot hold it; also MemoryError.
    """
    choice = choose_engine(settings)
    if choice.engine == "torch":
        return _load_torch(transformer, spec, settings, choice.precision)
    try:
        return ENGINES[choice.engine](transformer, spec, settings, choice.precision)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # whatever a converter or compiler may raise
        if settings.engine == "auto" and choice.precision != "int8":
            logger.warning(
                "%s cannot run this model (%s); torch does. To say so: --engine torch",
                choice.name,
                first_line(error),
            )
            return _load_torch(transformer, spec, settings, choice.precision)
        raise DeviceError(
            f"{choice.name}: the model cannot be run: {first_line(error)}. Use --engine torch, or "
            f"another version of {choice.engine}."
        ) from error
