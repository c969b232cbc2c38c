"""What every stage does with a batch: its features, the precision, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config.train import OptimizerSection
from pipeline.training.data.augmentation import Augment
from pipeline.training.data.batches import BatchLoader, BatchSettings
from pipeline.training.data.dataset import ClipSet, pack_clips
from pipeline.training.stages.masked_patches import draw_kept
from transforms.errors import TrainingError
from transforms.features.fbank import KaldiFbank
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS

Precision = Literal["fp32", "bf16", "fp16"]
IF_DIVERGED = (
    "Lower optimizer.learning_rate, set optimizer.max_gradient_norm to 1, or use --precision fp32; "
    "then start again with --overwrite. What was saved of earlier epochs stays."
)
_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class InputLoader:
    """Gives the batches of an epoch as the model takes them.

    ``log_mel`` makes features that are not normalised, on the model's device.
    """

    def __init__(
        self,
        model: ASTForAudioClassification,
        clips: ClipSet,
        augment: Augment,
        log_mel: KaldiFbank,
        batches: BatchSettings,
        num_loaders: int,
    ) -> None:
        self._augment, self._log_mel, self.rng = augment, log_mel, batches.rng
        self._loader = BatchLoader(pack_clips(clips), augment, batches, num_loaders)
        self._num_patches = model.config.num_tokens - NUM_PREFIX_TOKENS
        self._device = next(model.parameters()).device
        self.num_steps = self._loader.num_steps

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (B, T, F) and targets (B, labels); ``epoch`` counts from 0."""
        for step, batch in enumerate(self._loader.epoch(epoch)):
            waveforms, lengths, targets = (tensor.to(self._device) for tensor in batch)
            rng = self.rng("features", epoch, step)
            with torch.no_grad():
                features = self._augment.features(self._log_mel(waveforms, lengths), lengths, rng)
            yield features, targets

    def draw_kept(self, num_clips: int, ratio: float, epoch: int, step: int) -> Tensor:
        """Draw the patches that the model sees in a step; see ``masked_patches.draw_kept``."""
        rng = self.rng("tokens", epoch, step)
        return draw_kept(num_clips, self._num_patches, ratio, rng).to(self._device)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return a context in which matrix products use half precision, if it is asked for."""
    dtype = _AUTOCAST_TYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_optimizer(
    model: nn.Module, section: OptimizerSection, learning_rate: float
) -> torch.optim.Optimizer:
    """Make torch's Adam or AdamW for the weights that are not frozen.

    Adam's weight decay is an L2 penalty on every weight, as in the original. AdamW's applies only
    to matrices, and not to biases, norms, tokens and positions, as is usual for transformers.
    ``learning_rate`` is the highest; the section's own may be null.
    """
    betas = section.betas[0], section.betas[1]
    if section.name == "adam":
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(
            weights, learning_rate, betas=betas, weight_decay=section.weight_decay
        )
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not name.endswith(("_token", "position_embeddings"))
            (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, learning_rate, betas=betas)


class Stepper:
    """Takes optimizer steps: gradients, their bound, the learning rate.

    Args:
        stage: Name of the stage, for errors.
        factor: Returns the factor of the learning rate at a step, from 0. It is also called for the
            step after the last.
        max_gradient_norm: Bound of the gradients' norm; None for no bound.
        scaled: Whether to scale the loss, as float16 gradients need.
    """

    def __init__(
        self,
        stage: str,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        *,
        max_gradient_norm: float | None,
        scaled: bool,
    ) -> None:
        self._stage, self._modules, self._optimizer = stage, modules, optimizer
        self._max_norm = max_gradient_norm
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        device = next(modules.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)  # type: ignore[attr-defined]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, loss: Tensor, epoch: int, step: int) -> float:
        """Take a step against the gradient of the loss, and return the loss.

        ``epoch`` and ``step`` count from 0. Raise ``TrainingError``, and take no step, if the loss
        is NaN or infinite.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of {self._stage} is {value} in epoch {epoch + 1}, step {step + 1}, at a "
                f"learning rate of {self.learning_rate:.3g}; expected a finite number. "
                f"{IF_DIVERGED}"
            )
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._max_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._modules.parameters(), self._max_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._scheduler.step()
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule and scale."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "steps": self._scheduler.last_epoch,
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._optimizer.load_state_dict(state["optimizer"])  # the learning rate with it
        self._scheduler.last_epoch = state["steps"]
        self._scaler.load_state_dict(state["scaler"])


def weighted_mean(losses: list[tuple[float, int]]) -> float:
    """Return the mean loss per clip from the mean losses and sizes of batches."""
    return math.fsum(loss * count for loss, count in losses) / sum(count for _, count in losses)
