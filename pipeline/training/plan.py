"""The plan of a training, made before audio is decoded: model, settings and inputs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.label import given_output
from pipeline.config.train import TrainConfig
from pipeline.labelling.plan import describe_inputs, find_items, input_options
from pipeline.result.state import make_fingerprint
from pipeline.training.data.dataset import check_found
from pipeline.training.initial import Initial, resolve_initial
from pipeline.training.stages.steps import Precision
from transforms.errors import ConfigError, OutputError
from transforms.features.fbank import FbankSettings
from transforms.inference.backbones import resolve_device, resolve_precision
from transforms.label_audio import InputSettings, make_input_settings
from transforms.records import ContainerSlice
from transforms.sources.read_unit import (
    Found,
    make_unit_id,
)
from transforms.storage import urls
from transforms.storage.secrets import public_uri

CACHE_NAME = "cache"

# Where none is given. A few hundred clips are learnt at these rates within the default epochs; at
# the rate that fresh weights need, a checkpoint soon forgets what it knows.
_LEARNING_RATES = {"scratch": 1e-3, "checkpoint": 1e-4, "image": 1e-4}

# Sections of the configuration that the result depends on.
_DECISIVE = (
    *("model", "architecture", "training", "optimizer", "schedule", "augmentation", "averaging"),
    *("pretraining", "window", "cache", "hold_out", "limit"),
)
# Keys in them that it does not depend on, or that are recorded or compared elsewhere.
_INDECISIVE = {
    *(("training", "device"), ("training", "loader_processes")),
    ("training", "epochs"),  # more of them extend a training
    *(("model", "name"), ("cache", "folder")),
}


@dataclass(frozen=True)
class TrainPlan:
    """The settings and inputs of a training, before anything is decoded.

    Attributes:
        output: The model's folder, as ``urls.normalise`` gives it.
        fbank: The features; their mean and standard deviation are settled later.
        cache: The folder of decoded audio.
        learning_rate: Highest learning rate of the stage that teaches labels.
        results: Everything that the result depends on, by name; ``data`` is added once the clips
            are known.
    """

    output: str
    found: Found
    found_validation: Found | None
    initial: Initial
    fbank: FbankSettings
    settings: InputSettings
    cache: str
    learning_rate: float
    results: Mapping[str, Any]
    device: str
    precision: Precision

    @property
    def fingerprint(self) -> str:
        """Digest of what the result depends on."""
        return make_fingerprint(self.results)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Doubts about what the inputs mean."""
        both = (self.found, self.found_validation)
        return tuple(text for found in both if found is not None for text in found.warnings)

    @property
    def inputs_digest(self) -> str:
        """Digest of places, sizes, versions, given labels and bounds, all known before reading."""
        limits = dataclasses.astuple(self.settings.sources.limits)
        parts: list[object] = [self.settings.decode.max_item_s, *limits]
        for found in (self.found, self.found_validation):
            if found is None:
                continue
            parts.append(make_unit_id("files", found.items))
            for entry in found.containers:
                whole = ContainerSlice(
                    entry.uri, entry.url, entry.size, entry.version, stop=entry.stop
                )
                parts.append(make_unit_id(entry.kind, entry.items, whole))
            inside = [item for entry in found.containers for item in entry.items]
            parts.append([[item.truth, item.metadata] for item in (*found.items, *inside)])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def local_output(config: TrainConfig) -> str:
    """Return the output folder; raise ``OutputError`` if it is not on this machine."""
    output = urls.normalise(given_output(config.output))
    if not urls.is_local(output):
        raise OutputError(
            f"--output is {public_uri(output)}; expected a folder on this machine, because a "
            "training writes its whole state after every epoch. Copy the model when it is done."
        )
    return output


def make_train_plan(config: TrainConfig, output: str) -> TrainPlan:
    """Find the inputs and resolve the settings; ``UsageError`` if one is not right."""
    device = resolve_device(config.training.device, "training.device")
    precision = resolve_precision(config.training.precision, device)
    keeps_head = config.training.head == "keep"
    initial = resolve_initial(config.model, config.architecture, keeps_head=keeps_head)
    shape = initial.config
    check_possible(config, device, shape.num_hidden_layers)
    fbank = FbankSettings(num_mel_bins=shape.num_mel_bins, num_frames=shape.max_length)
    settings = make_input_settings(fbank, **input_options(config))
    find = functools.partial(
        find_items, limit=config.limit, sources=settings.sources, exclude=output
    )
    found = find(config.train)
    found_validation = find(config.validation) if config.validation else None
    check_found(found, "training", config.hold_out)
    if found_validation is not None:
        check_found(found_validation, "validation")
    learning_rate = config.optimizer.learning_rate or _LEARNING_RATES[initial.kind]
    return TrainPlan(
        output=output,
        found=found,
        found_validation=found_validation,
        initial=initial,
        fbank=fbank,
        settings=settings,
        cache=urls.normalise(config.cache.folder or urls.join(output, CACHE_NAME)),
        learning_rate=learning_rate,
        results=what_changes_training(config, initial, precision, learning_rate),
        device=device,
        precision=precision,  # type: ignore[arg-type]
    )


def check_possible(config: TrainConfig, device: str, num_layers: int) -> None:
    """Raise ``ConfigError`` for a precision the device lacks, or layers the model lacks."""
    if config.training.precision == "fp16" and device == "cpu":
        raise ConfigError(
            "training.precision is fp16, and the device is the CPU, which cannot train in it; "
            "expected auto, fp32 or bf16. Give another --precision, or another --device."
        )
    trained = config.training.trained_layers
    if trained is not None and trained > num_layers:
        raise ConfigError(
            f"training.trained_layers is {trained}; the model has {num_layers} layers. Give at "
            "most that many, or null to train all of it."
        )


def what_changes_training(
    config: TrainConfig, initial: Initial, precision: str, learning_rate: float
) -> dict[str, Any]:
    """Return every setting that the trained weights depend on, by name."""
    resolved = config.resolved()
    values: dict[str, Any] = {}
    for name in _DECISIVE:
        section = resolved[name]
        if isinstance(section, dict):
            section = {k: v for k, v in section.items() if (name, k) not in _INDECISIVE}
        values[name] = section
    values["training"]["precision"] = precision
    values["optimizer"]["learning_rate"] = learning_rate
    if config.decode.channel != "mix":  # a training from before there was a choice is continued
        values["decode"] = {"channel": config.decode.channel}
    return {**values, "initial": initial.name, "initial_sha256": initial.sha256}


def describe_train_plan(plan: TrainPlan) -> list[str]:
    """Say what is going to be trained, in a few lines."""
    shape, initial, windows = plan.initial.config, plan.initial, plan.settings.windows
    lines = [
        f"Model: {initial.described}, {shape.num_hidden_layers} layers of {shape.hidden_size}, "
        f"windows of {windows.window_samples / windows.sample_rate_hz:g} s; on {plan.device} in "
        f"{plan.precision}, learning rate {plan.learning_rate:g}.",
        *initial.notes,
        *describe_inputs(plan.found),
    ]
    if plan.found_validation is not None:
        lines += [f"For validation: {line}" for line in describe_inputs(plan.found_validation)]
    return lines
