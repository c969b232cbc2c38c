"""Run the stages of a training epoch by epoch, and go on where an earlier run was killed.

After every epoch the whole state is written, in one file that is replaced whole: weights,
optimizer, averages, history. All that is drawn follows from the seed and the epoch's number, so an
epoch that was cut short is done again from the state before it. On a CPU it has the same result. A
GPU adds numbers up in another order each time, so weights are kept only of epochs that the state
knows to be done.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from transforms.errors import OutputError
from transforms.storage import filesystem, reading, urls, writing
from transforms.storage.writing import writing_to

STATE_NAME = "_resume.pt"
_STATE_VERSION = 2

Row = dict[str, float | int | str | None]


class Stage(Protocol):
    """A part of training that consists of epochs."""

    name: str
    epochs: int

    def run_epoch(self, epoch: int, on_step: Callable[[int, int, float], None]) -> Row:
        """Do one epoch, counted from 0; gives its figures.

        Args:
            epoch: Which.
            on_step: Told the step (from 1), the number of steps and the step's loss.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        ...


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        stage: Which stage is at work, from 0; the number of stages when all are done.
        epoch: Epochs of that stage that are done.
        history: The figures of every epoch so far.
    """

    stage: int = 0
    epoch: int = 0
    history: list[Row] = field(default_factory=list)


def run_stages(
    stages: Sequence[Stage],
    folder: str,
    fingerprint: str,
    *,
    on_resume: Callable[[Stage, int], None],
    on_step: Callable[[Stage, int, int, int, float], None],
    on_epoch: Callable[[Stage, Row, list[Row]], None],
    on_saved: Callable[[Stage, int], None],
) -> Progress:
    """Run every epoch that is not done yet.

    Args:
        stages: In order.
        folder: Where the state is kept.
        fingerprint: Of what is trained; a state of another training is not taken over.
        on_resume: Told the stage that an earlier run was at, and its epochs that are done.
        on_step: Told the stage, the epoch (from 0), the step (from 1), the number of steps and
            the loss.
        on_epoch: Told the stage, the epoch's figures and all figures so far, before the state is
            written: what it writes is written again if the epoch is done again.
        on_saved: Told the stage and its epochs that are done, which the state has by now: this
            epoch is never done again. It is told again of the last one when an earlier run is gone
            on with, which may have been killed before.
    """
    progress = load_progress(stages, folder, fingerprint)
    if progress.history:
        on_resume(stages[progress.stage], progress.epoch)
        on_saved(stages[progress.stage], progress.epoch)
    while progress.stage < len(stages):
        stage = stages[progress.stage]
        while progress.epoch < stage.epochs:
            epoch = progress.epoch
            began_s = time.monotonic()
            figures = stage.run_epoch(
                epoch, lambda *step, of=stage, at=epoch: on_step(of, at, *step)
            )
            took_s = round(time.monotonic() - began_s, 3)
            row: Row = {"stage": stage.name, "epoch": epoch + 1, **figures, "seconds": took_s}
            progress.history.append(row)
            progress.epoch += 1
            on_epoch(stage, row, progress.history)
            save_progress(progress, stage, folder, fingerprint)
            on_saved(stage, progress.epoch)
        progress.stage, progress.epoch = progress.stage + 1, 0
    return progress


def save_progress(progress: Progress, stage: Stage, folder: str, fingerprint: str) -> None:
    """Write the state, whole or not at all.

    Raises:
        WriteError: It cannot be written; the one before it stays.
    """
    content = io.BytesIO()
    state = {
        "version": _STATE_VERSION,
        "fingerprint": fingerprint,
        "stage": progress.stage,
        "epoch": progress.epoch,
        "history": progress.history,
        "state": stage.state_dict(),
    }
    torch.save(state, content)
    url = urls.join(folder, STATE_NAME)
    with writing_to(url):
        writing.write_bytes(url, content.getvalue())


def load_progress(stages: Sequence[Stage], folder: str, fingerprint: str) -> Progress:
    """How far an earlier run came, with its stage's state loaded; the beginning if there is none.

    Raises:
        OutputError: The state is damaged, or of another training.
    """
    url = urls.join(folder, STATE_NAME)
    if not filesystem.exists(url):
        return Progress()
    try:
        # To the CPU: what loads it has a device of its own, and room there for one copy.
        content = io.BytesIO(reading.read_bytes(url))
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise OutputError(
            f"{url} cannot be read as the state of a training ({type(error).__name__}). Start anew "
            "with --overwrite."
        ) from error
    if state.get("version") != _STATE_VERSION or state.get("fingerprint") != fingerprint:
        raise OutputError(
            f"{url} is the state of another training; start anew with --overwrite, or give another "
            "--output."
        )
    progress = Progress(state["stage"], state["epoch"], list(state["history"]))
    stages[progress.stage].load_state_dict(state["state"])
    return progress
