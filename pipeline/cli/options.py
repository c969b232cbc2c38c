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
TABLES = "Tables"
CLIPS, TRAINING = "Clips", "Training"
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option, or one argument, of a command.

    Attributes:
        key: Dotted key of the configuration that it sets; None for a parameter of the command.
        flags: Like ``--output -o DIR`` or ``--scores/--no-scores``; an argument has a name first,
            like ``folder DIR``. What is in capitals stands for the value in the help, where whole
            numbers are N by default.
        help: One sentence, with the default.
        panel: Heading in the help.
        default: Of a row without a key.
    """

    key: str | None
    flags: str
    help: str
    kind: Any = str
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
        words = self.flags.split()
        return words[-1] if self.is_argument else words[0].partition("/")[0]

    def parameter(self) -> inspect.Parameter:
        """Return it as a parameter that typer understands."""
        declare: Any = typer.Argument if self.is_argument else typer.Option
        flags = [word for word in self.flags.split() if word.startswith("-")]
        *_, last = self.flags.split()
        info = declare(
            *flags,
            metavar=("N" if self.kind is int else None) if last in flags else last,
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
    "--set KEY=VALUE",
    "Set any key of the configuration; repeatable.",
    kind=list[str],
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
TABLE = (
    Option(
        "manifest.columns",
        "--column NAME=COLUMN",
        "What a table calls a column, like label=category; repeatable.",
        kind=list[str],
        panel=TABLES,
    ),
    Option(
        "manifest.format",
        "--format NAME",
        "The tool whose tables they are: audiofolder, kaldi, lhotse, nemo or audioset "
        "(default: recognised).",
        panel=TABLES,
    ),
    Option(
        "manifest.label_separator",
        "--label-separator TEXT",
        "What separates several labels in one text (default ;).",
        panel=TABLES,
    ),
)
DEVICE_HELP = "auto, cpu, cuda or mps (default auto); an absent device is an error."
RESULT = Option(None, "folder DIR", "A result's folder.", default=REQUIRED)

LABEL = (
    Option(
        "inputs",
        "inputs INPUT",
        "Files, globs, folders, tars, audio-Parquet or manifests; local paths or URLs.",
        kind=list[str],
    ),
    Option(
        "truth",
        "--truth -t FILE",
        "A table of what is true of the audio: a manifest with labels, or AudioSet's segments CSV.",
    ),
    Option("output", "--output -o DIR", "The result's folder.", panel=OUTPUT),
    Option(
        "model.name",
        "--model -m MODEL",
        "Hub id (optionally @revision), folder, or original .pth; see [b]earmark models[/b] "
        "(default: esc10, which ships with Earmark and knows ten sounds).",
        panel=MODEL,
    ),
    Option(
        None,
        "--config -c FILE",
        "A YAML file, or the name of one that ships with Earmark: audioset, speech_commands.",
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
        "--precision TYPE",
        "auto, fp32, bf16, fp16 or int8 (default auto: what the chip has natively).",
        panel=MODEL,
    ),
    Option("inference.device", "--device NAME", DEVICE_HELP, panel=MODEL),
    Option(
        "inference.engine",
        "--engine NAME",
        "auto, torch or openvino (default auto).",
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
        "--window-s SECONDS",
        "Window length (default: what the checkpoint holds).",
        kind=float,
        panel=WINDOWS,
    ),
    Option(
        "window.hop_s",
        "--hop-s SECONDS",
        "From one window's start to the next's (default: the window's length).",
        kind=float,
        panel=WINDOWS,
    ),
    *TABLE,
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
        "--max-failed RATIO",
        "Share of failed items above which the exit code is 3 (default 0.05).",
        kind=float,
        panel=RUN,
    ),
    QUIET,
)

PLAN = (
    *LABEL,
    Option(
        None,
        "--segment-s SECONDS",
        "Divide longer items into segments of this length; needs --manifest.",
        kind=float,
        panel=OUTPUT,
    ),
    Option(
        None,
        "--manifest FILE",
        "The manifest of segments to write: .jsonl, .csv or .parquet.",
        panel=OUTPUT,
    ),
)


def _of_label(*names: str) -> tuple[Option, ...]:
    return tuple(option for option in LABEL if option.name in names)


STATS = (
    *_of_label("inputs"),
    Option("output", "--output -o DIR", "A folder to write preprocessor_config.json to."),
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
        "--train -t INPUT",
        "What to learn from: a manifest, tar or audio-Parquet with labels; repeatable.",
        kind=list[str],
        panel=CLIPS,
    ),
    Option(
        "validation",
        "--validation -v INPUT",
        "What to measure each epoch with: other clips with labels; repeatable.",
        kind=list[str],
        panel=CLIPS,
    ),
    Option(
        "hold_out",
        "--hold-out COLUMN=VALUE",
        "Measure with the clips of --train that have this value, like fold=1.",
        panel=CLIPS,
    ),
    Option(
        "output",
        "--output -o DIR",
        "The folder of the trained model; [b]label --model DIR[/b] takes it.",
        panel=OUTPUT,
    ),
    Option(
        "model.name",
        "--model -m MODEL",
        "What to start from: hub id (optionally @revision), folder, or original .pth "
        "(default: a small model from scratch).",
        panel=MODEL,
    ),
    Option(
        "model.labels",
        "--labels LIST",
        "The labels, in order: a file, audioset or speech_commands (default: those of the clips).",
        panel=MODEL,
    ),
    Option(
        None,
        "--config -c FILE",
        "A YAML file, or the name of a recipe that ships with Earmark: esc10, esc50, "
        "speech_commands, audioset_balanced, audioset_full.",
    ),
    SET,
    Option(
        "training.epochs",
        "--epochs",
        "Passes over the training clips (default: 25, more for few clips; more extend a training).",
        kind=int,
        panel=TRAINING,
    ),
    Option(
        "training.batch_size",
        "--batch-size",
        "Clips per step (default: 8 to 48, by the number of clips).",
        kind=int,
        panel=TRAINING,
    ),
    Option(
        "optimizer.learning_rate",
        "--learning-rate RATE",
        "At its highest (default: 0.001 from scratch, else 0.0001).",
        kind=float,
        panel=TRAINING,
    ),
    Option(
        "training.seed",
        "--seed",
        "Seed of everything that is drawn (default 0).",
        kind=int,
        panel=TRAINING,
    ),
    Option("training.device", "--device NAME", DEVICE_HELP, panel=TRAINING),
    Option(
        "training.precision",
        "--precision TYPE",
        "auto, fp32, bf16 or fp16 (default auto: what the chip has natively).",
        panel=TRAINING,
    ),
    Option(
        "cache.folder",
        "--cache FOLDER",
        "Local folder to keep decoded clips in (default: in the output).",
        panel=CLIPS,
    ),
    Option(
        None,
        "--label-column COLUMN",
        "What the tables call their label: short for --column label=COLUMN.",
        panel=TABLES,
    ),
    *TABLE,
    Option("limit", "--limit", "Take at most N items (default: all).", kind=int, panel=CLIPS),
    OVERWRITE,
    Option(
        "max_failed",
        "--max-failed RATIO",
        "Share of failed items above which nothing is trained (default 0.05).",
        kind=float,
        panel=CLIPS,
    ),
    QUIET,
)

VERIFY = (RESULT, QUIET_COMMAND)

SUMMARY = (RESULT,)

EVALUATE = (
    Option(
        None,
        "folders DIR",
        "A result. The scores of several results of the same clips are averaged; several without "
        "a clip in common, such as folds, are taken together.",
        kind=list[str],
        default=REQUIRED,
    ),
    Option(
        None,
        "--truth -t FILE",
        "A manifest with labels, or AudioSet's segments CSV (default: the truth in the result).",
    ),
    *TABLE,
    Option(
        None, "--set KEY=VALUE", "Set a key of the section manifest; repeatable.", kind=list[str]
    ),
    Option(None, "--model -m MODEL", "Where the result's model lies now, if it moved."),
    Option(None, "--output -o FOLDER", "Where to write (default: DIR/evaluation)."),
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
        "--format -f csv|audacity|raven|list",
        "One CSV file, one label track or selection table per source file, or a list of paths.",
        default=REQUIRED,
    ),
    Option(
        None,
        "--output -o FOLDER",
        "Where to write (default: DIR/export/FORMAT; list: standard output); a file such as "
        "labels.csv for csv and list, or - for standard output.",
    ),
    Option(
        None,
        "--label -l NAME",
        "Only this label, by name or id; repeatable. With list, it is the best one of the clip, "
        "unless --threshold or --top-k is given.",
        kind=list[str],
    ),
    Option(None, "--threshold SCORE", "Smallest score (default: all that are stored).", kind=float),
    Option(None, "--top-k", "Labels per window (default: all that are stored).", kind=int),
    Option(
        None,
        "--per window|clip",
        "With csv: a row per window and label, or per clip and label (default window).",
    ),
    Option(
        None,
        "--null -0",
        "With list: end each path with NUL instead of a new line, for xargs -0.",
        kind=bool,
        default=False,
    ),
    Option(
        None,
        "--one-table",
        "With raven: one selection table for all files, with Begin Path.",
        kind=bool,
        default=False,
    ),
    QUIET_COMMAND,
)

MODELS = (Option(None, "--json", "As JSON, for programs.", kind=bool, default=False),)
