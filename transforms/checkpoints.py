"""Checkpoints of AST: find one, check everything that can fail, load it, save it.

Its place: the launcher calls ``resolve_model`` once, before any work; the small ``ModelSpec`` it
gives goes to the workers, where ``inference`` calls ``load_model``.

    --model NAME ─resolve_model─▶ ModelSpec ─(pickled, to each worker)─▶ load_model ─▶ the model

A checkpoint is a model on the hub, a local or remote folder, or an original ``.pth`` file. The
same tensors go by three sets of names: the original code's, those on disk (transformers 4.x, the
hub, and what 5.x saves too), and those in memory (transformers 5.x, and ours). ``tensor_names``
is the one table of them.

Guarantees: every tensor's name and shape is checked against the config and every weight is
finite, or ``ModelError`` says which is not and what to do. Pickles are read for their tensors
only, so that no code in them runs. A hub revision is pinned to its commit. No token and no
signature stands in a name or a message.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import errors as hub_errors
from torch import Tensor

from transforms import storage
from transforms.errors import ModelError
from transforms.labels import (
    Label,
    audioset_labels,
    labels_from_names,
    read_labels,
    speech_commands_labels,
)
from transforms.spectrogram_transformer import (
    NUM_PREFIX_TOKENS,
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    resize_position_embeddings,
)

Activation = Literal["sigmoid", "softmax"]
Source = Literal["hub", "folder", "original"]
Layout = Literal["original", "disk", "memory"]

SAMPLING_RATE_HZ = 16_000
# Far above any AST: a damaged config must not fill the memory or overflow.
MAX_LAYERS = 1_000
MAX_SIZE = 1 << 20
CONFIG_NAME = "config.json"
FEATURES_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"

AUDIOSET_STATS = (-4.2677393, 4.5689974)
SPEECH_COMMANDS_STATS = (-6.845978, 5.5654526)

# Of the original code: timm's LayerNorm, and torch's default in the head (ast_models.py:132).
ORIGINAL_LAYER_NORM_EPS = 1e-6
ORIGINAL_HEAD_LAYER_NORM_EPS = 1e-5
# DeiT tiny, small and base, from which AST starts, all have heads 64 wide (3, 6 and 12 of them).
ORIGINAL_HEAD_WIDTH = 64
# The windows that the original recipes train with: AudioSet, ESC-50, Speech Commands.
ORIGINAL_WINDOWS = (1024, 512, 128)

CLASSIFIER = "classifier.dense.weight"
ORIGINAL_CLASSIFIER = "module.mlp_head.1.weight"
_BASE = "audio_spectrogram_transformer."
# What makes a block what it is: a checkpoint cannot start a model that differs in one of these.
_FIXED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "patch_size", "qkv_bias",
)  # fmt: skip
_HUB_TIMEOUT_S = 30.0
# Everything a request to the hub can raise: with the base class of whichever HTTP library it uses.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    hub_errors.HfHubHTTPError,
    *hub_errors.HfHubHTTPError.__bases__,
)
_NORMALISER_OFF = (0.0, 0.5)  # (x - 0) / (2 * 0.5) leaves x as it is


@dataclass(frozen=True)
class PublicCheckpoint:
    """A checkpoint that the authors of AST published.

    Attributes:
        hub_id: What to give as ``--model``; None for one that is only a file.
        file_name: Its name as an original ``.pth`` file.
        frequency_stride: Step between patches, in mel bins.
        time_stride: Step between patches, in frames.
        max_length: Frames of a window.
        labels: ``audioset`` or ``speech_commands``.
        num_labels: How many that are.
        mean: Of the training features.
        std: Of the training features.
        metric: What the authors measured on the evaluation set.
        published: What it came to, in [0, 1].
        license: Of the weights, as their page on the hub says.
    """

    hub_id: str | None
    file_name: str
    frequency_stride: int
    time_stride: int
    max_length: int
    labels: str
    num_labels: int
    mean: float
    std: float
    metric: str
    published: float
    license: str = "BSD-3-Clause"

    @property
    def window_s(self) -> float:
        """Length of a window: 25 ms frames every 10 ms."""
        return _window_s(self.max_length)


def _audioset(
    hub_name: str | None, file_name: str, stride: int, mean_ap: float
) -> PublicCheckpoint:
    hub_id = f"MIT/ast-finetuned-audioset-{hub_name}" if hub_name else None
    geometry = (stride, stride, 1024)
    return PublicCheckpoint(
        hub_id, file_name, *geometry, "audioset", 527, *AUDIOSET_STATS, "mAP", mean_ap
    )


# Sources: YuanGongND/ast README (files and figures); the hub pages of the MIT organisation.
PUBLIC_CHECKPOINTS: tuple[PublicCheckpoint, ...] = (
    _audioset("10-10-0.4593", "audioset_10_10_0.4593.pth", 10, 0.4593),
    _audioset("10-10-0.450", "audioset_10_10_0.4495.pth", 10, 0.4495),
    _audioset("10-10-0.448", "audioset_10_10_0.4483.pth", 10, 0.4483),
    _audioset("10-10-0.448-v2", "audioset_10_10_0.4475.pth", 10, 0.4475),
    _audioset("12-12-0.447", "audioset_12_12_0.4467.pth", 12, 0.4467),
    _audioset("14-14-0.443", "audioset_14_14_0.4431.pth", 14, 0.4431),
    _audioset("16-16-0.442", "audioset_16_16_0.4422.pth", 16, 0.4422),
    PublicCheckpoint(
        "MIT/ast-finetuned-speech-commands-v2",
        "speechcommands_10_10_0.9812.pth",
        *(10, 10, 128),
        *("speech_commands", 35),
        *SPEECH_COMMANDS_STATS,
        *("accuracy", 0.9812),
    ),
)
# Balanced training only; published as a file alone.
_PUBLISHED_FILES = {
    entry.file_name: entry
    for entry in (
        *PUBLIC_CHECKPOINTS,
        _audioset(None, "audioset_bal_10_10_0.3499.pth", 10, 0.3499),
    )
}


@dataclass(frozen=True)
class ModelOverrides:
    """What ``--set model.*`` says instead of, or in addition to, the checkpoint; None: nothing.

    Attributes:
        activation: What turns logits into scores.
        labels: ``audioset``, ``speech_commands``, or a file (``labels.read_labels``).
        mean: Of the training features, before normalising.
        std: Of the training features, before normalising; above 0.
        frequency_stride: Step between patches, in mel bins.
        time_stride: Step between patches, in frames.
        max_length: Frames of a window.
        num_mel_bins: Mel bins of a frame.
        num_attention_heads: Heads per block: weights do not show it.
        layer_norm_eps: Epsilon of every LayerNorm but the head's.
        head_layer_norm_eps: Epsilon of the head's LayerNorm.

    Raises:
        ModelError: a value is not one that the field can have.
    """

    activation: Activation | None = None
    labels: str | None = None
    mean: float | None = None
    std: float | None = None
    frequency_stride: int | None = None
    time_stride: int | None = None
    max_length: int | None = None
    num_mel_bins: int | None = None
    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    head_layer_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.activation not in (None, "sigmoid", "softmax"):
            raise ModelError(
                f"model.activation is {self.activation!r}; expected sigmoid or softmax"
            )

    def config_fields(self) -> dict[str, Any]:
        """Those that are fields of ``ASTConfig``, and given."""
        names = {f.name for f in dataclasses.fields(ASTConfig)} & vars(self).keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint that was found and checked; small, so that it can travel to every worker.

    Attributes:
        name: What the user gave, without secrets.
        source: ``hub``, ``folder`` or ``original``.
        location: Hub id, folder or ``.pth`` file to load from; may carry a signature, so it is
            never written or printed.
        revision: The hub's commit, or None.
        sha256: Hex digest of the weights file; of several files, that of the sorted lines
            ``name digest``.
        config: Its shape, overrides applied.
        labels: What its outputs mean, in order.
        activation: What turns its logits into scores.
        mean: Features are normalised as ``(x - mean) / (2 * std)``.
        std: As for ``mean``.
        weight_files: Names of the files that hold the weights.
        sampling_rate: Of the audio it was trained on, in Hz.
        license: Of the weights, where known.
        notes: What a user should know of choices made for this model.
    """

    name: str
    source: Source
    location: str = dataclasses.field(repr=False)
    revision: str | None
    sha256: str
    config: ASTConfig
    labels: tuple[Label, ...]
    activation: Activation
    mean: float
    std: float
    weight_files: tuple[str, ...] = (WEIGHTS_NAME,)
    sampling_rate: int = SAMPLING_RATE_HZ
    license: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return self.config.hidden_size

    @property
    def num_labels(self) -> int:
        """How many outputs the head has."""
        return len(self.labels)

    @property
    def num_frames(self) -> int:
        """Frames of a window."""
        return self.config.max_length

    @property
    def window_s(self) -> float:
        """Length of a window in seconds: 10.255 for 1024 frames."""
        return _window_s(self.num_frames)


def _window_s(num_frames: int) -> float:
    return ((num_frames - 1) * 160 + 400) / SAMPLING_RATE_HZ


# --- Names of tensors ----------------------------------------------------------------------

# What stands before the names below: of the base, of block {}, of the head.
_PREFIXES: dict[Layout, tuple[str, str, str]] = {
    "memory": (_BASE, _BASE + "layers.{}.", ""),
    "disk": (_BASE, _BASE + "encoder.layer.{}.", ""),
    "original": ("module.", "module.v.blocks.{}.", "module."),
}
# (in memory, on disk, original). A number after # says which third of the fused qkv it is.
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
_DROPPED = re.compile(r"module\.v\.(head|head_dist)\.(weight|bias)")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a checkpoint.

    Attributes:
        name: Its name there.
        third: Which third of its rows, for query, key and value that are stored as one; or None.
    """

    name: str
    third: int | None = None


def tensor_names(config: ASTConfig, layout: Layout) -> dict[str, StoredTensor]:
    """Where each of our tensors is in a checkpoint of this layout; explicit, nothing guessed.

    Returns:
        One entry per name in the state dict of ``ASTForAudioClassification(config)``.
    """
    column = ("memory", "disk", "original").index(layout)
    base, block, head = _PREFIXES[layout]
    names = {_BASE + row[0]: StoredTensor(base + row[column]) for row in _STEM}
    modules = [(_BASE + row[0], base + row[column]) for row in _STEM_MODULES]
    for n in range(config.num_hidden_layers):
        modules += [
            (f"{_BASE}layers.{n}.{row[0]}", block.format(n) + row[column]) for row in _BLOCK_MODULES
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


def from_layout(
    tensors: Mapping[str, Tensor], config: ASTConfig, layout: Layout
) -> dict[str, Tensor]:
    """Rename (and split) the tensors of a layout into our state dict; values bit for bit.

    Raises:
        KeyError: a tensor is not there.
    """
    return {
        ours: _take_third(tensors[stored.name], stored.third)
        for ours, stored in tensor_names(config, layout).items()
    }


def to_layout(state: Mapping[str, Tensor], config: ASTConfig, layout: Layout) -> dict[str, Tensor]:
    """Rename (and join) our state dict into the tensors of a layout; values bit for bit."""
    parts: dict[str, list[Tensor]] = {}
    for ours, stored in tensor_names(config, layout).items():
        if ours in state:
            parts.setdefault(stored.name, []).append(state[ours])
    return {name: part[0] if len(part) == 1 else torch.cat(part) for name, part in parts.items()}


def _take_third(tensor: Tensor, third: int | None) -> Tensor:
    # A copy, so that three parameters do not share (and keep alive) one storage.
    return tensor if third is None else tensor.chunk(3)[third].clone()


# --- Finding the files ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Location:
    """Where a checkpoint is, found but not read yet.

    ``listing`` holds the names of a hub model's files; None where only the local cache could be
    looked at, and for what is not on the hub.
    """

    name: str
    source: Source
    url: str
    revision: str | None = None
    license: str | None = None
    listing: frozenset[str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return storage.parent(self.url) if self.source == "original" else self.url

    def fail(self, text: str, cause: BaseException | None = None) -> NoReturn:
        raise ModelError(f"model {self.name}: {text}") from cause


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _locate(name: str) -> _Location:
    """Tell what kind of name it is; what exists locally comes before the hub."""
    public = storage.public_uri(name)
    if not name:
        raise ModelError("model is empty; give a hub id (org/name), a folder or a .pth file")
    if storage.file_name(name).endswith((".pth", ".pt")):
        return _Location(public, "original", storage.normalise(name))
    if not storage.is_local(name) or storage.is_folder(name):
        return _Location(public, "folder", storage.normalise(name))
    hub_id, _, revision = name.partition("@")
    if storage.exists(name):
        raise ModelError(
            f"model {public}: is a file; expected a folder with {CONFIG_NAME} and the weights, or "
            "an original checkpoint that ends in .pth"
        )
    if name.startswith((".", "/", "~", "file:")) or not _HUB_ID.fullmatch(hub_id):
        raise ModelError(
            f"model {public}: there is no such folder. Legal names: a hub id (org/name or "
            "org/name@revision), a local or remote folder, an original .pth file"
        )
    return _locate_on_hub(public, hub_id, revision or None)


def _locate_on_hub(name: str, hub_id: str, revision: str | None) -> _Location:
    try:
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except hub_errors.RevisionNotFoundError:
        raise ModelError(
            f"model {name}: the hub has no revision {revision!r} of {hub_id}; give a branch, tag "
            "or commit that its page lists"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise ModelError(
            f"model {name}: there is no such folder here, and the hub has no model {hub_id} that "
            "you may see; check the name, or log in (hf auth login) if it is private"
        ) from None
    except _HUB_ERRORS as error:
        return _locate_in_cache(name, hub_id, revision, error)
    license_name = getattr(info.card_data, "license", None)
    listing = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return _Location(
        name, "hub", hub_id, info.sha, str(license_name) if license_name else None, listing
    )


def _locate_in_cache(name: str, hub_id: str, revision: str | None, error: Exception) -> _Location:
    """Fall back on what an earlier run downloaded: the same revision, pinned then."""
    cached = huggingface_hub.try_to_load_from_cache(hub_id, CONFIG_NAME, revision=revision)
    if not isinstance(cached, str):
        # The library's text may hold the request with its headers: no cause, and the token cut.
        raise ModelError(
            f"model {name}: cannot reach the hub for {hub_id}: {_without_token(error)}; pass a "
            "local folder, or try again where there is a network"
        ) from None
    commit = Path(cached).parent.name
    note = f"the hub cannot be reached; took commit {commit[:12]} from its local cache"
    return _Location(name, "hub", hub_id, commit, notes=(note,))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["nothing more is known"])[0]


def _without_token(error: Exception) -> str:
    text = f"{type(error).__name__}: {_first_line(error)}"
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


class _Files(AbstractContextManager["_Files"]):
    """A checkpoint's files on this machine; what was fetched from a remote folder goes at exit."""

    def __init__(self, location: _Location) -> None:
        self.location = location
        self._stack = ExitStack()
        self._found: dict[str, Path | None] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def find(self, file_name: str) -> Path | None:
        """The local path of a file, or None where the checkpoint has none of that name."""
        if file_name not in self._found:  # a remote file is fetched once
            is_on_hub = self.location.source == "hub"
            look = self._find_on_hub if is_on_hub else self._find_in_folder
            self._found[file_name] = look(file_name)
        return self._found[file_name]

    def _find_in_folder(self, file_name: str) -> Path | None:
        url = self._url(file_name)
        try:
            if not storage.exists(url):
                return None
            return Path(storage.local_path(url)) if storage.is_local(url) else self._fetch(url)
        except OSError as error:
            self.location.fail(f"{file_name} cannot be read: {error}", error)

    def need(self, file_name: str) -> Path:
        """The local path of a file without which there is no model."""
        path = self.find(file_name)
        if path is None:
            self.location.fail(f"{file_name} is not there (any more)")
        return path

    def read_json(self, file_name: str) -> dict[str, Any] | None:
        """The object in a JSON file, or None where there is no such file."""
        path = self.find(file_name)
        if path is None:
            return None
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            self.location.fail(f"{file_name} cannot be read as JSON: {error}. Get it again", error)
        if not isinstance(values, dict):
            self.location.fail(
                f"{file_name} holds a {type(values).__name__}; expected a JSON object"
            )
        return values

    def _url(self, file_name: str) -> str:
        location = self.location
        if location.source == "original" and file_name == storage.file_name(location.url):
            return location.url  # with its query, which may sign it
        return storage.join(location.folder, file_name)

    def _fetch(self, url: str) -> Path:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-model-"))
        path = Path(folder) / storage.file_name(url)
        storage.get_file(url, str(path))
        return path

    def _find_on_hub(self, file_name: str) -> Path | None:
        location = self.location
        if location.listing is not None and file_name not in location.listing:
            return None
        cached = huggingface_hub.try_to_load_from_cache(
            location.url, file_name, revision=location.revision
        )
        if isinstance(cached, str):
            return Path(cached)
        if location.listing is None:
            return None
        return _download(location, file_name)


def _download(location: _Location, file_name: str) -> Path:
    try:
        return Path(
            huggingface_hub.hf_hub_download(location.url, file_name, revision=location.revision)
        )
    except hub_errors.GatedRepoError:
        location.fail(
            "is gated: accept its terms on its page, then log in (hf auth login), or pass a "
            "local folder"
        )
    except _HUB_ERRORS as error:
        text = _without_token(error)
    raise ModelError(
        f"model {location.name}: cannot download {file_name} from the hub for {location.url}: "
        f"{text}; pass a local folder, or try again"
    )


# --- Reading the weights -------------------------------------------------------------------


class _Weights:
    """The tensors of a checkpoint under the names of its layout.

    Safetensors files are read tensor by tensor; shapes come from their headers. A pickle is read
    whole.
    """

    def __init__(self, files: _Files, file_names: tuple[str, ...]) -> None:
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
        return _take_third(self._readers[stored.name](), stored.third)

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
                f"{path.name} cannot be read as a torch file: {_first_line(error)}. It is "
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
            self.shapes[name] = tuple(tensor.shape)
            self._readers[name] = tensor.detach

    def _canonicalise(self) -> Layout:
        """Bring the names to those of a layout: prefixes come and go with how it was saved."""
        layout = _layout_of(self.shapes)
        for name in [name for name in self.shapes if _full_name(name, layout) != name]:
            self.shapes[_full_name(name, layout)] = self.shapes.pop(name)
            self._readers[_full_name(name, layout)] = self._readers.pop(name)
        return layout


def _layout_of(names: Iterable[str]) -> Layout:
    for name in names:
        if name.removeprefix("module.").startswith(("v.", "mlp_head.")):
            return "original"
        if name.removeprefix(_BASE).startswith("encoder.layer."):
            return "disk"
    return "memory"


def _full_name(name: str, layout: Layout) -> str:
    """The name with the prefix that DataParallel adds, or that ``ASTModel`` alone leaves out."""
    if layout == "original":
        return name if name.startswith("module.") else f"module.{name}"
    stem = ("embeddings.", "encoder.", "layers.", "layernorm.")
    return _BASE + name if name.startswith(stem) else name


def _find_weight_files(files: _Files) -> tuple[str, ...]:
    location = files.location
    if location.source == "original":
        name = storage.file_name(location.url)
        if files.find(name) is None:
            location.fail("there is no such file")
        return (name,)
    if files.find(WEIGHTS_NAME) is not None:
        return (WEIGHTS_NAME,)
    index = files.read_json(INDEX_NAME)
    if index is not None:
        return _shard_names(location, index)
    if files.find(PICKLE_NAME) is None:
        location.fail(
            f"has no weights; expected {WEIGHTS_NAME}, {INDEX_NAME} with its parts, or "
            f"{PICKLE_NAME}"
        )
    return (PICKLE_NAME,)


def _shard_names(location: _Location, index: Mapping[str, Any]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        location.fail(f"{INDEX_NAME} has no weight_map from tensor to file")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            location.fail(
                f"{INDEX_NAME} names the file {name!r}; expected a .safetensors beside it"
            )
    return tuple(names)


def _sha256(files: _Files, names: Sequence[str]) -> str:
    digests = {}
    for name in names:
        with files.need(name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


# --- Checking the weights ------------------------------------------------------------------


def _expected_shapes(config: ASTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes only, no memory
        state = ASTForAudioClassification(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_tensors(weights: _Weights, config: ASTConfig, wanted: Collection[str]) -> None:
    """Every tensor we want is there in its shape, and there is none that we do not know."""
    names = tensor_names(config, weights.layout)
    missing = [names[ours].name for ours in wanted if names[ours].name not in weights.shapes]
    if missing:
        weights.location.fail(
            f"there is no tensor {missing[0]!r}{_and_more(missing)}; expected it for "
            f"num_hidden_layers={config.num_hidden_layers}. {_missing_advice(missing)}"
        )
    known = {stored.name for stored in names.values()}
    unknown = [n for n in weights.shapes if n not in known and not _DROPPED.fullmatch(n)]
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
    weights: _Weights, stored: StoredTensor, shape: tuple[int, ...], config: ASTConfig
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


def _read_state(weights: _Weights, config: ASTConfig, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Read the wanted tensors, as float32 under our names."""
    names = tensor_names(config, weights.layout)
    state = {}
    for ours in wanted:
        tensor = weights.read(names[ours])
        if not tensor.is_floating_point():
            weights.location.fail(
                f"the tensor {names[ours].name!r} is {tensor.dtype}; expected a float type. "
                "Quantised checkpoints cannot be read: use the one they were made from"
            )
        # A copy: safetensors maps the file, which may change or go while the model lives.
        state[ours] = tensor.to(torch.float32, copy=True)
    return state


def _check_finite(weights: _Weights, config: ASTConfig) -> None:
    for name, stored in tensor_names(config, weights.layout).items():
        # One tensor at a time: a checkpoint need not fit into the launcher's memory twice.
        tensor = _read_state(weights, config, [name])[name]
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            weights.location.fail(
                f"the tensor {stored.name!r} holds {bad} values that are NaN or infinite, of "
                f"{tensor.numel()}; its training diverged or the file is damaged. Use another "
                "checkpoint"
            )


# --- Reading the config --------------------------------------------------------------------


def _make_config(
    location: _Location, values: Mapping[str, Any], overrides: ModelOverrides
) -> ASTConfig:
    try:
        config = ASTConfig.from_dict({**values, **overrides.config_fields()})
    except (TypeError, ValueError) as error:
        location.fail(f"{CONFIG_NAME} or --set model.* is wrong: {error}", error)
    for name, value in config.to_dict().items():
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if isinstance(value, int) and value > most:
            location.fail(f"{name} is {value}; expected at most {most}")
    return config


def _need_config(files: _Files) -> dict[str, Any]:
    values = files.read_json(CONFIG_NAME)
    if values is None:
        offline = files.location.source == "hub" and files.location.listing is None
        files.location.fail(
            f"there is no {CONFIG_NAME}; expected a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and "
            f"{FEATURES_NAME}" + (" (only the local cache was looked at)" if offline else "")
        )
    if "model_type" not in values:
        files.location.fail(
            f"{CONFIG_NAME} has no model_type; expected audio-spectrogram-transformer. Is this a "
            "model's folder?"
        )
    return values


def _open(files: _Files) -> tuple[dict[str, Any], _Weights]:
    """The values of the config, as far as the checkpoint gives them, and the weights' headers."""
    if files.location.source == "original":
        weights = _Weights(files, _find_weight_files(files))
        return _original_values(files, weights), weights
    values = _need_config(files)
    return values, _Weights(files, _find_weight_files(files))


def _original_values(files: _Files, weights: _Weights) -> dict[str, Any]:
    """What is known of an original checkpoint: from its tensors, its name, files beside it.

    Later ones win. ``mean`` and ``std`` are among the values where somebody gave them.
    """
    features = files.read_json(FEATURES_NAME) or {}
    names = ("max_length", "num_mel_bins", "mean", "std")
    return {
        **_values_from_shapes(weights),
        **_values_from_name(storage.file_name(files.location.url)),
        **{name: features[name] for name in names if name in features},
        **(files.read_json(CONFIG_NAME) or {}),
    }


def _values_from_shapes(weights: _Weights) -> dict[str, Any]:
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
    entry = _PUBLISHED_FILES.get(file_name)
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


def _complete_original(
    weights: _Weights, values: Mapping[str, Any], overrides: ModelOverrides
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Add the window that the position embeddings imply, and list what nobody gave.

    Returns:
        The values, the missing fields of the config with a hint each, and notes.
    """
    given = {**values, **overrides.config_fields()}
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


def _window_range(weights: _Weights, given: Mapping[str, Any]) -> tuple[int, int]:
    """The shortest and longest window that gives as many patches as there are positions."""
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


def _fail_missing(location: _Location, missing: Sequence[str]) -> NoReturn:
    location.fail(
        "an original checkpoint carries no labels, statistics or strides. Missing: "
        f"{'; '.join(missing)}. Give each with --set (--set "
        f"{missing[0].partition(' ')[0]}=…), or in a {CONFIG_NAME} beside it"
    )


# --- Settling what the checkpoint leaves open ----------------------------------------------


def _settle_labels(
    weights: _Weights, config: ASTConfig, overrides: ModelOverrides
) -> tuple[ASTConfig, tuple[Label, ...]]:
    if overrides.labels is not None:
        labels = read_labels(overrides.labels, storage.read_bytes)
        origin = f"model.labels={storage.public_uri(overrides.labels)}"
    else:
        labels = labels_from_names(tuple(config.id2label.values()))
        origin = f"id2label in {CONFIG_NAME}"
    if weights.num_labels not in (0, len(labels)):
        weights.location.fail(
            f"{origin} has {len(labels)} labels, and the classifier has {weights.num_labels} "
            "outputs; expected one label per output, in its order. Give the right list with --set "
            "model.labels=audioset, speech_commands or a file"
        )
    return config.with_labels([label.name for label in labels]), labels


def _settle_activation(
    location: _Location, config: ASTConfig, labels: Sequence[Label], overrides: ModelOverrides
) -> tuple[Activation, tuple[str, ...]]:
    if overrides.activation is not None:
        return overrides.activation, ()
    if config.problem_type == "single_label_classification":
        return "softmax", ()
    if config.problem_type == "multi_label_classification":
        return "sigmoid", ()
    if config.problem_type is not None:
        location.fail(
            f"problem_type is {config.problem_type!r}: its outputs are no labels; expected "
            "single_label_classification or multi_label_classification. To score them all the "
            "same, give --set model.activation=sigmoid or softmax"
        )
    if labels[0].id is not None:
        return "sigmoid", ("activation: sigmoid: no problem_type, and AudioSet's 527 labels",)
    return "softmax", ("activation: softmax: no problem_type, and labels other than AudioSet's",)


def _read_features(files: _Files, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the feature extractor; what its file leaves out is transformers' default."""
    features = files.read_json(FEATURES_NAME)
    if features is not None:
        mean, std = AUDIOSET_STATS
        return {"mean": mean, "std": std, **features}
    if files.location.source == "original":
        return {name: values[name] for name in ("mean", "std") if name in values}
    return {}


def _settle_stats(
    location: _Location, features: Mapping[str, Any], config: ASTConfig, overrides: ModelOverrides
) -> tuple[float, float]:
    """Mean and std to normalise with; and the features must be those that the model takes."""
    kind = features.get("feature_extractor_type", "ASTFeatureExtractor")
    expected = {"sampling_rate": SAMPLING_RATE_HZ}
    if overrides.max_length is None:
        expected["max_length"] = config.max_length
    if overrides.num_mel_bins is None:
        expected["num_mel_bins"] = config.num_mel_bins
    if kind != "ASTFeatureExtractor":
        location.fail(
            f"feature_extractor_type in {FEATURES_NAME} is {kind!r}; expected ASTFeatureExtractor"
        )
    for name, value in expected.items():
        if features.get(name, value) != value:
            reason = "AST is fed no other" if name == "sampling_rate" else f"as in {CONFIG_NAME}"
            location.fail(
                f"{name} in {FEATURES_NAME} is {features[name]!r}; expected {value!r}, {reason}"
            )
    mean, std = features.get("mean"), features.get("std")
    if not features.get("do_normalize", True):
        mean, std = _NORMALISER_OFF
    mean = mean if overrides.mean is None else overrides.mean
    std = std if overrides.std is None else overrides.std
    return _statistic(location, "mean", mean), _statistic(location, "std", std)


def _statistic(location: _Location, name: str, value: Any) -> float:
    if value is None:
        location.fail(
            f"there is no {FEATURES_NAME}, and so no {name}; add the file, or give --set "
            f"model.{name}= (earmark stats measures it on a dataset)"
        )
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or (name == "std" and value <= 0):
        location.fail(
            f"{name} is {value!r}; expected a finite number" + (" above 0" * (name == "std"))
        )
    return float(value)


# --- What others call ----------------------------------------------------------------------


def resolve_model(name: str, overrides: ModelOverrides = ModelOverrides()) -> ModelSpec:
    """Find a checkpoint, check everything about it that can be wrong, and describe it.

    A remote folder or file is fetched for the check, and again by ``load_model``; a hub model is
    kept in the hub's local cache.

    Args:
        name: Hub id (``org/name`` or ``org/name@revision``), local or remote folder, or original
            ``.pth`` file.
        overrides: What to take instead of what the checkpoint says.

    Raises:
        ModelError: it cannot be had, is damaged, or does not fit its description; the message
            names the tensor or field, what was found, what was expected, and the next step.
    """
    location = _locate(name)
    with _Files(location) as files:
        values, weights = _open(files)
        features = _read_features(files, values)
        notes = list(location.notes)
        if location.source == "original":
            values, missing, found = _complete_original(weights, values, overrides)
            missing += _missing_meaning(weights, values, features, overrides)
            notes += found
            if missing:
                _fail_missing(location, missing)
        config, labels = _settle_labels(
            weights, _make_config(location, values, overrides), overrides
        )
        _check_tensors(weights, config, tensor_names(config, "memory").keys())
        _check_finite(weights, config)
        mean, std = _settle_stats(location, features, config, overrides)
        activation, found_activation = _settle_activation(location, config, labels, overrides)
        return ModelSpec(
            name=location.name,
            source=location.source,
            location=location.url,
            revision=location.revision,
            sha256=_sha256(files, weights.file_names),
            config=config,
            labels=labels,
            activation=activation,
            mean=mean,
            std=std,
            weight_files=weights.file_names,
            license=location.license or _published_license(location),
            notes=(*notes, *found_activation),
        )


def _missing_meaning(
    weights: _Weights,
    values: Mapping[str, Any],
    features: Mapping[str, Any],
    overrides: ModelOverrides,
) -> list[str]:
    missing = []
    if "id2label" not in values and overrides.labels is None:
        missing.append(
            f"model.labels (audioset, speech_commands or a file; it has {weights.num_labels} "
            "outputs)"
        )
    for name, audioset in zip(("mean", "std"), AUDIOSET_STATS, strict=True):
        if name not in features and getattr(overrides, name) is None:
            missing.append(f"model.{name} (AudioSet: {audioset})")
    return missing


def _published_license(location: _Location) -> str | None:
    if location.source == "hub":
        licenses = {entry.hub_id: entry.license for entry in PUBLIC_CHECKPOINTS}
        return licenses.get(location.url)
    entry = _PUBLISHED_FILES.get(storage.file_name(location.url))
    return entry.license if entry else None


def load_model(spec: ModelSpec) -> ASTForAudioClassification:
    """Load what ``resolve_model`` described; on the CPU, in float32 and evaluation mode.

    Raises:
        ModelError: its files have gone or changed since.
    """
    location = _Location(
        spec.name,
        spec.source,
        spec.location,
        spec.revision,
        listing=frozenset(spec.weight_files) if spec.source == "hub" else None,
    )
    with _Files(location) as files:
        return _build(_Weights(files, spec.weight_files), spec.config)


def load_for_finetuning(spec: ModelSpec, config: ASTConfig) -> ASTForAudioClassification:
    """Load a checkpoint into a model of other strides, another window or other labels.

    Position embeddings are resized as in the original code. The head is the checkpoint's where
    the label names are the same in the same order, else a fresh one.

    Args:
        spec: The checkpoint to start from.
        config: Of the model wanted; all but strides, window and labels as in the checkpoint.

    Raises:
        ModelError: the checkpoint's files have gone, or its blocks are others.
    """
    for field in _FIXED_FIELDS:
        found, expected = getattr(config, field), getattr(spec.config, field)
        if found != expected:
            raise ModelError(
                f"model {spec.name}: {field} is {expected}, and the model to fine-tune has "
                f"{found}; only strides, max_length, num_mel_bins and labels may differ"
            )
    state = load_model(spec).state_dict()
    name = f"{_BASE}embeddings.position_embeddings"
    state[name] = resize_position_embeddings(state[name], spec.config.patch_grid, config.patch_grid)
    model = ASTForAudioClassification(config)
    if config.id2label != spec.config.id2label:
        state |= {
            key: tensor for key, tensor in model.state_dict().items() if not key.startswith(_BASE)
        }
    model.load_state_dict(state)
    return model


def load_pretrained(name: str, revision: str | None = None) -> ASTForAudioClassification:
    """Load a checkpoint for use from Python: as ``resolve_model``, but it need have no statistics.

    Raises:
        ModelError: as ``resolve_model``.
    """
    with _Files(_locate(_with_revision(name, revision))) as files:
        config, weights = _config_and_weights(files)
        config, _ = _settle_labels(weights, config, ModelOverrides())
        return _build(weights, config)


def load_base_model(name: str, revision: str | None = None) -> ASTModel:
    """Load a checkpoint's transformer; whether it has a head does not matter.

    Raises:
        ModelError: as ``resolve_model``.
    """
    with _Files(_locate(_with_revision(name, revision))) as files:
        config, weights = _config_and_weights(files)
        wanted = [key for key in tensor_names(config, "memory") if key.startswith(_BASE)]
        _check_tensors(weights, config, wanted)
        state = _read_state(weights, config, wanted)
        with torch.device("meta"):
            model = ASTModel(config)
        renamed = {key.removeprefix(_BASE): tensor for key, tensor in state.items()}
        model.load_state_dict(renamed, assign=True)
        return model.eval()


def load_config(name: str, revision: str | None = None) -> ASTConfig:
    """Read a checkpoint's config alone.

    Raises:
        ModelError: it cannot be had, or is not that of an AST.
    """
    location = _locate(_with_revision(name, revision))
    with _Files(location) as files:
        if location.source == "original":
            return _config_and_weights(files)[0]
        return _make_config(location, _need_config(files), ModelOverrides())


def _with_revision(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _config_and_weights(files: _Files) -> tuple[ASTConfig, _Weights]:
    values, weights = _open(files)
    if files.location.source == "original":
        values, missing, _ = _complete_original(weights, values, ModelOverrides())
        if missing:
            _fail_missing(files.location, missing)
        if "id2label" not in values:
            values["num_labels"] = weights.num_labels
    return _make_config(files.location, values, ModelOverrides()), weights


def _build(weights: _Weights, config: ASTConfig) -> ASTForAudioClassification:
    wanted = tensor_names(config, "memory").keys()
    _check_tensors(weights, config, wanted)
    with torch.device("meta"):  # no memory, and no time for weights that are replaced at once
        model = ASTForAudioClassification(config)
    model.load_state_dict(_read_state(weights, config, wanted), assign=True)
    return model.eval()


# --- Saving --------------------------------------------------------------------------------


def save_pretrained(
    model: ASTForAudioClassification, folder: str | Path, *, mean: float, std: float
) -> None:
    """Write a model's folder that Earmark and transformers load back, features and all.

    Weights come first and ``config.json`` last, each file whole or not at all, so that a folder
    with a config is complete. transformers has one LayerNorm epsilon for everything: where the
    head's differs, the config holds both, and transformers uses ``layer_norm_eps`` throughout.
    With the original's pair (1e-6, and 1e-5 in the head) its logits before the bias then differ
    by a factor of 1 + 4.5e-6 / (variance of the embedding): 2e-5 was measured, with random
    weights, an embedding variance of 0.7 and logits of standard deviation 1.

    Args:
        model: On any device, in any float type.
        folder: Local folder or URL; made if it is not there.
        mean: Of the training features, before normalising.
        std: Of the training features, before normalising.
    """
    features = {
        "do_normalize": True,
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "max_length": model.config.max_length,
        "mean": mean,
        "num_mel_bins": model.config.num_mel_bins,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": SAMPLING_RATE_HZ,
        "std": std,
    }
    _write_json(folder, FEATURES_NAME, features)
    save_model(model, folder)


def save_model(model: ASTForAudioClassification | ASTModel, folder: str | Path) -> None:
    """Write weights and config, in transformers' names on disk; as ``save_pretrained``."""
    if isinstance(model, ASTModel):
        state = {_BASE + name: tensor for name, tensor in model.state_dict().items()}
        stored = to_layout(state, model.config, "disk")
        # transformers leaves the prefix out where there is no head beside the base.
        stored = {name.removeprefix(_BASE): tensor for name, tensor in stored.items()}
    else:
        stored = to_layout(model.state_dict(), model.config, "disk")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    storage.write_bytes(storage.join(_url(folder), WEIGHTS_NAME), content)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    _write_json(folder, CONFIG_NAME, values)


def save_config(config: ASTConfig, folder: str | Path) -> None:
    """Write ``config.json`` alone."""
    _write_json(folder, CONFIG_NAME, config.to_dict())


def _write_json(folder: str | Path, file_name: str, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    storage.write_bytes(storage.join(_url(folder), file_name), text.encode())


def _url(folder: str | Path) -> str:
    return storage.normalise(str(folder))
