"""START READING HERE: the whole run as one Beam graph.

    units ─▶ skip committed ─▶ LabelUnits ─▶ CommitUnits ─▶ summaries ─┐
                    └─────────── summaries of committed units ─────────┤
                                            run.json, _SUCCESS ◀─ total

A unit is a small description of what to read: a few hundred files, or a slice of a tar or Parquet
file. ``plan`` makes the units; for very many inputs, workers do (``plan_on_workers``).

From reading to commit, everything happens in one fused stage. Only units go in and only summaries
come out, so memory stays flat and a unit is committed as soon as its last window is labelled. A
shuffle, side input, state or differing resource hint in between would split that stage:
``tests/pipeline/test_graph.py`` checks that it is one, and ``CommitUnits`` raises rather than
commit half a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import apache_beam as beam
from apache_beam.pvalue import PCollection

from transforms.label_audio import LabelSettings, LabelUnits
from transforms.process.stage_times import NO_SECONDS, StageSeconds
from transforms.records import WorkUnit
from transforms.results.commits import Checks, UnitSummary, UnitTotals, add_checks
from transforms.results.counts import RowCounts
from transforms.results.write_units import CommitSettings, CommitUnits, SkipCommitted


@dataclass(frozen=True)
class RunTotals:
    """The sum of unit summaries.

    Several ``engines`` are a mixture, which is reported. ``checks`` holds how far each was from
    float32, where that was measured. ``counts`` is what the rows say.
    """

    units: int = 0
    totals: UnitTotals = field(default_factory=UnitTotals)
    engines: tuple[str, ...] = ()
    checks: Checks = field(default_factory=dict)
    seconds: StageSeconds = NO_SECONDS
    counts: RowCounts = field(default_factory=RowCounts)

    def __add__(self, other: RunTotals) -> RunTotals:
        return RunTotals(
            self.units + other.units,
            self.totals + other.totals,
            tuple(sorted({*self.engines, *other.engines})),
            add_checks(self.checks, other.checks),
            self.seconds + other.seconds,
            self.counts + other.counts,
        )

    @staticmethod
    def of(summary: UnitSummary) -> RunTotals:
        """Return the totals of one unit."""
        return RunTotals(
            1, summary.totals, summary.engines, summary.checks, summary.seconds, summary.counts
        )


def sum_totals(totals: Iterable[RunTotals]) -> RunTotals:
    """Sum totals, partial sums included, in any order."""
    return sum(totals, RunTotals())


def build_graph(
    pipeline: beam.Pipeline,
    units: Sequence[WorkUnit],
    label: LabelSettings,
    commit: CommitSettings,
    finish: Callable[[RunTotals], None],
) -> None:
    """Build the graph of a run.

    ``finish`` is called once with the totals of all units, after the last commit. It must be
    picklable, since it runs where the pipeline runs.
    """
    listed = pipeline | "List units" >> beam.Create(units)
    totals = label_units(listed, label, commit)
    _ = totals | "Finish run" >> beam.Map(finish)


def label_units(
    units: PCollection[WorkUnit], label: LabelSettings, commit: CommitSettings
) -> PCollection[RunTotals]:
    """Build the graph from units to totals, which come once the last unit is committed."""
    to_do, done = units | "Skip committed" >> SkipCommitted(commit)
    labelled = to_do | "Label" >> LabelUnits(label) | "Commit" >> CommitUnits(commit)
    totals: PCollection[RunTotals] = (
        (labelled, done)
        | "Gather summaries" >> beam.Flatten()
        | "Count units" >> beam.Map(RunTotals.of)
        | "Sum up" >> beam.CombineGlobally(sum_totals)
    )
    return totals
