"""What a training says while it is at work: a bar on a terminal, and a line per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.training.loop import Row, Stage

_NAMES = {"accuracy": "accuracy", "mean_average_precision": "mAP"}


class EpochDisplay:
    """Shows how far a training is; use it as a context.

    Args:
        stages: In order.
        metric: What validation is shown by.
        quiet: Show nothing.
        console: Where to; standard error by default.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        metric: str,
        *,
        quiet: bool = False,
        console: Console | None = None,
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

    def __enter__(self) -> Self:
        self._bar.start()
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

    def on_epoch(self, stage: Stage, row: Row, best: tuple[int, float] | None) -> None:
        """An epoch is done."""
        if not self._quiet:
            self._console.print(self.line(stage, row, best), markup=False)

    def line(self, stage: Stage, row: Row, best: tuple[int, float] | None) -> str:
        """An epoch in words."""
        parts = [f"loss {row['train_loss']:.4f}"]
        name = _NAMES[self._metric]
        figure = row.get(f"validation_{self._metric}")
        if figure is not None:
            part = f"validation {name} {figure:.4f}"
            parts.append(part if best is None else f"{part} (best {best[1]:.4f})")
        averaged = row.get(f"averaged_{self._metric}")
        if averaged is not None:
            parts.append(f"averaged {averaged:.4f}")
        parts.append(f"{row['seconds']:.1f} s")
        return f"{stage.name}, epoch {row['epoch']} of {stage.epochs}: {', '.join(parts)}"
