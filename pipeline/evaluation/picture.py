"""The picture of an evaluation: precision against recall, and the confusion matrix."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from pipeline.evaluation.metrics import Metrics

# More curves cannot be told apart; of more classes, the best, the worst and some between are drawn.
MAX_CURVES = 10
MAX_CONFUSED_CLASSES = 60
DPI = 120


def draw_evaluation(
    metrics: Metrics, truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]
) -> bytes:
    """Draw the picture of an evaluation as a PNG file; arrays have shape (clips, classes)."""
    has_confusion = metrics.confusion is not None and len(metrics.classes) <= MAX_CONFUSED_CLASSES
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        # Not through pyplot, which keeps state and may want a window system.
        figure = Figure(figsize=(13 if has_confusion else 6.5, 6), layout="constrained")
        axes = figure.subplots(1, 2 if has_confusion else 1, squeeze=False)[0]
        _draw_curves(axes[0], metrics, truth, scores)
        if has_confusion:
            _draw_confusion(axes[1], metrics)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=DPI)
    return target.getvalue()


def _draw_curves(
    axes: Axes, metrics: Metrics, truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]
) -> None:
    ranked = sorted(
        (entry for entry in metrics.classes if entry.average_precision is not None),
        key=lambda entry: entry.average_precision or 0.0,
        reverse=True,
    )
    chosen = sorted({round(i) for i in np.linspace(0, len(ranked) - 1, MAX_CURVES)})
    for entry in ranked if len(ranked) <= MAX_CURVES else [ranked[index] for index in chosen]:
        precision, recall, _ = precision_recall_curve(truth[:, entry.index], scores[:, entry.index])
        axes.plot(
            recall,
            precision,
            drawstyle="steps-post",
            label=f"{_short(entry.name)} ({entry.average_precision:.2f})",
        )
    axes.set(
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title=f"Precision and recall, mAP {metrics.mean_average_precision or 0.0:.3f}",
    )
    axes.legend(loc="lower left", fontsize=8, title="class (average precision)")


def _draw_confusion(axes: Axes, metrics: Metrics) -> None:
    confusion = metrics.confusion
    if confusion is None:
        return
    shown = [entry.index for entry in metrics.classes if entry.positives or entry.claimed]
    counts = confusion[np.ix_(shown, shown)]
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [_short(metrics.classes[index].name) for index in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90)
    axes.set_yticks(range(len(shown)), names)
    axes.set(
        xlabel="best label", ylabel="truth", title=f"Clips, accuracy {metrics.accuracy or 0.0:.3f}"
    )
    if len(shown) <= 20:
        for row, column in np.argwhere(counts):
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= 24 else f"{name[:23]}…"
