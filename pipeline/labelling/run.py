"""``earmark label``: plan a run, run its graph, and print the result.

Planning finds every error in the command before anything is written. Then the output is repaired,
``run.json`` gets the status ``running``, and the graph does the rest. Its last step writes the
totals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.config.label import RunConfig, given_inputs, given_output
from pipeline.exit_codes import EXIT_DONE, EXIT_INCOMPLETE
from pipeline.graph import RunTotals, build_graph
from pipeline.labelling.calibration import calibrate
from pipeline.labelling.forecast import (
    DeferredForecast,
    Forecast,
    PlanForecast,
    show_progress,
)
from pipeline.labelling.plan import (
    ResolvedRun,
    RunPlan,
    describe_missing_columns,
    describe_model,
    describe_plan,
    find_plan,
    make_finish,
    resolve_run,
)
from pipeline.labelling.plan_on_workers import build_deferred_graph
from pipeline.labelling.same_bytes import write_renewed
from pipeline.result.lock import hold_output
from pipeline.result.state import (
    SUCCESS_FILE,
    FinishRun,
    heal,
    read_run,
    remove_result,
    remove_staging,
    utc_now,
    wait_for_writers,
    write_run,
)
from pipeline.runners.dataflow import check_no_job, follow, is_dataflow, is_left_running, submit
from pipeline.runners.options import (
    check_model_reachable,
    check_reachable,
    check_runner,
    is_in_process,
    is_remote,
    pipeline_options,
    temporary_files_in_scratch,
)
from pipeline.terminal.count_report import (
    describe_errors,
    describe_labels,
    describe_warnings,
    may_succeed,
)
from pipeline.terminal.precision_report import describe_checks, precision_warnings
from pipeline.terminal.progress import LiveReader
from pipeline.terminal.std_streams import say
from pipeline.terminal.time_report import UNTIMED, Startup, describe_time
from pipeline.terminal.wording import counted, format_audio, format_duration
from transforms.errors import ConfigError, OutputError, TooManyListedError
from transforms.process.progress_counts import LiveCounts, UnitsSeen
from transforms.process.stage_times import stage_clocks
from transforms.process.temp_folders import sweep
from transforms.records import WorkUnit
from transforms.results.commits import Commit, UnitTotals, list_unit_ids, read_commit
from transforms.sources.read_unit import check_there
from transforms.storage import urls, writing
from transforms.storage.secrets import public_uri

# Listing a remote folder takes a while, so commits of workers are counted every few seconds.
COMMIT_POLL_INTERVAL_S = 5.0

MAX_JOB_BYTES = 4 << 20


def run_label(config: RunConfig, beam_options: list[str], *, imports_s: float = 0.0) -> int:
    """Label the inputs, and return the exit code.

    It is 0 for done, or for submitted without waiting; 3 for done with a broken container or with
    more failures than allowed. Options in ``beam_options`` win over ``config.beam``. ``imports_s``
    is the time that importing this module took, for ``run.json``.

    Raises:
        UsageError: The command is not valid; nothing was written.
        AccountingError: Items and rows do not add up.
    """
    began_s = time.monotonic()
    options = pipeline_options(config, beam_options)
    remote = is_remote(options)
    output = urls.normalise(given_output(config.output))
    check_runner(options, config.inference.device)
    if remote:
        check_reachable(
            [urls.normalise(text) for text in given_inputs(config)],
            output,
            truth=None if config.truth is None else urls.normalise(config.truth),
        )
    sweep()
    with hold_output(output, on_lost=_interrupt_main_thread):
        wait_for_writers(output)
        check_no_job(output)
        resolved = resolve_run(config, is_remote=remote)
        if remote:
            check_model_reachable(resolved.label.model)
        run = plan_locally(resolved, config, options) or plan_on_workers(resolved, config)
        draw = run.prepare(Startup(imports_s, time.monotonic() - began_s))
        started = time.monotonic()
        if draw is not None:
            try:
                is_done = run_graph(draw, output, run.forecast, options, config.quiet)
            finally:
                remove_staging(output)
            if not is_done:
                say(f"When the job has ended, check it: earmark verify {public_uri(output)}")
                return EXIT_DONE
        return report(output, config, time.monotonic() - started)


@dataclass(frozen=True)
class PlannedRun:
    """A run that is ready to start.

    ``prepare`` repairs the output and returns the function that builds the graph; None if there
    was nothing to do and the run is finished.
    """

    prepare: Callable[[Startup], Callable[[beam.Pipeline], None] | None]
    forecast: Forecast


def plan_locally(
    resolved: ResolvedRun, config: RunConfig, options: PipelineOptions
) -> PlannedRun | None:
    """Plan a run on this machine; None if the inputs are too many to list or to submit.

    Raise ``UsageError`` before anything is written if the command or an input is not valid.
    """
    try:
        plan = find_plan(resolved, config.units.max_listed_here)
    except TooManyListedError:
        return None
    if is_dataflow(options) and not fits_job(plan.units):
        return None
    for line in describe_plan(plan):
        say(line, quiet=config.quiet and not line.endswith(plan.found.warnings))
    plan = calibrate(plan, config.inference.calibration_windows)

    def prepare(startup: Startup) -> Callable[[beam.Pipeline], None] | None:
        finish = prepare_output(plan, startup)
        if plan.units:
            label, commit = plan.resolved.label, plan.resolved.commit
            return functools.partial(
                build_graph, units=plan.units, label=label, commit=commit, finish=finish
            )
        finish(RunTotals())
        return None

    label = plan.resolved.label
    forecast = PlanForecast(plan.units, plan.found, label.sources, label.decode)
    return PlannedRun(prepare, forecast)


def fits_job(units: Sequence[WorkUnit]) -> bool:
    """Return whether a job description of Dataflow has room for these units."""
    num_bytes = itertools.accumulate(len(pickle.dumps(unit)) for unit in units)
    return all(total <= MAX_JOB_BYTES for total in num_bytes)


def plan_on_workers(resolved: ResolvedRun, config: RunConfig) -> PlannedRun:
    """Return a run that workers plan.

    Raise ``UsageError`` if an input does not exist, or the settings need a plan made here.
    """
    if config.inference.precision == "int8":
        raise ConfigError(
            "inference.precision is int8, which is calibrated on the inputs before the work "
            "starts, and there are too many of them to list on this machine "
            f"(units.max_listed_here is {config.units.max_listed_here}); raise that, or use "
            "--precision auto."
        )
    check_there([*resolved.urls, *([] if resolved.truth is None else [resolved.truth])])
    for line in (*describe_model(resolved.label), *describe_missing_columns(resolved)):
        say(line, quiet=config.quiet)
    say("There are many inputs: workers list and group them.", quiet=config.quiet)

    def prepare(startup: Startup) -> Callable[[beam.Pipeline], None]:
        begun = begin_output(resolved, {}, is_new=True)  # workers renew the commits
        return functools.partial(build_deferred_graph, resolved=begun, startup=startup)

    return PlannedRun(prepare, DeferredForecast(resolved.state.output))


def _interrupt_main_thread() -> None:
    # A signal interrupts any call that the main thread is blocked in.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def prepare_output(plan: RunPlan, startup: Startup = UNTIMED) -> FinishRun:
    """Repair the output and mark the run as running; return the run's last step."""
    is_new = bool(plan.units) or not plan.resolved.state.succeeded
    begun = begin_output(plan.resolved, plan.renewed, is_new=is_new)
    return make_finish(dataclasses.replace(plan, resolved=begun), startup)


def begin_output(
    resolved: ResolvedRun, renewed: Mapping[str, Commit], *, is_new: bool
) -> ResolvedRun:
    """Repair the output, or remove the existing result; return the run with its start's time.

    ``run.json`` is written if the run ``is_new``: if there may be units to do. Raise
    ``OutputError`` if that fails.
    """
    state = resolved.state
    run = {**resolved.run, "started_utc": utc_now()}
    try:
        if is_new:
            # First: from here on, no reader may take the result for a whole one.
            writing.remove(urls.join(state.output, SUCCESS_FILE))
        if resolved.keeps:
            heal(state)
            write_renewed(state.output, renewed)
        else:
            remove_result(state)
        if is_new:
            write_run(state.output, run)
    except OSError as error:
        raise OutputError(
            f"{public_uri(state.output)} cannot be written: {error}. Give another --output, or fix "
            "its permissions."
        ) from error
    return dataclasses.replace(resolved, run=run)


def run_graph(
    draw: Callable[[beam.Pipeline], None],
    output: str,
    forecast: Forecast,
    options: PipelineOptions,
    quiet: bool,
) -> bool:
    """Run the graph and show its progress; return False if the options say not to wait for it."""
    with temporary_files_in_scratch():  # else its folder would remain when the run is killed
        pipeline = beam.Pipeline(options=options)
    draw(pipeline)
    stage_clocks.reset()
    is_waited_for = not (is_remote(options) and is_left_running(options))
    # Dataflow accepts the job and answers at once; other runners do the work in the call to run.
    result = submit(pipeline, output, options, quiet=quiet) if is_dataflow(options) else None
    if not is_waited_for:
        if result is None:
            pipeline.run()
            say("The job is submitted; this command does not wait for it.", quiet=quiet)
        return False
    read = LiveReader() if is_in_process(options) else _CommitReader(output)
    progress = show_progress(read, forecast, quiet=quiet)
    with progress, temporary_files_in_scratch():  # a job server stages files in a folder
        follow(result or pipeline.run(), output, options)
    return True


class _CommitReader:
    """Counts the units committed since it was made, by listing the commits every few seconds."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._seen = set(list_unit_ids(output))
        self._committed: list[str] = []
        self._totals = UnitTotals()
        self._next_s = 0.0

    def __call__(self) -> LiveCounts:
        if time.monotonic() >= self._next_s:
            self.refresh()
        done = self._totals
        return LiveCounts(
            clips=done.items - done.failures,
            windows=done.windows,
            audio_s=done.audio_s,
            failures=done.failures,
            units=len(self._committed),
            clip_windows=done.windows,
        )

    def seen(self) -> UnitsSeen:
        """Return the units that are done."""
        return UnitsSeen(committed=self._committed)

    def refresh(self) -> None:
        """List the commits now; ``ProgressDisplay`` calls this at the end."""
        self._next_s = time.monotonic() + COMMIT_POLL_INTERVAL_S
        # Neither the display nor a commit that is being redone may end the run.
        with contextlib.suppress(OSError, OutputError):
            for unit_id in list_unit_ids(self._output):
                if unit_id not in self._seen:
                    self._totals += read_commit(self._output, unit_id).totals
                    self._seen.add(unit_id)
                    self._committed.append(unit_id)


def report(output: str, config: RunConfig, elapsed_s: float) -> int:
    """Print the closing lines, and return the exit code."""
    run = read_run(output) or {}
    totals: Mapping[str, Any] = run["totals"]
    checks = run.get("checks", {})
    lines = [
        *closing_lines(output, totals, run["engines"], elapsed_s),
        *describe_time(run["time"]),
        *describe_checks(checks),
    ]
    for line in lines:
        say(line, quiet=config.quiet)
    # Warnings and failures are printed with --quiet, too.
    for line in (*precision_warnings(checks), *describe_warnings(totals)):
        say(line)
    failures, items = totals["found_failures"], totals["found_items"]
    if failures:
        retry = " To retry: --retry-failed" if may_succeed(totals) else ""
        say(
            f"{failures:,} of {counted(items, 'item')} could not be labelled; the reasons are in "
            f"{public_uri(urls.join(output, 'errors'))}/*.parquet.{retry}"
        )
        for line in describe_errors(totals):
            say(line)
    if totals["broken_containers"]:
        say(
            f"Among the failures: {counted(totals['broken_containers'], 'container')} (tar, "
            "Parquet, manifest) not read to the end; the part that could be read is labelled."
        )
        return EXIT_INCOMPLETE
    if items and failures / items > config.max_failed:
        say(f"That is more than --max-failed allows ({config.max_failed:.4g} of the items).")
        return EXIT_INCOMPLETE
    return EXIT_DONE


def closing_lines(
    output: str, totals: Mapping[str, Any], engines: Sequence[str], elapsed_s: float
) -> list[str]:
    """Describe the accounting of a run, and where its rows are."""
    found, failed = totals["found_items"], totals["found_failures"]
    is_one_each = totals["clips"] == totals["items"] - totals["failures"]
    clips_too = "" if is_one_each else f"{counted(totals['clips'], 'clip')} (a channel each), "
    lines = [
        f"{counted(found, 'item')} found: {found - failed:,} labelled, {failed:,} failed "
        f"({totals['new_items']:,} in this run, {format_duration(elapsed_s)}).",
        f"{clips_too}{counted(totals['windows'], 'window')}, {format_audio(totals['audio_s'])} of "
        f"audio, {counted(totals['units'], 'unit')} in the result.",
    ]
    if totals["vanished_items"]:
        lines.append(
            f"Not in this input, or beyond its limit: {counted(totals['vanished_items'], 'item')} "
            "of earlier runs; their rows are kept."
        )
    if engines:
        lines.append(
            f"Computed by {'a mixture: ' if len(engines) > 1 else ''}{', '.join(engines)}."
        )
    lines += describe_labels(totals)
    if totals["clips"]:
        clips, windows = (public_uri(urls.join(output, name)) for name in ("clips", "windows"))
        lines.append(
            f"Labels: {clips}/*.parquet (a row per clip), {windows}/*.parquet (a row per window)."
        )
    return lines
