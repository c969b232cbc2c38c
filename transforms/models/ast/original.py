"""Original checkpoints: the config of a ``.pth`` file of the authors' own code.

Such a file holds tensors and nothing else. The config is derived from their shapes, from the
file's name if it is a published one, and from files beside it. The user must give whatever is
still missing; nothing is guessed silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transforms.models.ast.files import CONFIG_NAME, FEATURES_NAME, ModelFiles, ModelLocation
from transforms.models.ast.public import PUBLISHED_FILES
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS, ORIGINAL_CLASSIFIER
from transforms.models.ast.weights import Weights
from transforms.models.labels import audioset_labels, speech_commands_labels
from transforms.storage import urls

# In the original code: timm's LayerNorm, and torch's default in the head (ast_models.py:132).
ORIGINAL_LAYER_NORM_EPS = 1e-6
ORIGINAL_HEAD_LAYER_NORM_EPS = 1e-5
# DeiT tiny, small and base, from which AST starts, have 3, 6 and 12 heads, all 64 wide.
ORIGINAL_HEAD_WIDTH = 64
# Frames of a window in the original recipes: AudioSet, ESC-50, Speech Commands.
ORIGINAL_WINDOWS = (1024, 512, 128)


def original_values(files: ModelFiles, weights: Weights) -> dict[str, Any]:
    """Return what tensors, file name and files beside it say; the later wins.

    ``mean`` and ``std`` are among the values if the files beside it give them.
    """
    features = files.read_json(FEATURES_NAME) or {}
    names = ("max_length", "num_mel_bins", "mean", "std")
    return {
        **_values_from_shapes(weights),
        **_values_from_name(urls.file_name(files.location.url)),
        **{name: features[name] for name in names if name in features},
        **(files.read_json(CONFIG_NAME) or {}),
    }


def _values_from_shapes(weights: Weights) -> dict[str, Any]:
    shapes = weights.shapes
    blocks = [re.match(r"module\.v\.blocks\.(\d+)\.", name) for name in shapes]
    needed = (
        "module.v.cls_token",
        "module.v.patch_embed.proj.weight",
        "module.v.blocks.0.mlp.fc1.weight",
        "module.v.pos_embed",
        ORIGINAL_CLASSIFIER,
    )
    for name in needed:
        if name not in shapes:
            weights.location.fail(
                f"there is no tensor {name!r}; expected the state dict of an AST as "
                "YuanGongND/ast saves it"
            )
    hidden_size = shapes[needed[0]][-1]
    values: dict[str, Any] = {
        "hidden_size": hidden_size,
        "patch_size": shapes[needed[1]][-1],
        "intermediate_size": shapes[needed[2]][0],
        "num_hidden_layers": 1 + max(int(match[1]) for match in blocks if match),
        "qkv_bias": "module.v.blocks.0.attn.qkv.bias" in shapes,
        "num_mel_bins": 128,  # what every recipe of the original code uses
        "layer_norm_eps": ORIGINAL_LAYER_NORM_EPS,
        "head_layer_norm_eps": ORIGINAL_HEAD_LAYER_NORM_EPS,
    }
    if hidden_size % ORIGINAL_HEAD_WIDTH == 0:
        values["num_attention_heads"] = hidden_size // ORIGINAL_HEAD_WIDTH
    return values


def _values_from_name(file_name: str) -> dict[str, Any]:
    entry = PUBLISHED_FILES.get(file_name)
    if entry is None:
        return {}
    labels = audioset_labels() if entry.labels == "audioset" else speech_commands_labels()
    return {
        "frequency_stride": entry.frequency_stride,
        "time_stride": entry.time_stride,
        "max_length": entry.max_length,
        "id2label": {label.index: label.name for label in labels},
        "mean": entry.mean,
        "std": entry.std,
    }


def complete_original(
    weights: Weights, values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Add the window that the position embeddings imply to what is known of the config.

    Return the values, the missing fields of the config with a hint each, and notes.
    """
    given = dict(values)
    notes: list[str] = []
    hint = f"unless it is one of {ORIGINAL_WINDOWS}, which the strides will show"
    if {"frequency_stride", "time_stride"} <= given.keys() and "max_length" not in given:
        lowest, highest = _window_range(weights, given)
        windows = [length for length in ORIGINAL_WINDOWS if lowest <= length <= highest]
        hint = f"{lowest} to {highest} by its position embeddings"
        if windows:
            given["max_length"] = windows[0]
            notes.append(
                f"max_length: {windows[0]}, the published window among {lowest} to {highest}, "
                "which its position embeddings allow"
            )
    hints = {
        "frequency_stride": "the published models have 10, 12, 14 or 16",
        "time_stride": "the published models have 10, 12, 14 or 16",
        "max_length": hint,
        "num_attention_heads": f"a divisor of hidden_size={given['hidden_size']}",
    }
    missing = [f"model.{name} ({text})" for name, text in hints.items() if name not in given]
    return given, missing, notes


def _window_range(weights: Weights, given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the shortest and longest window with as many patches as there are positions."""
    patch_size, stride = given["patch_size"], given["time_stride"]
    rows = (given["num_mel_bins"] - patch_size) // given["frequency_stride"] + 1
    patches = weights.shapes["module.v.pos_embed"][1] - NUM_PREFIX_TOKENS
    columns, rest = divmod(patches, rows)
    if rest:
        weights.location.fail(
            f"its {patches} position embeddings do not divide into the {rows} rows that "
            f"frequency_stride={given['frequency_stride']} gives; check --set "
            "model.frequency_stride="
        )
    lowest = (columns - 1) * stride + patch_size
    return lowest, lowest + stride - 1


def fail_missing(location: ModelLocation, missing: Sequence[str]) -> NoReturn:
    """Refuse a checkpoint with missing fields; each entry is ``model.field (hint)``."""
    location.fail(
        "an original checkpoint carries no labels, statistics or strides. Missing: "
        f"{'; '.join(missing)}. Give each with --set (--set "
        f"{missing[0].partition(' ')[0]}=…), or in a {CONFIG_NAME} beside it"
    )
