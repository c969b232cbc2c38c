"""The mistakes of an evaluation, as a table and in words."""

from __future__ import annotations

import csv
import io

import numpy as np

from pipeline.evaluation.mistakes import (
    MAX_SHOWN,
    Mistake,
    describe_mistakes,
    find_mistakes,
    mistakes_table,
)

NAMES = ("dog", "rain", "rooster")


def test_mistakes_are_clips_whose_best_label_is_not_true_the_surest_first() -> None:
    truth = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]], np.bool_)
    scores = np.array(
        [[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7], [0.9, 0.9, 0.9], [0.0, 0.2, 0.8]],
        np.float32,
    )
    found = find_mistakes([f"c{index}" for index in range(5)], NAMES, truth, scores)
    assert [(one.clip_id, one.truth, one.guess) for one in found] == [
        ("c4", ("rain",), "rooster"),
        ("c1", ("dog",), "rain"),
    ]
    np.testing.assert_allclose([one.score for one in found], [0.8, 0.6], rtol=1e-6)


def test_the_table_has_a_row_per_mistake() -> None:
    table = mistakes_table([Mistake("/x/a,b.wav", ("dog", "rain"), "rooster", 0.5)])
    assert list(csv.reader(io.StringIO(table.decode()))) == [
        ["clip_id", "truth", "guess", "score"],
        ["/x/a,b.wav", "dog;rain", "rooster", "0.500000"],
    ]


def test_the_first_few_are_described() -> None:
    assert describe_mistakes([]) == []
    mistakes = [Mistake(f"{index}.wav", ("dog",), "rain", 0.9) for index in range(MAX_SHOWN + 1)]
    assert describe_mistakes(mistakes[:1]) == [
        "1 clip whose best label is not true:",
        "  0.wav: dog taken for rain (0.900)",
    ]
    title, *lines = describe_mistakes(mistakes)
    assert title == "6 clips whose best label is not true, the surest 5 of them:"
    assert len(lines) == MAX_SHOWN
