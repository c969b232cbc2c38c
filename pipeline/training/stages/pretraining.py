"""The stage before labels: predict hidden patches of the training clips."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pipeline.config.train import OptimizerSection, PretrainingSection, ScheduleSection
from pipeline.training.data.augmentation import Augment
from pipeline.training.stages.loop import Row
from pipeline.training.stages.masked_patches import MaskedPatchDecoder, masked_patch_loss
from pipeline.training.stages.schedule import schedule_factor
from pipeline.training.stages.steps import (
    InputLoader,
    Precision,
    Stepper,
    autocast,
    make_optimizer,
    weighted_mean,
)
from transforms.models.ast.model import ASTAttention, ASTForAudioClassification

# He et al. 2021, arXiv:2111.06377, table 8.
_BETAS = (0.9, 0.95)
_MAX_GRADIENT_NORM = 1.0


def predictable(augment: Augment) -> Augment:
    """Leave out what masks, which would hide twice, and noise, which cannot be predicted."""
    clean = {"masked_mels": 0, "masked_frames": 0, "feature_noise": 0.0}
    return dataclasses.replace(augment, section=augment.section.model_copy(update=clean))


class PretrainingStage:
    """Teaches a model's encoder to predict hidden patches; the decoder is discarded afterwards.

    The labels of ``inputs`` do not matter.
    """

    name = "pretraining"

    def __init__(
        self,
        model: ASTForAudioClassification,
        inputs: InputLoader,
        section: PretrainingSection,
        precision: Precision,
    ) -> None:
        self.epochs = section.epochs
        self._inputs, self._precision = inputs, precision
        self._masked_ratio = section.masked_ratio
        self._encoder = model.audio_spectrogram_transformer
        generator = torch.Generator().manual_seed(
            int(inputs.rng("weights", section.epochs).integers(2**63))
        )
        self._decoder = MaskedPatchDecoder(
            model.config, section.decoder_width, section.decoder_layers, generator
        ).to(next(model.parameters()).device)
        self._both = nn.ModuleList([self._encoder, self._decoder])
        steps = inputs.num_steps
        optimizer = OptimizerSection(name="adamw", betas=_BETAS, weight_decay=section.weight_decay)
        schedule = ScheduleSection(
            kind="cosine", warmup_steps=section.warmup_epochs * steps, warmup_interval=1
        )
        self._stepper = Stepper(
            self.name,
            self._both,
            make_optimizer(self._both, optimizer, section.learning_rate),
            lambda step: schedule_factor(schedule, step, steps, section.epochs),
            max_gradient_norm=_MAX_GRADIENT_NORM,
            scaled=precision == "fp16",
        )

    def run_epoch(self, epoch: int, on_step: Callable[[int, int, float], None]) -> Row:
        """Run an epoch; see ``Stage.run_epoch``."""
        self._both.train()
        learning_rate = self._stepper.learning_rate
        losses = []
        # Hiding patches is enough of a regulariser; dropout would only make predictions worse.
        with without_dropout(self._encoder):
            for step, (features, _) in enumerate(self._inputs.epoch(epoch)):
                kept = self._inputs.draw_kept(len(features), self._masked_ratio, epoch, step)
                with autocast(features.device, self._precision):
                    loss = masked_patch_loss(self._encoder, self._decoder, features, kept)
                value = self._stepper.step(loss, epoch, step)
                losses.append((value, len(features)))
                on_step(step + 1, self._inputs.num_steps, value)
        return {"learning_rate": learning_rate, "train_loss": weighted_mean(losses)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; see ``Stage.state_dict``."""
        return {"modules": self._both.state_dict(), "stepper": self._stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; see ``Stage.load_state_dict``."""
        self._both.load_state_dict(state["modules"])
        self._stepper.load_state_dict(state["stepper"])


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch off all dropout of a model that is in training mode."""
    dropouts = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    attentions = [part for part in model.modules() if isinstance(part, ASTAttention)]
    before = [part.p for part in dropouts], [part.dropout for part in attentions]
    try:
        for dropout in dropouts:
            dropout.p = 0.0
        for attention in attentions:
            attention.dropout = 0.0
        yield
    finally:
        for dropout, rate in zip(dropouts, before[0], strict=True):
            dropout.p = rate
        for attention, rate in zip(attentions, before[1], strict=True):
            attention.dropout = rate
