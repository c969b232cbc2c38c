"""The start of a training: an AST checkpoint, an image model's weights, or nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.config.label import CheckpointSection
from pipeline.config.train import SHAPE_FROM_SCRATCH, ArchitectureSection
from pipeline.labelling.plan import read_features
from pipeline.training.data.dataset import ClipSet
from transforms.errors import ModelError
from transforms.features.fbank import FbankSettings
from transforms.features.statistics import (
    FeatureStatistics,
    mean_and_std,
    measure_window,
    sum_statistics,
)
from transforms.features.windows import WindowSettings, cut_windows
from transforms.models.ast.checkpoints import (
    ModelOverrides,
    ModelSpec,
    load_for_finetuning,
    resolve_model,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.files import locate_model
from transforms.models.ast.image_models import (
    ImageModel,
    is_image_model,
    load_image_model,
    resolve_image_model,
)
from transforms.models.ast.model import ASTForAudioClassification, initialise_from_scratch
from transforms.models.labels import read_labels
from transforms.storage import urls

SCRATCH = "scratch"
# Facts of a checkpoint that training may change, and facts that it may not.
_CHANGEABLE = tuple(SHAPE_FROM_SCRATCH)
_FACTS = ("num_attention_heads", "layer_norm_eps", "head_layer_norm_eps")


@dataclass(frozen=True)
class Initial:
    """The model that a training starts from.

    Attributes:
        name: The model's name without secrets, or ``scratch``.
        sha256: Digest of the weights; None without any.
        config: The shape to train, with labels that are still to be replaced.
        labels: The checkpoint's own label names; ``LABEL_0`` and so on if its head is not kept and
            its outputs have no names.
        wanted_labels: The label names that ``model.labels`` gives, or None.
        statistics: Mean and standard deviation to normalise with; None if still to be measured.
    """

    kind: Literal["checkpoint", "image", "scratch"]
    name: str
    config: ASTConfig
    sha256: str | None = None
    spec: ModelSpec | None = None
    image: ImageModel | None = None
    labels: tuple[str, ...] = ()
    wanted_labels: tuple[str, ...] | None = None
    statistics: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str | None:
        """Local folder or file of the weights; None if they are not on this machine."""
        origin = self.spec or self.image
        if origin is None or origin.source == "hub" or not urls.is_local(origin.location):
            return None
        return urls.local_path(urls.normalise(origin.location))

    @property
    def described(self) -> str:
        """Description in a few words."""
        if self.kind == "scratch":
            return "from scratch"
        return f"from {self.name}" + (", an image model" if self.kind == "image" else "")


def resolve_initial(
    model: CheckpointSection, architecture: ArchitectureSection, *, keeps_head: bool
) -> Initial:
    """Resolve the model to start from and the shape to train; a kept head needs label names.

    Raise ``ModelError`` if the checkpoint, the label list or the shape is not right.
    """
    wanted = _wanted_labels(model.labels)
    given = {name: value for name in _CHANGEABLE if (value := getattr(model, name)) is not None}
    given |= architecture.model_dump(
        include={"hidden_dropout_prob", "attention_probs_dropout_prob"}
    )
    statistics = _given_statistics(model)
    if model.name is None:
        shape = {**SHAPE_FROM_SCRATCH, **architecture.model_dump(), **given}
        shape["intermediate_size"] = shape["intermediate_size"] or 4 * architecture.hidden_size
        return Initial(
            "scratch", SCRATCH, _make_config(shape), wanted_labels=wanted, statistics=statistics
        )
    if is_image_model(model.name):
        image = resolve_image_model(model.name)
        return Initial(
            "image",
            image.name,
            _make_config({**_fields(image.config), **SHAPE_FROM_SCRATCH, **given}),
            sha256=image.sha256,
            image=image,
            wanted_labels=wanted,
            statistics=statistics,
            notes=image.notes,
        )
    facts = {name: getattr(model, name) for name in _FACTS}
    if locate_model(model.name).source == "original":
        # It describes neither, so the config says both what it is and what is wanted. The labels
        # of a new head, however, are not those of the old one.
        kept = ("labels",) if keeps_head else ()
        facts |= {name: getattr(model, name) for name in (*_CHANGEABLE, *kept)}
    mean, std = statistics or (None, None)
    # training.loss decides the activation; the checkpoint's own is not used.
    overrides = ModelOverrides(activation="sigmoid", mean=mean, std=std, **facts)
    spec = resolve_model(model.name, overrides, needs_labels=keeps_head)
    return Initial(
        "checkpoint",
        spec.name,
        _make_config({**_fields(spec.config), **given}),
        sha256=spec.sha256,
        spec=spec,
        labels=tuple(label.name for label in spec.labels),
        wanted_labels=wanted,
        statistics=(spec.mean, spec.std),
        notes=spec.notes,
    )


def build_model(
    initial: Initial, label_names: tuple[str, ...], loss: str, seed: int, *, keeps_head: bool
) -> ASTForAudioClassification:
    """Build the model before its first step, on the CPU.

    ``label_names`` are in the order of the head's outputs, and those of the checkpoint if its head
    is kept. ``seed`` is for the weights that no checkpoint gives. Raise ``ModelError`` if the
    checkpoint does not fit the shape.
    """
    problem = {
        "cross_entropy": "single_label_classification",
        "binary_cross_entropy": "multi_label_classification",
    }[loss]
    config = dataclasses.replace(initial.config.with_labels(label_names), problem_type=problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if initial.spec is not None:
            started = load_for_finetuning(initial.spec, config)
            if not keeps_head and label_names == initial.labels:
                # The labels happen to be the same, so it has taken the head over.
                started.classifier = ASTForAudioClassification(config).classifier
            return started
        if initial.image is not None:
            return load_image_model(initial.image.location, config, initial.image.revision)
        model = ASTForAudioClassification(config)
        initialise_from_scratch(model)
        return model


def measure_statistics(
    clips: ClipSet, windows: WindowSettings, fbank: FbankSettings
) -> tuple[float, float]:
    """Measure mean and standard deviation of the clips' features, as ``earmark stats`` does."""
    total = FeatureStatistics()
    for clip in clips.clips:
        cuts = cut_windows(clips.files.read_clip(clip), windows)
        moments = [measure_window(cut.samples, fbank) for cut in cuts]
        parts = [FeatureStatistics(moment, windows=1) for moment in moments]
        total = sum_statistics([total, *parts])
    return mean_and_std(total)


def _given_statistics(model: CheckpointSection) -> tuple[float, float] | None:
    """Return what the configuration gives; ``mean`` and ``std`` win over ``preprocessor``."""
    features = {} if model.preprocessor is None else read_features(model.preprocessor)
    mean = model.mean if model.mean is not None else features.get("mean")
    std = model.std if model.std is not None else features.get("std")
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ModelError(
            f"model.{missing} is missing, and its counterpart is given; give both, neither, or a "
            "model.preprocessor that earmark stats wrote"
        )
    return None if mean is None or std is None else (float(mean), float(std))


def _wanted_labels(source: str | None) -> tuple[str, ...] | None:
    if source is None:
        return None
    return tuple(label.name for label in read_labels(source))


def _fields(config: ASTConfig) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(config)]
    labels = ("id2label", "label2id", "num_labels")
    return {name: getattr(config, name) for name in names if name not in labels}


def _make_config(values: dict[str, Any]) -> ASTConfig:
    try:
        return ASTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the model to train: {error}") from error
