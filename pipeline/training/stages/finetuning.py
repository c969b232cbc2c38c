"""The stage that teaches labels: from a checkpoint, from scratch, or from pre-trained weights.

Optimizer, schedule and averaging are torch's own. Each epoch validates the model, and its average
if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config.train import AveragingSection, TrainConfig
from pipeline.training.data.dataset import ClipSet
from pipeline.training.stages.loop import Row
from pipeline.training.stages.schedule import schedule_factor
from pipeline.training.stages.steps import (
    IF_DIVERGED,
    InputLoader,
    Precision,
    Stepper,
    autocast,
    make_optimizer,
    weighted_mean,
)
from pipeline.training.stages.validation import Scorer, Validation, validate
from transforms.errors import TrainingError
from transforms.models.ast.model import ASTForAudioClassification


class Best(NamedTuple):
    """The best epoch by validation, from 1, with its metric and validation loss; 0 is the start."""

    epoch: int
    figure: float
    loss: float


def is_better(now: Best, before: Best | None) -> bool:
    """Return whether an epoch is the best so far: by the metric, then by the lower loss.

    With few clips the metric has few values and ties are common; the loss breaks them.
    """
    return before is None or (now.figure, -now.loss) > (before.figure, -before.loss)


def classification_loss(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Compute the loss of a batch in float32 from logits, shape (B, labels).

    ``targets`` are the share of each label, in [0, 1]; for ``cross_entropy`` each row adds up to 1.
    Any other ``loss`` is binary cross-entropy.
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

    ``learning_rate`` is the highest. ``precision`` is that of the forward pass; weights and loss
    are float32.
    """

    name = "training"

    def __init__(
        self,
        model: ASTForAudioClassification,
        inputs: InputLoader,
        validation: ClipSet | None,
        scorer: Scorer,
        config: TrainConfig,
        epochs: int,
        learning_rate: float,
        precision: Precision,
    ) -> None:
        self._settings = config.training
        self.epochs = epochs
        self.best: Best | None = None
        self.model = model
        self._inputs, self.validation, self.scorer = inputs, validation, scorer
        self._precision, self._patch_drop = precision, config.augmentation.patch_drop
        freeze_all_but(model, config.training.trained_layers)
        self.averages = Averages(model, config.averaging)
        self._stepper = Stepper(
            self.name,
            model,
            make_optimizer(model, config.optimizer, learning_rate),
            lambda step: schedule_factor(config.schedule, step, inputs.num_steps, self.epochs),
            max_gradient_norm=config.optimizer.max_gradient_norm,
            scaled=precision == "fp16",
        )

    def run_epoch(self, epoch: int, on_step: Callable[[int, int, float], None]) -> Row:
        """Run an epoch; see ``Stage.run_epoch``."""
        # Only dropout still draws from torch's own state.
        torch.manual_seed(int(self._inputs.rng("weights", epoch).integers(2**63)))
        self.model.train()
        losses = []
        for step, (features, targets) in enumerate(self._inputs.epoch(epoch)):
            kept = None
            if self._patch_drop:
                kept = self._inputs.draw_kept(len(targets), self._patch_drop, epoch, step)
            with autocast(features.device, self._precision):
                logits = self.model.compute_logits(features, kept)
            loss = classification_loss(logits, targets, self._settings.loss)
            learning_rate = self._stepper.learning_rate
            value = self._stepper.step(loss, epoch, step)
            self.averages.after_step(self.model)
            losses.append((value, len(targets)))
            on_step(step + 1, self._inputs.num_steps, value)
        # A step may ruin the weights even though its loss was finite; these are not saved.
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            raise TrainingError(
                f"{self.name} has made weights NaN or infinite by the end of epoch {epoch + 1}, at "
                f"a learning rate of {learning_rate:.3g}; expected finite numbers. {IF_DIVERGED}"
            )
        self.averages.after_epoch(self.model, epoch)
        return {
            "learning_rate": learning_rate,
            "train_loss": weighted_mean(losses),
            **self._validate(epoch),
        }

    def _validate(self, epoch: int) -> Row:
        is_due = (epoch + 1) % self._settings.validate_every == 0 or epoch + 1 == self.epochs
        if self.validation is None or not is_due:
            return {}
        validation = validate(self.model, self.validation, self.scorer)
        figures = _figures(validation, "validation")
        figure = getattr(validation.metrics, self._settings.metric)
        if figure is not None:
            now = Best(epoch + 1, figure, validation.loss)
            self.best = now if is_better(now, self.best) else self.best
        averaged = self.averages.model
        if averaged is not None:
            figures |= _figures(validate(averaged, self.validation, self.scorer), "averaged")
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
