"""The mistakes of an evaluation: clips whose best label is not true, as a table and in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.terminal.wording import counted

MISTAKES_FILE = "mistakes.csv"
MAX_SHOWN = 5


class Mistake(NamedTuple):
    """A clip, its true labels, the label that scored best, and that label's score."""

    clip_id: str
    truth: tuple[str, ...]
    guess: str
    score: float


def find_mistakes(
    clip_ids: Sequence[str],
    names: Sequence[str],
    truth: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.floating],
) -> tuple[Mistake, ...]:
    """Return the clips whose best label is not true, the surest first.

    Arrays have shape (clips, labels). A clip without a true label cannot show a mistake: whatever
    scores best may be far from certain.
    """
    best = scores.argmax(axis=1)
    clips = np.arange(len(clip_ids))
    wrong = np.flatnonzero(truth.any(axis=1) & ~truth[clips, best])
    order = wrong[np.argsort(-scores[wrong, best[wrong]], kind="stable")]
    return tuple(
        Mistake(
            clip_ids[clip],
            tuple(names[label] for label in np.flatnonzero(truth[clip]).tolist()),
            names[int(best[clip])],
            float(scores[clip, best[clip]]),
        )
        for clip in order.tolist()
    )


def mistakes_table(mistakes: Sequence[Mistake]) -> bytes:
    """Make a CSV file with a row per mistake; several true labels are separated by ``;``."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Mistake._fields)
    for mistake in mistakes:
        score = f"{mistake.score:.6f}"
        writer.writerow([mistake.clip_id, ";".join(mistake.truth), mistake.guess, score])
    return text.getvalue().encode()


def describe_mistakes(mistakes: Sequence[Mistake]) -> list[str]:
    """Describe the first few mistakes, in a line each; no line if there are none."""
    if not mistakes:
        return []
    shown = mistakes[:MAX_SHOWN]
    rest = f", the surest {len(shown)} of them" if len(shown) < len(mistakes) else ""
    return [
        f"{counted(len(mistakes), 'clip')} whose best label is not true{rest}:",
        *(
            f"  {clip_id}: {' and '.join(truth)} taken for {guess} ({score:.3f})"
            for clip_id, truth, guess, score in shown
        ),
    ]
