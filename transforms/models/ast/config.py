"""The shape of an AST: ``ASTConfig``, with the fields and defaults of transformers.

It is the meaning of a checkpoint's ``config.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from transforms.models.ast.config_files import read_config_values, write_json
from transforms.models.ast.files import CONFIG_NAME, ModelFiles, ModelLocation, locate_model
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS

MODEL_TYPE = "audio-spectrogram-transformer"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one, by erf: what every published AST uses
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

# Far above any AST: a damaged config must not fill the memory or overflow.
MAX_LAYERS = 1_000
MAX_SIZE = 1 << 20

_POSITIVE_INTEGERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size",
    "frequency_stride", "time_stride", "max_length", "num_mel_bins",
)  # fmt: skip
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_SWITCHES = ("qkv_bias", "output_attentions", "output_hidden_states", "return_dict")


@dataclass(frozen=True, kw_only=True)
class ASTConfig:
    """The shape of an AST, with the fields, defaults and strict types of transformers.

    Attributes:
        hidden_size: Width D of a token, and of the embedding.
        num_attention_heads: Heads per block; divides ``hidden_size``.
        intermediate_size: Width of the blocks' hidden MLP layer.
        hidden_act: The MLP's activation: gelu, gelu_new, gelu_pytorch_tanh, relu, silu or swish.
        hidden_dropout_prob: Dropout of embeddings and block outputs in training, in [0, 1].
        attention_probs_dropout_prob: Dropout of attention weights in training, in [0, 1].
        initializer_range: Standard deviation of fresh weights.
        layer_norm_eps: Epsilon of every LayerNorm; 1e-12 in transformers, 1e-6 in the original.
        head_layer_norm_eps: Epsilon of the head's LayerNorm, 1e-5 in the original code; None
            means ``layer_norm_eps``. transformers does not have this field.
        patch_size: Side of a square patch, in bins and frames.
        frequency_stride: Step between patches, in mel bins.
        time_stride: Step between patches, in frames.
        max_length: Frames of an input.
        id2label: Name of each index, from 0 without gaps; LABEL_0, LABEL_1, … by default.
        label2id: Index of each name; derived from ``id2label`` by default.
        num_labels: Outputs of the head; -1 means as many as ``id2label`` names, or two.
        problem_type: regression, single_label_classification, multi_label_classification, or
            None, which leaves the loss to the number and type of the labels.
        output_attentions, output_hidden_states, return_dict: Defaults of ``forward``'s arguments.

    Raises:
        TypeError: A value has another type (``hidden_size="768"``).
        ValueError: A value is out of range, or two values contradict each other.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    head_layer_norm_eps: float | None = None
    patch_size: int = 16
    qkv_bias: bool = True
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024
    num_mel_bins: int = 128
    id2label: dict[int, str] = field(default_factory=dict, hash=False, repr=False)
    label2id: dict[str, int] = field(default_factory=dict, hash=False, repr=False)
    num_labels: int = -1
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTEGERS:
            _check(self, name, (int,), "a whole number from 1", lambda value: value >= 1)
        for name in _RATES:
            _check(self, name, (float, int), "a number in [0, 1]", lambda value: 0 <= value <= 1)
        for name in _SWITCHES:
            _check(self, name, (bool,), "True or False")
        for name in ("layer_norm_eps", "initializer_range"):
            _check(self, name, (float,), "a float in [0, 1)", lambda value: 0 <= value < 1)
        if self.head_layer_norm_eps is not None:
            _check(self, "head_layer_norm_eps", (float,), "a float in [0, 1)", lambda v: 0 <= v < 1)
        _check(self, "hidden_act", (str,), f"one of {sorted(ACTIVATIONS)}", ACTIVATIONS.get)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type is {self.problem_type!r}; expected None or one of {PROBLEM_TYPES}"
            )
        self._check_fit()
        self._complete_labels()

    def _check_fit(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a divisor of "
                f"hidden_size, which is {self.hidden_size}"
            )
        for name in ("max_length", "num_mel_bins"):
            if getattr(self, name) < self.patch_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected at least patch_size, which is "
                    f"{self.patch_size}"
                )

    def _complete_labels(self) -> None:
        if self.num_labels != -1:
            _check(self, "num_labels", (int,), "a whole number from 1", lambda value: value >= 1)
        id2label = _ordered_labels(self.id2label)
        if not id2label:
            count = 2 if self.num_labels == -1 else self.num_labels
            id2label = {index: f"LABEL_{index}" for index in range(count)}
        if self.num_labels not in (-1, len(id2label)):
            raise ValueError(
                f"num_labels is {self.num_labels}; expected {len(id2label)}, the number of names "
                "in id2label. Leave num_labels out"
            )
        derived = {name: index for index, name in id2label.items()}
        if self.label2id and dict(self.label2id) != derived:
            raise ValueError(
                f"label2id is {_short(self.label2id)}; expected the reverse of id2label, which "
                f"is {_short(derived)}. Leave it out, or use with_labels()"
            )
        for name, value in (
            ("id2label", id2label),
            ("label2id", derived),
            ("num_labels", len(id2label)),
        ):
            object.__setattr__(self, name, value)  # frozen: completed once, here

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Number of patches along frequency and time: (12, 101) for the AudioSet models."""
        return (
            (self.num_mel_bins - self.patch_size) // self.frequency_stride + 1,
            (self.max_length - self.patch_size) // self.time_stride + 1,
        )

    @property
    def num_tokens(self) -> int:
        """Length N of the token sequence: two prefix tokens and every patch."""
        rows, columns = self.patch_grid
        return NUM_PREFIX_TOKENS + rows * columns

    def with_labels(self, names: tuple[str, ...] | list[str]) -> ASTConfig:
        """Return the same shape with another head: one output per name, in this order."""
        return dataclasses.replace(
            self, id2label=dict(enumerate(names)), label2id={}, num_labels=len(names)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``config.json``, as transformers and ``from_dict`` read it."""
        values = dataclasses.asdict(self)
        del values["num_labels"]  # follows from id2label, there as here
        kept = {name: value for name, value in values.items() if value is not None}
        return {"model_type": MODEL_TYPE, **kept}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` or transformers wrote.

        Fields that AST does not have (``dtype``, ``transformers_version``, …) are ignored.
        ``label2id`` is derived from ``id2label``, because it is often stale in configs on the hub.

        Raises:
            TypeError: As for the class.
            ValueError: As for the class; also for another ``model_type``, and for sizes far
                beyond any AST, which only a damaged file has.
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(f"model_type is {values['model_type']!r}; expected {MODEL_TYPE!r}")
        names = {f.name for f in dataclasses.fields(cls)} - {"label2id"}
        known = {name: values[name] for name in names & values.keys()}
        if known.get("id2label") is None:
            known.pop("id2label", None)
        config = cls(**known)
        for name in _POSITIVE_INTEGERS:
            value = getattr(config, name)
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if value > most:
                raise ValueError(f"{name} is {value}; expected at most {most}")
        return config

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> ASTConfig:
        """Read the config of a checkpoint; see ``ASTForAudioClassification.from_pretrained``."""
        with ModelFiles(locate_model(str(name_or_path), revision)) as files:
            return parse_config(files.location, read_config_values(files))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` into a folder, which is created if it does not exist."""
        write_json(folder, CONFIG_NAME, self.to_dict())


def parse_config(location: ModelLocation, values: Mapping[str, Any]) -> ASTConfig:
    """Make a config of values, with ``ModelError`` for those that are wrong."""
    try:
        return ASTConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        location.fail(f"{CONFIG_NAME} or --set model.* is wrong: {error}", error)


def _check(
    config: ASTConfig,
    name: str,
    types: tuple[type, ...],
    expected: str,
    is_legal: Callable[[Any], Any] = lambda value: True,
) -> None:
    value = getattr(config, name)
    if type(value) not in types:  # exact: True is no whole number, 12.0 neither
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    if not is_legal(value):
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _ordered_labels(id2label: Mapping[Any, Any]) -> dict[int, str]:
    """Return labels in index order. JSON made the keys text; some configs name labels by number."""
    if not isinstance(id2label, Mapping):
        raise TypeError(f"id2label is {id2label!r}; expected a mapping from index to name")
    labels: dict[int, str] = {}
    for key, name in id2label.items():
        is_index = type(key) is int or (isinstance(key, str) and key.isdecimal())
        if not is_index or type(name) not in (str, int):
            raise TypeError(f"id2label holds {key!r}: {name!r}; expected an index and a name")
        labels[int(key)] = str(name)
    if sorted(labels) != list(range(len(id2label))):
        raise ValueError(
            f"id2label has the indices {_short(sorted(labels))}; expected 0 to "
            f"{len(id2label) - 1}, each once"
        )
    return {index: labels[index] for index in range(len(labels))}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
