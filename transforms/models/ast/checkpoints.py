"""Checkpoints of AST: found, checked, described, loaded and saved.

The launcher calls ``resolve_model`` once, before any work. Workers receive the small ``ModelSpec``
that it returns and call ``load_model``.

Guarantees: whatever can fail, fails in ``resolve_model``, with a ``ModelError`` that says what to
do. Labels, their order, window and statistics come from the checkpoint or from the user.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transforms.errors import ModelError
from transforms.models.ast.config import ASTConfig, parse_config
from transforms.models.ast.config_files import check_extractor, open_checkpoint
from transforms.models.ast.feature_extractor import ASTFeatureExtractor
from transforms.models.ast.files import (
    CONFIG_NAME,
    FEATURES_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    ModelLocation,
    Source,
    hash_files,
    locate_model,
)
from transforms.models.ast.model import ASTForAudioClassification, resize_position_embeddings
from transforms.models.ast.original import complete_original, fail_missing
from transforms.models.ast.pretrained import build_model, check_finite, check_tensors, save_model
from transforms.models.ast.public import (
    AUDIOSET_STATS,
    PUBLIC_CHECKPOINTS,
    PUBLISHED_FILES,
    SAMPLING_RATE_HZ,
    window_length_s,
)
from transforms.models.ast.tensor_names import BASE
from transforms.models.ast.weights import Weights, check_labels
from transforms.models.labels import Label, labels_from_names, read_labels
from transforms.storage import urls
from transforms.storage.secrets import public_uri

Activation = Literal["sigmoid", "softmax"]

# The fields that define a block: a model can only start from a checkpoint that agrees in these.
FIXED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "patch_size", "qkv_bias",
)  # fmt: skip
_NORMALISER_OFF = (0.0, 0.5)  # (x - 0) / (2 * 0.5) leaves x as it is


@dataclass(frozen=True)
class ModelOverrides:
    """Values of ``--set model.*``, which replace or complete the checkpoint's; None leaves them.

    Most are fields of ``ASTConfig``.

    Attributes:
        labels: ``audioset``, ``speech_commands``, or a file (``labels.read_labels``).
        mean, std: Of the training features, before normalising; ``std`` above 0.
        num_attention_heads: Heads per block, which the weights do not show.
        layer_norm_eps: Epsilon of every LayerNorm but the head's.

    Raises:
        ModelError: A value is not legal.
    """

    activation: Activation | None = None
    labels: str | None = None
    mean: float | None = None
    std: float | None = None
    frequency_stride: int | None = None
    time_stride: int | None = None
    max_length: int | None = None
    num_mel_bins: int | None = None
    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    head_layer_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.activation not in (None, "sigmoid", "softmax"):
            raise ModelError(
                f"model.activation is {self.activation!r}; expected sigmoid or softmax"
            )

    def config_fields(self) -> dict[str, Any]:
        """Return the values given for fields of ``ASTConfig``."""
        names = {f.name for f in dataclasses.fields(ASTConfig)} & vars(self).keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint that was found and checked; small, because it is sent to every worker.

    Attributes:
        name: What the user gave, without secrets.
        location: Bundled model's name, hub id, folder or ``.pth`` file to load from. It may carry
            a signature, so it is never written or printed.
        revision: Commit on the hub, or None.
        sha256: Hex digest of the weights file; of several files, that of the sorted lines
            ``name digest``.
        config: Its shape, overrides applied.
        mean: Features are normalised as ``(x - mean) / (2 * std)``.
        sampling_rate: Rate of the audio it was trained on, in Hz.
        notes: Choices made for this model that the user should know.
    """

    name: str
    source: Source
    location: str = dataclasses.field(repr=False)
    revision: str | None
    sha256: str
    config: ASTConfig
    labels: tuple[Label, ...]
    activation: Activation
    mean: float
    std: float
    weight_files: tuple[str, ...] = (WEIGHTS_NAME,)
    sampling_rate: int = SAMPLING_RATE_HZ
    license: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return self.config.hidden_size

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels)

    @property
    def num_frames(self) -> int:
        """Frames of a window."""
        return self.config.max_length

    @property
    def window_s(self) -> float:
        """Length of a window in seconds: 10.255 for 1024 frames."""
        return window_length_s(self.num_frames)


# --- Settling what the checkpoint leaves open ----------------------------------------------


def _settle_labels(
    weights: Weights, config: ASTConfig, overrides: ModelOverrides
) -> tuple[ASTConfig, tuple[Label, ...]]:
    if overrides.labels is not None:
        name = public_uri(overrides.labels)
        labels = read_labels(overrides.labels)
        origin = f"model.labels={name}"
    else:
        labels = labels_from_names(tuple(config.id2label.values()))
        origin = f"id2label in {CONFIG_NAME}"
    names = [label.name for label in labels]
    check_labels(weights, origin, names)
    return config.with_labels(names), labels


def _settle_activation(
    location: ModelLocation, config: ASTConfig, labels: Sequence[Label], overrides: ModelOverrides
) -> tuple[Activation, tuple[str, ...]]:
    if overrides.activation is not None:
        return overrides.activation, ()
    if config.problem_type == "single_label_classification":
        return "softmax", ()
    if config.problem_type == "multi_label_classification":
        return "sigmoid", ()
    if config.problem_type is not None:
        location.fail(
            f"problem_type is {config.problem_type!r}: its outputs are not labels; expected "
            "single_label_classification or multi_label_classification. To score them anyway, "
            "give --set model.activation=sigmoid or softmax"
        )
    if labels[0].id is not None:
        return "sigmoid", (
            "Scores are sigmoids: the checkpoint does not say (no problem_type), and AudioSet's "
            "527 classes are independent.",
        )
    return "softmax", (
        "Scores are a softmax: the checkpoint does not say (no problem_type), and its labels are "
        "not AudioSet's. Where classes are independent: --set model.activation=sigmoid",
    )


def _read_features(files: ModelFiles, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the feature extractor's settings; the file's gaps are filled as in transformers."""
    features = files.read_json(FEATURES_NAME)
    if features is not None:
        mean, std = AUDIOSET_STATS
        return {"mean": mean, "std": std, **features}
    if files.location.source == "original":
        return {name: values[name] for name in ("mean", "std") if name in values}
    return {}


def _settle_stats(
    location: ModelLocation,
    features: Mapping[str, Any],
    config: ASTConfig,
    overrides: ModelOverrides,
) -> tuple[float, float]:
    """Return mean and std, after checking that the features are those the model takes."""
    check_extractor(location, features)
    expected = {"sampling_rate": SAMPLING_RATE_HZ}
    if overrides.max_length is None:
        expected["max_length"] = config.max_length
    if overrides.num_mel_bins is None:
        expected["num_mel_bins"] = config.num_mel_bins
    for name, value in expected.items():
        if features.get(name, value) != value:
            reason = "the only rate of AST" if name == "sampling_rate" else f"as in {CONFIG_NAME}"
            location.fail(
                f"{name} in {FEATURES_NAME} is {features[name]!r}; expected {value!r}, {reason}"
            )
    mean, std = features.get("mean"), features.get("std")
    if not features.get("do_normalize", True):
        mean, std = _NORMALISER_OFF
    mean = mean if overrides.mean is None else overrides.mean
    std = std if overrides.std is None else overrides.std
    return _statistic(location, "mean", mean), _statistic(location, "std", std)


def _statistic(location: ModelLocation, name: str, value: Any) -> float:
    if value is None:
        location.fail(
            f"there is no {FEATURES_NAME}, and so no {name}; add the file, or give --set "
            f"model.{name}= (earmark stats measures it on a dataset)"
        )
    # JSON has integers that no float can hold, on which isfinite raises.
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if not is_number or (name == "std" and value <= 0):
        location.fail(
            f"{name} is {value!r}; expected a finite number" + (" above 0" * (name == "std"))
        )
    return float(value)


# --- Resolving and loading ----------------------------------------------------------------------


def resolve_model(
    name: str, overrides: ModelOverrides = ModelOverrides(), *, needs_labels: bool = True
) -> ModelSpec:
    """Find a checkpoint, check everything about it that can be wrong, and describe it.

    A remote folder or file is downloaded for the check, and again by ``load_model``. A hub model
    stays in the hub's local cache.

    Args:
        name: Name of a bundled model (``esc10``), hub id (``org/name`` or ``org/name@revision``),
            local or remote folder, or original ``.pth`` file.
        needs_labels: Whether the outputs must have names. If not, unnamed outputs of an original
            checkpoint are called ``LABEL_0`` and so on, as in transformers.

    Raises:
        ModelError: The checkpoint does not exist, is damaged, or contradicts its description; the
            message names the tensor or field, what was found, what was expected, and what to do.
    """
    location = locate_model(name)
    with ModelFiles(location) as files:
        values, weights = open_checkpoint(files)
        features = _read_features(files, values)
        values.update(overrides.config_fields())
        notes = list(location.notes)
        if location.source == "original":
            values, missing, found = complete_original(weights, values)
            is_named = "id2label" in values or overrides.labels is not None
            if not is_named and not needs_labels:
                values["num_labels"] = weights.num_labels
                is_named = True
            missing += _missing_meaning(weights, features, overrides, is_named=is_named)
            notes += found
            if missing:
                fail_missing(location, missing)
        config = parse_config(location, values)
        config, labels = _settle_labels(weights, config, overrides)
        check_tensors(weights, config, ASTForAudioClassification)
        check_finite(weights, config)
        mean, std = _settle_stats(location, features, config, overrides)
        activation, found_activation = _settle_activation(location, config, labels, overrides)
        return ModelSpec(
            name=location.name,
            source=location.source,
            location=location.url,
            revision=location.revision,
            sha256=hash_files(files, weights.file_names),
            config=config,
            labels=labels,
            activation=activation,
            mean=mean,
            std=std,
            weight_files=weights.file_names,
            license=location.license or _published_license(location),
            notes=(*notes, *found_activation),
        )


def _missing_meaning(
    weights: Weights, features: Mapping[str, Any], overrides: ModelOverrides, *, is_named: bool
) -> list[str]:
    missing = []
    if not is_named:
        missing.append(
            f"model.labels (audioset, speech_commands or a file; it has {weights.num_labels} "
            "outputs)"
        )
    for name, audioset in zip(("mean", "std"), AUDIOSET_STATS, strict=True):
        if name not in features and getattr(overrides, name) is None:
            missing.append(f"model.{name} (AudioSet: {audioset})")
    return missing


def _published_license(location: ModelLocation) -> str | None:
    if location.source == "hub":
        licenses = {entry.hub_id: entry.license for entry in PUBLIC_CHECKPOINTS}
        return licenses.get(location.url)
    entry = PUBLISHED_FILES.get(urls.file_name(location.url))
    return entry.license if entry else None


def load_model(spec: ModelSpec) -> ASTForAudioClassification:
    """Load what ``resolve_model`` described, on the CPU, in float32 and evaluation mode.

    Raises ``ModelError`` if the files have gone or changed since.
    """
    location = ModelLocation(
        spec.name,
        spec.source,
        spec.location,
        spec.revision,
        listing=frozenset(spec.weight_files) if spec.source == "hub" else None,
    )
    with ModelFiles(location) as files:
        weights = Weights(files, spec.weight_files)
        model = build_model(ASTForAudioClassification, spec.config, weights)
        # After reading: a file replaced before or meanwhile has another hash.
        sha256 = hash_files(files, spec.weight_files)
    if sha256 != spec.sha256:
        location.fail(
            f"its weights have changed since the run was planned: sha256 is {sha256}, and was "
            f"{spec.sha256}. Run the same command again, and do not change the model meanwhile"
        )
    return model


def load_for_finetuning(spec: ModelSpec, config: ASTConfig) -> ASTForAudioClassification:
    """Load a checkpoint into a model with other strides, another window or other labels.

    Position embeddings are resized as in the original code. The head is the checkpoint's if the
    label names are the same in the same order, else a fresh one. All other fields of ``config``
    are the checkpoint's. ``ModelError`` if its files have gone, or its blocks differ.
    """
    check_blocks(spec.name, spec.config, config)
    state: dict[str, Tensor] = load_model(spec).state_dict()
    if config.id2label != spec.config.id2label:
        state = {name: tensor for name, tensor in state.items() if name.startswith(BASE)}
    return start_model(state, spec.config, config)


def check_blocks(name: str, source: ASTConfig, config: ASTConfig) -> None:
    """Raise ``ModelError`` if a model cannot start from a checkpoint, because its blocks differ."""
    for field in FIXED_FIELDS:
        found, expected = getattr(config, field), getattr(source, field)
        if found != expected:
            raise ModelError(
                f"model {name}: {field} is {expected}, and the model to fine-tune has "
                f"{found}; only strides, max_length, num_mel_bins and labels may differ"
            )


def start_model(
    state: Mapping[str, Tensor], source: ASTConfig, config: ASTConfig
) -> ASTForAudioClassification:
    """Build a model from another's tensors, with position embeddings resized to its own patches.

    Args:
        state: Tensors under the names of ``ASTForAudioClassification``'s state dict. Without a
            head among them, the head stays random, from torch's own generator.
        source: Config of the model that the tensors are from; its blocks are those of ``config``.
    """
    model = ASTForAudioClassification(config)
    name = f"{BASE}embeddings.position_embeddings"
    resized = resize_position_embeddings(state[name], source.patch_grid, config.patch_grid)
    model.load_state_dict({**model.state_dict(), **state, name: resized})
    return model


def save_pretrained(
    model: ASTForAudioClassification,
    folder: str | Path,
    *,
    mean: float,
    std: float,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's folder that Earmark and transformers load back, features included.

    transformers has one LayerNorm epsilon for everything: where the head's differs, the config
    holds both, and transformers uses ``layer_norm_eps`` throughout. With the original's pair
    (1e-6, and 1e-5 in the head) its logits before the bias then differ by a factor of
    1 + 4.5e-6 / (variance of the embedding): 2e-5 was measured, with random weights, an embedding
    variance of 0.7 and logits of standard deviation 1.

    Args:
        model: On any device, in any float type.
        folder: Local folder or URL; created if it does not exist.
        mean, std: Of the training features, before normalising.
        dtype: Float type of the weights in the file, as for ``save_model``.

    Raises:
        ModelError: A weight is too large for ``dtype``.
    """
    config = model.config
    extractor = ASTFeatureExtractor(
        num_mel_bins=config.num_mel_bins, max_length=config.max_length, mean=mean, std=std
    )
    save_model(model, folder, dtype, extractor.to_dict())
