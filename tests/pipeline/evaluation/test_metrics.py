"""The figures are scikit-learn's and the paper's."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, roc_auc_score

from pipeline.evaluation.metrics import compute_metrics, d_prime

NAMES = ("dog", "rain", "rooster", "never", "always")


def case(
    num_clips: int = 200, seed: int = 0
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Truth and scores that know something of it; nothing has class 3, everything class 4."""
    rng = np.random.default_rng(seed)
    truth = rng.random((num_clips, len(NAMES))) < 0.3
    truth[:, 3], truth[:, 4] = False, True
    scores = (truth * 0.3 + rng.random(truth.shape)).astype(np.float32)
    scores[:20] = scores[0]  # ties
    return truth, scores


def test_every_class_has_sklearns_figures() -> None:
    truth, scores = case()
    metrics = compute_metrics(truth, scores, NAMES)
    for entry in metrics.classes:
        column = truth[:, entry.index], scores[:, entry.index]
        assert entry.positives == truth[:, entry.index].sum()
        if entry.name == "never":
            assert (entry.average_precision, entry.auc) == (None, None)
        elif entry.name == "always":
            assert (entry.average_precision, entry.auc) == (1.0, None)
        else:
            assert entry.average_precision == average_precision_score(*column)
            assert entry.auc == roc_auc_score(*column)
    assert metrics.accuracy is None
    assert metrics.confusion is None


def test_means_are_over_the_classes_that_have_a_figure() -> None:
    truth, scores = case()
    metrics = compute_metrics(truth, scores, NAMES)
    there = [0, 1, 2, 4]
    assert metrics.mean_average_precision == pytest.approx(
        average_precision_score(truth[:, there], scores[:, there], average="macro"), rel=1e-12
    )
    with pytest.warns(UserWarning, match="No positive class"):
        everything = average_precision_score(truth, scores, average="macro")
    assert metrics.mean_average_precision_all == pytest.approx(everything, rel=1e-12)
    assert metrics.mean_auc == pytest.approx(
        roc_auc_score(truth[:, :3], scores[:, :3], average="macro"), rel=1e-12
    )


def test_d_prime_is_that_of_the_mean_auc() -> None:
    truth, scores = case()
    metrics = compute_metrics(truth, scores, NAMES)
    assert metrics.mean_auc is not None
    assert metrics.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(metrics.mean_auc), rel=1e-12)
    of_each = [math.sqrt(2) * norm.ppf(entry.auc) for entry in metrics.classes[:3]]
    assert metrics.d_prime != pytest.approx(np.mean(of_each), rel=1e-6)
    # The paper's AUC of 0.972 is a d' of 2.703.
    assert d_prime(0.972) == pytest.approx(2.7027, abs=1e-3)
    assert (d_prime(0.5), d_prime(1.0), d_prime(0.0)) == (0.0, math.inf, -math.inf)


def test_one_label_per_clip_has_accuracy_and_confusion() -> None:
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 4, 300)
    truth = np.eye(5, dtype=np.bool_)[classes]
    scores = (truth * 0.4 + rng.random(truth.shape)).astype(np.float32)
    metrics = compute_metrics(truth, scores, NAMES)
    best = scores.argmax(axis=1)
    assert metrics.accuracy == accuracy_score(classes, best)
    assert metrics.confusion is not None
    np.testing.assert_array_equal(
        metrics.confusion, confusion_matrix(classes, best, labels=range(5))
    )
    for entry in metrics.classes:
        assert entry.found == ((classes == entry.index) & (best == entry.index)).sum()
        assert entry.claimed == (best == entry.index).sum()
    dog = metrics.classes[0]
    assert dog.recall == dog.found / dog.positives  # type: ignore[operator]
    assert dog.precision == dog.found / dog.claimed  # type: ignore[operator]
    assert metrics.classes[4].recall is None


def test_with_a_clip_of_two_labels_or_none_there_is_no_accuracy() -> None:
    truth = np.eye(5, dtype=np.bool_)
    scores = np.eye(5, dtype=np.float32)
    perfect = compute_metrics(truth, scores, NAMES)
    assert (perfect.accuracy, perfect.mean_average_precision, perfect.d_prime) == (1, 1, math.inf)
    for change in (True, False):
        changed = truth.copy()
        changed[0, :2] = change
        assert compute_metrics(changed, scores, NAMES).accuracy is None


def test_an_empty_truth_has_no_means() -> None:
    metrics = compute_metrics(np.zeros((3, 5), np.bool_), np.ones((3, 5), np.float32), NAMES)
    assert (metrics.mean_average_precision, metrics.mean_auc, metrics.d_prime) == (None,) * 3


@pytest.mark.parametrize(
    ("truth", "scores", "words"),
    [
        (np.zeros((2, 5), bool), np.zeros((3, 5)), "shape"),
        (np.zeros((2, 4), bool), np.zeros((2, 4)), "shape"),
        (np.zeros((0, 5), bool), np.zeros((0, 5)), "at least one clip"),
        (np.zeros((2, 5), bool), np.full((2, 5), np.nan), "NaN"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compute_metrics(truth, scores, NAMES)
