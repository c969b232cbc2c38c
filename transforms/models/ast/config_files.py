"""The JSON files of a checkpoint, ``config.json`` and ``preprocessor_config.json``.

They are read and written here as plain values. An original ``.pth`` file has no ``config.json``:
what ``original`` finds out about it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transforms.models.ast.files import (
    CONFIG_NAME,
    FEATURES_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    ModelLocation,
    find_weight_files,
    locate_model,
)
from transforms.models.ast.original import complete_original, fail_missing, original_values
from transforms.models.ast.weights import Weights
from transforms.storage import urls, writing

# Image transformers of AST's shape, from which it can start (``image_models``).
IMAGE_MODEL_TYPES = ("deit", "vit")


def open_checkpoint(files: ModelFiles) -> tuple[dict[str, Any], Weights]:
    """Read the config's values, as far as the checkpoint gives them, and the weights' headers."""
    if files.location.source == "original":
        weights = Weights(files, find_weight_files(files))
        return original_values(files, weights), weights
    return _need_config(files), Weights(files, find_weight_files(files))


def open_complete_checkpoint(files: ModelFiles) -> tuple[dict[str, Any], Weights]:
    """Read all of the config's values, and the weights' headers.

    Raises ``ModelError`` if an original checkpoint leaves something open.
    """
    values, weights = open_checkpoint(files)
    if files.location.source == "original":
        values, missing, _ = complete_original(weights, values)
        if missing:
            fail_missing(files.location, missing)
        if "id2label" not in values:
            values["num_labels"] = weights.num_labels
    return values, weights


def read_config_values(files: ModelFiles) -> dict[str, Any]:
    """Read all of the config's values alone; ``ModelError`` if there are none."""
    if files.location.source == "original":
        return open_complete_checkpoint(files)[0]
    return _need_config(files)


def load_features(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read a checkpoint's ``preprocessor_config.json``, without defaults for what it omits.

    It is found as by ``locate_model``; for an original ``.pth`` file, beside that.

    Raises:
        ModelError: The file does not exist, or describes another extractor than AST's.
    """
    location = locate_model(name, revision, wanted=FEATURES_NAME)
    with ModelFiles(location) as files:
        features = files.read_json(FEATURES_NAME)
    if features is None:
        location.fail(f"there is no {FEATURES_NAME}; expected one in its folder. Is it a model's?")
    check_extractor(location, features)
    return features


def check_extractor(location: ModelLocation, features: Mapping[str, Any]) -> None:
    """Raise ``ModelError`` if the features are not made by AST's extractor."""
    kind = features.get("feature_extractor_type", "ASTFeatureExtractor")
    if kind != "ASTFeatureExtractor":
        location.fail(
            f"feature_extractor_type in {FEATURES_NAME} is {kind!r}; expected ASTFeatureExtractor"
        )


def write_json(folder: str | Path, file_name: str, values: Mapping[str, Any]) -> None:
    """Write a JSON file into a local or remote folder, which is created if it does not exist."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    writing.write_bytes(urls.join(urls.normalise(str(folder)), file_name), text.encode())


def _need_config(files: ModelFiles) -> dict[str, Any]:
    values = files.read_json(CONFIG_NAME)
    if values is None:
        offline = files.location.source == "hub" and files.location.listing is None
        files.location.fail(
            f"there is no {CONFIG_NAME}; expected a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and "
            f"{FEATURES_NAME}" + (" (only the local cache was searched)" if offline else "")
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
