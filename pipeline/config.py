"""The run's configuration: every key, and how defaults, YAML, ``--set`` and options join.

    defaults ◀─ YAML (--config) ◀─ --set key=value ◀─ explicit options ─▶ RunConfig

What stands further right wins. ``configs/default.yaml`` says what each key means. Everything
that is wrong is reported at once, with where each value came from, before any work starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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


class _Section(BaseModel):
    """Strict, so that ``top_k: true`` or ``hop_s: "5"`` is an error rather than a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """What to run, and what overrides the checkpoint's own word; null leaves it its word.

    Attributes:
        name: Hub id (optionally ``@revision``), folder, or original ``.pth``.
        activation: Of the scores.
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
    activation: Literal["sigmoid", "softmax"] | None = None
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


class WindowSection(_Section):
    """How clips are cut.

    Attributes:
        length_s: Window length in seconds; null is what the checkpoint holds.
        hop_s: From one window's start to the next's, in seconds; null is the window's length.
        min_tail: Share of the window below which a tail gets no padded window of its own.
    """

    length_s: Positive | None = None
    hop_s: Positive | None = None
    min_tail: Ratio = 0.1


class LabelsSection(_Section):
    """What is stored of the scores.

    Attributes:
        top_k: Labels per row, best first.
        scores: Also store every class's score.
    """

    top_k: Count = 10
    scores: bool = False


class EmbeddingSection(_Section):
    """What is stored as the embedding.

    Attributes:
        pooling: AST's own, or the mean of the patch tokens.
        dtype: Type it is stored in.
    """

    pooling: Literal["pooler_output", "patch_mean"] = "pooler_output"
    dtype: Literal["float32", "float16"] = "float32"


class InferenceSection(_Section):
    """How the model is run.

    Attributes:
        precision: Of the backbone; the head is always float32.
        device: A device asked for by name and absent is an error.
        engine: What executes the model.
        batch_size: Windows per call; null lets the device decide.
        workers: Processes, one device each where there are several.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    batch_size: Count | None = None
    workers: Count = 1


class DecodeSection(_Section):
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


class ReadSection(_Section):
    """What reading a container may take.

    Attributes:
        max_page_bytes: Bytes of a page of a Parquet file, decompressed; more is an error.
        max_expansion: Bytes that a compressed tar may give per byte of it; more is an error.
    """

    max_page_bytes: Count = 1_073_741_824
    max_expansion: Annotated[float, Field(ge=1)] = 200.0


class UnitsSection(_Section):
    """What is committed at once.

    Attributes:
        windows: About how many windows a work unit holds.
    """

    windows: Count = 256


class RunConfig(_Section):
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
        values = flatten(self.model_dump(mode="json"))
        problems = list(_broken_rules(values, {}))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain dicts and lists, fit to be written: no secrets.

        URLs are without what signs them, and ``NOT_WRITTEN`` stands for Beam's keys and passwords.
        It is itself a valid YAML configuration.
        """
        from transforms.storage import public_uri  # brings fsspec along

        plain = self.model_dump(mode="json")
        plain["inputs"] = [public_uri(text) for text in self.inputs]
        model = plain["model"]
        for section, key in (
            (plain, "output"),
            (model, "name"),
            (model, "labels"),
            (model, "preprocessor"),
        ):
            if section[key] is not None:
                section[key] = public_uri(section[key])
        plain["beam"] = {name: _public_option(name, value) for name, value in self.beam.items()}
        return plain


def _public_option(name: str, value: BeamValue) -> BeamValue:
    """The value of a Beam option as it may be written."""
    from transforms.storage import public_text

    if _SECRET_OPTION.search(name) and not isinstance(value, bool | None):
        return NOT_WRITTEN
    if isinstance(value, list):
        return [public_text(item) if isinstance(item, str) else item for item in value]
    return public_text(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class _Rule:
    """What must hold between keys.

    Attributes:
        keys: The keys it is about; the first is the one that is named as wrong.
        broken: From their values to what the first must be, or None where all is well.
    """

    keys: tuple[str, ...]
    broken: Callable[..., str | None]


def _empty_input(inputs: Sequence[str]) -> str | None:
    if all(text.strip() for text in inputs):
        return None
    return "must hold no empty text, as an unset variable gives it; the current folder is ."


def _empty_output(output: str | None) -> str | None:
    if output is None or output.strip():
        return None
    return "must not be empty, as an unset variable gives it; the current folder is ."


def _hop_leaves_gaps(hop_s: float | None, length_s: float | None) -> str | None:
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


RULES = (
    _Rule(("inputs",), _empty_input),
    _Rule(("output",), _empty_output),
    _Rule(("window.hop_s", "window.length_s"), _hop_leaves_gaps),
    _Rule(("retry_failed", "overwrite"), _retries_what_it_removes),
    _Rule(("inference.engine", "inference.device"), _openvino_elsewhere),
    _Rule(("inference.precision", "inference.engine"), _int8_without_openvino),
)


def _broken_rules(values: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[str]:
    """What the values have wrong between them; rules on absent keys are passed over."""
    for rule in RULES:
        if not all(key in values for key in rule.keys):
            continue
        wanted = rule.broken(*(values[key] for key in rule.keys))
        if wanted is not None:
            key = rule.keys[0]
            yield f"{_describe(key, values[key], origins.get(key))}; {wanted}"


def _describe(key: str, value: object, origin: str | None) -> str:
    """``window.hop_s is 12.0 (--hop-s)``: value as YAML writes it, so that null is null."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    shown = text.removesuffix("...\n").strip()  # PyYAML ends a lone scalar's document with it
    return f"{key} is {shown} ({origin})" if origin else f"{key} is {shown}"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; ``beam`` counts as a section."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
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


# `beam` holds what Beam knows; the others are models of their own.
SECTIONS = frozenset(
    name
    for name, field in RunConfig.model_fields.items()
    if name == "beam" or isinstance(field.default, _Section)
)
_DEFAULTS = flatten(RunConfig().model_dump(mode="json"))
KEYS = tuple(_DEFAULTS)


def _is_key(key: str) -> bool:
    return key in KEYS or (key.startswith("beam.") and key != "beam.")


def _unknown(key: str, origin: str, among: Iterable[str]) -> str:
    """Say that there is no such key, and which one was probably meant."""
    # The last part alone counts as well: `hop_s` means `window.hop_s`.
    meant = {known.rpartition(".")[2]: known for known in among}
    meant |= {known: known for known in among}
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

    def __init__(self, path: Path) -> None:
        self.path = path
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
        if key in SECTIONS and isinstance(node, yaml.MappingNode):
            self._read_section(node, f"{key}.")
        elif key in SECTIONS:
            value = self._construct(node)
            if value is not None:  # a section whose keys are all commented out is empty
                self.problems.append(f"{_describe(key, value, origin)}; must hold keys and values")
        elif _is_key(key):
            self.settings.append(_Setting(key, self._construct(node), origin))
        else:
            sections_only = isinstance(node, yaml.MappingNode)
            self.problems.append(_unknown(key, origin, SECTIONS if sections_only else KEYS))

    def _construct(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)


def _read_assignments(sets: Iterable[str]) -> tuple[list[_Setting], list[str]]:
    """Read each ``key=value`` of ``--set``."""
    settings, problems = [], []
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        key, origin = key.strip(), f"--set {assignment}"
        if not equals:
            problems.append(f"{origin} has no '='; must be key=value, like window.hop_s=5")
        elif key in SECTIONS:
            example = next((known for known in KEYS if known.startswith(f"{key}.")), "beam.runner")
            problems.append(f"{key} ({origin}) is a section; must be a key of it, like {example}")
        elif not _is_key(key):
            problems.append(_unknown(key, origin, KEYS))
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
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_type": "text (in quotes, if YAML takes it for something else)",
    "tuple_type": "a list of text",
}
_EXPECTED_OF_BEAM = "a number, text, true, false, null, or a list of these"


def _field_problems(error: ValidationError) -> dict[str, str]:
    """Each wrong key with what it must be; a value of several possible types has several."""
    wanted: dict[str, dict[str, None]] = {}
    for detail in error.errors(include_url=False):
        if not detail["loc"]:
            continue  # a rule between keys: told apart, with origins
        loc = [str(part) for part in detail["loc"]]
        key = loc[0] if loc[0] not in SECTIONS else ".".join(loc[:2])
        template = _EXPECTED.get(detail["type"])
        text = template.format(**detail.get("ctx", {})) if template else detail["msg"]
        wanted.setdefault(key, {})[text] = None
    return {
        key: f"must be {_EXPECTED_OF_BEAM if key.startswith('beam.') else ' or '.join(texts)}"
        for key, texts in wanted.items()
    }


def load_config(
    path: str | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Join the defaults, a YAML file, ``--set`` assignments and options, and check them all.

    Args:
        path: A YAML file, or the name of one that ships with Earmark (``audioset``).
        sets: ``key=value`` texts with dotted keys; values are read as YAML.
        options: Flag (a key of ``OPTION_KEYS``) to value; None means not given.
    Returns:
        The checked configuration.
    Raises:
        ConfigError: Lists everything that is wrong, with where each came from.
    """
    settings: list[_Setting] = []
    problems: list[str] = []
    if path is not None:
        file = _YamlSettings(find_config(path))
        settings += file.settings
        problems += file.problems
    assigned, wrong = _read_assignments(sets)
    settings += assigned
    problems += wrong
    settings += [
        _Setting(OPTION_KEYS[flag], value, flag)
        for flag, value in (options or {}).items()
        if value is not None
    ]
    return _validate(settings, problems)


def _validate(settings: Sequence[_Setting], problems: Sequence[str]) -> RunConfig:
    """Check what the layers set, the last of each key, and report all that is wrong."""
    given = {setting.key: setting.value for setting in settings}
    origins = {setting.key: setting.origin for setting in settings}
    problems, config, wrong = list(problems), RunConfig(), dict[str, str]()
    try:
        config = RunConfig.model_validate(_nest(given))
    except ValidationError as error:
        wrong = _field_problems(error)
    problems += [
        f"{_describe(key, given.get(key), origins.get(key))}; {wanted}"
        for key, wanted in wrong.items()
    ]
    values = {key: value for key, value in (_DEFAULTS | given).items() if key not in wrong}
    problems += _broken_rules(values, origins)
    if problems:
        raise ConfigError(_list_problems(problems))
    return config


def _list_problems(problems: Sequence[str]) -> str:
    where = f"Every key is described in {config_folder() / 'default.yaml'}."
    if len(problems) == 1:
        return f"{problems[0]}\n{where}"
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{len(problems)} problems in the configuration:{lines}\n{where}"


def config_folder() -> Path:
    """The folder of the YAML files that ship with Earmark: in the package, or in the checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the YAML files that ship with Earmark, without ``.yaml``."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file that ``--config`` means: a path, else the name of one that ships with Earmark.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return config_folder() / f"{stem}.yaml"
    close = get_close_matches(stem, shipped, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"--config is {name}; must be a YAML file, or one that ships with Earmark: "
        f"{', '.join(shipped)}.{hint}"
    )


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


def given_output(config: RunConfig) -> str:
    """The result's folder, which no default can give.

    Raises:
        OutputError: There is none.
    """
    if config.output is None:
        raise OutputError("no output is given; name a folder: --output DIR")
    return config.output


def given_model(config: RunConfig) -> str:
    """The model's name, which no default can give.

    Raises:
        ConfigError: There is none.
    """
    if config.model.name is None:
        raise ConfigError(
            "no model is given; pass --model with a hub id, a folder or an original .pth "
            "(earmark models lists the public ones), or --config audioset"
        )
    return config.model.name
