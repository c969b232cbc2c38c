"""Optimizer steps of every stage: precision, gradients, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config.train import OptimizerSection
from transforms.errors import TrainingError

Precision = Literal["fp32", "bf16", "fp16"]
IF_DIVERGED = (
    "Lower optimizer.learning_rate, set optimizer.max_gradient_norm to 1, or use --precision fp32; "
    "then start again with --overwrite. What was saved of earlier epochs stays."
)
_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        factor: Returns the factor of the learning rate at a step, from 0.
        max_gradient_norm: Bound of the gradients' norm; None for no bound.
        scaled: Whether to scale the loss, as float16 gradients need.
    """

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        *,
        num_steps: int,
        max_gradient_norm: float | None,
        scaled: bool,
    ) -> None:
        self._modules, self._optimizer = modules, optimizer
        self._max_norm = max_gradient_norm
        # torch asks for the step after the last one, too.
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(min(step, num_steps - 1))
        )
        device = next(modules.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)  # type: ignore[attr-defined]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, loss: Tensor) -> None:
        """Take a step against the gradient of the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._max_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._modules.parameters(), self._max_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._scheduler.step()

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


def checked_loss(loss: Tensor, stage: str, epoch: int, step: int, learning_rate: float) -> float:
    """Return the loss as a number; raise ``TrainingError`` if it is NaN or infinite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss of {stage} is {value} in epoch {epoch + 1}, step {step + 1}, at a learning "
            f"rate of {learning_rate:.3g}; expected a finite number. {IF_DIVERGED}"
        )
    return value


def weighted_mean(losses: Iterable[tuple[float, int]]) -> float:
    """Return the mean loss per clip from the mean losses and sizes of batches."""
    pairs = list(losses)
    return math.fsum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
