"""Checkpoints of AST: find one, check everything that can fail, load it, save it.

Its place: the launcher calls ``resolve_model`` once, before any work; the small ``ModelSpec`` it
gives goes to the workers, where ``inference`` calls ``load_model``.

    --model NAME ─resolve_model─▶ ModelSpec ─(pickled, to each worker)─▶ load_model ─▶ the model

This file says what a checkpoint means. Where its files are is ``model_files``, what their tensors
are called ``tensor_names``, whether they are sound ``model_weights``, what is known of the authors'
own files ``original_checkpoints``, and which models there are ``public_checkpoints`` and
``bundled``. Image models, which training can start from, are ``image_checkpoints``.

Guarantees: what can fail, fails in ``resolve_model``, with a ``ModelError`` that says what to do.
Labels, their order, window and statistics are the checkpoint's, or what the user gave instead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from transforms.errors import ModelError
from transforms.models.ast.files import (
    CONFIG_NAME,
    FEATURES_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    ModelLocation,
    Source,
    find_weight_files,
    hash_files,
    locate_model,
)
from transforms.models.ast.model import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    resize_position_embeddings,
)
from transforms.models.ast.original import complete_original, fail_missing, original_values
from transforms.models.ast.public import (
    AUDIOSET_STATS,
    PUBLIC_CHECKPOINTS,
    PUBLISHED_FILES,
    SAMPLING_RATE_HZ,
    window_length_s,
)
from transforms.models.ast.tensor_names import BASE, tensor_names, to_layout
from transforms.models.ast.weights import Weights, check_finite, check_tensors, read_state
from transforms.models.labels import Label, labels_from_names, read_labels
from transforms.storage import reading, urls, writing
from transforms.storage.secrets import public_uri

Activation = Literal["sigmoid", "softmax"]

# Far above any AST: a damaged config must not fill the memory or overflow.
MAX_LAYERS = 1_000
MAX_SIZE = 1 << 20
# Image transformers of AST's shape, which it can start from (``image_checkpoints``).
IMAGE_MODEL_TYPES = ("deit", "vit")
# What makes a block what it is: a checkpoint cannot start a model that differs in one of these.
FIXED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "patch_size", "qkv_bias",
)  # fmt: skip
_NORMALISER_OFF = (0.0, 0.5)  # (x - 0) / (2 * 0.5) leaves x as it is


@dataclass(frozen=True)
class ModelOverrides:
    """What ``--set model.*`` says instead of, or in addition to, the checkpoint; None: nothing.

    Attributes:
        activation: What turns logits into scores.
        labels: ``audioset``, ``speech_commands``, or a file (``labels.read_labels``).
        mean: Of the training features, before normalising.
        std: Of the training features, before normalising; above 0.
        frequency_stride: Step between patches, in mel bins.
        time_stride: Step between patches, in frames.
        max_length: Frames of a window.
        num_mel_bins: Mel bins of a frame.
        num_attention_heads: Heads per block: weights do not show it.
        layer_norm_eps: Epsilon of every LayerNorm but the head's.
        head_layer_norm_eps: Epsilon of the head's LayerNorm.

    Raises:
        ModelError: a value is not one that the field can have.
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
        """Those that are fields of ``ASTConfig``, and given."""
        names = {f.name for f in dataclasses.fields(ASTConfig)} & vars(self).keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint that was found and checked; small, so that it can travel to every worker.

    Attributes:
        name: What the user gave, without secrets.
        source: ``bundled``, ``hub``, ``folder`` or ``original``.
        location: Bundled model's name, hub id, folder or ``.pth`` file to load from; may carry a
            signature, so it is never written or printed.
        revision: The hub's commit, or None.
        sha256: Hex digest of the weights file; of several files, that of the sorted lines
            ``name digest``.
        config: Its shape, overrides applied.
        labels: What its outputs mean, in order.
        activation: What turns its logits into scores.
        mean: Features are normalised as ``(x - mean) / (2 * std)``.
        std: As for ``mean``.
        weight_files: Names of the files that hold the weights.
        sampling_rate: Of the audio it was trained on, in Hz.
        license: Of the weights, where known.
        notes: What a user should know of choices made for this model.
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
        """How many outputs the head has."""
        return len(self.labels)

    @property
    def num_frames(self) -> int:
        """Frames of a window."""
        return self.config.max_length

    @property
    def window_s(self) -> float:
        """Length of a window in seconds: 10.255 for 1024 frames."""
        return window_length_s(self.num_frames)


# --- Reading the config --------------------------------------------------------------------


def make_config(
    location: ModelLocation, values: Mapping[str, Any], overrides: ModelOverrides
) -> ASTConfig:
    """The config that these values describe, or ``ModelError``; what the user gave wins."""
    try:
        config = ASTConfig.from_dict({**values, **overrides.config_fields()})
    except (TypeError, ValueError) as error:
        location.fail(f"{CONFIG_NAME} or --set model.* is wrong: {error}", error)
    for name, value in config.to_dict().items():
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if isinstance(value, int) and value > most:
            location.fail(f"{name} is {value}; expected at most {most}")
    return config


def _need_config(files: ModelFiles) -> dict[str, Any]:
    values = files.read_json(CONFIG_NAME)
    if values is None:
        offline = files.location.source == "hub" and files.location.listing is None
        files.location.fail(
            f"there is no {CONFIG_NAME}; expected a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and "
            f"{FEATURES_NAME}" + (" (only the local cache was looked at)" if offline else "")
        )
    if values.get("model_type") in IMAGE_MODEL_TYPES:
        files.location.fail(
            f"model_type in {CONFIG_NAME} is {values['model_type']!r}, a transformer for images; "
            "expected audio-spectrogram-transformer. It knows no sounds yet: train it first "
            "(earmark train --model)"
        )
    if "model_type" not in values:
        files.location.fail(
            f"{CONFIG_NAME} has no model_type; expected audio-spectrogram-transformer. Is this a "
            "model's folder?"
        )
    return values


def _open(files: ModelFiles) -> tuple[dict[str, Any], Weights]:
    """The values of the config, as far as the checkpoint gives them, and the weights' headers."""
    if files.location.source == "original":
        weights = Weights(files, find_weight_files(files))
        return original_values(files, weights), weights
    values = _need_config(files)
    return values, Weights(files, find_weight_files(files))


# --- Settling what the checkpoint leaves open ----------------------------------------------


def _settle_labels(
    weights: Weights, config: ASTConfig, overrides: ModelOverrides
) -> tuple[ASTConfig, tuple[Label, ...]]:
    if overrides.labels is not None:
        name = public_uri(overrides.labels)
        labels = read_labels(overrides.labels, reading.read_bytes, name)
        origin = f"model.labels={name}"
    else:
        names = tuple(config.id2label.values())
        origin = f"id2label in {CONFIG_NAME}"
        _check_names(weights.location, origin, names)
        labels = labels_from_names(names)
    if weights.num_labels not in (0, len(labels)):
        weights.location.fail(
            f"{origin} has {len(labels)} labels, and the classifier has {weights.num_labels} "
            "outputs; expected one label per output, in its order. Give the right list with --set "
            "model.labels=audioset, speech_commands or a file"
        )
    return config.with_labels([label.name for label in labels]), labels


def _check_names(location: ModelLocation, origin: str, names: Sequence[str]) -> None:
    """Every output has a name, and one of its own: rows and exports go by names."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name.strip() and name not in seen:
            seen[name] = index
            continue
        found = f"{name!r} for {seen[name]} and {index}" if name in seen else f"none for {index}"
        location.fail(
            f"{origin} has the name {found}; expected one per output, each once. Give the right "
            "list with --set model.labels="
        )


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
            f"problem_type is {config.problem_type!r}: its outputs are no labels; expected "
            "single_label_classification or multi_label_classification. To score them all the "
            "same, give --set model.activation=sigmoid or softmax"
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
    """Settings of the feature extractor; what its file leaves out is transformers' default."""
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
    """Mean and std to normalise with; and the features must be those that the model takes."""
    _check_kind(location, features)
    expected = {"sampling_rate": SAMPLING_RATE_HZ}
    if overrides.max_length is None:
        expected["max_length"] = config.max_length
    if overrides.num_mel_bins is None:
        expected["num_mel_bins"] = config.num_mel_bins
    for name, value in expected.items():
        if features.get(name, value) != value:
            reason = "AST is fed no other" if name == "sampling_rate" else f"as in {CONFIG_NAME}"
            location.fail(
                f"{name} in {FEATURES_NAME} is {features[name]!r}; expected {value!r}, {reason}"
            )
    mean, std = features.get("mean"), features.get("std")
    if not features.get("do_normalize", True):
        mean, std = _NORMALISER_OFF
    mean = mean if overrides.mean is None else overrides.mean
    std = std if overrides.std is None else overrides.std
    return _statistic(location, "mean", mean), _statistic(location, "std", std)


def _check_kind(location: ModelLocation, features: Mapping[str, Any]) -> None:
    kind = features.get("feature_extractor_type", "ASTFeatureExtractor")
    if kind != "ASTFeatureExtractor":
        location.fail(
            f"feature_extractor_type in {FEATURES_NAME} is {kind!r}; expected ASTFeatureExtractor"
        )


def _statistic(location: ModelLocation, name: str, value: Any) -> float:
    if value is None:
        location.fail(
            f"there is no {FEATURES_NAME}, and so no {name}; add the file, or give --set "
            f"model.{name}= (earmark stats measures it on a dataset)"
        )
    # JSON has whole numbers that no float can hold, and isfinite cannot tell.
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if not is_number or (name == "std" and value <= 0):
        location.fail(
            f"{name} is {value!r}; expected a finite number" + (" above 0" * (name == "std"))
        )
    return float(value)


# --- What others call ----------------------------------------------------------------------


def resolve_model(
    name: str, overrides: ModelOverrides = ModelOverrides(), *, needs_labels: bool = True
) -> ModelSpec:
    """Find a checkpoint, check everything about it that can be wrong, and describe it.

    A remote folder or file is fetched for the check, and again by ``load_model``; a hub model is
    kept in the hub's local cache.

    Args:
        name: Of a model that ships with Earmark (``esc10``), a hub id (``org/name`` or
            ``org/name@revision``), local or remote folder, or original ``.pth`` file.
        overrides: What to take instead of what the checkpoint says.
        needs_labels: Whether it must be known what the outputs mean. If not, those of an original
            checkpoint that nobody names are called ``LABEL_0`` and so on, as transformers does.

    Raises:
        ModelError: it cannot be had, is damaged, or does not fit its description; the message
            names the tensor or field, what was found, what was expected, and the next step.
    """
    location = locate_model(name)
    with ModelFiles(location) as files:
        values, weights = _open(files)
        features = _read_features(files, values)
        notes = list(location.notes)
        if location.source == "original":
            given = {**values, **overrides.config_fields()}
            values, missing, found = complete_original(weights, given)
            is_named = "id2label" in values or overrides.labels is not None
            if not is_named and not needs_labels:
                values["num_labels"] = weights.num_labels
                is_named = True
            missing += _missing_meaning(weights, features, overrides, is_named=is_named)
            notes += found
            if missing:
                fail_missing(location, missing)
        config, labels = _settle_labels(
            weights, make_config(location, values, overrides), overrides
        )
        check_tensors(weights, config, tensor_names(config, "memory").keys())
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
    """Load what ``resolve_model`` described; on the CPU, in float32 and evaluation mode.

    Raises:
        ModelError: its files have gone or changed since.
    """
    location = ModelLocation(
        spec.name,
        spec.source,
        spec.location,
        spec.revision,
        listing=frozenset(spec.weight_files) if spec.source == "hub" else None,
    )
    with ModelFiles(location) as files:
        model = _build(Weights(files, spec.weight_files), spec.config)
        # Behind the reading: a file that was replaced before or meanwhile has another hash.
        sha256 = hash_files(files, spec.weight_files)
    if sha256 != spec.sha256:
        location.fail(
            f"its weights have changed since the run was planned: sha256 is {sha256}, and was "
            f"{spec.sha256}. Run the same command again, with the model left alone meanwhile"
        )
    return model


def load_for_finetuning(spec: ModelSpec, config: ASTConfig) -> ASTForAudioClassification:
    """Load a checkpoint into a model of other strides, another window or other labels.

    Position embeddings are resized as in the original code. The head is the checkpoint's where
    the label names are the same in the same order, else a fresh one.

    Args:
        spec: The checkpoint to start from.
        config: Of the model wanted; all but strides, window and labels as in the checkpoint.

    Raises:
        ModelError: the checkpoint's files have gone, or its blocks are others.
    """
    check_blocks(spec.name, spec.config, config)
    state: dict[str, Tensor] = load_model(spec).state_dict()
    if config.id2label != spec.config.id2label:
        state = {name: tensor for name, tensor in state.items() if name.startswith(BASE)}
    return start_model(state, spec.config, config)


def check_blocks(name: str, source: ASTConfig, config: ASTConfig) -> None:
    """A checkpoint's blocks are those of the model that is to start from it.

    Raises:
        ModelError: a field that makes a block what it is differs.
    """
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
        state: Tensors under the names of ``ASTForAudioClassification``'s state dict; without those
            of a head, the model's stays as it starts: random, from torch's own generator.
        source: What they are the tensors of; its blocks are those of ``config``.
        config: Of the model wanted.
    """
    model = ASTForAudioClassification(config)
    name = f"{BASE}embeddings.position_embeddings"
    resized = resize_position_embeddings(state[name], source.patch_grid, config.patch_grid)
    model.load_state_dict({**model.state_dict(), **state, name: resized})
    return model


def load_pretrained(name: str, revision: str | None = None) -> ASTForAudioClassification:
    """Load a checkpoint for use from Python: as ``resolve_model``, but it need have no statistics.

    Raises:
        ModelError: as ``resolve_model``.
    """
    with ModelFiles(locate_model(name, revision)) as files:
        config, weights = _config_and_weights(files)
        config, _ = _settle_labels(weights, config, ModelOverrides())
        return _build(weights, config)


def load_base_model(name: str, revision: str | None = None) -> ASTModel:
    """Load a checkpoint's transformer; whether it has a head does not matter.

    Raises:
        ModelError: as ``resolve_model``.
    """
    with ModelFiles(locate_model(name, revision)) as files:
        config, weights = _config_and_weights(files)
        wanted = [key for key in tensor_names(config, "memory") if key.startswith(BASE)]
        check_tensors(weights, config, wanted)
        state = read_state(weights, config, wanted)
        with torch.device("meta"):
            model = ASTModel(config)
        renamed = {key.removeprefix(BASE): tensor for key, tensor in state.items()}
        model.load_state_dict(renamed, assign=True)
        return model.eval()


def load_config(name: str, revision: str | None = None) -> ASTConfig:
    """Read a checkpoint's config alone.

    Raises:
        ModelError: it cannot be had, or is not that of an AST.
    """
    location = locate_model(name, revision)
    with ModelFiles(location) as files:
        if location.source == "original":
            return _config_and_weights(files)[0]
        return make_config(location, _need_config(files), ModelOverrides())


def load_features(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read the settings of a checkpoint's feature extractor alone, ``preprocessor_config.json``.

    Args:
        name: As for ``resolve_model``; of an original ``.pth`` file, what lies beside it.
        revision: Branch, tag or commit on the hub, instead of the one in the name.

    Returns:
        What the file says, and nothing that it leaves out.

    Raises:
        ModelError: it cannot be had, or describes another extractor than AST's.
    """
    location = locate_model(name, revision, wanted=FEATURES_NAME)
    with ModelFiles(location) as files:
        features = files.read_json(FEATURES_NAME)
    if features is None:
        location.fail(f"there is no {FEATURES_NAME}; expected one in its folder. Is it a model's?")
    _check_kind(location, features)
    return features


def _config_and_weights(files: ModelFiles) -> tuple[ASTConfig, Weights]:
    values, weights = _open(files)
    if files.location.source == "original":
        values, missing, _ = complete_original(weights, values)
        if missing:
            fail_missing(files.location, missing)
        if "id2label" not in values:
            values["num_labels"] = weights.num_labels
    return make_config(files.location, values, ModelOverrides()), weights


def _build(weights: Weights, config: ASTConfig) -> ASTForAudioClassification:
    wanted = tensor_names(config, "memory").keys()
    check_tensors(weights, config, wanted)
    with torch.device("meta"):  # no memory, and no time for weights that are replaced at once
        model = ASTForAudioClassification(config)
    model.load_state_dict(read_state(weights, config, wanted), assign=True)
    return model.eval()


# --- Saving --------------------------------------------------------------------------------


def save_pretrained(
    model: ASTForAudioClassification,
    folder: str | Path,
    *,
    mean: float,
    std: float,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's folder that Earmark and transformers load back, features and all.

    Weights come first and ``config.json`` last, each file whole or not at all, so that a folder
    with a config is complete. transformers has one LayerNorm epsilon for everything: where the
    head's differs, the config holds both, and transformers uses ``layer_norm_eps`` throughout.
    With the original's pair (1e-6, and 1e-5 in the head) its logits before the bias then differ
    by a factor of 1 + 4.5e-6 / (variance of the embedding): 2e-5 was measured, with random
    weights, an embedding variance of 0.7 and logits of standard deviation 1.

    Args:
        model: On any device, in any float type.
        folder: Local folder or URL; made if it is not there.
        mean: Of the training features, before normalising.
        std: Of the training features, before normalising.
        dtype: Float type of the weights in the file, as for ``save_model``.

    Raises:
        ModelError: a weight is too large for ``dtype``.
    """
    # Before anything is written: weights that cannot be saved leave the folder as it was.
    weights = _weights_content(model, dtype)
    features = {
        "do_normalize": True,
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "max_length": model.config.max_length,
        "mean": mean,
        "num_mel_bins": model.config.num_mel_bins,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": SAMPLING_RATE_HZ,
        "std": std,
    }
    _write_json(folder, FEATURES_NAME, features)
    _write_model(model, folder, weights)


def save_model(
    model: ASTForAudioClassification | ASTModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and config, in transformers' names on disk; as ``save_pretrained``.

    Args:
        model: On any device, in any float type.
        folder: Local folder or URL; made if it is not there.
        dtype: Float type of the weights in the file; None leaves them the model's. Whatever it
            is, ``dtype`` in the config is the model's: transformers computes in that type, and in
            float16 it would refuse the float32 features that its own extractor makes.

    Raises:
        ModelError: a weight is too large for ``dtype``.
    """
    _write_model(model, folder, _weights_content(model, dtype))


def _weights_content(
    model: ASTForAudioClassification | ASTModel, dtype: torch.dtype | None
) -> bytes:
    """The bytes of ``model.safetensors``."""
    if isinstance(model, ASTModel):
        state = {BASE + name: tensor for name, tensor in model.state_dict().items()}
        stored = to_layout(state, model.config, "disk")
        # transformers leaves the prefix out where there is no head beside the base.
        stored = {name.removeprefix(BASE): tensor for name, tensor in stored.items()}
    else:
        stored = to_layout(model.state_dict(), model.config, "disk")
    tensors = {
        name: _as_stored(name, tensor.detach().cpu(), dtype).contiguous()
        for name, tensor in stored.items()
    }
    content: bytes = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return content


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    converted = tensor.to(dtype)
    too_large = torch.isfinite(tensor) & ~torch.isfinite(converted)
    if too_large.any():
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"the tensor {name!r} holds {tensor[too_large].abs().max().item():.6g}; {kind} goes to "
            f"{torch.finfo(dtype).max:.6g}. Save it as float32"
        )
    return converted


def _write_model(
    model: ASTForAudioClassification | ASTModel, folder: str | Path, weights: bytes
) -> None:
    writing.write_bytes(urls.join(_url(folder), WEIGHTS_NAME), weights)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    _write_json(folder, CONFIG_NAME, values)


def save_config(config: ASTConfig, folder: str | Path) -> None:
    """Write ``config.json`` alone."""
    _write_json(folder, CONFIG_NAME, config.to_dict())


def _write_json(folder: str | Path, file_name: str, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    writing.write_bytes(urls.join(_url(folder), file_name), text.encode())


def _url(folder: str | Path) -> str:
    return urls.normalise(str(folder))
