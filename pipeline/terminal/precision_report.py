"""What the precision check of a run found: for ``run.json``, and in words.

The figures come from ``precision_check``, summed over every unit of the result, by engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.terminal.wording import counted
from transforms.results.commits import CheckFigures, Checks

# Beyond these a warning says that an engine's results are not those of float32.
MAX_SCORE_DIFFERENCE = 0.02
MIN_SAME_TOP = 0.99


def checks_record(checks: Checks) -> dict[str, dict[str, Any]]:
    """Return the figures as ``run.json`` holds them, by engine."""
    return {engine: _figures_record(figures) for engine, figures in sorted(checks.items())}


def _figures_record(figures: CheckFigures) -> dict[str, Any]:
    if figures.windows == 0:
        return {"windows": 0, "error": figures.error}
    return {
        "windows": figures.windows,
        "max_score_difference": figures.max_score_difference,
        "min_cosine": figures.min_cosine,
        "mean_cosine": figures.sum_cosine / figures.windows,
        "same_top": figures.same_top,
        "top1_agreement": figures.same_top / figures.windows,
        # Windows that an earlier run measured: the same audio, model, engine and machine.
        "reused_windows": figures.reused,
        "oldest_utc": figures.oldest_utc,
        "error": figures.error,
    }


def describe_checks(record: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each engine that was checked."""
    for engine, figures in record.items():
        if figures["windows"]:
            yield f"{_figures_in_words(engine, figures)}{_when(figures)}."


def precision_warnings(record: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what even a quiet run prints: an engine that differs too much, or was not checked.

    One window with another best class is no finding yet: two classes may be nearly equal.
    """
    for engine, figures in record.items():
        if figures["error"] is not None:
            yield (
                f"The precision of {engine} could not be checked on all windows: "
                f"{figures['error']}. To skip the check: --set inference.check_windows=0"
            )
        if figures["windows"] and _is_beyond(figures):
            yield (
                f"Warning: {_figures_in_words(engine, figures)}. Expected: no score further than "
                f"{MAX_SCORE_DIFFERENCE:g}, and the same best class in {MIN_SAME_TOP:.0%}. "
                "For float32's own numbers, label again with --precision fp32 --overwrite."
            )


def _is_beyond(figures: Mapping[str, Any]) -> bool:
    num_others = figures["windows"] - figures["same_top"]
    differs = num_others > 1 and figures["top1_agreement"] < MIN_SAME_TOP
    return bool(differs or figures["max_score_difference"] > MAX_SCORE_DIFFERENCE)


def _figures_in_words(engine: str, figures: Mapping[str, Any]) -> str:
    return (
        f"{engine} against torch in float32, {counted(figures['windows'], 'window')}: "
        f"scores within {figures['max_score_difference']:.2g}, the same best class in "
        f"{figures['top1_agreement']:.1%}, cosine of embeddings at least "
        f"{figures['min_cosine']:.6f}"
    )


def _when(figures: Mapping[str, Any]) -> str:
    if not figures["reused_windows"]:
        return ""
    return f" ({figures['reused_windows']:,} of them measured before, from {figures['oldest_utc']})"
