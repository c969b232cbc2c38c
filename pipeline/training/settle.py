"""What a training decides once its clips are known: its head, batches and epochs; and its start.

Small sets need small batches: 60 clips make two batches of 48, and a new head learns little in a
few dozen steps. A checkpoint that knows the labels of the clips keeps its head. It is measured
on the validation clips before the first step, so that a training that makes it worse is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pipeline.config.train import MIN_EPOCHS, TrainConfig, TrainingSection
from pipeline.terminal.wording import counted
from pipeline.training.data.dataset import ClipSet
from pipeline.training.history import METRIC_NAMES
from pipeline.training.initial import Initial, build_model
from pipeline.training.stages.finetuning import Best
from pipeline.training.stages.loop import Row
from pipeline.training.stages.validation import Scorer, validate
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.labels import find_label, labels_from_names

# Batches that are chosen, the largest first that makes enough steps an epoch.
_BATCH_SIZES = (48, 32, 16, 8)
_MIN_STEPS_PER_EPOCH = 8
# Optimizer steps in all: as many are chosen at least, and fewer than the second are warned about.
_CHOSEN_STEPS = 200
_FEW_STEPS = 100


# --- Batches and epochs --------------------------------------------------------------------


class Settled(NamedTuple):
    """The settings of ``training`` that depend on the clips."""

    batch_size: int
    epochs: int
    head: Literal["keep", "new"]

    def put_into(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with these settings."""
        training = config.training.model_copy(update=self._asdict())
        return config.model_copy(update={"training": training})

    def num_steps(self, num_clips: int) -> int:
        """Return the optimizer steps of all epochs."""
        return _steps(num_clips, self.batch_size) * self.epochs


def settle_training(
    training: TrainingSection, num_clips: int, *, keeps_head: bool, epochs_before: int | None
) -> Settled:
    """Choose what the section leaves open.

    ``num_clips`` are trained on. ``epochs_before`` is what an earlier run of this training had.
    """
    batch_size = training.batch_size or next(
        (size for size in _BATCH_SIZES if _steps(num_clips, size) >= _MIN_STEPS_PER_EPOCH),
        _BATCH_SIZES[-1],
    )
    epochs = training.epochs or epochs_before or _enough_epochs(num_clips, batch_size)
    return Settled(batch_size, epochs, "keep" if keeps_head else "new")


def _steps(num_clips: int, batch_size: int) -> int:
    return -(-num_clips // batch_size)  # rounded up


def _enough_epochs(num_clips: int, batch_size: int) -> int:
    return max(MIN_EPOCHS, -(-_CHOSEN_STEPS // _steps(num_clips, batch_size)))  # rounded up


def describe_steps(settled: Settled, num_clips: int) -> str:
    """Say how many steps the clips make, in a line."""
    return (
        f"Batches of {settled.batch_size}: "
        f"{counted(_steps(num_clips, settled.batch_size), 'step')} an epoch, "
        f"{counted(settled.num_steps(num_clips), 'step')} in {counted(settled.epochs, 'epoch')}."
    )


def warn_of_few_steps(settled: Settled, num_clips: int) -> list[str]:
    """Warn of a training too short to learn much: a line, or none."""
    num_steps = settled.num_steps(num_clips)
    if num_steps >= _FEW_STEPS:
        return []
    smaller = min(settled.batch_size, _BATCH_SIZES[-1])
    return [
        f"{counted(num_steps, 'optimizer step')} in all are few to learn from. For more: "
        f"--batch-size {smaller} --epochs {_enough_epochs(num_clips, smaller)}."
    ]


# --- The head ------------------------------------------------------------------------------


class Head(NamedTuple):
    """Whether the checkpoint's head is kept, and what to say of it; empty if nothing."""

    is_kept: bool
    note: str = ""


def settle_head(config: TrainConfig, initial: Initial, texts: Sequence[str]) -> Head:
    """Decide about the checkpoint's head; ``texts`` are the labels of all clips to learn from."""
    asked, own = config.training.head, initial.labels
    if asked == "keep":
        return Head(True)
    if initial.kind != "checkpoint" or not own:
        return Head(False)
    wanted = initial.wanted_labels
    labels = labels_from_names(own)
    known = {find_label(text, labels) for text in texts}
    if wanted is None:
        is_same, is_part = known == set(range(len(own))), None not in known
    else:
        is_same, is_part = wanted == own, False
    if asked == "auto" and is_same:
        return Head(
            True,
            f"The labels are those of {initial.name}, whose head is kept; for a new one: --set "
            "training.head=new.",
        )
    if asked == "auto" and is_part and texts:
        return Head(
            False,
            f"A new head is trained, although {initial.name} knows all of these labels; to keep "
            "its own: --set training.head=keep.",
        )
    return Head(False)


# --- The start -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """How well the checkpoint itself does on the validation clips.

    Attributes:
        figures: Accuracy, mean average precision and loss.
        is_kept: Whether the training starts with this very model, head included.
    """

    figures: Mapping[str, float | None]
    is_kept: bool

    def as_best(self, metric: str) -> Best | None:
        """Return the start as epoch 0, for epochs to be compared with; None if it is not one."""
        figure, loss = self.figures[metric], self.figures["loss"]
        if not self.is_kept or figure is None or loss is None:
            return None
        return Best(0, figure, loss)


def measure_start(
    config: TrainConfig,
    initial: Initial,
    model: ASTForAudioClassification,
    clips: ClipSet | None,
    scorer: Scorer,
) -> Start | None:
    """Measure the checkpoint with its own head on the validation clips.

    ``model`` has not been trained yet. None without such clips, without a checkpoint, or if it does
    not know all of the labels.
    """
    if clips is None or initial.kind != "checkpoint":
        return None
    if config.training.head == "keep":
        return Start(_figures(model, clips, scorer), is_kept=True)
    labels = labels_from_names(initial.labels)
    columns = [
        index for name in clips.label_names if (index := find_label(name, labels)) is not None
    ]
    if len(columns) < len(clips.label_names):
        return None
    own = build_model(initial, initial.labels, config.training.loss, 0, keeps_head=True)
    own = own.to(next(model.parameters()).device)
    return Start(_figures(own, clips, scorer, columns), is_kept=False)


def _figures(
    model: ASTForAudioClassification,
    clips: ClipSet,
    scorer: Scorer,
    columns: Sequence[int] | None = None,
) -> dict[str, float | None]:
    metrics, loss = validate(model, clips, scorer, columns)
    return {
        "accuracy": metrics.accuracy,
        "mean_average_precision": metrics.mean_average_precision,
        "loss": loss,
    }


def describe_start(config: TrainConfig, start: Start, num_clips: int) -> str:
    """Say how well the checkpoint does before training, in a line."""
    metric = config.training.metric
    return (
        f"Before training: {METRIC_NAMES[metric]} {_number(start.figures[metric])}, loss "
        f"{_number(start.figures['loss'])} on {counted(num_clips, 'validation clip')}."
    )


# --- The end -------------------------------------------------------------------------------


def warn_of_result(
    config: TrainConfig, start: Start | None, best: Best | None, last: Row, learning_rate: float
) -> list[str]:
    """Warn of a model that is worse than the start, or not trained to its best; no line if fine.

    ``last`` are the figures of the last epoch.
    """
    training = config.training
    metric = training.metric
    name = METRIC_NAMES[metric]
    lower = f"--learning-rate {learning_rate / 3:.1g}"
    whose = "averaged" if training.keep == "averaged" else "validation"
    after: Any = best.figure if training.keep == "best" and best else last.get(f"{whose}_{metric}")
    before = None if start is None else start.figures[metric]
    if training.keep == "best" and best is not None and best.epoch == 0:
        return [
            "No epoch was better than the start, so the model is the one that training began with. "
            f"Try smaller steps ({lower}), fewer layers (--set training.trained_layers=1), or more "
            "clips."
        ]
    if before is not None and after is not None and after < before:
        head = "" if training.head == "keep" else " --set training.head=keep, or"
        return [
            f"Training has made the model worse: validation {name} was {before:.4f} before and is "
            f"{after:.4f} after it, on the same clips. Keep using the model that it began with, or "
            f"try{head} {lower}, or --set training.keep=best."
        ]
    if best is not None and best.epoch == last["epoch"]:
        return [
            "The best epoch is the last one, so more may be better: "
            f"--epochs {2 * best.epoch} extends "
            "this training."
        ]
    return []


def _number(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"
