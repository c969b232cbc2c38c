"""The graph is one fused stage from reading to commit, and sums up the units."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from pipeline.graph import RunTotals, build_graph, sum_totals
from tests.support.stages import STEPS, stages_with
from tests.support.unit_factory import file_unit
from transforms.label_audio import LabelSettings, make_settings
from transforms.models.ast.checkpoints import resolve_model
from transforms.results.commits import UnitSummary, UnitTotals
from transforms.results.write_units import CommitSettings


@pytest.fixture(scope="module")
def label(tiny_model: Path) -> LabelSettings:
    return make_settings(resolve_model(str(tiny_model)))


def commit_settings(label: LabelSettings, output: Path) -> CommitSettings:
    return CommitSettings(str(output), "run", "f" * 64, label.model.sha256, label.rows)


def ignore(totals: RunTotals) -> None:
    """Takes the totals."""


def test_everything_from_reading_to_commit_is_one_stage(
    label: LabelSettings, tmp_path: Path
) -> None:
    pipeline = beam.Pipeline(FnApiRunner(), options=PipelineOptions([]))
    build_graph(pipeline, [file_unit("u", 1)], label, commit_settings(label, tmp_path), ignore)
    assert stages_with(pipeline.to_runner_api()) == [set(STEPS)]


def test_summaries_sum_up_whatever_the_order() -> None:
    summaries = [
        UnitSummary("a", UnitTotals(3, 2, 1, 0, 5, 20.0), ("torch cpu fp32",)),
        UnitSummary("b", UnitTotals(1, 1, 0, 0, 1, 5.0), ("torch cuda bf16",)),
    ]
    first, second = (RunTotals.of(summary) for summary in summaries)
    expected = RunTotals(2, UnitTotals(4, 3, 1, 0, 6, 25.0), ("torch cpu fp32", "torch cuda bf16"))
    assert sum_totals([first, second]) == expected
    assert sum_totals([sum_totals([second]), sum_totals([]), sum_totals([first])]) == expected
