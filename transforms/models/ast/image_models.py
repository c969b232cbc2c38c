"""An AST that starts from a transformer for images, as the published ones did.

AST is a vision transformer applied to a spectrogram. Weights trained on photographs (ImageNet) are
a better start than random ones, so the authors used a DeiT. A checkpoint written by transformers,
of ``model_type`` ``deit`` or ``vit``, becomes the state of an AST as follows:

    patch kernels (D, 3, P, P) ──sum over the colours──▶ (D, 1, P, P): a spectrogram has one
    positions of 24×24 patches ──cut or interpolated───▶ those of the AST's own grid
    class, distillation token, blocks, final norm ─────▶ unchanged
    classifiers of images ─────────────────────────────▶ omitted; the AST has a new head

A plain ViT has no distillation token: AST's starts as a copy of the class token, position included.
The two stay equal until something random (dropout) separates them, and their mean, AST's embedding,
is what the class token alone would give; only attention sees the token twice.

Source: Gong et al. 2021, arXiv:2104.01778, section 2.2; YuanGongND/ast src/models/ast_models.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transforms.models.ast.checkpoints import FIXED_FIELDS, check_blocks, start_model
from transforms.models.ast.config import ASTConfig, parse_config
from transforms.models.ast.config_files import IMAGE_MODEL_TYPES
from transforms.models.ast.files import (
    CONFIG_NAME,
    ModelFiles,
    ModelLocation,
    Source,
    find_weight_files,
    hash_files,
    locate_model,
)
from transforms.models.ast.model import ASTForAudioClassification, ASTModel
from transforms.models.ast.tensor_names import (
    BASE,
    NUM_PREFIX_TOKENS,
    StoredTensor,
    layout_of,
    tensor_names,
)
from transforms.models.ast.weights import Weights, check_values

# The fields that an AST takes over from an image model.
_TAKEN_FIELDS = (*FIXED_FIELDS, "layer_norm_eps")
# Defaults of transformers' DeiTConfig and ViTConfig.
_DEFAULT_SIZES = {"image_size": 224, "patch_size": 16, "num_channels": 3}
# With and without a head. ``Weights`` puts the last before names without a prefix.
_PREFIXES = ("deit.", "vit.", BASE)
# Useless for sounds: classifiers, transformers' pooler, masked image modelling.
_UNUSED = re.compile(
    r"(classifier|cls_classifier|distillation_classifier|decoder\.0|(\w+\.)?pooler\.dense)"
    r"\.(weight|bias)|(\w+\.)?embeddings\.mask_token"
)
_CLASS, _DISTILLATION, _POSITIONS, _KERNEL = (
    f"{BASE}embeddings.{name}"
    for name in (
        *("cls_token", "distillation_token", "position_embeddings"),
        "patch_embeddings.projection.weight",
    )
)


@dataclass(frozen=True)
class ImageModel:
    """An image model that was found and checked, from its config to its last weight.

    Attributes:
        name: What the user gave, without secrets.
        location: Hub id or folder to load from. It may carry a signature, so it is never written
            or printed. With ``revision`` it identifies the weights.
        revision: Commit on the hub, or None.
        sha256: Hex digest of the weights, as in ``ModelSpec``.
        config: Config of an AST with this model's blocks and grid of patches.
        notes: What the user should know of how it was found and of what it lacks.
    """

    name: str
    source: Source
    location: str = field(repr=False)
    revision: str | None
    sha256: str
    config: ASTConfig
    notes: tuple[str, ...]


def is_image_model(name: str) -> bool:
    """Return whether a model is one for images, according to its ``config.json``.

    Raises ``ModelError`` if there is no such model, or its config is not JSON.
    """
    location = locate_model(name)
    if location.source == "original":
        return False  # a config beside it describes the AST in it
    with ModelFiles(location) as files:
        values = files.read_json(CONFIG_NAME) or {}
    return values.get("model_type") in IMAGE_MODEL_TYPES


def resolve_image_model(name: str) -> ImageModel:
    """Find an image model, check everything about it that can be wrong, and describe it.

    Raises:
        ModelError: The model does not exist, is damaged, or does not fit its config; the message
            names the tensor or field, what was found, what was expected, and what to do.
    """
    with ModelFiles(locate_model(name)) as files:
        config, num_channels = _read_config(files)
        weights = Weights(files, find_weight_files(files))
        names = _stored_names(weights, config)
        _read_state(weights, names, config, num_channels)
        location = files.location
        return ImageModel(
            name=location.name,
            source=location.source,
            location=location.url,
            revision=location.revision,
            sha256=hash_files(files, weights.file_names),
            config=config,
            notes=(*location.notes, *_lacking(names)),
        )


def load_image_model(
    name: str, config: ASTConfig, revision: str | None = None
) -> ASTForAudioClassification:
    """Load an image model into an AST: float32, on the CPU, with a new head.

    Args:
        name: Hub id (``org/name`` or ``org/name@revision``), or a local or remote folder.
        config: Config of the new AST: the image model's blocks (``ImageModel.config``), with any
            strides, window, mel bins and labels.
        revision: Replaces the one in the name.

    Raises:
        ModelError: As ``resolve_image_model``; or the blocks of ``config`` differ.
    """
    with ModelFiles(locate_model(name, revision)) as files:
        source, num_channels = _read_config(files)
        check_blocks(files.location.name, source, config)
        weights = Weights(files, find_weight_files(files))
        state = _read_state(weights, _stored_names(weights, source), source, num_channels)
    return start_model(state, source, config)


def _read_config(files: ModelFiles) -> tuple[ASTConfig, int]:
    """Describe the image model as an AST whose input is the image; also the number of colours."""
    location = files.location
    values = files.read_json(CONFIG_NAME) or {}
    if values.get("model_type") not in IMAGE_MODEL_TYPES:
        location.fail(
            f"model_type in {CONFIG_NAME} is {values.get('model_type')!r}; expected "
            f"{' or '.join(IMAGE_MODEL_TYPES)}: a transformer for images as transformers saves it, "
            "like facebook/deit-base-distilled-patch16-384"
        )
    height, width = _size(location, values, "image_size")
    patch_size, patch_width = _size(location, values, "patch_size")
    num_channels, _ = _size(location, values, "num_channels")
    if patch_size != patch_width:
        location.fail(
            f"patch_size in {CONFIG_NAME} is {values['patch_size']}; expected a square, as AST's "
            "are. Use another model"
        )
    fields = {name: values[name] for name in _TAKEN_FIELDS if name in values}
    fields |= {
        "patch_size": patch_size,
        "frequency_stride": patch_size,
        "time_stride": patch_size,
        "num_mel_bins": height,
        "max_length": width,
    }
    return parse_config(location, fields), num_channels


def _size(location: ModelLocation, values: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return height and width; a single number is both, as in transformers."""
    value = values.get(name, _DEFAULT_SIZES[name])
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2 or not all(type(size) is int and size >= 1 for size in both):
        location.fail(f"{name} in {CONFIG_NAME} is {value!r}; expected a whole number from 1")
    return both[0], both[1]


def _stored_names(weights: Weights, config: ASTConfig) -> dict[str, StoredTensor]:
    """Return where the file holds each tensor of ``ASTModel``; a ViT has no distillation token."""
    prefix = next(
        (prefix for prefix in _PREFIXES if f"{prefix}embeddings.cls_token" in weights.shapes), None
    )
    if prefix is None:
        weights.location.fail(
            "there is no tensor 'embeddings.cls_token', nor one with 'deit.' or 'vit.' before it; "
            "expected the weights of a DeiT or ViT as transformers saves them"
        )
    layout = layout_of(name.removeprefix(prefix) for name in weights.shapes)
    names = {
        ours: StoredTensor(prefix + stored.name.removeprefix(BASE))
        for ours, stored in tensor_names(config, layout).items()
        if ours.startswith(BASE)
    }
    if names[_DISTILLATION].name not in weights.shapes:
        del names[_DISTILLATION]
    return names


def _lacking(names: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    if _DISTILLATION in names:
        return ()
    return (
        "It has no distillation token: AST's starts as a copy of the class token. A distilled DeiT "
        "has one (facebook/deit-base-distilled-patch16-384)",
    )


def _read_state(
    weights: Weights, names: Mapping[str, StoredTensor], config: ASTConfig, num_channels: int
) -> dict[str, Tensor]:
    """Read the state of an AST without a head, on the image's own grid of patches."""
    _check_names(weights, names, config)
    for ours, shape in _expected_shapes(names, config, num_channels).items():
        found = weights.shapes[names[ours].name]
        if found != shape:
            weights.location.fail(
                f"the tensor {_shown(names[ours])!r} has the shape {found}; expected {shape}. Its "
                f"{CONFIG_NAME} describes another model"
            )
    state = {}
    for ours, stored in names.items():
        state[ours] = weights.read(stored)
        check_values(weights, stored, state[ours])
    state[_KERNEL] = state[_KERNEL].sum(dim=1, keepdim=True)  # (D, 1, P, P)
    if _DISTILLATION not in state:
        state[_DISTILLATION] = state[_CLASS].clone()
        first = state[_POSITIONS][:, :1]
        state[_POSITIONS] = torch.cat((first, state[_POSITIONS]), dim=1)  # (1, 2 + patches, D)
    return state


def _check_names(weights: Weights, names: Mapping[str, StoredTensor], config: ASTConfig) -> None:
    known = {stored.name for stored in names.values()}
    missing = [_shown(stored) for stored in names.values() if stored.name not in weights.shapes]
    if missing:
        weights.location.fail(
            f"there is no tensor {missing[0]!r}, one of {len(missing)} missing; expected it "
            f"for num_hidden_layers={config.num_hidden_layers}, qkv_bias={config.qkv_bias}. Is the "
            "file whole?"
        )
    unknown = [name for name in weights.shapes if name not in known and not _UNUSED.fullmatch(name)]
    if unknown:
        weights.location.fail(
            f"the tensor {unknown[0]!r}, one of {len(unknown)} unknown, is not part of a "
            f"DeiT or ViT with num_hidden_layers={config.num_hidden_layers}, "
            f"qkv_bias={config.qkv_bias}; check {CONFIG_NAME}, or use another model"
        )


def _expected_shapes(
    names: Mapping[str, StoredTensor], config: ASTConfig, num_channels: int
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes only, no memory
        state = ASTModel(config).state_dict()
    shapes = {ours: tuple(state[ours.removeprefix(BASE)].shape) for ours in names}
    width, patch_size = config.hidden_size, config.patch_size
    shapes[_KERNEL] = (width, num_channels, patch_size, patch_size)
    if _DISTILLATION not in names:
        shapes[_POSITIONS] = (1, config.num_tokens - NUM_PREFIX_TOKENS + 1, width)
    return shapes


def _shown(stored: StoredTensor) -> str:
    """Return the name as in the file: ``Weights`` adds a prefix if there is none."""
    return stored.name.removeprefix(BASE)
