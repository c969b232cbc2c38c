"""The learning rate of every step, as a factor of the configured one.

It is the product of a warm-up over the first steps and a decay from epoch to epoch. With
``kind: multistep`` both are those of the original code (YuanGongND/ast ``src/traintest.py``), which
raises the rate only every 50 steps, so the first 50 have a rate of 0. The factor follows from the
step's number alone, so a resumed training continues at the same rate.
"""

from __future__ import annotations

import math

from pipeline.config.train import ScheduleSection


def schedule_factor(
    schedule: ScheduleSection, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Return the factor of the learning rate at one step, in [0, 1].

    ``step`` counts the optimizer's steps from 0 over all epochs. Schedulers also ask for the step
    after the last, where all epochs are completed; ``ValueError`` is raised for any other.
    """
    if not 0 <= step <= steps_per_epoch * epochs:
        raise ValueError(
            f"step is {step}; must be in [0, {steps_per_epoch * epochs}]: {epochs} epochs of "
            f"{steps_per_epoch} steps"
        )
    return warmup_factor(schedule, step) * decay_factor(schedule, step // steps_per_epoch, epochs)


def warmup_factor(schedule: ScheduleSection, step: int) -> float:
    """Return the warm-up's factor, from 0 to 1: proportional to the step, updated every few steps.

    After ``warmup_steps`` it is 1, even if the last update before did not reach 1.
    """
    if schedule.warmup_steps == 0 or step > schedule.warmup_steps:
        return 1.0
    last_update = step - step % schedule.warmup_interval
    return last_update / schedule.warmup_steps


def decay_factor(schedule: ScheduleSection, completed_epochs: int, epochs: int) -> float:
    """Return the decay's factor, which changes only between epochs.

    ``multistep`` multiplies the rate by ``decay_factor`` after the epoch ``decay_start_epoch`` and
    after every ``decay_every_epochs`` from there. ``cosine`` is the half wave
    ½ (1 + cos(π · completed / epochs)), above 0 in the last epoch.

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
