"""The learning rate step by step, against torch's own schedulers and the original code's loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.train import ScheduleSection
from pipeline.training.stages.schedule import schedule_factor


def factors_of_epochs(schedule: ScheduleSection, epochs: int) -> list[float]:
    """The factor in the last step of each epoch, of three steps."""
    return [schedule_factor(schedule, end, 3, epochs) for end in range(2, 3 * epochs, 3)]


def rates_of_torch(make_scheduler: Any, epochs: int) -> list[float]:
    """What a scheduler of torch, stepped after each epoch, makes of a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates_of_the_original(
    *, warmup: bool, start: int, every: int, factor: float, epochs: int, steps_per_epoch: int
) -> list[float]:
    """The rate of every step, by the control flow of the original's traintest.py."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, list(range(start, 1000, every)), gamma=factor
    )
    rates, global_step = [], 0
    for _ in range(epochs):
        for _ in range(steps_per_epoch):
            if global_step <= 1000 and global_step % 50 == 0 and warmup:
                optimizer.param_groups[0]["lr"] = global_step / 1000
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            global_step += 1
        scheduler.step()
    return rates


def make_multistep(start: int, every: int, factor: float, warmup: int = 0) -> ScheduleSection:
    return ScheduleSection(
        kind="multistep",
        warmup_steps=warmup,
        warmup_interval=50,
        decay_start_epoch=start,
        decay_every_epochs=every,
        decay_factor=factor,
    )


@pytest.mark.parametrize(
    ("start", "every", "factor"), [(5, 1, 0.85), (10, 5, 0.5), (2, 1, 0.5), (1, 3, 0.1), (40, 1, 1)]
)
def test_multistep_is_torch_s_multi_step_lr(start: int, every: int, factor: float) -> None:
    expected = rates_of_torch(
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(range(start, 1000, every)), gamma=factor
        ),
        epochs=30,
    )
    found = factors_of_epochs(make_multistep(start, every, factor), 30)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epochs", [1, 7, 200])
def test_cosine_is_torch_s_cosine_annealing(epochs: int) -> None:
    expected = rates_of_torch(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), epochs
    )
    found = factors_of_epochs(ScheduleSection(kind="cosine"), epochs)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == 1.0
    assert found[-1] > 0.0


@pytest.mark.parametrize("warmup", [0, 1000])
def test_every_step_is_that_of_the_original_s_loop(warmup: int) -> None:
    expected = rates_of_the_original(
        warmup=warmup > 0, start=2, every=1, factor=0.5, epochs=4, steps_per_epoch=1203
    )
    schedule = make_multistep(2, 1, 0.5, warmup=warmup)
    found = [schedule_factor(schedule, step, 1203, 4) for step in range(4 * 1203)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_warmup_updated_at_every_step_rises_evenly() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_steps=4, warmup_interval=1)
    found = [schedule_factor(schedule, step, 10, 1) for step in range(7)]
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_warmup_that_its_interval_does_not_divide_ends_all_the_same() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_steps=70, warmup_interval=50)
    found = [schedule_factor(schedule, step, 100, 1) for step in (49, 50, 70, 71)]
    assert found == [0.0, 50 / 70, 50 / 70, 1.0]


def test_warmup_and_decay_multiply() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_steps=30, warmup_interval=1)
    assert schedule_factor(schedule, 15, 10, 2) == pytest.approx(0.5 * 0.5, rel=1e-12)


@pytest.mark.parametrize("step", [-1, 16])
def test_a_step_out_of_range_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step is {step}; must be in \[0, 15\]: 5 epochs of 3"):
        schedule_factor(ScheduleSection(), step, 3, 5)
