"""The models that ship with Earmark, which label without a network.

Each is a folder in ``bundled_models/``, inside the package: ``config.json``, ``model.safetensors``,
``preprocessor_config.json`` and a model card, ``README.md``. Everything about a model is read from
its folder: labels and window from the config; licence, dataset and figure from the front matter of
the card, in the format of model hubs:

    ---
    license: cc-by-nc-4.0
    model-index:
    - name: …
      results:
      - dataset: {name: ESC-10, …}
        metrics: [{type: accuracy, value: 0.9}]
    ---
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from transforms.errors import ModelError
from transforms.models.ast.public import window_length_s

BUNDLED_FOLDER = Path(__file__).resolve().parent / "bundled_models"
# The model used when none is given.
DEFAULT_MODEL = "esc10"

_CONFIG_NAME = "config.json"
_CARD_NAME = "README.md"
_FENCE = "---"


@dataclass(frozen=True)
class BundledModel:
    """A model that ships with Earmark.

    Attributes:
        name: Value for ``--model``.
        labels: Names of its classes, in the order of its outputs.
        max_length: Frames of a window.
        value: Value of the metric in the evaluation, in [0, 1].
    """

    name: str
    folder: Path
    labels: tuple[str, ...]
    max_length: int
    dataset: str
    metric: str
    value: float
    license: str

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def window_s(self) -> float:
        """Length of a window in seconds."""
        return window_length_s(self.max_length)


def bundled_names() -> tuple[str, ...]:
    """Return the names of the models in this installation, sorted."""
    return tuple(sorted(path.parent.name for path in BUNDLED_FOLDER.glob(f"*/{_CONFIG_NAME}")))


def bundled_folder(name: str) -> Path | None:
    """Return the folder of a bundled model, or None if there is no model of this name."""
    return BUNDLED_FOLDER / name if name in bundled_names() else None


def bundled_model(name: str) -> BundledModel:
    """Describe a bundled model; ``ModelError`` if it does not exist or its files are damaged."""
    folder = bundled_folder(name)
    if folder is None:
        known = ", ".join(bundled_names()) or "none"
        raise ModelError(
            f"model {name}: not in this installation of Earmark, which has {known}. Install the "
            "same version of Earmark everywhere, or give another --model"
        )
    config, card = _read_config(folder), _read_front_matter(folder)
    dataset, metric, value = _read_result(folder, card)
    license_name = card.get("license")
    if not isinstance(license_name, str) or not license_name:
        _fail(folder, f"license in {_CARD_NAME} is {license_name!r}; expected its name")
    return BundledModel(
        name=name,
        folder=folder,
        labels=tuple(config["id2label"][str(n)] for n in range(len(config["id2label"]))),
        max_length=config["max_length"],
        dataset=dataset,
        metric=metric,
        value=value,
        license=license_name,
    )


def bundled_models() -> tuple[BundledModel, ...]:
    """Describe every bundled model; ``ModelError`` if the files of one are damaged."""
    return tuple(bundled_model(name) for name in bundled_names())


def describe_default() -> str:
    """Say in one line what the default model knows, and how to get another.

    Raises ``ModelError`` if this installation does not have it.
    """
    model = bundled_model(DEFAULT_MODEL)
    return (
        f"No model is given: using {model.name}, which ships with Earmark and knows "
        f"{model.num_labels} sounds ({', '.join(model.labels)}). For AudioSet's 527: --config "
        "audioset, which needs the network once, or --model with a downloaded copy"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``, checking only the values used here."""
    try:
        values = json.loads((folder / _CONFIG_NAME).read_bytes())
        names = values["id2label"]
        has_names = names.keys() == {str(n) for n in range(len(names))}
        if not has_names or type(values["max_length"]) is not int:
            raise ValueError("id2label or max_length is not valid")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _fail(folder, f"{_CONFIG_NAME} cannot be read as an AST's: {error!r}", error)
    return dict(values)


def _read_front_matter(folder: Path) -> Mapping[str, Any]:
    """Read the YAML between the first two ``---`` lines of the model card."""
    try:
        lines = (folder / _CARD_NAME).read_text(encoding="utf-8").splitlines()
        if lines[:1] != [_FENCE] or _FENCE not in lines[1:]:
            raise ValueError(f"there is no front matter between two lines {_FENCE}")
        card = yaml.safe_load("\n".join(lines[1 : lines.index(_FENCE, 1)]))
    except (OSError, ValueError, yaml.YAMLError) as error:
        _fail(folder, f"{_CARD_NAME} cannot be read as a model card: {error}", error)
    if not isinstance(card, dict):
        _fail(folder, f"the front matter of {_CARD_NAME} is {card!r}; expected keys and values")
    return card


def _read_result(folder: Path, card: Mapping[str, Any]) -> tuple[str, str, float]:
    try:
        result = card["model-index"][0]["results"][0]
        dataset, metric = result["dataset"]["name"], result["metrics"][0]
        name, value = metric["type"], metric["value"]
    except (KeyError, IndexError, TypeError) as error:
        _fail(
            folder,
            f"{_CARD_NAME} has no model-index with a result's dataset.name, metrics.type and "
            f"metrics.value: {error!r}",
            error,
        )
    is_ratio = type(value) in (int, float) and 0 <= value <= 1
    if not (isinstance(dataset, str) and isinstance(name, str) and is_ratio):
        _fail(
            folder,
            f"the result in {_CARD_NAME} is {dataset!r}, {name!r}, {value!r}; expected a name, a "
            "metric and a number in [0, 1]",
        )
    return dataset, name, value


def _fail(folder: Path, text: str, cause: BaseException | None = None) -> NoReturn:
    raise ModelError(
        f"model {folder.name}, which ships with Earmark: {text}. Install Earmark again"
    ) from cause
