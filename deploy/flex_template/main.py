"""The command of a flex template: ``earmark label`` with its parameters, without waiting.

    --input=gs://… --output=gs://… --model=… --runner=DataflowRunner --template_location=gs://… …
        └─▶ earmark label gs://… --output gs://… --model … -- --runner=DataflowRunner …

It lists the inputs, writes the job's description, and ends. The service then starts the job from
it. ``metadata.json`` describes the parameters. Everything else is an option for Beam.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli import main as cli

# The template's parameters for Earmark, with their options.
OPTIONS = {"output": "--output", "model": "--model", "config": "--config"}
DEFAULT_CONFIG = "dataflow_gpu"


def split_arguments(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return names and values, in order, of ``--name=value``, ``--name value`` and ``--name``."""
    found: list[tuple[str, str | None]] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else None))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0], word)
        else:
            raise SystemExit(f"{word} follows no option; expected --name=value")
    return found


def make_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of ``earmark`` for the arguments that the service passes.

    Args:
        arguments: ``--input=…``, the parameters of ``OPTIONS``, ``--set=key=value;key=value``, and
            Beam's options. Options unknown to Beam are dropped with a message, because the
            service may pass its launchers more than Beam's client reads.
    """
    known = {name.replace("-", "_") for name in PipelineOptions([]).get_all_options()}
    inputs, own, beam_options = [], {"config": DEFAULT_CONFIG}, []
    settings: list[str] = []
    for name, value in split_arguments(arguments):
        if name == "input":
            inputs.append(value or "")
        elif name == "set":
            settings += [text for text in (value or "").split(";") if text]
        elif name in OPTIONS:
            own[name] = value or own.get(name, "")
        elif name.replace("-", "_").removeprefix("no_") in known or name in known:
            beam_options.append(f"--{name}" if value is None else f"--{name}={value}")
        else:
            print(f"dropped --{name}: Beam does not know this option", file=sys.stderr)
    options = [word for name, value in own.items() for word in (OPTIONS[name], value)]
    sets = [word for text in settings for word in ("--set", text)]
    return ["label", *inputs, *options, *sets, "--", *beam_options]


if __name__ == "__main__":
    sys.exit(cli.main(make_command(sys.argv[1:])))
