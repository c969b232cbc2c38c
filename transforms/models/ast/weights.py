"""The tensors of a checkpoint as its files hold them.

Pickles are read for their tensors only, so code in them never runs.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from transforms.errors import first_line
from transforms.models.ast.files import ModelFiles
from transforms.models.ast.tensor_names import (
    CLASSIFIER,
    ORIGINAL_CLASSIFIER,
    Layout,
    StoredTensor,
    full_name,
    layout_of,
    take_third,
)


class Weights:
    """The tensors of a checkpoint, under the names of its layout.

    Safetensors are read one tensor at a time, and their shapes from the header. A pickle is read
    as a whole.
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
        """Outputs of the head; 0 without a head."""
        name = ORIGINAL_CLASSIFIER if self.layout == "original" else CLASSIFIER
        return self.shapes.get(name, (0,))[0]

    def read(self, stored: StoredTensor) -> Tensor:
        """Read one tensor as float32."""
        tensor = take_third(self._readers[stored.name](), stored.third)
        if not tensor.is_floating_point():
            self.location.fail(
                f"the tensor {stored.name!r} is {tensor.dtype}; expected a float type. "
                "Quantised checkpoints cannot be read: use the one they were made from"
            )
        # A copy: safetensors maps the file, which may change or vanish while the model is in use.
        return tensor.to(torch.float32, copy=True)

    def _add_safetensors(self, path: Path) -> None:
        try:
            with path.open("rb") as opened:
                name = _utf8_name(path, opened.fileno())
                file: Any = safetensors.safe_open(name, framework="pt")
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
            # Warnings are about files that are refused below.
            with path.open("rb") as opened, warnings.catch_warnings(action="ignore"):
                name = _utf8_name(path, opened.fileno())
                tensors = torch.load(name, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            self.location.fail(
                f"{path.name} holds more than tensors (or is damaged) and is refused: loading it "
                "would run code from the file. Save its state_dict() alone, or use safetensors",
                error,
            )
        except MemoryError:
            raise
        except Exception as error:  # torch raises nearly anything on damaged bytes
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
        """Refuse a tensor that is not stored in full: a few bytes of pickle can promise terabytes.

        Sparse, quantised, ``meta`` and expanded tensors do not belong in a checkpoint, and would
        take their memory only when they are read.
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
        """Complete the names: which prefixes a file has depends on how it was saved."""
        layout = layout_of(self.shapes)
        for name in [name for name in self.shapes if full_name(name, layout) != name]:
            self.shapes[full_name(name, layout)] = self.shapes.pop(name)
            self._readers[full_name(name, layout)] = self._readers.pop(name)
        return layout


def check_values(weights: Weights, stored: StoredTensor, tensor: Tensor) -> None:
    """Raise ``ModelError`` if a value is NaN or infinite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        weights.location.fail(
            f"the tensor {stored.name!r} holds {bad} values that are NaN or infinite, of "
            f"{tensor.numel()}; its training diverged or the file is damaged. Use another "
            "checkpoint"
        )


def check_labels(weights: Weights, origin: str, names: Sequence[str]) -> None:
    """Raise ``ModelError``, with ``origin``, unless each output has a name, no two the same."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name.strip() and name not in seen:
            seen[name] = index
            continue
        found = f"{name!r} for {seen[name]} and {index}" if name in seen else f"none for {index}"
        weights.location.fail(
            f"{origin} has the name {found}; expected one per output, each once. Give the right "
            "list with --set model.labels="
        )
    if weights.num_labels not in (0, len(names)):
        weights.location.fail(
            f"{origin} has {len(names)} labels, and the classifier has {weights.num_labels} "
            "outputs; expected one label per output, in its order. Give the right list with --set "
            "model.labels=audioset, speech_commands or a file"
        )


def _utf8_name(path: Path, descriptor: int) -> str:
    """Return a name in UTF-8 of an open file, because the libraries open no other.

    A system with other names is Linux, which gives every open file a second one.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return f"/proc/self/fd/{descriptor}"
