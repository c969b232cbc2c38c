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

import apache_beam as beam
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.transforms.combiners import Count

from pipeline.graph import RunTotals, label_units
from pipeline.labelling.plan import ResolvedRun, find_work, make_finish
from pipeline.labelling.same_bytes import write_renewed
from pipeline.result.state import FinishRun, ResultState, read_result
from pipeline.terminal.time_report import Startup
from transforms.records import WorkUnit
from transforms.sources.read_unit import RestOfContainer, cut_container


def list_and_compare(
    resolved: ResolvedRun, startup: Startup
) -> Iterator[WorkUnit | TaggedOutput[str, RestOfContainer] | TaggedOutput[str, FinishRun]]:
    """List the inputs, and compare them with the commits."""
    state = read_result(resolved.state.output)
    work = find_work(dataclasses.replace(resolved, state=state))
    write_renewed(resolved.state.output, work.renewed)
    yield from work.units
    for rest in work.remaining.rests:
        yield TaggedOutput("rests", rest)
    yield TaggedOutput("finish", make_finish(work, startup))


def build_deferred_graph(pipeline: beam.Pipeline, resolved: ResolvedRun, startup: Startup) -> None:
    """Build the graph of a run that begins with its own planning, once the output is repaired."""
    # A worker reads the state of the output itself.
    deferred = dataclasses.replace(resolved, state=ResultState(resolved.state.output), keeps=True)
    step = beam.FlatMap(list_and_compare, startup).with_output_types(
        WorkUnit, rests=RestOfContainer, finish=FinishRun
    )
    planned = (
        pipeline
        | "Create plan" >> beam.Create([deferred])
        | "List and compare" >> step.with_outputs("rests", "finish", main="units")
    )
    cut = beam.FlatMap(functools.partial(cut_container, settings=resolved.label.sources))
    of_containers = (
        planned.rests
        | "Spread containers" >> beam.Reshuffle()
        | "Cut containers" >> cut.with_output_types(WorkUnit)
    )
    units = (planned.units, of_containers) | "All units" >> beam.Flatten()
    num_units = units | "Count planned units" >> Count.Globally()
    # Without it, the worker that planned the units would label them all.
    spread = units | "Spread units" >> beam.Reshuffle()
    totals = label_units(spread, resolved.label, resolved.commit)
    _ = totals | "Finish run" >> beam.Map(
        finish_run, AsSingleton(planned.finish), AsSingleton(num_units)
    )


def finish_run(new: RunTotals, finish: FinishRun, num_units: int) -> None:
    """Finish the run, with the number of units after all containers are cut."""
    dataclasses.replace(finish, num_units=num_units)(new)
