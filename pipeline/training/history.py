"""The figures of every epoch as a table, and as curves."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.training.stages.loop import Row

HISTORY_NAME = "history.csv"
CURVES_NAME = "curves.png"
DPI = 120

COLUMNS = (
    "stage",
    "epoch",
    "learning_rate",
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "validation_mean_average_precision",
    "averaged_loss",
    "averaged_accuracy",
    "averaged_mean_average_precision",
    "seconds",
)
METRIC_NAMES = {"accuracy": "accuracy", "mean_average_precision": "mAP"}
_MODELS = {"validation": "this epoch's weights", "averaged": "average of weights"}


def history_table(history: Sequence[Row]) -> bytes:
    """Make a CSV file with a row per epoch; figures that an epoch lacks are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def draw_curves(history: Sequence[Row]) -> bytes:
    """Draw loss, validation and learning rate by epoch, one above the other; returns a PNG file.

    Epochs of all stages are numbered consecutively; a line marks the end of a stage.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        # Not through pyplot, which keeps state and may want a window system.
        figure = Figure(figsize=(8, 8), layout="constrained")
        loss, metric, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
        _draw_losses(loss, history)
        _draw_metrics(metric, history)
        for stage in _stages(history):
            _draw(rate, history, "learning_rate", stage, stage=stage)
        rate.xaxis.set_major_locator(MaxNLocator(integer=True))
        rate.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
        for axes in (loss, metric, rate):
            for end in _ends_of_stages(history):
                axes.axvline(end + 0.5, color="0.7", linewidth=0.8, linestyle=":")
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=DPI)
    return target.getvalue()


def _draw_losses(axes: Axes, history: Sequence[Row]) -> None:
    for stage in _stages(history):
        _draw(axes, history, "train_loss", stage, stage=stage)
    for whose, model_name in _MODELS.items():
        _draw(axes, history, f"{whose}_loss", f"validation, {model_name}")
    axes.set(ylabel="loss", title="Training")
    axes.legend(frameon=False)


def _draw_metrics(axes: Axes, history: Sequence[Row]) -> None:
    for whose, model_name in _MODELS.items():
        for metric, name in METRIC_NAMES.items():
            _draw(axes, history, f"{whose}_{metric}", f"{name}, {model_name}")
    axes.set(ylabel="validation", ylim=(0, 1.02))
    if axes.lines:
        axes.legend(frameon=False, loc="lower right")
    else:
        axes.text(0.5, 0.5, "no validation set", ha="center", transform=axes.transAxes, color="0.5")


def _stages(history: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["stage"]) for row in history))


def _draw(
    axes: Axes, history: Sequence[Row], column: str, name: str, stage: str | None = None
) -> None:
    points = [
        (number, float(value))
        for number, row in enumerate(history, start=1)
        if isinstance(value := row.get(column), int | float) and stage in (None, row["stage"])
    ]
    if points:
        marker = "." if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=1.2, label=name)


def _ends_of_stages(history: Sequence[Row]) -> list[int]:
    return [
        number
        for number, (row, following) in enumerate(itertools.pairwise(history), start=1)
        if row["stage"] != following["stage"]
    ]
