"""The table of engines, the choice between them, and the backbone of the chosen one.

A new engine is an entry in ``ENGINES``: a function from a loaded transformer to a ``Backbone``, and
one that says what the engine cannot do. All share head, activation and the handling of failures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transforms.errors import ConfigError, DeviceError, EarmarkError, first_line
from transforms.inference import openvino
from transforms.inference.backbones import (
    Backbone,
    InferenceSettings,
    TorchBackbone,
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
        load: Makes a backbone of a transformer on the CPU in float32, its checkpoint, the settings
            and the precision.
        why_not: Returns, for a device and a precision, why the engine cannot do that here, with
            the next step; None if it can.
    """

    load: Callable[[ASTModel, ModelSpec, InferenceSettings, str], Backbone]
    why_not: Callable[[str, str], str | None]


def _why_not_torch(device: str, precision: str) -> str | None:
    return "it has no int8; use --precision auto" if precision == "int8" else None


# By name; ``auto`` is the first that can do what is requested.
ENGINES: Mapping[str, EngineKind] = {
    "openvino": EngineKind(openvino.load_backbone, openvino.why_not),
    "torch": EngineKind(
        lambda transformer, spec, settings, precision: TorchBackbone(
            transformer, settings, precision
        ),
        _why_not_torch,
    ),
}


@dataclass(frozen=True)
class EngineChoice:
    """The engine (a key of ``ENGINES``), device (torch's name) and precision that will be used."""

    engine: str
    device: str
    precision: str

    @property
    def name(self) -> str:
        """Name in commits."""
        return f"{self.engine} {self.device} {self.precision}"


def choose_engine(settings: InferenceSettings) -> EngineChoice:
    """Choose an engine that can do what is requested on this machine.

    Raises ``ConfigError``, which names the setting and what this machine has, if none can.
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
    reasons = ". ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise ConfigError(
        f"inference.precision is {precision} and inference.engine is {settings.engine}, which "
        f"is not possible here. {reasons}."
    )


def load_backbone(transformer: ASTModel, spec: ModelSpec, settings: InferenceSettings) -> Backbone:
    """Load the backbone that the settings ask for; ``auto`` falls back to torch, with a warning.

    The backbone owns the transformer, which is given on the CPU in float32.

    Raises:
        ConfigError: The settings cannot be met.
        DeviceError: An engine requested by name cannot run this model.
        RuntimeError: The model does not fit onto the device; also MemoryError.
    """
    choice = choose_engine(settings)
    try:
        return ENGINES[choice.engine].load(transformer, spec, settings, choice.precision)
    except (EarmarkError, MemoryError):
        raise
    except Exception as error:  # whatever a converter or compiler may raise
        if choice.engine == "torch":
            raise
        if settings.engine != "auto" or _why_not_torch(choice.device, choice.precision):
            raise DeviceError(
                f"{choice.name}: the model cannot be run: {first_line(error)}. Use --engine torch, "
                f"or another version of {choice.engine}."
            ) from error
        logger.warning(
            "%s cannot run this model (%s), so torch does. To skip the attempt: --engine torch",
            choice.name,
            first_line(error),
        )
        return TorchBackbone(transformer, settings, choice.precision)
