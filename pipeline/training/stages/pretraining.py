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
from pipeline.training.data.batches import Batch, BatchLoader, BatchSettings
from pipeline.training.data.dataset import ClipSet, pack_clips
from pipeline.training.stages.loop import Row
from pipeline.training.stages.masked_patches import MaskedPatchDecoder, draw_kept, masked_patch_loss
from pipeline.training.stages.schedule import schedule_factor
from pipeline.training.stages.steps import (
    Precision,
    Stepper,
    autocast,
    checked_loss,
    make_optimizer,
    weighted_mean,
)
from transforms.features.fbank import KaldiFbank
from transforms.models.ast.model import ASTAttention, ASTForAudioClassification

# He et al. 2021, arXiv:2111.06377, table 8.
_BETAS = (0.9, 0.95)
_MAX_GRADIENT_NORM = 1.0


class PretrainingStage:
    """Teaches a model's encoder to predict hidden patches; the decoder is discarded afterwards.

    The labels of ``train`` do not matter. The masks, noise and dropped patches of ``augment`` are
    left out. ``log_mel`` makes features that are not normalised, on the model's device.
    """

    name = "pretraining"

    def __init__(
        self,
        model: ASTForAudioClassification,
        train: ClipSet,
        augment: Augment,
        log_mel: KaldiFbank,
        batches: BatchSettings,
        section: PretrainingSection,
        *,
        precision: Precision,
        num_loaders: int,
    ) -> None:
        self.epochs = section.epochs
        # Masks would hide twice, and noise cannot be predicted.
        clean = {"masked_mels": 0, "masked_frames": 0, "feature_noise": 0.0}
        section_of_clips = augment.section.model_copy(update=clean)
        self._augment = dataclasses.replace(augment, section=section_of_clips)
        self._log_mel, self._batches, self._precision = log_mel, batches, precision
        self._masked_ratio = section.masked_ratio
        self._loader = BatchLoader(pack_clips(train), self._augment, batches, num_loaders)
        self._encoder = model.audio_spectrogram_transformer
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(
            int(batches.rng("weights", section.epochs).integers(2**63))
        )
        self._decoder = MaskedPatchDecoder(
            model.config, section.decoder_width, section.decoder_layers, generator
        ).to(device)
        self._both = nn.ModuleList([self._encoder, self._decoder])
        steps = self._loader.num_steps
        optimizer = OptimizerSection(name="adamw", betas=_BETAS, weight_decay=section.weight_decay)
        schedule = ScheduleSection(
            kind="cosine", warmup_steps=section.warmup_epochs * steps, warmup_interval=1
        )
        self._stepper = Stepper(
            self._both,
            make_optimizer(self._both, optimizer, section.learning_rate),
            lambda step: schedule_factor(schedule, step, steps, section.epochs),
            num_steps=steps * section.epochs,
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
            for step, batch in enumerate(self._loader.epoch(epoch)):
                value = self._run_step(batch, epoch, step)
                losses.append((value, len(batch.lengths)))
                on_step(step + 1, self._loader.num_steps, value)
        return {"learning_rate": learning_rate, "train_loss": weighted_mean(losses)}

    def _run_step(self, batch: Batch, epoch: int, step: int) -> float:
        device = next(self._decoder.parameters()).device
        waveforms, lengths = batch.waveforms.to(device), batch.lengths.to(device)
        features = self._augment.features(
            self._log_mel(waveforms, lengths), lengths, self._batches.rng("features", epoch, step)
        )
        kept = draw_kept(
            len(lengths),
            self._decoder.num_patches,
            self._masked_ratio,
            self._batches.rng("tokens", epoch, step),
        )
        with autocast(device, self._precision):
            loss = masked_patch_loss(self._encoder, self._decoder, features, kept.to(device))
        value = checked_loss(loss, self.name, epoch, step, self._stepper.learning_rate)
        self._stepper.step(loss)
        return value

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
