"""The command line: parses, loads the configuration, runs a command, gives the exit code.

    argv ─split at a bare "--"─▶ typer ─▶ a job (nothing has run yet) ─▶ run, errors to exit codes

Typer only parses; each command returns the job to run, so that every error is told in one place.
Heavy modules are imported inside the jobs: ``earmark --help`` must answer at once.
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from typer.exceptions import TyperException

from pipeline import __version__
from pipeline.__main__ import EXIT_INTERRUPTED, INTERRUPTED
from pipeline.terminal.std_streams import usable_streams
from transforms import errors
from transforms.errors import (
    AnswerError,
    EarmarkError,
    OutputError,
    OutputLostError,
    UsageError,
    in_words,
)

if TYPE_CHECKING:
    from pipeline.config.label import RunConfig, Schema
    from pipeline.config.train import TrainConfig

EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
MODELS_WIDTH = 200  # more than the table needs
# How long after an interrupt that was lost in a callback it comes again.
LOST_INTERRUPT_S = 0.02
GO_ON = "Once that is mended, run the same command again: it goes on from what is done."
AGAIN = "Once that is mended, run the same command again."
SEE_DEBUG = "EARMARK_DEBUG=1 shows where it comes from."

GOES_ON = ("label", "train")  # commands that do only what is missing

Job = Callable[[], int]

# What Beam says in every run: of BigQuery, which Earmark has nothing to do with, and of a memory
# figure that it would have liked to take.
NOISE = (
    "apitools not found",
    "Resource module is not available",
    "Discarding unparseable args",
)

# Their tracebacks are those of errors that reach ``main``, or of requests that are sent again.
TOLD_AT_THE_END = ("apache_beam.runners", "gcsfs")

# An exception in the text of a traceback, and what Beam adds to its message.
RAISED = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.*)$", re.MULTILINE)
RUNNING_STEP = re.compile(r" \[while running '[^\n]*'\]")

app = typer.Typer(
    name="earmark",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

OUTPUT_PANEL, MODEL_PANEL, WINDOWS_PANEL, RUN_PANEL = "Output", "Model", "Windows", "Run"
CLIPS_PANEL, TRAINING_PANEL = "Clips", "Training"

# Each option is a key of the config (OPTION_KEYS of pipeline.config.label and
# pipeline.config.train), which checks its value and knows its default: None is "not given".
# The defaults said here are held to those by a test.
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Files, globs, folders, tars, audio-Parquet or manifests; local paths or URLs.",
        show_default=False,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="The result's folder.", rich_help_panel=OUTPUT_PANEL
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Hub id (optionally @revision), folder, or original .pth; see [b]earmark models[/b] "
        "(default: esc10, which ships with Earmark and knows ten sounds).",
        rich_help_panel=MODEL_PANEL,
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="A YAML file, or the name of one that ships with Earmark: audioset, speech_commands.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; repeatable."),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="N",
        help="Labels per row, best first (default 10).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Scores = Annotated[
    bool | None,
    typer.Option(
        "--scores/--no-scores",
        help="Store every class's score (default no).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Overwrite = Annotated[
    bool | None,
    typer.Option(
        "--overwrite/--no-overwrite",
        help="Start anew: remove what Earmark wrote there before (default no).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help="auto, fp32, bf16, fp16 or int8 (default auto: what the chip has natively).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda or mps (default auto); asked for and absent is an error.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="auto, torch or openvino (default auto).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes, one device each if there are several (default 1).",
        rich_help_panel=MODEL_PANEL,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Windows per call (default: what suits the device).",
        rich_help_panel=MODEL_PANEL,
    ),
]
WindowS = Annotated[
    float | None,
    typer.Option(
        "--window-s",
        metavar="SECONDS",
        help="Window length (default: what the checkpoint holds).",
        rich_help_panel=WINDOWS_PANEL,
    ),
]
HopS = Annotated[
    float | None,
    typer.Option(
        "--hop-s",
        metavar="SECONDS",
        help="From one window's start to the next's (default: the window's length).",
        rich_help_panel=WINDOWS_PANEL,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        help="Label at most N items (default: all).",
        rich_help_panel=RUN_PANEL,
    ),
]
RetryFailed = Annotated[
    bool | None,
    typer.Option(
        "--retry-failed/--no-retry-failed",
        help="Try again what failed in an earlier run (default no).",
        rich_help_panel=RUN_PANEL,
    ),
]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        "--max-failed",
        metavar="RATIO",
        help="Share of failed items above which the exit code is 3 (default 0.05).",
        rich_help_panel=RUN_PANEL,
    ),
]
Quiet = Annotated[
    bool | None,
    typer.Option("--quiet/--no-quiet", "-q", help="Only warnings and errors (default no)."),
]
SegmentS = Annotated[
    float | None,
    typer.Option(
        "--segment-s",
        metavar="SECONDS",
        help="Divide longer items into segments of this length; needs --manifest.",
        rich_help_panel=WINDOWS_PANEL,
    ),
]
SegmentsManifest = Annotated[
    str | None,
    typer.Option(
        "--manifest",
        metavar="FILE",
        help="The manifest of segments to write: .jsonl, .csv or .parquet.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
TrainInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--train",
        "-t",
        metavar="INPUT",
        help="What to learn from: a manifest, tar or audio-Parquet with labels; repeatable.",
        show_default=False,
        rich_help_panel=CLIPS_PANEL,
    ),
]
ValidationInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--validation",
        "-v",
        metavar="INPUT",
        help="What to measure each epoch with: other clips with labels; repeatable.",
        show_default=False,
        rich_help_panel=CLIPS_PANEL,
    ),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        "--hold-out",
        metavar="COLUMN=VALUE",
        help="Measure with those clips of --train that have this value, like fold=1.",
        rich_help_panel=CLIPS_PANEL,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Local folder that decoded clips are kept in (default: in the output).",
        rich_help_panel=CLIPS_PANEL,
    ),
]
TrainLimit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        help="Take at most N items (default: all).",
        rich_help_panel=CLIPS_PANEL,
    ),
]
TrainMaxFailed = Annotated[
    float | None,
    typer.Option(
        "--max-failed",
        metavar="RATIO",
        help="Share of failed items above which nothing is trained (default 0.05).",
        rich_help_panel=CLIPS_PANEL,
    ),
]
TrainOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="The folder of the model that comes out; [b]label --model DIR[/b] takes it.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
StartModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="What to start from: hub id (optionally @revision), folder, or original .pth "
        "(default: a small model from scratch).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="LIST",
        help="The labels, in order: a file, audioset or speech_commands (default: those of the "
        "clips).",
        rich_help_panel=MODEL_PANEL,
    ),
]
TrainPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help="auto, fp32, bf16 or fp16 (default auto: what the chip has natively).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
TrainDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda or mps (default auto); asked for and absent is an error.",
        rich_help_panel=TRAINING_PANEL,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        help="Times that the clips are gone through (default 25).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
TrainBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Clips per step (default 48).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        metavar="RATE",
        help="At its highest (default: 0.001 from scratch, else 0.0001).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="What everything that is drawn follows from (default 0).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
TrainConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="A YAML file, or the name of a recipe that ships with Earmark: esc10, esc50, "
        "speech_commands, audioset_balanced, audioset_full.",
    ),
]
ResultFolder = Annotated[
    str, typer.Argument(metavar="DIR", help="A result's folder.", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"earmark {__version__}")
        raise typer.Exit


@app.callback()
def earmark(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
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


@app.command()
def label(
    context: typer.Context,
    inputs: Inputs = None,
    output: Output = None,
    model: Model = None,
    config: ConfigFile = None,
    set: Assignments = None,
    top_k: TopK = None,
    scores: Scores = None,
    precision: Precision = None,
    device: Device = None,
    engine: Engine = None,
    workers: Workers = None,
    batch_size: BatchSize = None,
    window_s: WindowS = None,
    hop_s: HopS = None,
    limit: Limit = None,
    overwrite: Overwrite = None,
    retry_failed: RetryFailed = None,
    max_failed: MaxFailed = None,
    quiet: Quiet = None,
) -> Job:
    """Label audio: read it, run the model over it, write Parquet.

    Run the same command again to go on after an interruption, or to label what has come since.
    """
    return _labelling_job(context)


@app.command()
def plan(
    context: typer.Context,
    inputs: Inputs = None,
    output: Output = None,
    model: Model = None,
    config: ConfigFile = None,
    set: Assignments = None,
    top_k: TopK = None,
    scores: Scores = None,
    precision: Precision = None,
    device: Device = None,
    engine: Engine = None,
    workers: Workers = None,
    batch_size: BatchSize = None,
    window_s: WindowS = None,
    hop_s: HopS = None,
    limit: Limit = None,
    overwrite: Overwrite = None,
    retry_failed: RetryFailed = None,
    max_failed: MaxFailed = None,
    quiet: Quiet = None,
    segment_s: SegmentS = None,
    manifest: SegmentsManifest = None,
) -> Job:
    """Say what [b]label[/b] would do: files, hours, windows, what is done already; runs nothing.

    Takes the options of [b]label[/b], so that the same command line serves both.
    With [b]--segment-s[/b] it writes a manifest that divides long recordings into segments.
    """
    return _labelling_job(context)


@app.command()
def verify(context: typer.Context, folder: ResultFolder, quiet: Quiet = None) -> Job:
    """Check a result: parts against commits, orphans, duplicates, the accounting.

    The exit code is 0 only if the result is whole, 3 if it is damaged or unfinished; what to do
    about it is said.
    """
    _refuse_beam_options(context)

    def job() -> int:
        from pipeline.result.verify import run_verify

        return run_verify(folder, quiet=bool(quiet))

    return job


@app.command()
def stats(
    context: typer.Context,
    inputs: Inputs = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="A folder to write preprocessor_config.json to."
        ),
    ] = None,
    as_original: Annotated[
        bool,
        typer.Option(
            "--as-original",
            help="As the script does that the published figures were made with: mixed, masked, "
            "padding counted.",
        ),
    ] = False,
    config: ConfigFile = None,
    set: Assignments = None,
    workers: Workers = None,
    window_s: WindowS = None,
    hop_s: HopS = None,
    limit: Limit = None,
    overwrite: Overwrite = None,
    max_failed: MaxFailed = None,
    quiet: Quiet = None,
) -> Job:
    """Measure the mean and standard deviation of a dataset's features, to normalise them with.

    [b]--set model.preprocessor=DIR[/b] makes label use what is written.
    """
    parameters, beam_options = dict(context.params), context.obj

    def job() -> int:
        parameters.pop("as_original")
        run_config = _read_config(parameters, needs_output=False)
        _check_output_lasts(run_config.output)
        _configure_logging(run_config.quiet)
        from pipeline.labelling.stats import run_stats

        return run_stats(run_config, beam_options, as_original=as_original)

    return job


@app.command()
def evaluate(
    context: typer.Context,
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR",
            help="A result. The scores of several of the same clips are averaged; several without "
            "a clip in common, such as folds, are taken together.",
            show_default=False,
        ),
    ],
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth",
            "-t",
            metavar="FILE",
            help="A manifest with labels, or AudioSet's segments CSV (default: what the result "
            "itself has as truth).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Where the result's model lies now, if it moved."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where to (default: DIR/evaluation)."
        ),
    ] = None,
    known_labels_only: Annotated[
        bool,
        typer.Option(
            "--known-labels-only", help="Leave out labels of the truth that the model has not."
        ),
    ] = False,
    quiet: Quiet = None,
) -> Job:
    """Compare labels with the truth: accuracy, mAP, AUC, d', per class; JSON and a picture."""
    _refuse_beam_options(context)

    def job() -> int:
        _check_output_lasts(output)
        from pipeline.evaluation.evaluate import run_evaluate

        return run_evaluate(
            folders,
            truth=truth,
            model=model,
            output=output,
            known_labels_only=known_labels_only,
            quiet=bool(quiet),
        )

    return job


@app.command()
def train(
    context: typer.Context,
    train: TrainInputs = None,
    validation: ValidationInputs = None,
    hold_out: HoldOut = None,
    output: TrainOutput = None,
    model: StartModel = None,
    labels: Labels = None,
    config: TrainConfigFile = None,
    set: Assignments = None,
    epochs: Epochs = None,
    batch_size: TrainBatchSize = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: TrainDevice = None,
    precision: TrainPrecision = None,
    cache: Cache = None,
    limit: TrainLimit = None,
    overwrite: Overwrite = None,
    max_failed: TrainMaxFailed = None,
    quiet: Quiet = None,
) -> Job:
    """Train a model on clips with labels: one's own, from a checkpoint or from scratch.

    Run the same command again to go on after an interruption, from the last epoch that was
    finished.
    """
    _refuse_beam_options(context)
    parameters = dict(context.params)

    def job() -> int:
        train_config = _read_train_config(parameters)
        _check_output_lasts(train_config.output)
        _configure_logging(train_config.quiet)
        from pipeline.training.run import run_train

        return run_train(train_config)

    return job


@app.command()
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> Job:
    """List what can be used as [b]--model[/b], with source, licence, window and labels."""
    _refuse_beam_options(context)
    return _print_models_json if as_json else _print_models


@app.command()
def export(
    context: typer.Context,
    folder: ResultFolder,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="csv|audacity|raven",
            help="One CSV file, or one label track or selection table per source file.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where to (default: DIR/export/FORMAT)."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", metavar="SCORE", help="Smallest score (default: all that are stored)."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", metavar="N", help="Labels per window (default: all that are stored)."
        ),
    ] = None,
    quiet: Quiet = None,
) -> Job:
    """Write labels with their times for the tools people review audio in."""
    _refuse_beam_options(context)

    def job() -> int:
        _check_output_lasts(output)
        from pipeline.result.export import run_export

        return run_export(
            folder, format, output, threshold=threshold, top_k=top_k, quiet=bool(quiet)
        )

    return job


def _labelling_job(context: typer.Context) -> Job:
    """The job of ``label`` or ``plan``, from what typer parsed."""
    name, parameters, beam_options = context.info_name, dict(context.params), context.obj
    segment_s, manifest = parameters.pop("segment_s", None), parameters.pop("manifest", None)

    def job() -> int:
        config = _read_config(parameters, needs_output=name == "label")
        _check_output_lasts(config.output)
        _configure_logging(config.quiet)
        if name == "label":
            began_s = time.monotonic()
            from pipeline.labelling.run import run_label

            return run_label(config, beam_options, imports_s=time.monotonic() - began_s)
        if segment_s is not None or manifest is not None:
            from pipeline.labelling.segments import run_segments

            return run_segments(config, segment_s, manifest)
        from pipeline.labelling.estimate import run_plan

        return run_plan(config, beam_options)

    return job


def _read_config(parameters: dict[str, Any], *, needs_output: bool) -> RunConfig:
    """Load the configuration, and check that nothing is missing that no default can give."""
    from pipeline.config.label import (
        RUN_SCHEMA,
        given_inputs,
        given_output,
        load_config,
    )

    given = _split_parameters(parameters, RUN_SCHEMA, {"inputs": "INPUT"})
    config = load_config(*given)
    # Before torch and Beam are loaded, which takes seconds.
    given_inputs(config)
    if needs_output:
        given_output(config)
    return config


def _read_train_config(parameters: dict[str, Any]) -> TrainConfig:
    """Load a training's configuration, and check that what no default can give is there."""
    from pipeline.config.label import given_output, load_config
    from pipeline.config.train import TRAIN_SCHEMA, given_train

    given = _split_parameters(parameters, TRAIN_SCHEMA, {})
    config = load_config(*given, schema=TRAIN_SCHEMA)
    given_train(config)
    given_output(config)
    return config


def _split_parameters(
    parameters: Mapping[str, Any], schema: Schema[Any], names: Mapping[str, str]
) -> tuple[str | None, Sequence[str], dict[str, Any]]:
    """What ``load_config`` takes, from what typer parsed.

    Args:
        parameters: Parameter to value; None, and a list of nothing, mean not given.
        schema: What can be set; every parameter must be one of its options.
        names: What parameters are called that are no ``--option``.
    Returns:
        The YAML file or None, the assignments, and flags with their values.
    """
    options = {
        names.get(name, f"--{name.replace('_', '-')}"): None if value in ([], ()) else value
        for name, value in parameters.items()
        if name not in ("config", "set")
    }
    if not options.keys() <= schema.option_keys.keys():
        raise ValueError(f"options without a key: {options.keys() - schema.option_keys.keys()}")
    return parameters["config"], parameters["set"] or (), options


def _check_output_lasts(output: str | None) -> None:
    """Refuse what only programs that go on can use.

    Raises:
        OutputError: The output is this process's own memory.
    """
    if output is not None and output.lower().startswith("memory:"):
        raise OutputError(
            f"--output is {output}, and memory:// is gone when the command ends; give a folder."
        )


def _check_current_folder() -> None:
    """Relative paths mean nothing without it, and some libraries abort the process.

    Raises:
        UsageError: It has been removed.
    """
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError as error:
        raise UsageError(
            "the current folder has been removed; change to another one, then run the command again"
        ) from error


def _refuse_beam_options(context: typer.Context) -> None:
    if context.obj:
        raise UsageError(
            f"earmark {context.info_name} runs no pipeline and takes no options for Beam: "
            f"-- {' '.join(context.obj)}"
        )


def _print_models_json() -> int:
    from transforms.models.ast.bundled import bundled_models
    from transforms.models.ast.public import PUBLIC_CHECKPOINTS

    bundled = [
        {
            "name": model.name,
            "source": "bundled",
            "max_length": model.max_length,
            "window_s": model.window_s,
            "labels": model.dataset,
            "num_labels": model.num_labels,
            "metric": model.metric,
            "published": model.value,
            "license": model.license,
        }
        for model in bundled_models()
    ]
    public = [
        {
            "name": entry.hub_id,
            "source": "hub",
            **dataclasses.asdict(entry),
            "window_s": entry.window_s,
        }
        for entry in PUBLIC_CHECKPOINTS
    ]
    print(json.dumps([*bundled, *public], indent=2))
    return 0


def _print_models() -> int:
    from rich.console import Console
    from rich.table import Table

    from transforms.models.ast.bundled import bundled_models
    from transforms.models.ast.public import PUBLIC_CHECKPOINTS

    console = Console(highlight=False)
    table = Table("--model", "window", "trained on", "published", "licence", title="Public models")
    bundled = bundled_models()
    models = [
        *((m.name, m.window_s, m.dataset, m.num_labels, m.metric, m.value, m.license)
          for m in bundled),
        *((m.hub_id, m.window_s, m.labels, m.num_labels, m.metric, m.published, m.license)
          for m in PUBLIC_CHECKPOINTS),
    ]  # fmt: skip
    lines = []
    for name, window_s, labels, num_labels, metric, value, license_name in models:
        facts = [
            f"{window_s:.3f} s",
            f"{labels} ({num_labels} labels)",
            f"{metric} {value:.4f}",
            license_name,
        ]
        table.add_row(name, *facts)
        lines.append(f"{name}\n  {' · '.join(facts)}")
    wide = console.options.update(width=MODELS_WIDTH)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(width=MODELS_WIDTH, highlight=False)
        console.print(table)
    elif console.measure(table, options=wide).maximum <= console.width:
        console.print(table)
    else:  # an id is there to be copied: it is never cut or folded
        console.print("\n".join(lines), soft_wrap=True, markup=False)
    source = "the Hugging Face hub"
    if bundled:
        inside = ", ".join(model.name for model in bundled)
        source = f"inside Earmark for {inside}, {source} for the others"
    console.print(
        f"Source: {source}. A folder (config.json, model.safetensors, "
        "preprocessor_config.json) or an original .pth file can be used as well."
    )
    return 0


def _configure_logging(quiet: bool) -> None:
    """Earmark's own words from INFO on, other libraries' from WARNING on, to stderr."""
    from pipeline.terminal.progress import StderrHandler

    handler = StderrHandler()
    handler.addFilter(_is_worth_showing)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("pipeline", "transforms"):
        logging.getLogger(package).setLevel(logging.WARNING if quiet else logging.INFO)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Whether a record tells the user something."""
    if record.exc_info and record.exc_info[0] is KeyboardInterrupt:
        return False  # Beam logs where Ctrl-C met it
    if record.exc_info and record.name.startswith(TOLD_AT_THE_END) and not _is_debugging():
        return False
    return not record.getMessage().startswith(NOISE)


def _is_debugging() -> bool:
    return bool(os.environ.get("EARMARK_DEBUG"))


def split_beam_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments at the first bare ``--``: Earmark's before it, Beam's behind it."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.
    Returns:
        The exit code: 0 done, 1 unexpected, 2 wrong usage, 3 done but not all is well, 130
        interrupted.
    """
    with usable_streams():
        return _main(*split_beam_options(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str], beam_options: list[str]) -> int:
    interrupts = _Interrupts()
    try:
        with interrupts:
            code = _run(arguments, beam_options)
        if interrupts.came and code == EXIT_INTERRUPTED:  # typer took it, and said nothing
            return _fail(EXIT_INTERRUPTED, INTERRUPTED)
        return code
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, INTERRUPTED)
    except TyperException as error:
        # Without a command typer has printed the help, and its error has no words.
        return _fail(EXIT_USAGE, _parse_error(error)) if error.format_message() else EXIT_USAGE
    except UsageError as error:
        return _fail(EXIT_USAGE, str(error))
    except BrokenPipeError:
        # Whoever read the output has had enough (`earmark models | head`); what is still
        # buffered must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except AnswerError as error:
        return _fail(EXIT_UNEXPECTED, str(error))
    except Exception as error:  # the last door: whatever it is must become an exit code
        if interrupts.came and not isinstance(error, OutputLostError):
            return _fail(EXIT_INTERRUPTED, INTERRUPTED)
        goes_on = next((word for word in arguments if not word.startswith("-")), "") in GOES_ON
        return _fail(EXIT_UNEXPECTED, _words_of(error, GO_ON if goes_on else AGAIN))


def _run(arguments: list[str], beam_options: list[str]) -> int:
    command = typer.main.get_command(app)
    parsed = command.main(
        args=arguments, prog_name="earmark", standalone_mode=False, obj=beam_options
    )
    # --help and --version have done their work by now, and give an exit code instead of a job.
    code: int = parsed or 0
    if callable(parsed):
        _check_current_folder()
        _configure_logging(quiet=False)
        code = parsed()
    sys.stdout.flush()  # here a reader that has gone is an error to handle, at exit only a noise
    return code


class _Interrupts:
    """Treats SIGTERM like Ctrl-C, and remembers that one of them came.

    Both leave a result that the same command goes on from. An interrupt that meets a step of the
    pipeline comes out as Beam's RuntimeError, so that the exception alone does not tell. One that
    meets a callback of Python's own, of which imports have many, is lost there: it comes once more.
    """

    def __init__(self) -> None:
        self.came = False
        self._again: threading.Timer | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._interrupt)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._come_again
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook_before
        if self._again is not None:
            self._again.cancel()

    def _come_again(self, lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook_before(lost)
            return
        # A moment later: whatever is raised in here is lost as well.
        self._again = threading.Timer(LOST_INTERRUPT_S, os.kill, (os.getpid(), signal.SIGINT))
        self._again.daemon = True
        self._again.start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def _fail(code: int, message: str) -> int:
    if _is_debugging():
        traceback.print_exc()
    if code != EXIT_INTERRUPTED:  # its words are ours; and an interrupted import may not work again
        from transforms.sources.clip_ids import for_terminal  # brings numpy along

        message = for_terminal(message, keep_lines=True)
    print(f"earmark: {message}", file=sys.stderr)
    return code


def _words_of(error: Exception, again: str) -> str:
    """What went wrong, and the next step.

    Beam says where in its graph an error arose, and gives a worker's as a whole traceback.

    Args:
        error: What reached the last door.
        again: The next step where the system, a disk or a store is to blame.
    """
    if isinstance(error, EarmarkError):
        return RUNNING_STEP.sub("", f"{error}\n{SEE_DEBUG}")
    raised = RAISED.findall(f"{type(error).__name__}: {error}")
    kind, text = raised[-1] if raised else (type(error).__name__, str(error))
    text = RUNNING_STEP.sub("", text)
    if hasattr(errors, kind):
        return f"{text}\n{SEE_DEBUG}"
    if issubclass(getattr(builtins, kind, Exception), OSError):
        if isinstance(error, OSError) and error.filename is not None:
            text = in_words(error)
        return f"{text}\n{again}"
    return f"{kind}: {text}\n{SEE_DEBUG}"


def _parse_error(error: TyperException) -> str:
    message = error.format_message()
    if hasattr(error, "possibilities"):
        message += ". Options for Beam go after a bare --"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "earmark"
    return f"{message}\n{command} --help lists what there is."
