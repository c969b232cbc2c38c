"""Run the stages of a training epoch by epoch, and resume a run that was killed.

After every epoch the whole state (weights, optimizer, averages, history) replaces the one before in
one step. All random numbers follow from the seed and the epoch's number, so an epoch that was cut
short is repeated from the state before it. On a CPU the result is the same. A GPU sums in another
order each time, so weights are kept only of epochs that the saved state contains.
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
        """Run an epoch, counted from 0, and return its figures.

        ``on_step`` is called with the step (from 1), the number of steps and the step's loss.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        stage: Number of the current stage, from 0; the number of stages when all are done.
        epoch: Number of epochs of that stage that are done.
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
    """Run the remaining epochs.

    Args:
        fingerprint: Digest of what is trained; the state of another training is refused.
        on_resume: Called with the stage that an earlier run was in, and its epochs done.
        on_step: Called with the stage, the epoch (from 0), the step (from 1), the number of steps
            and the loss.
        on_epoch: Called with the stage, the epoch's figures and all figures so far, before the
            state is saved. If the epoch is repeated, so is this call.
        on_saved: Called with the stage and its epochs done, once the state is saved: this epoch is
            never repeated. Called again for the last one when a run is resumed, because the
            earlier run may have been killed before the call.
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
    """Save the state, or raise ``WriteError`` and leave the state before it."""
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
    """Return how far an earlier run came, with its stage's state loaded; or the start.

    Raise ``OutputError`` if the state is damaged, or of another training.
    """
    url = urls.join(folder, STATE_NAME)
    if not filesystem.exists(url):
        return Progress()
    try:
        # To the CPU: the stages copy it to their device, which may not have room for two copies.
        content = io.BytesIO(reading.read_bytes(url))
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise OutputError(
            f"{url} cannot be read as the state of a training ({type(error).__name__}). Start "
            "again with --overwrite."
        ) from error
    if state.get("version") != _STATE_VERSION or state.get("fingerprint") != fingerprint:
        raise OutputError(
            f"{url} is the state of another training; start again with --overwrite, or give "
            "another --output."
        )
    progress = Progress(state["stage"], state["epoch"], list(state["history"]))
    stages[progress.stage].load_state_dict(state["state"])
    return progress
