"""The configuration of ``earmark label``, ``plan`` and ``stats``.

``configs/default.yaml`` says what each key means, with its unit and default.
"""

from __future__ import annotations

import codecs
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pipeline.config.schema import (
    NO_GAPS,
    Config,
    Count,
    CountOrZero,
    Place,
    Positive,
    Ratio,
    Rule,
    Section,
    Texts,
    not_empty,
    not_empty_inputs,
)
from transforms.errors import InputError, OutputError
from transforms.sources.tables.columns import KNOWN_COLUMNS, TableFormat

DEFAULT_RUNNER = "FnApiRunner"
NOT_WRITTEN = "<not written>"  # stands for the value of an option that signs or unlocks
_ON_CPU = ("auto", "cpu")
MIN_DECODER_BYTES = 256 << 20  # the libraries themselves, and what ordinary audio takes

# Beam's options whose values are secrets, by their names: s3_secret_access_key, azure_connection_…
_SECRET_OPTION = re.compile(
    r"secret|password|token|key|connection_string|credential", re.IGNORECASE
)

BeamScalar = bool | int | float | str | None
BeamValue = BeamScalar | list[BeamScalar]


class CheckpointSection(Section):
    """Which checkpoint, and what overrides its own word; null leaves it its word."""

    name: Place | None = None
    labels: Place | None = None
    preprocessor: Place | None = None
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
    """Which model to run."""

    activation: Literal["sigmoid", "softmax"] | None = None


class WindowSection(Section):
    """How clips are cut into windows."""

    length_s: Positive | None = None
    hop_s: Positive | None = None
    min_tail: Ratio = 0.1


class TruthSection(Section):
    """Where labels come from that no table gives."""

    from_: Annotated[Literal["folder"] | None, Field(alias="from")] = None


class LabelsSection(TruthSection):
    """What is stored of the scores, and where the labels of the input come from."""

    top_k: Count = 10
    scores: bool = False


class EmbeddingSection(Section):
    """What is stored as the embedding."""

    pooling: Literal["pooler_output", "patch_mean"] = "pooler_output"
    dtype: Literal["float32", "float16"] = "float32"


class InferenceSection(Section):
    """How the model is run."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    batch_size: Count | None = None
    workers: Count = 1
    compile: bool | None = None
    check_windows: CountOrZero = 32
    calibration_windows: Count = 128
    features_on: Literal["auto", "host", "device"] = "auto"


class DecodeSection(Section):
    """How decoding looks ahead, and what an item may cost."""

    channel: Literal["mix", "first", "loudest", "each"] | Count = "mix"
    processes: Count | None = None
    clips_ahead: Count | None = None
    stall_timeout_s: Positive = 60.0
    max_item_bytes: Count = 68_719_476_736
    max_item_s: Positive = 604_800.0
    max_decode_ratio: Positive = 10.0
    max_decoder_bytes: Annotated[int, Field(ge=MIN_DECODER_BYTES)] = 2_147_483_648


class ReadSection(Section):
    """What reading a container may cost."""

    max_page_bytes: Count = 1_073_741_824
    max_expansion: Annotated[float, Field(ge=1)] = 200.0


def _as_columns(value: object) -> object:
    """Return texts NAME=COLUMN as a tuple, from a list of them, one of them or a mapping."""
    if isinstance(value, dict):
        value = [f"{name}={'' if column is None else column}" for name, column in value.items()]
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise PydanticCustomError("columns", "NAME=COLUMN, or several of them")
    known = [text.partition("=")[0].strip() for text in texts]
    for text, name in zip(texts, known, strict=True):
        if "=" not in text or name not in KNOWN_COLUMNS:
            raise PydanticCustomError(
                "columns",
                "NAME=COLUMN with a NAME among {names}",
                {"names": ", ".join(KNOWN_COLUMNS)},
            )
    if len(set(known)) < len(known):
        raise PydanticCustomError("columns", "NAME=COLUMN with each NAME once")
    return tuple(texts)


def _known_encoding(value: str) -> str:
    try:
        "".encode(codecs.lookup(value).name)
    except (LookupError, ValueError):
        raise PydanticCustomError(
            "encoding", "an encoding that Python knows, such as cp1252, latin-1 or utf-16"
        ) from None
    return value


class ManifestSection(Section):
    """How tables that list what to label are read."""

    format: TableFormat | None = None
    columns: Annotated[tuple[str, ...], BeforeValidator(_as_columns)] = ()
    root: str | None = None
    pattern: str | None = None
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = None
    label_separator: Annotated[str, Field(min_length=1)] = ";"

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the pairs of ``columns``."""
        parts = (text.partition("=") for text in self.columns)
        return tuple((name.strip(), column.strip()) for name, _, column in parts)


class UnitsSection(Section):
    """What is committed at once."""

    windows: Count = 256
    max_listed_here: CountOrZero = 1_000_000


class RunConfig(Config):
    """Everything that can be set for a run."""

    command: ClassVar[str] = "label"
    places: ClassVar = (
        *("inputs", "truth", "output", "manifest.root"),
        *("model.name", "model.labels", "model.preprocessor"),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        not_empty_inputs("inputs"),
        not_empty("truth"),
        not_empty("output"),
        not_empty("manifest.root"),
        not_empty("manifest.pattern"),
        NO_GAPS,
        Rule(
            ("retry_failed", "overwrite"),
            lambda retry_failed, overwrite: retry_failed and overwrite,
            "must be false with overwrite: true, which removes the rows to retry; use one of them",
        ),
        Rule(
            ("inference.engine", "inference.device"),
            lambda engine, device: engine == "openvino" and device not in _ON_CPU and device,
            "must be auto or torch with inference.device: {}; openvino runs on the CPU here",
        ),
        Rule(
            ("inference.precision", "inference.engine"),
            lambda precision, engine: precision == "int8" and engine == "torch",
            "must be auto, fp32, bf16 or fp16 with inference.engine: torch; int8 needs openvino",
        ),
        Rule(
            ("inference.precision", "inference.device"),
            lambda precision, device: precision == "int8" and device not in _ON_CPU and device,
            "must be auto, fp32, bf16 or fp16 with inference.device: {}; int8 is for the CPU",
        ),
    )

    inputs: Texts = ()
    truth: Place | None = None
    output: Place | None = None
    overwrite: bool = False
    retry_failed: bool = False
    limit: Count | None = None
    max_failed: Ratio = 0.05
    quiet: bool = False
    manifest: ManifestSection = ManifestSection()
    model: ModelSection = ModelSection()
    window: WindowSection = WindowSection()
    labels: LabelsSection = LabelsSection()
    embedding: EmbeddingSection = EmbeddingSection()
    inference: InferenceSection = InferenceSection()
    read: ReadSection = ReadSection()
    decode: DecodeSection = DecodeSection()
    units: UnitsSection = UnitsSection()
    beam: dict[str, BeamValue] = Field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration, fit to be written: no secrets.

        URLs are without signatures, and ``NOT_WRITTEN`` stands for Beam's keys and passwords. It
        is itself a valid YAML configuration.
        """
        plain = super().resolved()
        plain["beam"] = {name: _public_option(name, value) for name, value in self.beam.items()}
        return plain


def _public_option(name: str, value: BeamValue) -> BeamValue:
    from transforms.storage.secrets import public_text

    if _SECRET_OPTION.search(name) and not isinstance(value, bool | None):
        return NOT_WRITTEN
    if isinstance(value, list):
        return [public_text(item) if isinstance(item, str) else item for item in value]
    return public_text(value) if isinstance(value, str) else value


class TruthConfig(Config):
    """What can be set for ``earmark evaluate``: how a table of the truth is read."""

    command: ClassVar[str] = "label"  # whose default.yaml describes the keys
    places: ClassVar[tuple[str, ...]] = ("manifest.root",)

    manifest: ManifestSection = ManifestSection()


def given_inputs(config: RunConfig) -> tuple[str, ...]:
    """Return the inputs, which have no default."""
    if not config.inputs:
        raise InputError(
            "no input is given; name files, folders, globs or manifests: "
            "earmark label INPUT… --output DIR"
        )
    return config.inputs


def given_output(output: str | None) -> str:
    """Return the folder to write to, which has no default."""
    if output is None:
        raise OutputError("no output is given; name a folder: --output DIR")
    return output
