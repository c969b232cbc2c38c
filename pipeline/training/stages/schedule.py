"""The learning rate of every step, as a factor of the one that is configured.

Two things shape it, and their factors are multiplied: a warm-up over the first steps, and a decay
from epoch to epoch. With ``kind: multistep`` both are those of the original code (YuanGongND/ast
``src/traintest.py``), down to its habit of raising the rate every 50 steps only, which lets the
first 50 pass at a rate of 0. A step's factor follows from its number alone, so training that goes
on after an interruption goes on at the same rate.
"""

from __future__ import annotations

import math

from pipeline.config.train import ScheduleSection


def schedule_factor(
    schedule: ScheduleSection, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """What the learning rate is multiplied by at one step.

    Args:
        schedule: How the rate goes.
        step: Number of the optimizer's step, from 0 over all epochs. Schedulers also ask for the
            one after the last, which nobody takes: all epochs are completed there.
        steps_per_epoch: Steps in each epoch.
        epochs: All of them.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: there is no such step.
    """
    if not 0 <= step <= steps_per_epoch * epochs:
        raise ValueError(
            f"step is {step}; must be in [0, {steps_per_epoch * epochs}]: {epochs} epochs of "
            f"{steps_per_epoch} steps"
        )
    return warmup_factor(schedule, step) * decay_factor(schedule, step // steps_per_epoch, epochs)


def warmup_factor(schedule: ScheduleSection, step: int) -> float:
    """The warm-up's part, from 0 up to 1: proportional to the step, updated every few steps.

    Past ``warmup_steps`` it is 1, also where the last update before did not reach that.
    """
    if schedule.warmup_steps == 0 or step > schedule.warmup_steps:
        return 1.0
    last_update = step - step % schedule.warmup_interval
    return last_update / schedule.warmup_steps


def decay_factor(schedule: ScheduleSection, completed_epochs: int, epochs: int) -> float:
    """The decay's part, which changes between epochs alone.

    Args:
        schedule: ``multistep`` multiplies the rate by ``decay_factor`` after the epoch
            ``decay_start_epoch`` and after every ``decay_every_epochs`` from there. ``cosine``
            is the half wave ½ (1 + cos(π · completed / epochs)), above 0 in the last epoch.
        completed_epochs: Epochs that are over, from 0.
        epochs: All of them.

    Source: torch's ``MultiStepLR`` and ``CosineAnnealingLR``; Loshchilov and Hutter 2017,
        arXiv:1608.03983, for the cosine.
    """
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * completed_epochs / epochs))
    if completed_epochs < schedule.decay_start_epoch:
        return 1.0
    since_start = completed_epochs - schedule.decay_start_epoch
    times = 1 + since_start // schedule.decay_every_epochs
    return float(schedule.decay_factor**times)
