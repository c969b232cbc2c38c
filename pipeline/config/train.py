"""The configuration of ``earmark train``.

``configs/train/default.yaml`` says what each key means, with its unit and default. The sections are
themselves the settings that ``pipeline.training`` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pipeline.config.label import (
    CheckpointSection,
    DecodeSection,
    ManifestSection,
    ReadSection,
    TruthSection,
    WindowSection,
)
from pipeline.config.schema import (
    NO_GAPS,
    Config,
    Count,
    CountOrZero,
    NotNegative,
    Place,
    Positive,
    Ratio,
    Rule,
    Section,
    Texts,
    not_empty,
    not_empty_inputs,
)
from transforms.errors import InputError

# Shape of a model that has none of its own: AST's for AudioSet, with patches side by side.
SHAPE_FROM_SCRATCH = {
    "frequency_stride": 16,
    "time_stride": 16,
    "max_length": 1024,
    "num_mel_bins": 128,
}

# Epochs at least, where none are given.
MIN_EPOCHS = 25

# Keys of ``model`` that are for checkpoints only, and keys of ``architecture`` that are not.
_ONLY_OF_A_CHECKPOINT = ("num_attention_heads", "layer_norm_eps", "head_layer_norm_eps")
_ONLY_FROM_SCRATCH = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "patch_size",
)


def _as_betas(value: object) -> object:
    """Return two numbers in [0, 1) as a tuple; YAML has lists."""
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    are_numbers = all(type(number) in (int, float) for number in numbers)
    if len(numbers) != 2 or not are_numbers or not all(0 <= number < 1 for number in numbers):
        raise PydanticCustomError("betas", "a list of two numbers in [0, 1), like [0.95, 0.999]")
    return numbers


Share = Annotated[float, Field(ge=0, lt=1)]  # of which something must be left
Fraction = Annotated[float, Field(gt=0, lt=1)]
Betas = Annotated[tuple[float, float], BeforeValidator(_as_betas)]


class ArchitectureSection(Section):
    """The shape of a model from scratch; dropout is of any model."""

    hidden_size: Count = 192
    num_hidden_layers: Count = 6
    num_attention_heads: Count = 3
    intermediate_size: Count | None = None
    patch_size: Count = 16
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0


class TrainingSection(Section):
    """How long, on what, towards what."""

    epochs: Count | None = None
    batch_size: Count | None = None
    seed: CountOrZero = 0
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    metric: Literal["accuracy", "mean_average_precision"] = "accuracy"
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    head: Literal["auto", "new", "keep"] = "auto"
    trained_layers: CountOrZero | None = None
    keep: Literal["best", "averaged", "last"] = "best"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    saved_dtype: Literal["float32", "float16"] = "float32"
    validate_every: Count = 1
    loader_processes: CountOrZero | None = None


class OptimizerSection(Section):
    """How weights are changed."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: Positive | None = None
    betas: Betas = (0.95, 0.999)
    weight_decay: NotNegative = 5e-7
    max_gradient_norm: Positive | None = None


class ScheduleSection(Section):
    """What the learning rate is multiplied by, step for step."""

    kind: Literal["multistep", "cosine"] = "multistep"
    warmup_steps: CountOrZero = 0
    warmup_interval: Count = 50
    decay_start_epoch: Count = 5
    decay_every_epochs: Count = 1
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.85


class AugmentationSection(Section):
    """What is done to clips in training, differently each time."""

    mixup_ratio: Ratio = 0.0
    mixup_beta: Positive = 10.0
    masked_mels: CountOrZero = 0
    masked_frames: CountOrZero = 0
    feature_noise: NotNegative = 0.0
    shift_frames: CountOrZero = 0
    circular_shift: bool = False
    gain_db: NotNegative = 0.0
    speed: Share = 0.0
    equalizer_db: NotNegative = 0.0
    invert: bool = False
    patch_drop: Share = 0.0


class AveragingSection(Section):
    """Weights that are a mean over the training; epochs count from 1."""

    first_epoch: Count | None = None
    last_epoch: Count | None = None
    moving_decay: Fraction | None = None


class PretrainingSection(Section):
    """Training without labels beforehand: hidden patches are to be guessed from the others."""

    epochs: CountOrZero = 0
    masked_ratio: Fraction = 0.7
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    batch_size: Count = 32
    warmup_epochs: CountOrZero = 10
    decoder_width: Count = 96
    decoder_layers: Count = 2


class CacheSection(Section):
    """Where clips lie once they are decoded."""

    folder: Place | None = None
    dtype: Literal["float32", "int16"] = "float32"


def split_hold_out(hold_out: str) -> tuple[str, str]:
    """Return the column and the value of ``COLUMN=VALUE``; what the text lacks is empty."""
    column, _, value = hold_out.partition("=")
    return column.strip(), value.strip()


def _must_be_default(
    key: str, section: type[Section], decider: str, applies: Callable[[Any], bool], why: str
) -> Rule:
    """Return the rule that a key keeps its default where another key makes it useless."""
    default = section.model_fields[key.partition(".")[2]].default
    return Rule(
        (key, decider),
        lambda value, decided: not applies(decided) and value != default and decided,
        f"must be {'null' if default is None else default}, its default, with {decider}: {{}}{why}",
    )


class TrainConfig(Config):
    """Everything that can be set for a training."""

    command: ClassVar[str] = "train"
    places: ClassVar[tuple[str, ...]] = (
        *("train", "validation", "output", "cache.folder", "manifest.root"),
        *("model.name", "model.labels", "model.preprocessor"),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        not_empty_inputs("train"),
        not_empty_inputs("validation"),
        not_empty("output"),
        not_empty("cache.folder"),
        not_empty("manifest.root"),
        not_empty("manifest.pattern"),
        Rule(
            ("cache.folder",),
            lambda folder: folder and "://" in folder and not folder.startswith("file://"),
            "must be a local folder: samples are read from it at random all the time",
        ),
        Rule(
            ("hold_out",),
            lambda hold_out: hold_out is not None and not all(split_hold_out(hold_out)),
            "must be COLUMN=VALUE, like fold=1: a column of the inputs, and what it says of the "
            "clips",
        ),
        Rule(
            ("hold_out", "validation"),
            lambda hold_out, validation: hold_out is not None and validation,
            "must be null with validation, which names other clips to measure with; use one of "
            "them",
        ),
        Rule(
            ("training.keep", "train", "validation", "hold_out"),
            lambda keep, train, validation, hold_out: (
                keep == "best" and train and not validation and hold_out is None
            ),
            "needs clips to measure each epoch with: give --validation INPUT or --hold-out "
            "COLUMN=VALUE; without them, use --set training.keep=last",
        ),
        Rule(
            ("training.keep", "averaging.first_epoch", "averaging.moving_decay"),
            lambda keep, first_epoch, moving_decay: (
                keep == "averaged" and first_epoch is None and moving_decay is None
            ),
            "needs to know what to average: averaging.first_epoch and averaging.last_epoch, or "
            "averaging.moving_decay",
        ),
        Rule(
            ("training.head", "model.name"),
            lambda head, name: head == "keep" and name is None,
            "must be auto or new without model.name: a model from scratch has no head to keep",
        ),
        Rule(
            ("training.trained_layers", "model.name"),
            lambda trained_layers, name: trained_layers is not None and name is None,
            "must be null without model.name: the other layers would stay as they were drawn",
        ),
        Rule(
            ("training.trained_layers", "pretraining.epochs"),
            lambda trained_layers, epochs: trained_layers is not None and epochs,
            "must be null with pretraining.epochs: pretraining changes every layer",
        ),
        Rule(
            ("training.precision", "training.device"),
            lambda precision, device: precision == "fp16" and device == "cpu",
            "must be auto, fp32 or bf16 with training.device: cpu",
        ),
        *(
            Rule(
                (f"model.{key}", "model.name"),
                lambda value, name: value is not None and name is None,
                "must be null without model.name: it is for checkpoints that do not say it; the "
                "shape of a model from scratch is in architecture",
            )
            for key in _ONLY_OF_A_CHECKPOINT
        ),
        *(
            _must_be_default(
                f"architecture.{key}",
                ArchitectureSection,
                "model.name",
                lambda name: name is None,
                "; the architecture is that checkpoint's own",
            )
            for key in _ONLY_FROM_SCRATCH
        ),
        Rule(
            ("architecture.num_attention_heads", "architecture.hidden_size", "model.name"),
            lambda heads, hidden_size, name: name is None and hidden_size % heads and hidden_size,
            "must divide {} (architecture.hidden_size)",
        ),
        *(
            Rule(
                ("architecture.patch_size", f"model.{key}", "model.name"),
                lambda patch, size, name, of_scratch=SHAPE_FROM_SCRATCH[key]: (
                    name is None and patch > (size or of_scratch) and (size or of_scratch)
                ),
                "must be at most {}, or no patch fits into the model's input",
            )
            for key in ("num_mel_bins", "max_length")
        ),
        *(
            Rule(
                (f"augmentation.{mask}", f"model.{key}", "model.name"),
                # What a checkpoint takes is not known here.
                lambda masked, size, name, of_scratch=SHAPE_FROM_SCRATCH[key]: (
                    (limit := size or (name is None and of_scratch)) and masked > limit and limit
                ),
                "must be at most {}, which is all that the model takes",
            )
            for mask, key in (("masked_mels", "num_mel_bins"), ("masked_frames", "max_length"))
        ),
        *(
            Rule(
                (f"averaging.{missing}", f"averaging.{given}"),
                lambda missing, given: missing is None and given,
                "must be given as well: averaging ends at one epoch, and the other is {}",
            )
            for missing, given in itertools.permutations(("first_epoch", "last_epoch"))
        ),
        Rule(
            ("averaging.first_epoch", "averaging.last_epoch"),
            lambda first, last: None not in (first, last) and first > last and last,
            "must be at most {} (averaging.last_epoch)",
        ),
        Rule(
            ("averaging.last_epoch", "training.epochs"),
            # Without a number of epochs there are at least MIN_EPOCHS.
            lambda last_epoch, epochs: (
                last_epoch and last_epoch > (epochs or MIN_EPOCHS) and (epochs or MIN_EPOCHS)
            ),
            "must be at most {} (training.epochs)",
        ),
        Rule(
            ("averaging.moving_decay", "averaging.first_epoch"),
            lambda moving_decay, first_epoch: None not in (moving_decay, first_epoch),
            "must be null with averaging.first_epoch; there is one average: use one of them",
        ),
        Rule(
            ("schedule.warmup_interval", "schedule.warmup_steps"),
            lambda interval, steps: interval > steps and steps,
            "must be at most {} (schedule.warmup_steps), else the rate stays 0 so long",
        ),
        *(
            _must_be_default(
                f"schedule.{key}",
                ScheduleSection,
                "schedule.kind",
                lambda kind: kind == "multistep",
                ", which has no steps",
            )
            for key in ("decay_start_epoch", "decay_every_epochs", "decay_factor")
        ),
        Rule(
            ("pretraining.warmup_epochs", "pretraining.epochs"),
            lambda warmup_epochs, epochs: warmup_epochs >= epochs and epochs,
            "must be less than {} (pretraining.epochs)",
        ),
        Rule(
            ("decode.channel",),
            lambda channel: channel == "each",
            "must be mix, first, loudest or a number: a clip is one example; to learn from every "
            "channel, write each into a file of its own",
        ),
        NO_GAPS,
    )

    train: Texts = ()
    validation: Texts = ()
    hold_out: str | None = None
    output: Place | None = None
    overwrite: bool = False
    limit: Count | None = None
    max_failed: Ratio = 0.05
    quiet: bool = False
    manifest: ManifestSection = ManifestSection()
    labels: TruthSection = TruthSection()
    model: CheckpointSection = CheckpointSection()  # without a name, from scratch
    architecture: ArchitectureSection = ArchitectureSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    augmentation: AugmentationSection = AugmentationSection()
    averaging: AveragingSection = AveragingSection()
    pretraining: PretrainingSection = PretrainingSection()
    window: WindowSection = WindowSection()
    read: ReadSection = ReadSection()
    decode: DecodeSection = DecodeSection()
    cache: CacheSection = CacheSection()


def given_train(config: TrainConfig) -> tuple[str, ...]:
    """Return the inputs to learn from, which have no default."""
    if not config.train:
        raise InputError(
            "nothing to learn from is given; name folders, tars, Parquet files or manifests with "
            "labels: earmark train --train INPUT --output DIR"
        )
    return config.train
