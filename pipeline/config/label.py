"""A run's configuration: every key, and how defaults, YAML, ``--set`` and options join.

    defaults ◀─ YAML (--config) ◀─ --set key=value ◀─ explicit options ─▶ RunConfig

What stands further right wins. ``configs/default.yaml`` says what each key means. Everything
that is wrong is reported at once, with where each value came from, before any work starts.
What there is to set is a ``Schema``: this one's is ``RUN_SCHEMA``, and ``train_config`` has
another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, Self, TypeVar, overload

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from transforms.errors import ConfigError, InputError, OutputError

DEFAULT_RUNNER = "FnApiRunner"
NOT_WRITTEN = "<not written>"  # stands for the value of an option that signs or unlocks
MIN_DECODER_BYTES = 256 << 20  # the libraries themselves, and what ordinary audio takes

# Beam's options whose values are secrets, by their names: s3_secret_access_key, azure_connection_…
_SECRET_OPTION = re.compile(
    r"secret|password|token|key|connection_string|credential", re.IGNORECASE
)

# What each command-line option sets; the command line has no settings of its own.
OPTION_KEYS: Mapping[str, str] = {
    "INPUT": "inputs",
    "--output": "output",
    "--model": "model.name",
    "--top-k": "labels.top_k",
    "--scores": "labels.scores",
    "--precision": "inference.precision",
    "--device": "inference.device",
    "--engine": "inference.engine",
    "--workers": "inference.workers",
    "--batch-size": "inference.batch_size",
    "--window-s": "window.length_s",
    "--hop-s": "window.hop_s",
    "--limit": "limit",
    "--overwrite": "overwrite",
    "--retry-failed": "retry_failed",
    "--max-failed": "max_failed",
    "--quiet": "quiet",
}


# Where the YAML files of a command lie within config_folder(), by the command that takes them.
CONFIG_FOLDERS: Mapping[str, str] = {"label": "", "train": "train"}


def _as_tuple(value: object) -> object:
    """One text stands for a list of one; YAML has lists where the config has tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
BeamScalar = bool | int | float | str | None
BeamValue = BeamScalar | list[BeamScalar]


class Section(BaseModel):
    """Strict, so that ``top_k: true`` or ``hop_s: "5"`` is an error rather than a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CheckpointSection(Section):
    """Which checkpoint, and what overrides its own word; null leaves it its word.

    Attributes:
        name: Hub id (optionally ``@revision``), folder, or original ``.pth``.
        labels: The name of a label list that ships with Earmark, or a file with one.
        preprocessor: A ``preprocessor_config.json``, or its folder, to take mean and std from.
        mean: Of the training set's log-mel features; the features are normalised with it.
        std: Their standard deviation.
        frequency_stride: Of the patches, in mel bins.
        time_stride: Of the patches, in frames.
        max_length: Frames that the model takes.
        num_mel_bins: Mel bins that the model takes.
        num_attention_heads: Per layer; an original ``.pth`` does not say.
        layer_norm_eps: Of the backbone.
        head_layer_norm_eps: Of the head.
    """

    name: str | None = None
    labels: str | None = None
    preprocessor: str | None = None
    mean: float | None = None
    std: Positive | None = None
    frequency_stride: Count | None = None
    time_stride: Count | None = None
    max_length: Count | None = None
    num_mel_bins: Count | None = None
    num_attention_heads: Count | None = None
    layer_norm_eps: Positive | None = None
    head_layer_norm_eps: Positive | None = None


class ModelSection(CheckpointSection):
    """What to run.

    Attributes:
        activation: Of the scores.
    """

    activation: Literal["sigmoid", "softmax"] | None = None


class WindowSection(Section):
    """How clips are cut.

    Attributes:
        length_s: Window length in seconds; null is what the checkpoint holds.
        hop_s: From one window's start to the next's, in seconds; null is the window's length.
        min_tail: Share of the window below which a tail gets no padded window of its own.
    """

    length_s: Positive | None = None
    hop_s: Positive | None = None
    min_tail: Ratio = 0.1


class LabelsSection(Section):
    """What is stored of the scores.

    Attributes:
        top_k: Labels per row, best first.
        scores: Also store every class's score.
    """

    top_k: Count = 10
    scores: bool = False


class EmbeddingSection(Section):
    """What is stored as the embedding.

    Attributes:
        pooling: AST's own, or the mean of the patch tokens.
        dtype: Type it is stored in.
    """

    pooling: Literal["pooler_output", "patch_mean"] = "pooler_output"
    dtype: Literal["float32", "float16"] = "float32"


class InferenceSection(Section):
    """How the model is run.

    Attributes:
        precision: Of the backbone; the head is always float32.
        device: A device asked for by name and absent is an error.
        engine: What executes the model.
        batch_size: Windows per call; null lets the device decide.
        workers: Processes, one device each where there are several.
        compile: Whether torch compiles the model; null is on cuda alone.
        check_windows: Windows per process that are computed in float32 too.
        calibration_windows: Windows that int8 is calibrated on.
        features_on: Where features are made; auto is on the device if it is cuda.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    batch_size: Count | None = None
    workers: Count = 1
    compile: bool | None = None
    check_windows: Annotated[int, Field(ge=0)] = 32
    calibration_windows: Count = 128
    features_on: Literal["auto", "host", "device"] = "auto"


class DecodeSection(Section):
    """How decoding looks ahead, and what an item may cost.

    Attributes:
        processes: Decoder processes; null is one per core.
        clips_ahead: Clips decoded ahead of the model; null follows the processes.
        stall_timeout_s: Seconds without a sample after which a decoder counts as hung.
        max_item_bytes: Encoded bytes of an item; more is an error.
        max_item_s: Seconds of audio of an item; more is an error.
        max_decode_ratio: Seconds of computing per second of audio.
        max_decoder_bytes: Memory of a decoder process.
    """

    processes: Count | None = None
    clips_ahead: Count | None = None
    stall_timeout_s: Positive = 60.0
    max_item_bytes: Count = 68_719_476_736
    max_item_s: Positive = 604_800.0
    max_decode_ratio: Positive = 10.0
    max_decoder_bytes: Annotated[int, Field(ge=MIN_DECODER_BYTES)] = 2_147_483_648


class ReadSection(Section):
    """What reading a container may take.

    Attributes:
        max_page_bytes: Bytes of a page of a Parquet file, decompressed; more is an error.
        max_expansion: Bytes that a compressed tar may give per byte of it; more is an error.
    """

    max_page_bytes: Count = 1_073_741_824
    max_expansion: Annotated[float, Field(ge=1)] = 200.0


class UnitsSection(Section):
    """What is committed at once.

    Attributes:
        windows: About how many windows a work unit holds.
        max_listed_here: Files beyond which workers list the inputs, not the launching machine.
    """

    windows: Count = 256
    max_listed_here: Annotated[int, Field(ge=0)] = 1_000_000


class RunConfig(Section):
    """All that a run can be told; see ``configs/default.yaml`` for every key's meaning.

    Attributes:
        inputs: Files, globs, folders, containers or manifests; local paths or URLs.
        output: The result's folder.
        overwrite: Start anew: remove what Earmark wrote to the output.
        retry_failed: Try again what failed in an earlier run.
        limit: Label at most this many items.
        max_failed: Share of failed items above which the exit code is 3.
        quiet: No progress.
        beam: Beam pipeline options, name to value.
    """

    inputs: Texts = ()
    output: str | None = None
    overwrite: bool = False
    retry_failed: bool = False
    limit: Count | None = None
    max_failed: Ratio = 0.05
    quiet: bool = False
    model: ModelSection = ModelSection()
    window: WindowSection = WindowSection()
    labels: LabelsSection = LabelsSection()
    embedding: EmbeddingSection = EmbeddingSection()
    inference: InferenceSection = InferenceSection()
    read: ReadSection = ReadSection()
    decode: DecodeSection = DecodeSection()
    units: UnitsSection = UnitsSection()
    beam: dict[str, BeamValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        RUN_SCHEMA.check_rules(self)
        return self

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain dicts and lists, fit to be written: no secrets.

        URLs are without what signs them, and ``NOT_WRITTEN`` stands for Beam's keys and passwords.
        It is itself a valid YAML configuration.
        """
        places = ("inputs", "output", "model.name", "model.labels", "model.preprocessor")
        plain = without_signatures(self, places)
        plain["beam"] = {name: _public_option(name, value) for name, value in self.beam.items()}
        return plain


def without_signatures(config: BaseModel, places: Iterable[str]) -> dict[str, Any]:
    """A configuration as plain dicts and lists, its URLs without what signs them.

    Args:
        config: With sections one level deep.
        places: The dotted keys that hold a path or URL, a list of them, or None.
    """
    from transforms.storage.secrets import public_uri  # brings fsspec along

    flat = flatten(config.model_dump(mode="json"))
    for key in places:
        value = flat[key]
        if isinstance(value, list):
            flat[key] = [public_uri(text) for text in value]
        elif value is not None:
            flat[key] = public_uri(value)
    return _nest(flat)


def _public_option(name: str, value: BeamValue) -> BeamValue:
    """The value of a Beam option as it may be written."""
    from transforms.storage.secrets import public_text

    if _SECRET_OPTION.search(name) and not isinstance(value, bool | None):
        return NOT_WRITTEN
    if isinstance(value, list):
        return [public_text(item) if isinstance(item, str) else item for item in value]
    return public_text(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Rule:
    """What must hold between keys.

    Attributes:
        keys: The keys it is about; the first is the one that is named as wrong.
        broken: From their values to what the first must be, or None where all is well.
    """

    keys: tuple[str, ...]
    broken: Callable[..., str | None]


def empty_input(inputs: str | Sequence[str]) -> str | None:
    """A rule: no text of a list is empty; one text stands for a list of one."""
    texts = (inputs,) if isinstance(inputs, str) else inputs
    if all(text.strip() for text in texts):
        return None
    return "must hold no empty text, as an unset variable gives it; the current folder is ."


def empty_output(output: str | None) -> str | None:
    """A rule: a path that is given is not empty."""
    if output is None or output.strip():
        return None
    return "must not be empty, as an unset variable gives it; the current folder is ."


def hop_leaves_gaps(hop_s: float | None, length_s: float | None) -> str | None:
    """A rule: windows follow one another without a gap."""
    if hop_s is None or length_s is None or hop_s <= length_s:
        return None
    return f"must be in (0, {length_s:g}] (window.length_s), else audio between windows is lost"


def _retries_what_it_removes(retry_failed: bool, overwrite: bool) -> str | None:
    if not (retry_failed and overwrite):
        return None
    return "must be false with overwrite: true, which removes the rows to retry; use one of them"


def _openvino_elsewhere(engine: str, device: str) -> str | None:
    if engine != "openvino" or device in ("auto", "cpu"):
        return None
    return f"must be auto or torch with inference.device: {device}; openvino runs on the CPU here"


def _int8_without_openvino(precision: str, engine: str) -> str | None:
    if precision != "int8" or engine != "torch":
        return None
    return "must be auto, fp32, bf16 or fp16 with inference.engine: torch; int8 needs openvino"


def _int8_elsewhere(precision: str, device: str) -> str | None:
    if precision != "int8" or device in ("auto", "cpu"):
        return None
    return f"must be auto, fp32, bf16 or fp16 with inference.device: {device}; int8 is for the CPU"


RULES = (
    Rule(("inputs",), empty_input),
    Rule(("output",), empty_output),
    Rule(("window.hop_s", "window.length_s"), hop_leaves_gaps),
    Rule(("retry_failed", "overwrite"), _retries_what_it_removes),
    Rule(("inference.engine", "inference.device"), _openvino_elsewhere),
    Rule(("inference.precision", "inference.engine"), _int8_without_openvino),
    Rule(("inference.precision", "inference.device"), _int8_elsewhere),
)


def _describe(key: str, value: object, origin: str | None) -> str:
    """``window.hop_s is 12.0 (--hop-s)``: value as YAML writes it, so that null is null."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    shown = text.removesuffix("...\n").strip()  # PyYAML ends a lone scalar's document with it
    return f"{key} is {shown} ({origin})" if origin else f"{key} is {shown}"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values. What holds names is a section, also ``beam``; no value is a dict."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class Schema(Generic[C]):
    """What can be set for a command, and by which options.

    Attributes:
        command: The command that reads it; its YAML files lie in ``CONFIG_FOLDERS[command]``.
        model: The whole configuration, valid with nothing given.
        option_keys: What each command-line option sets; there is nothing else that one could set.
        rules: What must hold between keys.
    """

    command: str
    model: type[C]
    option_keys: Mapping[str, str]
    rules: tuple[Rule, ...]

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Dotted keys to their defaults, in the order of the model."""
        return flatten(self.model().model_dump(mode="json"))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every dotted key; those of an open section are not known."""
        return tuple(self.defaults)

    @cached_property
    def open_sections(self) -> frozenset[str]:
        """Sections whose keys someone else knows: ``beam``."""
        fields = self.model.model_fields.items()
        return frozenset(name for name, field in fields if field.default_factory is dict)

    @cached_property
    def sections(self) -> frozenset[str]:
        """Names of all sections: open ones, and those that are models of their own."""
        fields = self.model.model_fields.items()
        closed = {name for name, field in fields if isinstance(field.default, Section)}
        return self.open_sections | closed

    def has_key(self, key: str) -> bool:
        """Whether a dotted key can be set."""
        section, _, name = key.partition(".")
        return key in self.keys or (section in self.open_sections and bool(name))

    def broken_rules(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[str]:
        """What the values have wrong between them; rules on absent keys are passed over."""
        for rule in self.rules:
            if not all(key in values for key in rule.keys):
                continue
            wanted = rule.broken(*(values[key] for key in rule.keys))
            if wanted is not None:
                key = rule.keys[0]
                yield f"{_describe(key, values[key], origins.get(key))}; {wanted}"

    def check_rules(self, config: C) -> None:
        """Refuse a configuration that breaks a rule, however it was made.

        Raises:
            ValueError: Names what is wrong between keys.
        """
        problems = list(self.broken_rules(flatten(config.model_dump(mode="json")), {}))
        if problems:
            raise ValueError("; ".join(problems))


RUN_SCHEMA = Schema("label", RunConfig, OPTION_KEYS, RULES)
SECTIONS = RUN_SCHEMA.sections
KEYS = RUN_SCHEMA.keys


def _unknown(key: str, origin: str, among: Iterable[str]) -> str:
    """Say that there is no such key, and which one was probably meant."""
    # The last part alone counts as well: `hop_s` means `window.hop_s`, the first that ends so.
    meant = {known: known for known in among}
    for known in among:
        meant.setdefault(known.rpartition(".")[2], known)
    close = get_close_matches(key, meant, n=1) or get_close_matches(
        key.rpartition(".")[2], meant, n=1
    )
    hint = f"did you mean {meant[close[0]]}?" if close else "there is nothing like it"
    return f"{key} ({origin}) is no key; {hint}"


@dataclass(frozen=True)
class _Setting:
    """One value, and where it came from."""

    key: str
    value: Any
    origin: str


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


# PyYAML lets a ValueError through for what looks like a date and is none.
_YAML_ERRORS = (yaml.YAMLError, ValueError)


class _YamlSettings:
    """Reads one YAML file into settings that know their line, and problems."""

    def __init__(self, path: Path, schema: Schema[Any]) -> None:
        self.path = path
        self._schema = schema
        self.settings: list[_Setting] = []
        self.problems: list[str] = []
        self._seen: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from error
        try:
            self._loader = _Loader(text)
            root = self._loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                self._read_section(root, "")
            elif root is not None:
                self.problems.append(f"{path} holds no keys; must be lines of the form key: value")
        except _YAML_ERRORS as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error

    def _read_section(self, node: yaml.MappingNode, prefix: str) -> None:
        for name_node, value_node in node.value:
            key = f"{prefix}{self._construct(name_node)}"
            self._read_value(key, value_node, f"{self.path}:{name_node.start_mark.line + 1}")

    def _read_value(self, key: str, node: yaml.Node, origin: str) -> None:
        if key in self._seen:
            self.problems.append(f"{key} ({origin}) is there twice; keep one of them")
        self._seen.add(key)
        sections = self._schema.sections
        if key in sections and isinstance(node, yaml.MappingNode):
            self._read_section(node, f"{key}.")
        elif key in sections:
            value = self._construct(node)
            if value is not None:  # a section whose keys are all commented out is empty
                self.problems.append(f"{_describe(key, value, origin)}; must hold keys and values")
        elif self._schema.has_key(key):
            self.settings.append(_Setting(key, self._construct(node), origin))
        else:
            meant = sections if isinstance(node, yaml.MappingNode) else self._schema.keys
            self.problems.append(_unknown(key, origin, meant))

    def _construct(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)


def _read_assignments(sets: Iterable[str], schema: Schema[Any]) -> tuple[list[_Setting], list[str]]:
    """Read each ``key=value`` of ``--set``."""
    settings, problems = [], []
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        key, origin = key.strip(), f"--set {assignment}"
        if not equals:
            problems.append(f"{origin} has no '='; must be key=value, like window.hop_s=5")
        elif key in schema.sections:
            own = (known for known in schema.keys if known.startswith(f"{key}."))
            example = next(own, "beam.runner")
            problems.append(f"{key} ({origin}) is a section; must be a key of it, like {example}")
        elif not schema.has_key(key):
            problems.append(_unknown(key, origin, schema.keys))
        else:
            try:
                settings.append(_Setting(key, yaml.load(text, Loader=_Loader), origin))
            except _YAML_ERRORS as error:
                problems.append(f"{origin} is not valid YAML after '=': {error}")
    return settings, problems


# What pydantic finds wrong, said as what the value must be.
_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_type": "text (in quotes, if YAML takes it for something else)",
    "tuple_type": "a list of text",
}
_EXPECTED_IN_OPEN_SECTION = "a number, text, true, false, null, or a list of these"


def _field_problems(error: ValidationError, schema: Schema[Any]) -> dict[str, str]:
    """Each wrong key with what it must be; a value of several possible types has several."""
    wanted: dict[str, dict[str, None]] = {}
    for detail in error.errors(include_url=False):
        if not detail["loc"]:
            continue  # a rule between keys: told apart, with origins
        loc = [str(part) for part in detail["loc"]]
        key = ".".join(loc[:2]) if loc[0] in schema.sections else loc[0]
        if loc[0] in schema.open_sections:
            text = _EXPECTED_IN_OPEN_SECTION
        else:
            template = _EXPECTED.get(detail["type"])
            text = template.format(**detail.get("ctx", {})) if template else detail["msg"]
        wanted.setdefault(key, {})[text] = None
    return {key: f"must be {' or '.join(texts)}" for key, texts in wanted.items()}


@overload
def load_config(
    path: str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> RunConfig: ...


@overload
def load_config(
    path: str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    schema: Schema[C],
) -> C: ...


def load_config(
    path: str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    schema: Schema[Any] = RUN_SCHEMA,
) -> Any:
    """Join the defaults, a YAML file, ``--set`` assignments and options, and check them all.

    Args:
        path: A YAML file, or the name of one that ships with Earmark (``audioset``).
        sets: ``key=value`` texts with dotted keys; values are read as YAML.
        options: Flag (a key of ``schema.option_keys``) to value; None means not given.
        schema: What can be set.
    Returns:
        The checked configuration, a ``schema.model``.
    Raises:
        ConfigError: Lists everything that is wrong, with where each came from.
    """
    settings: list[_Setting] = []
    problems: list[str] = []
    if path is not None:
        file = _YamlSettings(find_config(path, schema), schema)
        settings += file.settings
        problems += file.problems
    assigned, wrong = _read_assignments(sets, schema)
    settings += assigned
    problems += wrong
    settings += [
        _Setting(schema.option_keys[flag], value, flag)
        for flag, value in (options or {}).items()
        if value is not None
    ]
    return _validate(settings, problems, schema)


def _validate(settings: Sequence[_Setting], problems: Sequence[str], schema: Schema[C]) -> C:
    """Check what the layers set, the last of each key, and report all that is wrong."""
    given = {setting.key: setting.value for setting in settings}
    origins = {setting.key: setting.origin for setting in settings}
    problems, config, wrong = list(problems), schema.model(), dict[str, str]()
    try:
        config = schema.model.model_validate(_nest(given))
    except ValidationError as error:
        wrong = _field_problems(error, schema)
    problems += [
        f"{_describe(key, given.get(key), origins.get(key))}; {wanted}"
        for key, wanted in wrong.items()
    ]
    values = {key: value for key, value in (schema.defaults | given).items() if key not in wrong}
    problems += schema.broken_rules(values, origins)
    if problems:
        raise ConfigError(_list_problems(problems, schema))
    return config


def _list_problems(problems: Sequence[str], schema: Schema[Any]) -> str:
    where = f"Every key is described in {_folder_of(schema.command) / 'default.yaml'}."
    if len(problems) == 1:
        return f"{problems[0]}\n{where}"
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{len(problems)} problems in the configuration:{lines}\n{where}"


def config_folder() -> Path:
    """The folder of the YAML files that ship with Earmark: in the package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _folder_of(command: str) -> Path:
    """The folder of the YAML files that ship with Earmark for a command."""
    return config_folder() / CONFIG_FOLDERS[command]


def shipped_configs(command: str = "label") -> list[str]:
    """Names of the YAML files that ship with Earmark for a command, without ``.yaml``."""
    return sorted(path.stem for path in _folder_of(command).glob("*.yaml"))


def find_config(name: str, schema: Schema[Any] = RUN_SCHEMA) -> Path:
    """The file that ``--config`` means: a path, else the name of one that ships with Earmark.

    Raises:
        ConfigError: There is neither; a name that means a file for another command is said to.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs(schema.command)
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return _folder_of(schema.command) / f"{stem}.yaml"
    close = get_close_matches(stem, shipped, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    for command in CONFIG_FOLDERS:
        if stem in shipped_configs(command):
            hint = f" {stem} is one for earmark {command}.{hint}"
    raise ConfigError(
        f"--config is {name}; must be a YAML file, or one that ships with Earmark: "
        f"{', '.join(shipped)}.{hint}"
    )


class _HasOutput(Protocol):
    @property
    def output(self) -> str | None: ...


def given_inputs(config: RunConfig) -> tuple[str, ...]:
    """The inputs, which no default can give.

    Raises:
        InputError: There are none.
    """
    if not config.inputs:
        raise InputError(
            "no input is given; name files, folders, globs or manifests: "
            "earmark label INPUT… --output DIR"
        )
    return config.inputs


def given_output(config: _HasOutput) -> str:
    """The folder to write to, which no default can give.

    Raises:
        OutputError: There is none.
    """
    if config.output is None:
        raise OutputError("no output is given; name a folder: --output DIR")
    return config.output
