"""START READING HERE: the whole run as one Beam graph.

    units ─▶ skip what is committed ─▶ LabelUnits ─▶ CommitUnits ─▶ summaries ─┐
                      └─────────────────── summaries of units already done ────┤
                                                     run.json, _SUCCESS ◀─ total

Where a file is so long that it would be several units (``is_long``), it is labelled in parts, by
the same steps as everything else, and joined once they are committed:

    units ─▶ cut long files ─▶ skip … ─▶ CommitUnits ─▶ summaries ─┬─────────────────▶ total
                     └─ parts ──▲                          parts ─▶ by file ─▶ join ─┘

A unit is a small description of what to read: a few hundred files, or a slice of a tar or Parquet
file (``plan`` makes them; where the inputs are too many, workers do: ``deferred``). From reading
to commit everything happens in one fused stage; only units go in and only summaries come out, so
that memory stays flat and a unit is committed as soon as its last window is labelled. Any
shuffle, side input, state or differing resource hint in between would split that stage:
``tests/pipeline/test_graph.py`` holds it together, and ``CommitUnits`` raises rather than commit
half a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import apache_beam as beam
from apache_beam.pvalue import PCollection

from transforms.join_parts import JoinParts
from transforms.label_audio import LabelSettings, LabelUnits
from transforms.long_files import CutLongFiles
from transforms.process.stage_times import NO_SECONDS, StageSeconds
from transforms.records import WorkUnit
from transforms.results.commits import Checks, UnitSummary, UnitTotals, add_checks
from transforms.results.write_units import CommitSettings, CommitUnits, SkipCommitted
from transforms.sources.read_unit import is_long


@dataclass(frozen=True)
class RunTotals:
    """The sum of unit summaries.

    Attributes:
        units: How many units.
        totals: What they held.
        engines: Everything that computed them; more than one is a mixture, and reported.
        checks: How far each was from float32, where that was looked at.
        seconds: Where the time went that this run took for them.
    """

    units: int = 0
    totals: UnitTotals = field(default_factory=UnitTotals)
    engines: tuple[str, ...] = ()
    checks: Checks = field(default_factory=dict)
    seconds: StageSeconds = NO_SECONDS

    def __add__(self, other: RunTotals) -> RunTotals:
        return RunTotals(
            self.units + other.units,
            self.totals + other.totals,
            tuple(sorted({*self.engines, *other.engines})),
            add_checks(self.checks, other.checks),
            self.seconds + other.seconds,
        )

    @staticmethod
    def of(summary: UnitSummary) -> RunTotals:
        """The totals of one unit; of a part of a long file, only what time it took."""
        if summary.part is not None:
            return RunTotals(seconds=summary.seconds)
        return RunTotals(1, summary.totals, summary.engines, summary.checks, summary.seconds)


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
    """Draw the run.

    Args:
        pipeline: Where to draw it.
        units: What to label.
        label: The settings of every step.
        commit: Where and how to write.
        finish: Called once with the totals of all units, after the last commit; it must be
            picklable, since it runs where the pipeline runs.
    """
    listed = pipeline | "List units" >> beam.Create(units)
    cuts = any(is_long(unit, label.sources) for unit in units)
    totals = label_units(listed, label, commit, cuts_long_files=cuts)
    _ = totals | "Finish run" >> beam.Map(finish)


def label_units(
    units: PCollection[WorkUnit],
    label: LabelSettings,
    commit: CommitSettings,
    *,
    cuts_long_files: bool,
) -> PCollection[RunTotals]:
    """Draw what is done with units, however they were planned.

    Args:
        units: What to label.
        label: The settings of every step.
        commit: Where and how to write.
        cuts_long_files: Whether there may be files that are labelled in parts.

    Returns:
        The totals of all units, once the last is committed.
    """
    if cuts_long_files:
        whole, parts = units | "Cut long files" >> CutLongFiles(
            label.sources, label.windows, label.decode, commit.output, commit.fingerprint
        )
        # Without this, all parts of a file would be labelled where it was cut.
        spread = parts | "Spread parts" >> beam.Reshuffle()
        units = (whole, spread) | "Units and parts" >> beam.Flatten()
    to_do, done = units | "Skip committed" >> SkipCommitted(commit)
    labelled = to_do | "Label" >> LabelUnits(label) | "Commit" >> CommitUnits(commit)
    summaries = (labelled, done) | "Gather summaries" >> beam.Flatten()
    if cuts_long_files:
        joined = summaries | "Join parts" >> JoinParts(commit, label.windows)
        summaries = (summaries, joined) | "Add joined files" >> beam.Flatten()
    totals: PCollection[RunTotals] = (
        summaries
        | "Count units" >> beam.Map(RunTotals.of)
        | "Sum up" >> beam.CombineGlobally(sum_totals)
    )
    return totals
