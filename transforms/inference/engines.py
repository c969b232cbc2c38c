"""The engines there are, which of them is to run, and the backbone that it gives.

Another engine is an entry in ``ENGINES``: a function from a loaded transformer to a ``Backbone``,
and one that says what it cannot do. Head, activation and safety are ``inference``'s, the same for
all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transforms.errors import ConfigError, DeviceError, EarmarkError
from transforms.inference import openvino
from transforms.inference.backbones import (
    Backbone,
    InferenceSettings,
    TorchBackbone,
    first_line,
    resolve_device,
    resolve_precision,
)
from transforms.models.ast.checkpoints import ModelSpec
from transforms.models.ast.model import ASTModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineKind:
    """An engine before it is loaded.

    Attributes:
        load: From a transformer on the CPU in float32, its checkpoint, the settings and the
            precision to a backbone.
        why_not: From device and precision to why it cannot do that here, with the next step; None
            if it can.
    """

    load: Callable[[ASTModel, ModelSpec, InferenceSettings, str], Backbone]
    why_not: Callable[[str, str], str | None]


def _load_torch(
    transformer: ASTModel, spec: ModelSpec, settings: InferenceSettings, precision: str
) -> Backbone:
    return TorchBackbone(transformer, settings, precision)


def _why_not_torch(device: str, precision: str) -> str | None:
    return "it has no int8; use --precision auto" if precision == "int8" else None


# By name; ``auto`` takes the first that can do what is asked for.
ENGINES: Mapping[str, EngineKind] = {
    "openvino": EngineKind(openvino.load_backbone, openvino.why_not),
    "torch": EngineKind(_load_torch, _why_not_torch),
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
    problems: dict[str, str] = {}
    for name in ENGINES if settings.engine == "auto" else (settings.engine,):
        problem = ENGINES[name].why_not(device, precision)
        if problem is None:
            return EngineChoice(name, device, precision)
        problems[name] = problem
    told = ". ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise ConfigError(
        f"inference.precision is {precision} and inference.engine is {settings.engine}, which "
        f"cannot be met here. {told}."
    )


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
    kind = ENGINES[choice.engine]
    if choice.engine == "torch":
        return kind.load(transformer, spec, settings, choice.precision)
    try:
        return kind.load(transformer, spec, settings, choice.precision)
    except (EarmarkError, MemoryError):
        raise
    except Exception as error:  # whatever a converter or compiler may raise
        if settings.engine == "auto" and _why_not_torch(choice.device, choice.precision) is None:
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
