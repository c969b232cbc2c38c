"""The commands: each takes what was parsed, and runs.

Typer only parses. What it calls returns a job, the command with its arguments, that ``main`` runs,
so that every error is reported in one place. Heavy modules are imported inside the commands:
``earmark --help`` must answer at once.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import __version__
from pipeline.cli import options
from pipeline.cli.options import Given, Option, split_values
from pipeline.terminal.logs import configure_logging
from transforms.errors import OutputError, UsageError

if TYPE_CHECKING:
    from pipeline.config.label import RunConfig

Job = Callable[[], int]
Command = Callable[..., int]

app = typer.Typer(
    name="earmark",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"earmark {__version__}")
        raise typer.Exit


@app.callback()
def earmark(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; the same as EARMARK_DEBUG=1.")
    ] = False,
) -> None:
    """Label audio datasets with the Audio Spectrogram Transformer on Apache Beam.

    Everything after a bare [b]--[/b] goes to Beam as pipeline options.
    """
    if debug:
        os.environ["EARMARK_DEBUG"] = "1"


def command(
    table: tuple[Option, ...], *, runs_pipeline: bool = False
) -> Callable[[Command], Command]:
    """Return a decorator that makes a function a command with these options.

    The function is called with the values of the rows without a key, by name. If the table has
    rows with a key, a ``Given`` comes first. Options for Beam are taken if it ``runs_pipeline``.
    """

    def register(run: Command) -> Command:
        def parse(context: typer.Context, **values: Any) -> Job:
            beam_options: list[str] = context.obj or []
            if beam_options and not runs_pipeline:
                raise UsageError(
                    f"earmark {context.info_name} runs no pipeline and takes no options for Beam: "
                    f"-- {' '.join(beam_options)}"
                )
            given, own = split_values(table, values, beam_options)
            has_config = any(option.key is not None for option in table)
            return functools.partial(run, *([given] if has_config else []), **own)

        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_ONLY, annotation=typer.Context
        )
        parameters = [context, *(option.parameter() for option in table)]
        parse.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        parse.__doc__ = run.__doc__
        app.command(run.__name__)(parse)
        return run

    return register


@command(options.LABEL, runs_pipeline=True)
def label(given: Given) -> int:
    """Label audio: read it, run the model over it, write Parquet.

    Run the same command again to resume after an interruption, or to label what is new.
    """
    config = _labelling_config(given, needs_output=True)
    began_s = time.monotonic()
    from pipeline.labelling.run import run_label

    return run_label(config, given.beam_options, imports_s=time.monotonic() - began_s)


@command(options.PLAN, runs_pipeline=True)
def plan(given: Given, segment_s: float | None, manifest: str | None) -> int:
    """Show what [b]label[/b] would do: files, hours, windows, what is done already; runs nothing.

    Takes the options of [b]label[/b], so that the same command line serves both. With
    [b]--segment-s[/b] it writes a manifest that divides long recordings into segments.
    """
    config = _labelling_config(given, needs_output=False)
    check_output_is_folder(config.output)
    if segment_s is not None or manifest is not None:
        from pipeline.labelling.segments import run_segments

        return run_segments(config, segment_s, manifest)
    from pipeline.labelling.estimate import run_plan

    return run_plan(config, given.beam_options)


@command(options.VERIFY)
def verify(folder: str, quiet: bool) -> int:
    """Check a result: parts against commits, orphans, duplicates, the accounting.

    Says what to do about each problem. The exit code is 0 only if the result is whole, 3 if it is
    damaged or unfinished.
    """
    from pipeline.result.verify import run_verify

    return run_verify(folder, quiet=quiet)


@command(options.SUMMARY)
def summary(folder: str) -> int:
    """Show what is in a result: labels by clips and hours, scores, warnings, failures."""
    from pipeline.result.summary import run_summary

    return run_summary(folder)


@command(options.STATS, runs_pipeline=True)
def stats(given: Given, as_original: bool) -> int:
    """Measure the mean and standard deviation of a dataset's features, to normalise them with.

    [b]--set model.preprocessor=DIR[/b] makes label use what is written.
    """
    config = _labelling_config(given, needs_output=False)
    from pipeline.labelling.stats import run_stats

    return run_stats(config, given.beam_options, as_original=as_original)


@command(options.EVALUATE)
def evaluate(
    given: Given,
    folders: list[str],
    truth: str | None,
    model: str | None,
    output: str | None,
    known_labels_only: bool,
    quiet: bool,
) -> int:
    """Compare labels with the truth: accuracy, mAP, AUC, d', per class; JSON and a picture."""
    check_output_lasts(output)
    from pipeline.config.label import TruthConfig
    from pipeline.config.load import load_config

    manifest = load_config(TruthConfig, None, given.sets, given.options).manifest
    from pipeline.evaluation.evaluate import run_evaluate

    return run_evaluate(
        folders,
        truth=truth,
        model=model,
        output=output,
        known_labels_only=known_labels_only,
        quiet=quiet,
        tables=manifest,
    )


@command(options.TRAIN)
def train(given: Given, label_column: str | None) -> int:
    """Train a model on your own labelled clips, from a checkpoint or from scratch.

    Run the same command again to resume after an interruption, from the last finished epoch.
    """
    from pipeline.config.label import given_output
    from pipeline.config.load import load_config
    from pipeline.config.train import TrainConfig, given_train

    settings = list(given.options)
    if label_column is not None:
        key = "manifest.columns"
        columns = [text for name, texts, _ in settings if name == key for text in texts]
        settings.append((key, [*columns, f"label={label_column}"], "--label-column"))
    config = load_config(TrainConfig, given.config, given.sets, settings)
    given_train(config)
    check_output_lasts(given_output(config.output))
    configure_logging(config.quiet)
    from pipeline.training.run import run_train

    return run_train(config)


@command(options.MODELS)
def models(json: bool) -> int:
    """List what can be used as [b]--model[/b], with source, licence, window and labels."""
    from pipeline.cli.models import print_models, print_models_json

    (print_models_json if json else print_models)()
    return 0


@command(options.EXPORT)
def export(
    folder: str,
    format: str,
    output: str | None,
    label: list[str] | None,
    threshold: float | None,
    top_k: int | None,
    per: str | None,
    null: bool,
    one_table: bool,
    quiet: bool,
) -> int:
    """Write labels with their times for the tools people review audio in, or list files."""
    check_output_lasts(output)
    from pipeline.result.export import run_export

    return run_export(
        folder,
        format,
        output,
        labels=label or (),
        threshold=threshold,
        top_k=top_k,
        per=per,
        null=null,
        one_table=one_table,
        quiet=quiet,
    )


def _labelling_config(given: Given, *, needs_output: bool) -> RunConfig:
    """Load the configuration, and check what no default can give, before torch and Beam load."""
    from pipeline.config.label import RunConfig, given_inputs, given_output
    from pipeline.config.load import load_config

    config = load_config(RunConfig, given.config, given.sets, given.options)
    given_inputs(config)
    if needs_output:
        given_output(config.output)
    check_output_is_folder(config.output)
    check_output_lasts(config.output)
    configure_logging(config.quiet)
    return config


def check_output_is_folder(output: str | None) -> None:
    """Refuse an output that is meant to be a file."""
    from transforms.storage.urls import names_file

    if output is not None and (output == "-" or names_file(output)):
        file = "-" if output == "-" else "FILE"
        raise OutputError(
            f"--output is {output}, and a result is a folder of Parquet files. Give a folder; then "
            f"earmark export DIR --format csv --output {file} writes its labels to "
            f"{'standard output' if output == '-' else 'a file'}."
        )


def check_output_lasts(output: str | None) -> None:
    """Refuse an output that would be gone when the command ends."""
    if output is not None and output.lower().startswith("memory:"):
        raise OutputError(
            f"--output is {output}, and memory:// is gone when the command ends; give a folder."
        )
