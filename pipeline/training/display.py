"""What a training says while it is at work: a line per epoch, and within one a bar.

Where there is no terminal, a line about once a minute stands for the bar.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.training.stages.finetuning import Best
from pipeline.training.stages.loop import Row, Stage

LINE_INTERVAL_S = 60.0

_NAMES = {"accuracy": "accuracy", "mean_average_precision": "mAP"}


class EpochDisplay:
    """Shows how far a training is; use it as a context.

    Args:
        stages: In order.
        metric: What validation is shown by.
        quiet: Show nothing.
        console: Where to; standard error by default.
        clock: Seconds from some moment on.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        metric: str,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages, self._metric, self._quiet = stages, metric, quiet
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, loss=float("nan"))
        self._says_steps = not quiet and not self._console.is_terminal
        self._clock = clock
        self._said_s = clock()

    def __enter__(self) -> Self:
        self._bar.start()
        self._said_s = self._clock()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_step(self, stage: Stage, epoch: int, step: int, num_steps: int, loss: float) -> None:
        """A step of an epoch (from 0) is done."""
        self._bar.update(
            self._task,
            description=f"{stage.name}, epoch {epoch + 1} of {stage.epochs}, steps",
            total=num_steps * stage.epochs,
            completed=epoch * num_steps + step,
            loss=loss,
        )
        if self._says_steps and self._clock() - self._said_s >= LINE_INTERVAL_S:
            self._say(
                f"{stage.name}, epoch {epoch + 1} of {stage.epochs}: step {step:,} of "
                f"{num_steps:,}, loss {loss:.4f}"
            )

    def on_epoch(self, stage: Stage, row: Row, best: Best | None) -> None:
        """An epoch is done."""
        if not self._quiet:
            self._say(self.line(stage, row, best))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)
        self._said_s = self._clock()

    def line(self, stage: Stage, row: Row, best: Best | None) -> str:
        """An epoch in words."""
        parts = [f"loss {row['train_loss']:.4f}"]
        name = _NAMES[self._metric]
        figure = row.get(f"validation_{self._metric}")
        if figure is not None:
            parts.append(f"validation loss {row['validation_loss']:.4f}")
            part = f"{name} {figure:.4f}"
            parts.append(part if best is None else f"{part} (best {best.figure:.4f})")
        averaged = row.get(f"averaged_{self._metric}")
        if averaged is not None:
            parts.append(f"averaged {averaged:.4f}")
        parts.append(f"{row['seconds']:.1f} s")
        return f"{stage.name}, epoch {row['epoch']} of {stage.epochs}: {', '.join(parts)}"
