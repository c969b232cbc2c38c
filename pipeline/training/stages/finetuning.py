"""The stage that teaches labels: from a checkpoint, from scratch, or from pre-trained weights.

Optimizer, schedule and averaging are torch's own. Each epoch validates the model, and its average
if there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config.train import (
    AveragingSection,
    OptimizerSection,
    ScheduleSection,
)
from pipeline.training.data.augmentation import Augment
from pipeline.training.data.batches import Batch, BatchLoader, BatchSettings
from pipeline.training.data.dataset import ClipSet, pack_clips
from pipeline.training.stages.loop import Row
from pipeline.training.stages.masked_patches import draw_kept
from pipeline.training.stages.schedule import schedule_factor
from pipeline.training.stages.steps import (
    IF_DIVERGED,
    Precision,
    Stepper,
    autocast,
    checked_loss,
    make_optimizer,
    weighted_mean,
)
from pipeline.training.stages.validation import Scorer, Validation, parameters_are_finite, validate
from transforms.errors import TrainingError
from transforms.features.fbank import KaldiFbank
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS

Loss = Literal["cross_entropy", "binary_cross_entropy"]


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings of the stage.

    Attributes:
        learning_rate: Highest learning rate.
        trained_layers: Number of blocks at the top that learn; None for the whole model.
        precision: Precision of the forward pass; weights and loss are float32.
        validate_every: Epochs between validations; the last epoch is always validated.
        metric: Metric by which the best epoch is chosen.
    """

    epochs: int
    loss: Loss
    optimizer: OptimizerSection
    learning_rate: float
    schedule: ScheduleSection
    averaging: AveragingSection
    trained_layers: int | None
    precision: Precision
    validate_every: int
    metric: Literal["accuracy", "mean_average_precision"]


class Best(NamedTuple):
    """The best epoch by validation, counted from 1, with its metric and its validation loss."""

    epoch: int
    figure: float
    loss: float


def is_better(now: Best, before: Best | None) -> bool:
    """Return whether an epoch is the best so far: by the metric, then by the lower loss.

    With few clips the metric has few values and ties are common; the loss breaks them.
    """
    return before is None or (now.figure, -now.loss) > (before.figure, -before.loss)


def classification_loss(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Compute the loss of a batch in float32 from logits, shape (B, labels).

    ``targets`` are the share of each label, in [0, 1]; for cross-entropy each row adds up to 1.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits.float(), targets)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def freeze_all_but(model: ASTForAudioClassification, trained_layers: int | None) -> None:
    """Freeze the embeddings and all blocks but the top ``trained_layers``; the head always learns.

    The final norm learns with any block. None trains everything; 0 trains the head alone.
    """
    if trained_layers is None:
        return
    base = model.audio_spectrogram_transformer
    base.requires_grad_(False)
    if trained_layers:
        for layer in base.layers[-trained_layers:]:
            layer.requires_grad_(True)
        base.layernorm.requires_grad_(True)


class Averages:
    """The average of a model's weights that a recipe asks for, if any."""

    def __init__(self, model: ASTForAudioClassification, section: AveragingSection) -> None:
        self._section = section
        self._averaged: AveragedModel | None = None
        if section.moving_decay is not None:
            moving = get_ema_multi_avg_fn(section.moving_decay)
            self._averaged = AveragedModel(model, multi_avg_fn=moving)
        elif section.first_epoch is not None:
            self._averaged = AveragedModel(model)

    @property
    def model(self) -> ASTForAudioClassification | None:
        """Model with the averaged weights; None before there are any."""
        if self._averaged is None or not int(self._averaged.n_averaged):
            return None
        return cast(ASTForAudioClassification, self._averaged.module)

    def after_step(self, model: nn.Module) -> None:
        """Add the weights to a moving average."""
        if self._averaged is not None and self._section.moving_decay is not None:
            self._averaged.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Add the weights to a mean over epochs; ``epoch`` counts from 0."""
        first, last = self._section.first_epoch, self._section.last_epoch
        if self._averaged is None or first is None or last is None:
            return
        if first <= epoch + 1 <= last:
            self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average; empty without one."""
        return {} if self._averaged is None else self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if self._averaged is not None:
            self._averaged.load_state_dict(state)


class FinetuningStage:
    """Teaches a model the labels of clips; see the module.

    ``log_mel`` makes features that are not normalised, on the model's device.
    """

    name = "training"

    def __init__(
        self,
        model: ASTForAudioClassification,
        train: ClipSet,
        validation: ClipSet | None,
        augment: Augment,
        log_mel: KaldiFbank,
        scorer: Scorer,
        batches: BatchSettings,
        settings: FinetuningSettings,
        *,
        num_loaders: int,
    ) -> None:
        self.epochs = settings.epochs
        self.best: Best | None = None
        self.model = model
        self._validation, self._augment, self._log_mel = validation, augment, log_mel
        self._scorer, self._batches, self._settings = scorer, batches, settings
        self._loader = BatchLoader(pack_clips(train), augment, batches, num_loaders)
        freeze_all_but(model, settings.trained_layers)
        self.averages = Averages(model, settings.averaging)
        steps = self._loader.num_steps
        self._stepper = Stepper(
            model,
            make_optimizer(model, settings.optimizer, settings.learning_rate),
            lambda step: schedule_factor(settings.schedule, step, steps, settings.epochs),
            num_steps=steps * settings.epochs,
            max_gradient_norm=settings.optimizer.max_gradient_norm,
            scaled=settings.precision == "fp16",
        )

    def run_epoch(self, epoch: int, on_step: Callable[[int, int, float], None]) -> Row:
        """Run an epoch; see ``Stage.run_epoch``."""
        # Only dropout still draws from torch's own state.
        torch.manual_seed(int(self._batches.rng("weights", epoch).integers(2**63)))
        self.model.train()
        losses = [
            (self._run_step(batch, epoch, step, on_step), len(batch.lengths))
            for step, batch in enumerate(self._loader.epoch(epoch))
        ]
        self._check_weights(epoch)
        self.averages.after_epoch(self.model, epoch)
        return {
            "learning_rate": self._last_rate,
            "train_loss": weighted_mean(losses),
            **self._validate(epoch),
        }

    def _run_step(
        self, batch: Batch, epoch: int, step: int, on_step: Callable[[int, int, float], None]
    ) -> float:
        device = next(self.model.parameters()).device
        waveforms, lengths, targets = (tensor.to(device) for tensor in batch)
        rng = self._batches.rng("features", epoch, step)
        with torch.no_grad():
            features = self._augment.features(self._log_mel(waveforms, lengths), lengths, rng)
        kept = self._draw_kept(len(lengths), self._batches.rng("tokens", epoch, step))
        with autocast(device, self._settings.precision):
            logits = self.model.compute_logits(features, None if kept is None else kept.to(device))
        loss = classification_loss(logits, targets, self._settings.loss)
        self._last_rate = self._stepper.learning_rate
        value = checked_loss(loss, self.name, epoch, step, self._last_rate)
        self._stepper.step(loss)
        self.averages.after_step(self.model)
        on_step(step + 1, self._loader.num_steps, value)
        return value

    def _check_weights(self, epoch: int) -> None:
        """Refuse to save weights that a step has ruined even though its loss was finite."""
        if not parameters_are_finite(self.model):
            raise TrainingError(
                f"{self.name} has made weights NaN or infinite by the end of epoch {epoch + 1}, at "
                f"a learning rate of {self._last_rate:.3g}; expected finite numbers. {IF_DIVERGED}"
            )

    def _draw_kept(self, batch_size: int, rng: np.random.Generator) -> Tensor | None:
        ratio = self._augment.section.patch_drop
        if not ratio:
            return None
        num_patches = self.model.config.num_tokens - NUM_PREFIX_TOKENS
        return draw_kept(batch_size, num_patches, ratio, rng)

    def _validate(self, epoch: int) -> Row:
        is_due = (epoch + 1) % self._settings.validate_every == 0 or epoch + 1 == self.epochs
        if self._validation is None or not is_due:
            return {}
        validation = validate(self.model, self._validation, self._scorer)
        figures = _figures(validation, "validation")
        figure = getattr(validation.metrics, self._settings.metric)
        if figure is not None:
            now = Best(epoch + 1, figure, validation.loss)
            self.best = now if is_better(now, self.best) else self.best
        averaged = self.averages.model
        if averaged is not None:
            figures |= _figures(validate(averaged, self._validation, self._scorer), "averaged")
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return the state; see ``Stage.state_dict``."""
        return {
            "model": self.model.state_dict(),
            "stepper": self._stepper.state_dict(),
            "averages": self.averages.state_dict(),
            "best": None if self.best is None else tuple(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; see ``Stage.load_state_dict``."""
        self.model.load_state_dict(state["model"])
        self._stepper.load_state_dict(state["stepper"])
        self.averages.load_state_dict(state["averages"])
        self.best = None if state["best"] is None else Best(*state["best"])


def _figures(validation: Validation, whose: str) -> Row:
    return {
        f"{whose}_loss": validation.loss,
        f"{whose}_accuracy": validation.metrics.accuracy,
        f"{whose}_mean_average_precision": validation.metrics.mean_average_precision,
    }


def copy_for_saving(model: ASTForAudioClassification) -> ASTForAudioClassification:
    """Return a copy of the model on the CPU, in evaluation mode."""
    return copy.deepcopy(model).cpu().eval()
