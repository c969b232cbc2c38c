"""The display of a training: a bar for decoding, a line per epoch, a bar within one.

Without a terminal, a line about once a minute replaces the bar.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.labelling.remaining import count_found_items
from pipeline.terminal.progress import Expected, LiveReader, ProgressDisplay
from pipeline.terminal.std_streams import say
from pipeline.terminal.wording import counted
from pipeline.training.history import METRIC_NAMES
from pipeline.training.stages.finetuning import Best
from pipeline.training.stages.loop import Row, Stage
from transforms.process.progress_counts import live_counts
from transforms.sources.read_unit import Found

LINE_INTERVAL_S = 60.0


class DecodingDisplay:
    """Shows how far decoding is, from its first clip on, until ``stack`` is closed.

    ``purpose`` is what the samples are for, with a space before it, or empty.
    """

    def __init__(
        self,
        found: Found,
        sample_rate_hz: int,
        purpose: str,
        stack: contextlib.ExitStack,
        *,
        quiet: bool,
    ) -> None:
        self._total, self._sample_rate_hz = count_found_items(found), sample_rate_hz
        self._purpose, self._stack, self._quiet = purpose, stack, quiet
        self._num_kept = 0
        self._shown = False

    def on_kept(self, num_items: int) -> None:
        """Say how many items the cache has already."""
        self._num_kept = num_items
        done = f"{counted(num_items, 'item')} already decoded"
        say(f"Resuming decoding{self._purpose}: {done}.", quiet=self._quiet)

    def on_clip(self, num_samples: int, failed: bool) -> None:
        """Count an item that has been decoded, or has failed."""
        if not self._shown:
            self._shown = True
            self._stack.enter_context(
                ProgressDisplay(
                    LiveReader(),
                    Expected(
                        items=None if self._total is None else self._total - self._num_kept,
                        doing=f"decoding{self._purpose}",
                        has_windows=False,
                    ),
                    quiet=self._quiet,
                )
            )
        live_counts.failures += failed
        live_counts.clips += not failed
        live_counts.audio_s += num_samples / self._sample_rate_hz


class EpochDisplay:
    """Shows how far a training is, and validation by one metric; use it as a context.

    ``console`` is standard error by default; ``clock`` returns a time in seconds.
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
        """Show that a step of an epoch (counted from 0) is done."""
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
        """Print the line of an epoch that is done."""
        if not self._quiet:
            self._say(self.line(stage, row, best))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)
        self._said_s = self._clock()

    def line(self, stage: Stage, row: Row, best: Best | None) -> str:
        """Return an epoch's figures in one line."""
        parts = [f"loss {row['train_loss']:.4f}"]
        figure = row.get(f"validation_{self._metric}")
        if figure is not None:
            parts.append(f"validation loss {row['validation_loss']:.4f}")
            part = f"{METRIC_NAMES[self._metric]} {figure:.4f}"
            parts.append(part if best is None else f"{part} (best {best.figure:.4f})")
        averaged = row.get(f"averaged_{self._metric}")
        if averaged is not None:
            parts.append(f"averaged {averaged:.4f}")
        parts.append(f"{row['seconds']:.1f} s")
        return f"{stage.name}, epoch {row['epoch']} of {stage.epochs}: {', '.join(parts)}"
