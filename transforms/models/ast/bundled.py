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
from dataclasses import dataclass
from pathlib import Path

import yaml

from transforms.errors import ModelError
from transforms.models.ast.public import window_length_s

BUNDLED_FOLDER = Path(__file__).resolve().parent / "bundled_models"
# The model used when none is given.
DEFAULT_MODEL = "esc10"

_CONFIG_NAME = "config.json"


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
    try:
        config = json.loads((folder / _CONFIG_NAME).read_bytes())
        _, front_matter, _ = (folder / "README.md").read_text("utf-8").split("---\n", 2)
        card = yaml.safe_load(front_matter)
        result = card["model-index"][0]["results"][0]
        return BundledModel(
            name=name,
            folder=folder,
            labels=tuple(config["id2label"][str(n)] for n in range(len(config["id2label"]))),
            max_length=int(config["max_length"]),
            dataset=result["dataset"]["name"],
            metric=result["metrics"][0]["type"],
            value=float(result["metrics"][0]["value"]),
            license=card["license"],
        )
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise ModelError(
            f"model {name}, which ships with Earmark: its files are damaged ({error!r}). Install "
            "Earmark again"
        ) from error


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
