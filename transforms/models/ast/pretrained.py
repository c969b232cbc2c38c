"""``from_pretrained`` and ``save_pretrained``: a model from a checkpoint's tensors, and back.

The functions take the class of the model as an argument, so that this file lies below ``model``.

Guarantees: the name and shape of every tensor is checked against the config before a model is
built, and ``ModelError`` says which does not fit and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from transforms.errors import ModelError
from transforms.models.ast.config import ASTConfig, parse_config
from transforms.models.ast.config_files import open_complete_checkpoint, write_json
from transforms.models.ast.files import (
    CONFIG_NAME,
    FEATURES_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    locate_model,
)
from transforms.models.ast.tensor_names import (
    CLASSIFIER,
    NUM_PREFIX_TOKENS,
    UNUSED,
    StoredTensor,
    tensor_names,
    to_layout,
)
from transforms.models.ast.weights import Weights, check_labels, check_values
from transforms.storage import urls, writing


class PretrainedModel(nn.Module):
    """A module that a config describes; checkpoints put ``name_prefix`` before its tensors."""

    name_prefix: ClassVar[str] = ""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> Self:
        """Load a checkpoint, in float32 and evaluation mode.

        Args:
            name_or_path: A hub id (``org/name``, ``org/name@revision``), a local or remote
                folder, or an original ``.pth`` file.
            revision: Branch, tag or commit on the hub; None for the default branch.

        Raises:
            ModelError: The checkpoint does not exist, is damaged, or does not fit its config.
        """
        with ModelFiles(locate_model(str(name_or_path), revision)) as files:
            values, weights = open_complete_checkpoint(files)
            config = parse_config(files.location, values)
            if CLASSIFIER.startswith(cls.name_prefix):  # the class has a head
                check_labels(weights, f"id2label in {CONFIG_NAME}", [*config.id2label.values()])
            return build_model(cls, config, weights)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights into a folder, as transformers reads them."""
        save_model(self, folder)


Model = TypeVar("Model", bound=PretrainedModel)


def build_model(model_class: type[Model], config: ASTConfig, weights: Weights) -> Model:
    """Build a model from a checkpoint's tensors, in float32 and evaluation mode.

    Raises ``ModelError`` if the tensors do not fit the config.
    """
    check_tensors(weights, config, model_class)
    state = {
        ours.removeprefix(model_class.name_prefix): weights.read(stored)
        for ours, stored in _wanted(weights, config, model_class).items()
    }
    with torch.device("meta"):  # no memory, and no time for weights that are replaced at once
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_tensors(weights: Weights, config: ASTConfig, model_class: type[PretrainedModel]) -> None:
    """Raise ``ModelError`` if a tensor is missing, unknown, or of another shape."""
    names = _wanted(weights, config, model_class)
    missing = [stored.name for stored in names.values() if stored.name not in weights.shapes]
    if missing:
        weights.location.fail(
            f"there is no tensor {missing[0]!r}{_and_more(missing)}; expected it for "
            f"num_hidden_layers={config.num_hidden_layers}. {_missing_advice(missing)}"
        )
    known = {stored.name for stored in tensor_names(config, weights.layout).values()}
    unknown = [n for n in weights.shapes if n not in known and not UNUSED.fullmatch(n)]
    if unknown:
        weights.location.fail(
            f"the tensor {unknown[0]!r}{_and_more(unknown)} is not part of an AST with "
            f"num_hidden_layers={config.num_hidden_layers}, qkv_bias={config.qkv_bias}; check "
            f"{CONFIG_NAME}, or remove what another library added"
        )
    with torch.device("meta"):  # shapes only, no memory
        expected = model_class(config).state_dict()
    for ours, stored in names.items():
        shape = tuple(expected[ours.removeprefix(model_class.name_prefix)].shape)
        _check_shape(weights, stored, shape, config)


def check_finite(weights: Weights, config: ASTConfig) -> None:
    """Raise ``ModelError`` if a weight is NaN or infinite."""
    for stored in tensor_names(config, weights.layout).values():
        # One tensor at a time: a checkpoint need not fit into the launcher's memory twice.
        check_values(weights, stored, weights.read(stored))


def _wanted(
    weights: Weights, config: ASTConfig, model_class: type[PretrainedModel]
) -> dict[str, StoredTensor]:
    names = tensor_names(config, weights.layout)
    return {ours: names[ours] for ours in names if ours.startswith(model_class.name_prefix)}


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _missing_advice(missing: Sequence[str]) -> str:
    if all(name.startswith(("classifier.", "module.mlp_head.")) for name in missing):
        return "It has no classifier: fine-tune it (earmark train) before labelling with it"
    return "Is this an AST, and the file whole?"


def _check_shape(
    weights: Weights, stored: StoredTensor, shape: tuple[int, ...], config: ASTConfig
) -> None:
    expected = shape if stored.third is None else (3 * shape[0], *shape[1:])
    found = weights.shapes[stored.name]
    if found == expected:
        return
    advice = f"Its {CONFIG_NAME} describes another model"
    if stored.name.endswith(("position_embeddings", "pos_embed")):
        rows, columns = config.patch_grid
        advice = (
            f"{rows} by {columns} patches and {NUM_PREFIX_TOKENS} tokens follow from "
            f"frequency_stride={config.frequency_stride}, time_stride={config.time_stride}, "
            f"max_length={config.max_length}, num_mel_bins={config.num_mel_bins}; give those it "
            "was trained with (--set model.max_length=…)"
        )
    weights.location.fail(
        f"the tensor {stored.name!r} has the shape {found}; expected {expected}. {advice}"
    )


def save_model(
    model: PretrainedModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    features: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's folder, with transformers' names for the tensors.

    Each file is written whole or not at all, and ``config.json`` last, so that a folder with a
    config is complete.

    Args:
        model: On any device, in any float type.
        folder: Local folder or URL; created if it does not exist.
        dtype: Float type of the weights in the file; None for the model's. ``dtype`` in the config
            is always the model's: transformers computes in that type, and in float16 it would
            refuse the float32 features of its own extractor.

    Raises:
        ModelError: A weight is too large for ``dtype``.
    """
    # Before anything is written: weights that cannot be saved leave the folder as it was.
    weights = _serialise(model, dtype)
    if features is not None:
        write_json(folder, FEATURES_NAME, features)
    writing.write_bytes(urls.join(urls.normalise(str(folder)), WEIGHTS_NAME), weights)
    model_dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    names = {"architectures": [type(model).__name__], "dtype": model_dtype}
    write_json(folder, CONFIG_NAME, {**model.config.to_dict(), **names})


def _serialise(model: PretrainedModel, dtype: torch.dtype | None) -> bytes:
    state = {model.name_prefix + name: tensor for name, tensor in model.state_dict().items()}
    stored = to_layout(state, model.config, "disk")
    tensors = {
        # transformers omits the prefix where there is no head beside the base.
        name.removeprefix(model.name_prefix): _convert(name, tensor.detach().cpu(), dtype)
        for name, tensor in stored.items()
    }
    content: bytes = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return content


def _convert(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor.contiguous()
    converted = tensor.to(dtype)
    too_large = torch.isfinite(tensor) & ~torch.isfinite(converted)
    if too_large.any():
        raise ModelError(
            f"the tensor {name!r} holds {tensor[too_large].abs().max().item():.6g}; "
            f"{str(dtype).removeprefix('torch.')} goes to "
            f"{torch.finfo(dtype).max:.6g}. Save it as float32"
        )
    return converted.contiguous()
