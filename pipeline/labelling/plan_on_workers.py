"""Planning on the workers, for more inputs than the launching machine can list.

    run ─▶ list, compare with commits ─┬─▶ units of files ─────────┐
                                       ├─▶ containers ─▶ cut each ─┴▶ units ─▶ graph.label_units
                                       └─▶ FinishRun ─▶ run.json, _SUCCESS

A worker calls the same functions as ``plan``, so the units are the same. Containers, whose headers
must be read, are cut by all workers. Neither items nor units go through the job's description,
whose size runners limit. One worker lists and groups all loose files: it needs memory for them
(``docs/scale.md``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import AsSingleton, PCollection, TaggedOutput
from apache_beam.transforms.combiners import Count
from apache_beam.typehints.decorators import IOTypeHints

from pipeline.graph import RunTotals, label_units
from pipeline.labelling.plan import ResolvedRun, find_work, make_finish
from pipeline.result.state import FinishRun, ResultState, read_result
from pipeline.terminal.time_report import Startup
from transforms.records import WorkUnit
from transforms.sources.read_unit import RestOfContainer, SourceSettings, cut_container


@dataclass(frozen=True)
class DeferredPlan:
    """What a worker needs to plan a run; it reads the state of the output itself."""

    resolved: ResolvedRun
    startup: Startup

    @staticmethod
    def of(resolved: ResolvedRun, startup: Startup) -> DeferredPlan:
        """Build the plan after the output has been repaired."""
        state = ResultState(resolved.output)
        return DeferredPlan(dataclasses.replace(resolved, state=state, keeps=True), startup)


class PlanUnits(
    beam.PTransform[PCollection[DeferredPlan], tuple[PCollection[WorkUnit], PCollection[FinishRun]]]
):
    """Plan a run: ``DeferredPlan`` to ``WorkUnit``s and their ``FinishRun``."""

    def __init__(self, sources: SourceSettings) -> None:
        super().__init__()
        self._sources = sources

    def default_type_hints(self) -> IOTypeHints:
        """Return the types that Beam checks elements against."""
        hints = IOTypeHints.empty().with_input_types(DeferredPlan)
        return hints.with_output_types(WorkUnit, FinishRun)

    def expand(
        self, plans: PCollection[DeferredPlan]
    ) -> tuple[PCollection[WorkUnit], PCollection[FinishRun]]:
        """Apply the transform."""
        step = beam.FlatMap(list_and_compare).with_output_types(
            WorkUnit, rests=RestOfContainer, finish=FinishRun
        )
        planned = plans | "List and compare" >> step.with_outputs("rests", "finish", main="units")
        cut = beam.FlatMap(functools.partial(cut_container, settings=self._sources))
        of_containers = (
            planned.rests
            | "Spread containers" >> beam.Reshuffle()
            | "Cut containers" >> cut.with_output_types(WorkUnit)
        )
        units = (planned.units, of_containers) | "All units" >> beam.Flatten()
        return units, planned.finish


def list_and_compare(
    plan: DeferredPlan,
) -> Iterator[WorkUnit | TaggedOutput[str, RestOfContainer] | TaggedOutput[str, FinishRun]]:
    """List the inputs, and compare them with the commits."""
    state = read_result(plan.resolved.output)
    work = find_work(dataclasses.replace(plan.resolved, state=state))
    yield from work.units
    for rest in work.remaining.rests:
        yield TaggedOutput("rests", rest)
    yield TaggedOutput("finish", make_finish(work, plan.startup))


def build_deferred_graph(pipeline: beam.Pipeline, plan: DeferredPlan) -> None:
    """Build the graph of a run that begins with its own planning."""
    resolved, sources = plan.resolved, plan.resolved.label.sources
    units, finish = pipeline | "Create plan" >> beam.Create([plan]) | "Plan" >> PlanUnits(sources)
    num_units = units | "Count planned units" >> Count.Globally()
    # Without it, the worker that planned the units would label them all.
    spread = units | "Spread units" >> beam.Reshuffle()
    totals = label_units(spread, resolved.label, resolved.commit)
    _ = totals | "Finish run" >> beam.Map(finish_run, AsSingleton(finish), AsSingleton(num_units))


def finish_run(new: RunTotals, finish: FinishRun, num_units: int) -> None:
    """Finish the run, with the number of units after all containers are cut."""
    num_commits = finish.kept.units + num_units
    dataclasses.replace(finish, num_units=num_units, num_commits=num_commits)(new)
