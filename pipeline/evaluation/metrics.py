"""The metrics by which taggers and classifiers are compared.

Average precision and AUC are scikit-learn's, class by class. They are undefined for a class that no
clip has, and AUC also for one that every clip has. Means are over the classes that have a value,
and their number is reported beside them.

d′ is √2 · Φ⁻¹(mean AUC), as in the AST paper's code, and not the mean of the classes' d′.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

Scores = npt.NDArray[np.floating]
Truth = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClassMetrics:
    """How well one class is told from the others.

    Attributes:
        positives: Number of clips that have it.
        average_precision: In [0, 1]; None without a positive.
        auc: Area under the ROC curve, in [0, 1]; None without a positive or without a negative.
        found: Number of its positives that have it as their best label; None if clips may have
            several labels.
        claimed: Number of clips that have it as their best label; None if clips may have several.
    """

    index: int
    name: str
    positives: int
    average_precision: float | None
    auc: float | None
    found: int | None
    claimed: int | None

    @property
    def recall(self) -> float | None:
        """Share of its positives that have it as their best label."""
        return None if self.found is None or not self.positives else self.found / self.positives

    @property
    def precision(self) -> float | None:
        """Share of positives among the clips that have it as their best label."""
        return None if self.found is None or not self.claimed else self.found / self.claimed


@dataclass(frozen=True, eq=False)
class Metrics:
    """How well scores match the truth; means are over the classes that have a value.

    Attributes:
        accuracy: Share of clips whose best label is the true one; None if a clip may have several.
        d_prime: d′ of the mean AUC; infinite for 1.
        classes: Every class, in the model's order.
        confusion: Clips by true class (rows) and best label (columns), shape (classes, classes);
            None if a clip may have several labels.
    """

    clips: int
    accuracy: float | None
    mean_average_precision: float | None
    mean_auc: float | None
    d_prime: float | None
    classes: tuple[ClassMetrics, ...]
    confusion: npt.NDArray[np.int64] | None

    @property
    def mean_average_precision_all(self) -> float:
        """Mean over all classes, those without a positive as 0: scikit-learn's macro average."""
        return math.fsum(entry.average_precision or 0.0 for entry in self.classes) / len(
            self.classes
        )


def compute_metrics(truth: Truth, scores: Scores, names: Sequence[str]) -> Metrics:
    """Compare scores with the truth, both of shape (clips, classes) with at least one clip.

    Only the order of scores within a class matters, and for the accuracy within a clip. Raise
    ``ValueError`` if the shapes do not fit or a score is not finite.
    """
    if truth.shape != scores.shape or truth.shape[1:] != (len(names),) or not truth.size:
        raise ValueError(
            f"truth has the shape {truth.shape} and scores {scores.shape}; both must be (clips, "
            f"{len(names)}), of at least one clip"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; all must be finite")
    single = bool((truth.sum(axis=1) == 1).all())
    best = scores.argmax(axis=1)
    classes = tuple(
        _class_metrics(index, name, truth[:, index], scores[:, index], best if single else None)
        for index, name in enumerate(names)
    )
    mean_auc = _mean([entry.auc for entry in classes])
    return Metrics(
        clips=truth.shape[0],
        accuracy=float(truth[np.arange(best.size), best].mean()) if single else None,
        mean_average_precision=_mean([entry.average_precision for entry in classes]),
        mean_auc=mean_auc,
        d_prime=None if mean_auc is None else d_prime(mean_auc),
        classes=classes,
        confusion=confusion_matrix(truth.argmax(axis=1), best, labels=range(len(names)))
        if single
        else None,
    )


def d_prime(mean_auc: float) -> float:
    """Return √2 · Φ⁻¹(mean AUC): the distance of two normal distributions with that AUC."""
    if not 0.0 < mean_auc < 1.0:
        return math.copysign(math.inf, mean_auc - 0.5)
    return math.sqrt(2.0) * NormalDist().inv_cdf(mean_auc)


def _class_metrics(
    index: int,
    name: str,
    truth: Truth,
    scores: Scores,
    best: npt.NDArray[np.intp] | None,
) -> ClassMetrics:
    positives = int(truth.sum())
    has_both = 0 < positives < truth.size
    is_best = None if best is None else best == index
    return ClassMetrics(
        index=index,
        name=name,
        positives=positives,
        average_precision=float(average_precision_score(truth, scores)) if positives else None,
        auc=float(roc_auc_score(truth, scores)) if has_both else None,
        found=None if is_best is None else int((is_best & truth).sum()),
        claimed=None if is_best is None else int(is_best.sum()),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
