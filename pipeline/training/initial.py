"""What a training starts from: an AST checkpoint, an image model's weights, or nothing.

--model (AST)    ─┐
--model (ViT)    ─┼─▶ Initial: the shape wanted, labels, statistics ─▶ a model to train
no --model       ─┘
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.config.label import CheckpointSection
from pipeline.config.train import (
    SCRATCH_NUM_FRAMES,
    SCRATCH_NUM_MEL_BINS,
    SCRATCH_STRIDE,
    ArchitectureSection,
)
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
from transforms.storage import filesystem as storage

SCRATCH = "scratch"
# Of a model that does not bring a shape along: AST's own for AudioSet, patches side by side.
_DEFAULT_SHAPE = {
    "frequency_stride": SCRATCH_STRIDE,
    "time_stride": SCRATCH_STRIDE,
    "max_length": SCRATCH_NUM_FRAMES,
    "num_mel_bins": SCRATCH_NUM_MEL_BINS,
}
# What a checkpoint has, and training may want otherwise.
_CHANGEABLE = ("frequency_stride", "time_stride", "max_length", "num_mel_bins")
_FACTS = ("num_attention_heads", "layer_norm_eps", "head_layer_norm_eps")


@dataclass(frozen=True)
class Initial:
    """What a training starts from.

    Attributes:
        kind: Where the weights come from.
        name: The model's name without secrets, or ``scratch``.
        sha256: Of the weights; None where there are none.
        spec: The checkpoint, if it is an AST.
        image: The checkpoint, if it is an image model.
        config: The shape to train, with labels that are still to be replaced.
        labels: The checkpoint's own label names; where its head is not kept, and nobody names its
            outputs, ``LABEL_0`` and so on.
        wanted_labels: The label names that ``model.labels`` gives, or None.
        statistics: Mean and standard deviation to normalise with; None: still to be measured.
        notes: What is worth saying.
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
        """Where the weights lie on this machine: a folder or a file; None if they do not."""
        origin = self.spec or self.image
        if origin is None or origin.source == "hub" or not storage.is_local(origin.location):
            return None
        return storage.local_path(storage.normalise(origin.location))

    @property
    def described(self) -> str:
        """In a few words."""
        if self.kind == "scratch":
            return "from scratch"
        return f"from {self.name}" + (", an image model" if self.kind == "image" else "")


def resolve_initial(
    model: CheckpointSection, architecture: ArchitectureSection, *, keeps_head: bool
) -> Initial:
    """Find out what to start from, and the shape to train.

    Args:
        model: The checkpoint, and what is wanted of the model.
        architecture: Of a model from scratch.
        keeps_head: Whether to start with the checkpoint's head, so that its outputs need names.

    Raises:
        ModelError: The checkpoint, the label list or the shape is not right.
    """
    wanted = _wanted_labels(model.labels)
    given = {name: value for name in _CHANGEABLE if (value := getattr(model, name)) is not None}
    given["hidden_dropout_prob"] = architecture.hidden_dropout_prob
    given["attention_probs_dropout_prob"] = architecture.attention_probs_dropout_prob
    statistics = _given_statistics(model)
    if model.name is None:
        shape = {**_DEFAULT_SHAPE, **_scratch_shape(architecture), **given}
        return Initial(
            "scratch", SCRATCH, _make_config(shape), wanted_labels=wanted, statistics=statistics
        )
    if is_image_model(model.name):
        image = resolve_image_model(model.name)
        return Initial(
            "image",
            image.name,
            _make_config({**_fields(image.config), **_DEFAULT_SHAPE, **given}),
            sha256=image.sha256,
            image=image,
            wanted_labels=wanted,
            statistics=statistics,
            notes=image.notes,
        )
    facts = {name: getattr(model, name) for name in _FACTS}
    if locate_model(model.name).source == "original":
        # It says neither of these of itself, so they are both what it is and what is wanted; but
        # the labels of a new head are not those of the old one.
        kept = ("labels",) if keeps_head else ()
        facts |= {name: getattr(model, name) for name in (*_CHANGEABLE, *kept)}
    mean, std = statistics or (None, None)
    # What becomes of the outputs is for training.loss to say; what the checkpoint has is not used.
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
    """The model before its first step, on the CPU.

    Args:
        initial: What to start from.
        label_names: The head's outputs, in order.
        loss: What it will be trained with; the saved config says so.
        seed: Of the weights that no checkpoint gives.
        keeps_head: Start with the checkpoint's head, whose labels these are.

    Raises:
        ModelError: The checkpoint does not fit the shape.
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
                # It has taken the head over, as the labels happen to be the same.
                started.classifier = ASTForAudioClassification(config).classifier
            return started
        if initial.image is not None:
            return load_image_model(initial.image.location, config, initial.image.revision)
        model = ASTForAudioClassification(config)
        initialise_from_scratch(model)
        return model


def measure_statistics(
    clips: ClipSet, windows: WindowSettings, config: ASTConfig
) -> tuple[float, float]:
    """Mean and standard deviation of the clips' features, as ``earmark stats`` measures them."""
    fbank = FbankSettings(
        sample_rate_hz=windows.sample_rate_hz,
        num_mel_bins=config.num_mel_bins,
        num_frames=config.max_length,
    )
    total = FeatureStatistics()
    for index, clip in enumerate(clips.clips):
        cuts = cut_windows(clips.samples(index, 0, clip.num_samples), windows)
        moments = [measure_window(cut.samples, fbank) for cut in cuts]
        parts = [FeatureStatistics(moment, windows=1) for moment in moments]
        total = sum_statistics([total, *parts])
    return mean_and_std(total)


def _given_statistics(model: CheckpointSection) -> tuple[float, float] | None:
    """What the configuration gives; ``mean`` and ``std`` win over ``preprocessor``."""
    features = {} if model.preprocessor is None else read_features(model.preprocessor)
    mean = model.mean if model.mean is not None else features.get("mean")
    std = model.std if model.std is not None else features.get("std")
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ModelError(
            f"model.{missing} is not given, and its counterpart is; give both, neither, or a "
            "model.preprocessor that earmark stats wrote"
        )
    return None if mean is None or std is None else (float(mean), float(std))


def _wanted_labels(source: str | None) -> tuple[str, ...] | None:
    if source is None:
        return None
    labels = read_labels(source, storage.read_bytes, storage.public_uri(source))
    return tuple(label.name for label in labels)


def _scratch_shape(architecture: ArchitectureSection) -> dict[str, Any]:
    return {
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "intermediate_size": architecture.intermediate_size or 4 * architecture.hidden_size,
        "patch_size": architecture.patch_size,
    }


def _fields(config: ASTConfig) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(config)]
    labels = ("id2label", "label2id", "num_labels")
    return {name: getattr(config, name) for name in names if name not in labels}


def _make_config(values: dict[str, Any]) -> ASTConfig:
    try:
        return ASTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the model to train: {error}") from error
