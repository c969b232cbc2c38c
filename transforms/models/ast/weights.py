"""The weights of a checkpoint: read, and checked against the config.

Its place: ``model_files`` finds the files, ``tensor_names`` says what a tensor is called in them,
``checkpoints`` builds the model from what is read here.

Guarantees: every tensor's name and shape is checked against the config and every weight is finite,
or ``ModelError`` says which is not and what to do. Pickles are read for their tensors only, so that
no code in them runs.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from transforms.models.ast.files import CONFIG_NAME, ModelFiles, first_line
from transforms.models.ast.model import (
    NUM_PREFIX_TOKENS,
    ASTConfig,
    ASTForAudioClassification,
)
from transforms.models.ast.tensor_names import (
    CLASSIFIER,
    ORIGINAL_CLASSIFIER,
    UNUSED,
    Layout,
    StoredTensor,
    full_name,
    layout_of,
    take_third,
    tensor_names,
)


class Weights:
    """The tensors of a checkpoint under the names of its layout.

    Safetensors files are read tensor by tensor; shapes come from their headers. A pickle is read
    whole.
    """

    def __init__(self, files: ModelFiles, file_names: tuple[str, ...]) -> None:
        self.location = files.location
        self.file_names = file_names
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for path in map(files.need, self.file_names):
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pickle(path)
        self.layout = self._canonicalise()

    @property
    def num_labels(self) -> int:
        """Outputs of the head; 0 where there is none."""
        name = ORIGINAL_CLASSIFIER if self.layout == "original" else CLASSIFIER
        return self.shapes.get(name, (0,))[0]

    def read(self, stored: StoredTensor) -> Tensor:
        """One tensor, as stored or the third of it that is meant."""
        return take_third(self._readers[stored.name](), stored.third)

    def _add_safetensors(self, path: Path) -> None:
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._readers[name] = partial(file.get_tensor, name)
        except (safetensors.SafetensorError, OSError) as error:
            self.location.fail(
                f"{path.name} cannot be read as safetensors: {error}. It is cut short or damaged; "
                "get it again",
                error,
            )

    def _add_pickle(self, path: Path) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of kinds of file that are refused here
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            self.location.fail(
                f"{path.name} holds more than tensors (or is damaged), and loading that would run "
                "code from the file: refused. Save its state_dict() alone, or use safetensors",
                error,
            )
        except MemoryError:
            raise
        except Exception as error:  # on damaged bytes its reader raises nearly anything
            self.location.fail(
                f"{path.name} cannot be read as a torch file: {first_line(error)}. It is "
                "cut short or damaged; get it again",
                error,
            )
        if not isinstance(tensors, dict) or not tensors:
            self.location.fail(
                f"{path.name} holds a {type(tensors).__name__}; expected a dict from name to tensor"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not isinstance(name, str):
                self.location.fail(
                    f"{path.name} holds {name!r}, a {type(tensor).__name__}; expected only "
                    "tensors, as state_dict() gives them"
                )
            self._check_stored(path, name, tensor)
            self.shapes[name] = tuple(tensor.shape)
            self._readers[name] = tensor.detach

    def _check_stored(self, path: Path, name: str, tensor: Tensor) -> None:
        """Refuse a tensor of a pickle that is not simply stored: a few bytes can promise terabytes.

        What is sparse, quantised, without data (``meta``) or expanded from fewer values has no
        place in a checkpoint, and would be filled in only when it is read.
        """
        kind = f"{tensor.layout} on {tensor.device}".removeprefix("torch.")
        is_plain = kind == "strided on cpu" and not tensor.is_quantized
        if is_plain:
            num_bytes = tensor.untyped_storage().nbytes()
            if num_bytes >= tensor.numel() * tensor.element_size():
                return
            kind = f"expanded from {num_bytes} bytes to the shape {tuple(tensor.shape)}"
        elif tensor.is_quantized:
            kind = "quantised"
        self.location.fail(
            f"{path.name} holds the tensor {name!r}, which is {kind}; expected every value to be "
            "stored. Save the state_dict() of the model itself, or use safetensors"
        )

    def _canonicalise(self) -> Layout:
        """Bring the names to those of a layout: prefixes come and go with how it was saved."""
        layout = layout_of(self.shapes)
        for name in [name for name in self.shapes if full_name(name, layout) != name]:
            self.shapes[full_name(name, layout)] = self.shapes.pop(name)
            self._readers[full_name(name, layout)] = self._readers.pop(name)
        return layout


def _expected_shapes(config: ASTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes only, no memory
        state = ASTForAudioClassification(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(weights: Weights, config: ASTConfig, wanted: Collection[str]) -> None:
    """Every tensor we want is there in its shape, and there is none that we do not know."""
    names = tensor_names(config, weights.layout)
    missing = [names[ours].name for ours in wanted if names[ours].name not in weights.shapes]
    if missing:
        weights.location.fail(
            f"there is no tensor {missing[0]!r}{_and_more(missing)}; expected it for "
            f"num_hidden_layers={config.num_hidden_layers}. {_missing_advice(missing)}"
        )
    known = {stored.name for stored in names.values()}
    unknown = [n for n in weights.shapes if n not in known and not UNUSED.fullmatch(n)]
    if unknown:
        weights.location.fail(
            f"the tensor {unknown[0]!r}{_and_more(unknown)} is not part of an AST with "
            f"num_hidden_layers={config.num_hidden_layers}, qkv_bias={config.qkv_bias}; check "
            f"{CONFIG_NAME}, or remove what another library added"
        )
    shapes = _expected_shapes(config)
    for ours in wanted:
        _check_shape(weights, names[ours], shapes[ours], config)


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


def read_state(weights: Weights, config: ASTConfig, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Read the wanted tensors, as float32 under our names."""
    names = tensor_names(config, weights.layout)
    return {ours: read_tensor(weights, names[ours]) for ours in wanted}


def read_tensor(weights: Weights, stored: StoredTensor) -> Tensor:
    """Read one tensor, as float32."""
    tensor = weights.read(stored)
    if not tensor.is_floating_point():
        weights.location.fail(
            f"the tensor {stored.name!r} is {tensor.dtype}; expected a float type. "
            "Quantised checkpoints cannot be read: use the one they were made from"
        )
    # A copy: safetensors maps the file, which may change or go while the model lives.
    return tensor.to(torch.float32, copy=True)


def check_finite(weights: Weights, config: ASTConfig) -> None:
    """No weight is NaN or infinite."""
    for stored in tensor_names(config, weights.layout).values():
        # One tensor at a time: a checkpoint need not fit into the launcher's memory twice.
        check_values(weights, stored, read_tensor(weights, stored))


def check_values(weights: Weights, stored: StoredTensor, tensor: Tensor) -> None:
    """No value of a tensor that was read is NaN or infinite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        weights.location.fail(
            f"the tensor {stored.name!r} holds {bad} values that are NaN or infinite, of "
            f"{tensor.numel()}; its training diverged or the file is damaged. Use another "
            "checkpoint"
        )
