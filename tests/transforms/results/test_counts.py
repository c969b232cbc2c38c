"""Counts of a unit's rows, in its commit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from pipeline.result.state import read_result
from pipeline.result.verify import verify_result
from tests.support.paths import ROOT
from tests.support.unit_factory import FACTS, commit_unit, make_item
from transforms.records import Failure, WarningKind
from transforms.results.commits import Commit, read_commit
from transforms.results.counts import MAX_EXAMPLE_CHARS, ErrorCount, RowCounts

ALPHA, GAMMA = (0.5, 0.25, 0.125), (0.25, 0.75, 0.875)
ODD = dataclasses.replace(FACTS, warning="cut; odd", warning_kinds=("cut_short", "damaged"))


def failure(name: str, error_type: str, message: str) -> Failure:
    return Failure(make_item(name), "decode", error_type, message)


@pytest.fixture
def output(tmp_path: Path) -> str:
    output = str(tmp_path / "out")
    clips = [(make_item(f"/{name}.wav"), [(0.0, 12.0, ALPHA)]) for name in "ab"]
    clips.append((make_item("/c.wav"), [(0.0, 12.0, GAMMA)]))
    failures = [
        failure("/e.wav", "NotAudio", "no"),
        failure("/d.wav", "NotAudio", "no"),
        failure("/f.wav", "TooShort", "/f.wav is short" + "!" * 1000),
    ]
    commit_unit(output, "0" * 20, clips, failures=failures)
    commit_unit(output, "1" * 20, [(make_item("/g.wav"), [(0.0, 12.0, GAMMA)])], facts=ODD)
    return output


def test_a_commit_counts_its_rows(output: str) -> None:
    first, second = (read_commit(output, digit * 20) for digit in "01")
    assert first.counts == RowCounts(
        clips=3,
        labels={"Alpha": 2, "Gamma": 1},
        errors={
            "NotAudio": ErrorCount(2, "/d.wav: no"),
            "TooShort": ErrorCount(1, ("/f.wav is short" + "!" * 1000)[:MAX_EXAMPLE_CHARS] + "…"),
        },
    )
    assert first.optional_columns == ("warning_kinds",)
    assert second.counts == RowCounts(1, {"Gamma": 1}, 1, {"cut_short": 1, "damaged": 1})
    total = second.counts + first.counts + second.counts
    assert total.labels == {"Alpha": 2, "Gamma": 3}
    assert (total.clips, total.warned_clips, total.warnings["damaged"]) == (5, 2, 2)
    assert (first.counts + first.counts).errors["NotAudio"] == ErrorCount(4, "/d.wav: no")


def test_verify_compares_the_counts_with_the_rows(output: str) -> None:
    state = read_result(output)
    assert [finding for finding in verify_result(state) if "counts" in finding.problem] == []
    path = Path(output) / "_commits" / f"{'1' * 20}.json"
    commit = read_commit(output, "1" * 20)
    counts = dataclasses.replace(commit.counts, warnings={"cut_short": 1})
    path.write_bytes(dataclasses.replace(commit, counts=counts).to_json())
    found = [finding for finding in verify_result(read_result(output)) if finding.unit_id]
    assert "warnings or errors are not those that its commit counts" in found[0].problem


def test_a_commit_of_an_earlier_version_counts_nothing(output: str) -> None:
    commit = dataclasses.asdict(read_commit(output, "0" * 20))
    del commit["counts"], commit["optional_columns"]
    old = Commit.from_json(json.dumps(commit).encode())
    assert (old.counts, old.optional_columns) == (RowCounts(), ())


def test_the_docs_explain_every_kind_of_warning() -> None:
    text = (ROOT / "docs" / "label.md").read_text(encoding="utf-8")
    table = text[text.index("| kind | meaning |") :].partition("\n\n")[0]
    kinds = [line.split("`")[1] for line in table.splitlines()[2:]]
    assert kinds == list(get_args(WarningKind))
