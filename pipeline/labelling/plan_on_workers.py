"""Planning where the work is done, for inputs that are too many for the launching machine.

    resolved ─▶ list, compare with commits ─┬─▶ units of files ─────────┐
                                         ├─▶ containers ─▶ cut each ─┴▶ units ─▶ graph.label_units
                                         └─▶ what the last step must know ─▶ run.json, _SUCCESS

The same functions as in ``plan``, and so the same units; only that a worker calls them, and that
containers (whose headers must be read) are cut by all workers. Neither items nor units go through
the job's description, which runners bound. One worker lists and groups all loose files: it needs
memory for them (``docs/scale.md``).
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
from transforms.sources.read_unit import RestOfContainer, cut_container


@dataclass(frozen=True)
class DeferredPlan:
    """What a worker needs to plan a run.

    Attributes:
        resolved: All of a plan but what the inputs hold; without the output's state, which the
            worker reads for itself.
        startup: What starting took.
    """

    resolved: ResolvedRun
    startup: Startup

    @staticmethod
    def of(resolved: ResolvedRun, startup: Startup) -> DeferredPlan:
        """The plan to be made of a resolved, once the output has been brought in order."""
        state = ResultState(resolved.output)
        return DeferredPlan(dataclasses.replace(resolved, state=state, keeps=True), startup)


class PlanUnits(
    beam.PTransform[PCollection[DeferredPlan], tuple[PCollection[WorkUnit], PCollection[FinishRun]]]
):
    """Plan a run: ``DeferredPlan`` to ``WorkUnit``s, and the ``FinishRun`` that goes with them.

    Args:
        resolved: What is to be planned.
    """

    def __init__(self, resolved: ResolvedRun) -> None:
        super().__init__()
        self._sources = resolved.label.sources

    def default_type_hints(self) -> IOTypeHints:
        """What Beam checks what goes in and comes out against."""
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
    """List the inputs and compare them with what is committed.

    Raises:
        InputError: An input is not right.
    """
    state = read_result(plan.resolved.output)
    work = find_work(dataclasses.replace(plan.resolved, state=state))
    yield from work.units
    for rest in work.remaining.rests:
        yield TaggedOutput("rests", rest)
    yield TaggedOutput("finish", make_finish(work, plan.startup))


def build_deferred_graph(pipeline: beam.Pipeline, plan: DeferredPlan) -> None:
    """Draw a run that begins with its own planning.

    Args:
        pipeline: Where to draw it.
        plan: What is to be planned.
    """
    resolved = plan.resolved
    units, finish = (
        pipeline | "What is to be planned" >> beam.Create([plan]) | "Plan" >> PlanUnits(resolved)
    )
    num_units = units | "Count planned units" >> Count.Globally()
    # Without this, all units would be labelled where they were planned.
    spread = units | "Spread units" >> beam.Reshuffle()
    cuts = resolved.label.sources.windows_per_part is not None
    totals = label_units(spread, resolved.label, resolved.commit, cuts_long_files=cuts)
    _ = totals | "Finish run" >> beam.Map(finish_run, AsSingleton(finish), AsSingleton(num_units))


def finish_run(new: RunTotals, finish: FinishRun, num_units: int) -> None:
    """The last step, with the number of units that cutting containers has given.

    Raises:
        AccountingError: Units, items and rows do not add up.
    """
    num_commits = finish.kept.units + num_units
    dataclasses.replace(finish, num_units=num_units, num_commits=num_commits)(new)
