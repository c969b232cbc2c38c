"""What closing lines say of labels, warnings and failures."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.terminal.count_report import (
    describe_errors,
    describe_labels,
    describe_warnings,
    list_largest,
    may_succeed,
    totals_record,
)
from transforms.results.commits import UnitTotals
from transforms.results.counts import ErrorCount, RowCounts


def record_of(counts: RowCounts, **totals: int) -> dict[str, Any]:
    failures = sum(count.items for count in counts.errors.values())
    values = {"clips": counts.clips, "failures": failures} | totals
    return totals_record(UnitTotals(**values), counts)


def test_the_ten_labels_of_most_clips_are_named() -> None:
    labels = {f"label {n}": n for n in range(1, 14)}
    (line,) = describe_labels(record_of(RowCounts(91, labels)))
    assert line.startswith("Clips by best label: label 13 (13), label 12 (12), label 11 (11), ")
    assert line.endswith("label 4 (4) and 3 more labels (6).")
    (line,) = describe_labels(record_of(RowCounts(3, {"b": 1, "a": 1, "c": 1})))
    assert line == "Clips by best label: a (1), b (1), c (1)."
    assert list(describe_labels(record_of(RowCounts()))) == []


def test_the_number_of_others_is_right_or_there_are_none() -> None:
    assert list_largest({".txt": 2, ".md": 9}, 1, "kind") == "9 .md, 2 .txt"
    assert list_largest({"a": 3, "b": 2, "c": 1}, 1, "kind") == "3 a and 2 more kinds (3)"


def test_clips_with_a_warning_are_counted_by_kind() -> None:
    counts = RowCounts(1000, warned_clips=12, warnings={"damaged": 5, "cut_short": 8})
    (line,) = describe_warnings(record_of(counts))
    assert line == (
        "12 of 1,000 clips with a warning: 8 cut_short, 5 damaged; see the column warning of clips."
    )
    assert list(describe_warnings(record_of(RowCounts(3)))) == []


ERRORS = {
    "NotAudio": ErrorCount(263, "/b.wav: not audio"),
    "NoAudioStream": ErrorCount(555, "/a.mp4: no audio stream"),
    "Odd": ErrorCount(1, "/c: odd"),
    "TooShort": ErrorCount(2, "/d.wav: 3 ms"),
}


def test_failures_are_counted_by_cause_with_examples_of_the_largest_few() -> None:
    assert list(describe_errors(record_of(RowCounts(errors=ERRORS)))) == [
        "Failures by cause: 555 NoAudioStream (no audio stream), 263 NotAudio (not audio that can "
        "be decoded), 2 TooShort (too little audio), 1 Odd.",
        "  NoAudioStream, for example /a.mp4: no audio stream",
        "  NotAudio, for example /b.wav: not audio",
        "  TooShort, for example /d.wav: 3 ms",
    ]
    assert list(describe_errors(record_of(RowCounts()))) == []


@pytest.mark.parametrize(
    ("errors", "failures", "may"),
    [
        (["NotAudio", "TooShort"], 265, False),
        (["NotAudio", "TooShort"], 266, True),  # one that an earlier version did not count
        (["NotAudio", "Odd"], 264, True),
    ],
)
def test_another_try_is_for_what_may_succeed(errors: list[str], failures: int, may: bool) -> None:
    counts = RowCounts(errors={name: ERRORS[name] for name in errors})
    assert may_succeed(record_of(counts, failures=failures)) == may
