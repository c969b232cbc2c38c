"""The names of AST's tensors, in one table.

The same tensors have three sets of names, each a ``Layout``: ``original``, in the ``.pth`` files of
the published code; ``disk``, in files written by transformers (4.x and 5.x) and on the hub;
``memory``, in a running model (transformers 5.x, and ours). The original code keeps query, key and
value in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Layout = Literal["original", "disk", "memory"]

NUM_PREFIX_TOKENS = 2  # the class and the distillation token precede the patches

CLASSIFIER = "classifier.dense.weight"
ORIGINAL_CLASSIFIER = "module.mlp_head.1.weight"
BASE = "audio_spectrogram_transformer."

# Prefixes of the names below: base, block {}, head.
_PREFIXES: dict[Layout, tuple[str, str, str]] = {
    "memory": (BASE, BASE + "layers.{}.", ""),
    "disk": (BASE, BASE + "encoder.layer.{}.", ""),
    "original": ("module.", "module.v.blocks.{}.", "module."),
}
# (memory, disk, original). A number after # is the third of the fused qkv.
_STEM = (
    ("embeddings.cls_token", "embeddings.cls_token", "v.cls_token"),
    ("embeddings.distillation_token", "embeddings.distillation_token", "v.dist_token"),
    ("embeddings.position_embeddings", "embeddings.position_embeddings", "v.pos_embed"),
)
_STEM_MODULES = (
    (
        "embeddings.patch_embeddings.projection",
        "embeddings.patch_embeddings.projection",
        "v.patch_embed.proj",
    ),
    ("layernorm", "layernorm", "v.norm"),
)
_BLOCK_MODULES = (
    ("layernorm_before", "layernorm_before", "norm1"),
    ("layernorm_after", "layernorm_after", "norm2"),
    ("attention.q_proj", "attention.attention.query", "attn.qkv#0"),
    ("attention.k_proj", "attention.attention.key", "attn.qkv#1"),
    ("attention.v_proj", "attention.attention.value", "attn.qkv#2"),
    ("attention.o_proj", "attention.output.dense", "attn.proj"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)
_HEAD_MODULES = (
    ("classifier.layernorm", "classifier.layernorm", "mlp_head.0"),
    ("classifier.dense", "classifier.dense", "mlp_head.1"),
)
# DeiT's own classifiers, which AST never uses.
UNUSED = re.compile(r"module\.v\.(head|head_dist)\.(weight|bias)")


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint holds a tensor.

    ``third`` is a third of the rows, where query, key and value are stored as one; else None.
    """

    name: str
    third: int | None = None


class BlockShape(Protocol):
    """The fields of ``ASTConfig`` that decide which tensors there are."""

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""


def tensor_names(config: BlockShape, layout: Layout) -> dict[str, StoredTensor]:
    """Return where each name in ``ASTForAudioClassification(config)``'s state dict is stored."""
    column = ("memory", "disk", "original").index(layout)
    base, block, head = _PREFIXES[layout]
    names = {BASE + row[0]: StoredTensor(base + row[column]) for row in _STEM}
    modules = [(BASE + row[0], base + row[column]) for row in _STEM_MODULES]
    for n in range(config.num_hidden_layers):
        modules += [
            (f"{BASE}layers.{n}.{row[0]}", block.format(n) + row[column]) for row in _BLOCK_MODULES
        ]
    modules += [(row[0], head + row[column]) for row in _HEAD_MODULES]
    without_bias = () if config.qkv_bias else ("q_proj", "k_proj", "v_proj")
    for ours, theirs in modules:
        module, _, third = theirs.partition("#")
        for part in ("weight", "bias"):
            if part == "bias" and ours.endswith(without_bias):
                continue
            names[f"{ours}.{part}"] = StoredTensor(
                f"{module}.{part}", int(third) if third else None
            )
    return names


def to_layout(state: Mapping[str, Tensor], config: BlockShape, layout: Layout) -> dict[str, Tensor]:
    """Rename (and join) our state dict into the tensors of a layout, bit for bit."""
    parts: dict[str, list[Tensor]] = {}
    for ours, stored in tensor_names(config, layout).items():
        if ours in state:
            parts.setdefault(stored.name, []).append(state[ours])
    return {name: part[0] if len(part) == 1 else torch.cat(part) for name, part in parts.items()}


def take_third(tensor: Tensor, third: int | None) -> Tensor:
    """Return a third of a tensor's rows, or all of it.

    A third is a copy, so that three parameters do not share (and keep alive) one storage.
    """
    return tensor if third is None else tensor.chunk(3)[third].clone()


def layout_of(names: Iterable[str]) -> Layout:
    """Return the layout of these names, from the first name that only one layout has."""
    for name in names:
        if name.removeprefix("module.").startswith(("v.", "mlp_head.")):
            return "original"
        if name.removeprefix(BASE).startswith("encoder.layer."):
            return "disk"
    return "memory"


def full_name(name: str, layout: Layout) -> str:
    """Add the prefix that DataParallel adds, or that a model without a head omits."""
    if layout == "original":
        return name if name.startswith("module.") else f"module.{name}"
    stem = ("embeddings.", "encoder.", "layers.", "layernorm.")
    return BASE + name if name.startswith(stem) else name
