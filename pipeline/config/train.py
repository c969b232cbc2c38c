"""The configuration of ``earmark train``.

``configs/train/default.yaml`` says what each key means, with its unit and default. The sections are
themselves the settings that ``pipeline.training`` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pipeline.config.label import CheckpointSection, DecodeSection, ReadSection, WindowSection
from pipeline.config.schema import (
    Config,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Ratio,
    Rule,
    Section,
    Texts,
    empty_input,
    empty_output,
    hop_leaves_gaps,
)
from transforms.errors import InputError

# Of a model from scratch, where ``model`` does not say otherwise.
SCRATCH_STRIDE = 16
SCRATCH_NUM_FRAMES = 1024
SCRATCH_NUM_MEL_BINS = 128

# Keys of ``model`` that are for checkpoints only, and keys of ``architecture`` that are not.
FACTS_OF_A_CHECKPOINT = ("num_attention_heads", "layer_norm_eps", "head_layer_norm_eps")
SHAPE_FROM_SCRATCH = (
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

    epochs: Count = 25
    batch_size: Count = 48
    seed: CountOrZero = 0
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    metric: Literal["accuracy", "mean_average_precision"] = "accuracy"
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    head: Literal["new", "keep"] = "new"
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

    folder: str | None = None
    dtype: Literal["float32", "int16"] = "float32"


def split_hold_out(hold_out: str) -> tuple[str, str]:
    """Return the column and the value of ``COLUMN=VALUE``; what the text lacks is empty."""
    column, _, value = hold_out.partition("=")
    return column.strip(), value.strip()


def _hold_out_is_no_pair(hold_out: str | None) -> str | None:
    if hold_out is None or all(split_hold_out(hold_out)):
        return None
    return (
        "must be COLUMN=VALUE, like fold=1: a column of the inputs, and what it says of the clips"
    )


def _two_validations(hold_out: str | None, validation: Sequence[str]) -> str | None:
    if hold_out is None or not validation:
        return None
    return "must be null with validation, which names other clips to measure with; use one of them"


def _best_of_nothing(
    keep: str, train: Sequence[str], validation: Sequence[str], hold_out: str | None
) -> str | None:
    if keep != "best" or validation or hold_out is not None or not train:
        return None
    return (
        "needs clips to measure each epoch with: give --validation INPUT or --hold-out "
        "COLUMN=VALUE; without them, use --set training.keep=last"
    )


def _average_of_nothing(
    keep: str, first_epoch: int | None, moving_decay: float | None
) -> str | None:
    if keep != "averaged" or first_epoch is not None or moving_decay is not None:
        return None
    return (
        "needs to know what to average: averaging.first_epoch and averaging.last_epoch, or "
        "averaging.moving_decay"
    )


def _other_end_missing(end: int | None, other: int | None) -> str | None:
    if end is not None or other is None:
        return None
    return f"must be given as well: averaging ends at one epoch, and the other is {other}"


def _ends_before_it_begins(first_epoch: int | None, last_epoch: int | None) -> str | None:
    if first_epoch is None or last_epoch is None or first_epoch <= last_epoch:
        return None
    return f"must be at most {last_epoch} (averaging.last_epoch)"


def _ends_after_the_training(last_epoch: int | None, epochs: int) -> str | None:
    if last_epoch is None or last_epoch <= epochs:
        return None
    return f"must be at most {epochs} (training.epochs)"


def _two_averages(moving_decay: float | None, first_epoch: int | None) -> str | None:
    if moving_decay is None or first_epoch is None:
        return None
    return "must be null with averaging.first_epoch; there is one average: use one of them"


def _head_of_nothing(head: str, name: str | None) -> str | None:
    if head != "keep" or name is not None:
        return None
    return "must be new without model.name: a model from scratch has no head to keep"


def _layers_never_trained(
    trained_layers: int | None, name: str | None, pretraining_epochs: int
) -> str | None:
    if trained_layers is None or (name is not None and not pretraining_epochs):
        return None
    why = (
        "the other layers would stay as they were drawn"
        if name is None
        else "pretraining changes every layer"
    )
    return f"must be null without model.name, and with pretraining.epochs: {why}"


def _fact_of_a_checkpoint(key: str) -> Rule:
    """Return the rule that what a checkpoint may lack is not set where there is none."""

    def broken(value: object, name: str | None) -> str | None:
        if value is None or name is not None:
            return None
        return (
            "must be null without model.name: it is for checkpoints that do not say it; the shape "
            "of a model from scratch is in architecture"
        )

    return Rule((f"model.{key}", "model.name"), broken)


def _unused_architecture(key: str) -> Rule:
    """Return the rule that the shape of a checkpoint is its own."""
    default = ArchitectureSection.model_fields[key].default

    def broken(value: object, name: str | None) -> str | None:
        if name is None or value == default:
            return None
        shown = "null" if default is None else default
        return (
            f"must be {shown}, its default, with model.name: {name}; the architecture is that "
            "checkpoint's own"
        )

    return Rule((f"architecture.{key}", "model.name"), broken)


def _unused_decay(key: str) -> Rule:
    """Return the rule that nothing is set for steps where there are none."""
    default = ScheduleSection.model_fields[key].default

    def broken(value: object, kind: str) -> str | None:
        if kind == "multistep" or value == default:
            return None
        return f"must be {default}, its default, with schedule.kind: {kind}, which has no steps"

    return Rule((f"schedule.{key}", "schedule.kind"), broken)


def _heads_do_not_divide(
    num_attention_heads: int, hidden_size: int, name: str | None
) -> str | None:
    if name is not None or hidden_size % num_attention_heads == 0:
        return None
    return f"must divide {hidden_size} (architecture.hidden_size)"


def _smaller_than_a_patch(scratch_size: int) -> Callable[..., str | None]:
    """Return a rule's function: a model from scratch has room for at least one patch."""

    def broken(patch_size: int, size: int | None, name: str | None) -> str | None:
        limit = scratch_size if size is None else size
        if name is not None or patch_size <= limit:
            return None
        return f"must be at most {limit}, or no patch fits into the model's input"

    return broken


def _mask_covers_everything(scratch_size: int) -> Callable[..., str | None]:
    """Return a rule's function: a mask fits into what the model takes, where that is known."""

    def broken(masked: int, size: int | None, name: str | None) -> str | None:
        limit = scratch_size if size is None and name is None else size
        if limit is None or masked <= limit:
            return None
        return f"must be at most {limit}, which is all that the model takes"

    return broken


def _warms_up_in_one_go(warmup_interval: int, warmup_steps: int) -> str | None:
    if warmup_steps == 0 or warmup_interval <= warmup_steps:
        return None
    return f"must be at most {warmup_steps} (schedule.warmup_steps), else the rate stays 0 so long"


def _never_warm(warmup_epochs: int, epochs: int) -> str | None:
    if epochs == 0 or warmup_epochs < epochs:
        return None
    return f"must be less than {epochs} (pretraining.epochs)"


def _half_on_the_cpu(precision: str, device: str) -> str | None:
    if precision != "fp16" or device != "cpu":
        return None
    return "must be auto, fp32 or bf16 with training.device: cpu"


def _not_a_local_folder(folder: str | None) -> str | None:
    if folder is None or "://" not in folder or folder.startswith("file://"):
        return None
    return "must be a local folder: samples are read from it at random all the time"


class TrainConfig(Config):
    """Everything that can be set for a training."""

    command: ClassVar[str] = "train"
    places: ClassVar[tuple[str, ...]] = (
        *("train", "validation", "output", "cache.folder"),
        *("model.name", "model.labels", "model.preprocessor"),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(("train",), empty_input),
        Rule(("validation",), empty_input),
        Rule(("output",), empty_output),
        Rule(("cache.folder",), empty_output),
        Rule(("cache.folder",), _not_a_local_folder),
        Rule(("hold_out",), _hold_out_is_no_pair),
        Rule(("hold_out", "validation"), _two_validations),
        Rule(("training.keep", "train", "validation", "hold_out"), _best_of_nothing),
        Rule(
            ("training.keep", "averaging.first_epoch", "averaging.moving_decay"),
            _average_of_nothing,
        ),
        Rule(("training.head", "model.name"), _head_of_nothing),
        Rule(
            ("training.trained_layers", "model.name", "pretraining.epochs"), _layers_never_trained
        ),
        Rule(("training.precision", "training.device"), _half_on_the_cpu),
        *map(_fact_of_a_checkpoint, FACTS_OF_A_CHECKPOINT),
        *map(_unused_architecture, SHAPE_FROM_SCRATCH),
        Rule(
            ("architecture.num_attention_heads", "architecture.hidden_size", "model.name"),
            _heads_do_not_divide,
        ),
        Rule(
            ("architecture.patch_size", "model.num_mel_bins", "model.name"),
            _smaller_than_a_patch(SCRATCH_NUM_MEL_BINS),
        ),
        Rule(
            ("architecture.patch_size", "model.max_length", "model.name"),
            _smaller_than_a_patch(SCRATCH_NUM_FRAMES),
        ),
        Rule(
            ("augmentation.masked_mels", "model.num_mel_bins", "model.name"),
            _mask_covers_everything(SCRATCH_NUM_MEL_BINS),
        ),
        Rule(
            ("augmentation.masked_frames", "model.max_length", "model.name"),
            _mask_covers_everything(SCRATCH_NUM_FRAMES),
        ),
        Rule(("averaging.first_epoch", "averaging.last_epoch"), _other_end_missing),
        Rule(("averaging.last_epoch", "averaging.first_epoch"), _other_end_missing),
        Rule(("averaging.first_epoch", "averaging.last_epoch"), _ends_before_it_begins),
        Rule(("averaging.last_epoch", "training.epochs"), _ends_after_the_training),
        Rule(("averaging.moving_decay", "averaging.first_epoch"), _two_averages),
        Rule(("schedule.warmup_interval", "schedule.warmup_steps"), _warms_up_in_one_go),
        *map(_unused_decay, ("decay_start_epoch", "decay_every_epochs", "decay_factor")),
        Rule(("pretraining.warmup_epochs", "pretraining.epochs"), _never_warm),
        Rule(("window.hop_s", "window.length_s"), hop_leaves_gaps),
    )

    train: Texts = ()
    validation: Texts = ()
    hold_out: str | None = None
    output: str | None = None
    overwrite: bool = False
    limit: Count | None = None
    max_failed: Ratio = 0.05
    quiet: bool = False
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
