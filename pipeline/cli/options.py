"""The options of the command line, one row each, by command.

A row with a key sets that key of the command's configuration, which checks the value and knows the
default: None means "not given". A row without a key is a parameter of the command's own function
in ``commands``. The defaults that help texts name are held to those of the configuration by a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

# Panels of the help.
OUTPUT, MODEL, WINDOWS, RUN = "Output", "Model", "Windows", "Run"
CLIPS, TRAINING = "Clips", "Training"
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option, or one argument, of a command.

    Attributes:
        key: Dotted key of the configuration that it sets; None for a parameter of the command.
        flags: As typed, like ``--output -o`` or ``--scores/--no-scores``; a bare name for an
            argument.
        help: One sentence, with the default.
        metavar: What stands for the value in the help; N for whole numbers by default.
        panel: Heading in the help.
        default: Of a row without a key.
    """

    key: str | None
    flags: str
    help: str
    kind: Any = str
    metavar: str | None = None
    panel: str | None = None
    default: Any = None

    @property
    def is_argument(self) -> bool:
        """Whether it is given by position."""
        return not self.flags.startswith("-")

    @property
    def name(self) -> str:
        """The Python name of the parameter: ``top_k`` for ``--top-k``."""
        return self.flags.split()[0].partition("/")[0].removeprefix("--").replace("-", "_")

    @property
    def origin(self) -> str:
        """How a message names it: ``--top-k``, or ``INPUT``."""
        shown = self.metavar if self.is_argument else self.flags.split()[0].partition("/")[0]
        return shown or self.name

    def parameter(self) -> inspect.Parameter:
        """Return it as a parameter that typer understands."""
        declare: Any = typer.Argument if self.is_argument else typer.Option
        info = declare(
            *(() if self.is_argument else self.flags.split()),
            metavar=self.metavar or ("N" if self.kind is int else None),
            help=self.help,
            show_default=False,
            rich_help_panel=self.panel,
        )
        kind = self.kind | None if self.default is None else self.kind
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[kind, info],
        )


@dataclass(frozen=True)
class Given:
    """What the command line says about a command's configuration, and to Beam.

    Attributes:
        config: A YAML file, or the name of one that ships with Earmark.
        sets: The ``key=value`` of each ``--set``.
        options: Key, value and flag of each option that was given.
        beam_options: What follows a bare ``--``.
    """

    config: str | None
    sets: list[str]
    options: list[tuple[str, Any, str]]
    beam_options: list[str]


def split_values(
    options: tuple[Option, ...], values: Mapping[str, Any], beam_options: list[str]
) -> tuple[Given, dict[str, Any]]:
    """Divide parsed values into the configuration's and the parameters of the command itself."""
    settings = [
        (option.key, values[option.name], option.origin)
        for option in options
        # An option that may be repeated is an empty list where it is not given.
        if option.key is not None and values[option.name] not in (None, [], ())
    ]
    own = {option.name: values[option.name] for option in options if option.key is None}
    given = Given(own.pop("config", None), list(own.pop("set", None) or []), settings, beam_options)
    return given, own


SET = Option(
    None,
    "--set",
    "Set any key of the configuration; repeatable.",
    kind=list[str],
    metavar="KEY=VALUE",
)
OVERWRITE = Option(
    "overwrite",
    "--overwrite/--no-overwrite",
    "Start over: remove what Earmark wrote there before (default no).",
    kind=bool,
    panel=OUTPUT,
)
QUIET_HELP = "Only warnings and errors (default no)."
QUIET = Option("quiet", "--quiet/--no-quiet -q", QUIET_HELP, kind=bool)
QUIET_COMMAND = Option(None, "--quiet/--no-quiet -q", QUIET_HELP, kind=bool, default=False)
DEVICE_HELP = "auto, cpu, cuda or mps (default auto); an absent device is an error."
RESULT = Option(None, "folder", "A result's folder.", metavar="DIR", default=REQUIRED)

LABEL = (
    Option(
        "inputs",
        "inputs",
        "Files, globs, folders, tars, audio-Parquet or manifests; local paths or URLs.",
        kind=list[str],
        metavar="INPUT",
    ),
    Option("output", "--output -o", "The result's folder.", metavar="DIR", panel=OUTPUT),
    Option(
        "model.name",
        "--model -m",
        "Hub id (optionally @revision), folder, or original .pth; see [b]earmark models[/b] "
        "(default: esc10, which ships with Earmark and knows ten sounds).",
        metavar="MODEL",
        panel=MODEL,
    ),
    Option(
        None,
        "--config -c",
        "A YAML file, or the name of one that ships with Earmark: audioset, speech_commands.",
        metavar="FILE",
    ),
    SET,
    Option(
        "labels.top_k",
        "--top-k",
        "Labels per row, best first (default 10).",
        kind=int,
        panel=OUTPUT,
    ),
    Option(
        "labels.scores",
        "--scores/--no-scores",
        "Store every class's score (default no).",
        kind=bool,
        panel=OUTPUT,
    ),
    Option(
        "inference.precision",
        "--precision",
        "auto, fp32, bf16, fp16 or int8 (default auto: what the chip has natively).",
        metavar="TYPE",
        panel=MODEL,
    ),
    Option("inference.device", "--device", DEVICE_HELP, metavar="NAME", panel=MODEL),
    Option(
        "inference.engine",
        "--engine",
        "auto, torch or openvino (default auto).",
        metavar="NAME",
        panel=MODEL,
    ),
    Option(
        "inference.workers",
        "--workers",
        "Processes, one device each if there are several (default 1).",
        kind=int,
        panel=MODEL,
    ),
    Option(
        "inference.batch_size",
        "--batch-size",
        "Windows per call (default: what suits the device).",
        kind=int,
        panel=MODEL,
    ),
    Option(
        "window.length_s",
        "--window-s",
        "Window length (default: what the checkpoint holds).",
        kind=float,
        metavar="SECONDS",
        panel=WINDOWS,
    ),
    Option(
        "window.hop_s",
        "--hop-s",
        "From one window's start to the next's (default: the window's length).",
        kind=float,
        metavar="SECONDS",
        panel=WINDOWS,
    ),
    Option("limit", "--limit", "Label at most N items (default: all).", kind=int, panel=RUN),
    OVERWRITE,
    Option(
        "retry_failed",
        "--retry-failed/--no-retry-failed",
        "Retry what failed in an earlier run (default no).",
        kind=bool,
        panel=RUN,
    ),
    Option(
        "max_failed",
        "--max-failed",
        "Share of failed items above which the exit code is 3 (default 0.05).",
        kind=float,
        metavar="RATIO",
        panel=RUN,
    ),
    QUIET,
)

PLAN = (
    *LABEL,
    Option(
        None,
        "--segment-s",
        "Divide longer items into segments of this length; needs --manifest.",
        kind=float,
        metavar="SECONDS",
        panel=OUTPUT,
    ),
    Option(
        None,
        "--manifest",
        "The manifest of segments to write: .jsonl, .csv or .parquet.",
        metavar="FILE",
        panel=OUTPUT,
    ),
)


def _of_label(*names: str) -> tuple[Option, ...]:
    return tuple(option for option in LABEL if option.name in names)


STATS = (
    *_of_label("inputs"),
    Option(
        "output", "--output -o", "A folder to write preprocessor_config.json to.", metavar="DIR"
    ),
    Option(
        None,
        "--as-original",
        "Like the script behind the published figures: mixed, masked, padding counted.",
        kind=bool,
        default=False,
    ),
    *_of_label("config", "set", "workers", "window_s", "hop_s"),
    *_of_label("limit", "overwrite", "max_failed", "quiet"),
)

TRAIN = (
    Option(
        "train",
        "--train -t",
        "What to learn from: a manifest, tar or audio-Parquet with labels; repeatable.",
        kind=list[str],
        metavar="INPUT",
        panel=CLIPS,
    ),
    Option(
        "validation",
        "--validation -v",
        "What to measure each epoch with: other clips with labels; repeatable.",
        kind=list[str],
        metavar="INPUT",
        panel=CLIPS,
    ),
    Option(
        "hold_out",
        "--hold-out",
        "Measure with the clips of --train that have this value, like fold=1.",
        metavar="COLUMN=VALUE",
        panel=CLIPS,
    ),
    Option(
        "output",
        "--output -o",
        "The folder of the trained model; [b]label --model DIR[/b] takes it.",
        metavar="DIR",
        panel=OUTPUT,
    ),
    Option(
        "model.name",
        "--model -m",
        "What to start from: hub id (optionally @revision), folder, or original .pth "
        "(default: a small model from scratch).",
        metavar="MODEL",
        panel=MODEL,
    ),
    Option(
        "model.labels",
        "--labels",
        "The labels, in order: a file, audioset or speech_commands (default: those of the clips).",
        metavar="LIST",
        panel=MODEL,
    ),
    Option(
        None,
        "--config -c",
        "A YAML file, or the name of a recipe that ships with Earmark: esc10, esc50, "
        "speech_commands, audioset_balanced, audioset_full.",
        metavar="FILE",
    ),
    SET,
    Option(
        "training.epochs",
        "--epochs",
        "Passes over the training clips (default 25).",
        kind=int,
        panel=TRAINING,
    ),
    Option(
        "training.batch_size",
        "--batch-size",
        "Clips per step (default 48).",
        kind=int,
        panel=TRAINING,
    ),
    Option(
        "optimizer.learning_rate",
        "--learning-rate",
        "At its highest (default: 0.001 from scratch, else 0.0001).",
        kind=float,
        metavar="RATE",
        panel=TRAINING,
    ),
    Option(
        "training.seed",
        "--seed",
        "Seed of everything that is drawn (default 0).",
        kind=int,
        panel=TRAINING,
    ),
    Option("training.device", "--device", DEVICE_HELP, metavar="NAME", panel=TRAINING),
    Option(
        "training.precision",
        "--precision",
        "auto, fp32, bf16 or fp16 (default auto: what the chip has natively).",
        metavar="TYPE",
        panel=TRAINING,
    ),
    Option(
        "cache.folder",
        "--cache",
        "Local folder to keep decoded clips in (default: in the output).",
        metavar="FOLDER",
        panel=CLIPS,
    ),
    Option("limit", "--limit", "Take at most N items (default: all).", kind=int, panel=CLIPS),
    OVERWRITE,
    Option(
        "max_failed",
        "--max-failed",
        "Share of failed items above which nothing is trained (default 0.05).",
        kind=float,
        metavar="RATIO",
        panel=CLIPS,
    ),
    QUIET,
)

VERIFY = (RESULT, QUIET_COMMAND)

EVALUATE = (
    Option(
        None,
        "folders",
        "A result. The scores of several results of the same clips are averaged; several without "
        "a clip in common, such as folds, are taken together.",
        kind=list[str],
        metavar="DIR",
        default=REQUIRED,
    ),
    Option(
        None,
        "--truth -t",
        "A manifest with labels, or AudioSet's segments CSV (default: the truth in the result).",
        metavar="FILE",
    ),
    Option(None, "--model -m", "Where the result's model lies now, if it moved.", metavar="MODEL"),
    Option(None, "--output -o", "Where to write (default: DIR/evaluation).", metavar="FOLDER"),
    Option(
        None,
        "--known-labels-only",
        "Ignore labels of the truth that the model does not have.",
        kind=bool,
        default=False,
    ),
    QUIET_COMMAND,
)

EXPORT = (
    RESULT,
    Option(
        None,
        "--format -f",
        "One CSV file, or one label track or selection table per source file.",
        metavar="csv|audacity|raven",
        default=REQUIRED,
    ),
    Option(None, "--output -o", "Where to write (default: DIR/export/FORMAT).", metavar="FOLDER"),
    Option(
        None,
        "--threshold",
        "Smallest score (default: all that are stored).",
        kind=float,
        metavar="SCORE",
    ),
    Option(None, "--top-k", "Labels per window (default: all that are stored).", kind=int),
    QUIET_COMMAND,
)

MODELS = (Option(None, "--json", "As JSON, for programs.", kind=bool, default=False),)
