"""Options for Beam's runners: from the config and the command line, checked before any work."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.runner import create_runner

from pipeline.config.label import DEFAULT_RUNNER, RunConfig
from pipeline.runners.dataflow import check_dataflow, check_device, is_dataflow
from pipeline.runners.job_service import JOB_SERVER_OPTIONS, check_workers, has_all_machines_here
from transforms.errors import ConfigError, ModelError
from transforms.models.ast.checkpoints import ModelSpec
from transforms.process.temp_folders import scratch_folder
from transforms.storage import urls

# Options whose values from the config and the command line are combined.
COMBINED = frozenset({"experiments"})


def pipeline_options(config: RunConfig, beam_options: Sequence[str]) -> PipelineOptions:
    """Return Beam's options: the config's, and the command line's, which win.

    An option on the command line replaces the config's value even where Beam would combine the two
    (``dataflow_service_options``); only experiments are combined. ``__main__`` is not pickled for
    workers, because all of Earmark's code is in packages. Raise ``ConfigError`` if Beam does not
    know an option.
    """
    given = {_option_name(arg) for arg in beam_options if arg.startswith("--")} - COMBINED
    args = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, values in config.beam.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None and value is not False and _option_name(name) not in given
    ]
    args += beam_options
    if not any(arg.endswith("save_main_session") for arg in args):
        args.append("--no_save_main_session")
    if not any(arg.split("=")[0] == "--runner" for arg in args):
        args.append(f"--runner={DEFAULT_RUNNER}")
    if config.inference.workers > 1 and not any("direct_num_workers" in arg for arg in args):
        args += [
            f"--direct_num_workers={config.inference.workers}",
            "--direct_running_mode=multi_processing",
        ]
    options = PipelineOptions(args)
    _check_known(options, args)
    return options


def _option_name(arg: str) -> str:
    return arg.removeprefix("--").split("=")[0].replace("-", "_")


def _check_known(options: PipelineOptions, args: Sequence[str]) -> None:
    """Raise ``ConfigError`` for options that Beam would only warn about ("Discarding…")."""
    known = {*options.get_all_options(), *JOB_SERVER_OPTIONS.get(runner_name(options), ())}
    for name in (arg[2:].split("=")[0] for arg in args if arg.startswith("--")):
        # Beam keeps the negative spelling of an option under another name.
        if name.replace("-", "_") not in known and not name.startswith(("no_", "no-")):
            raise ConfigError(
                f"Beam knows no pipeline option --{name}; see the Beam documentation, or put "
                "Earmark's own options before the bare --."
            )


def runner_name(options: PipelineOptions) -> str:
    """Return the name of the runner's class in lower case (``flinkrunner``), for any of its names.

    Raise ``ConfigError`` if Beam has no such runner, or it needs a package that is not installed.
    """
    name = options.view_as(StandardOptions).runner or DEFAULT_RUNNER
    try:
        return type(create_runner(name)).__name__.lower()
    except ImportError as error:
        raise ConfigError(
            f"runner {name} needs a package that is not installed ({error}); for DataflowRunner: "
            "run pip install '.[gcp]' in Earmark's checkout"
        ) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"Beam has no runner {name}; its runners include FnApiRunner (the default), "
            "DirectRunner, PrismRunner, FlinkRunner, SparkRunner and DataflowRunner."
        ) from error


def is_remote(options: PipelineOptions) -> bool:
    """Return whether other machines do the work, which cannot see this one's files."""
    return is_dataflow(options) or not has_all_machines_here(runner_name(options), options)


def is_in_process(options: PipelineOptions) -> bool:
    """Return whether this process itself does the work."""
    num_workers = options.view_as(DirectOptions).direct_num_workers
    return runner_name(options) == DEFAULT_RUNNER.lower() and num_workers == 1


def check_runner(options: PipelineOptions, device: str | None = None) -> None:
    """Raise ``ConfigError`` if the runner cannot work with the options; no model, no ``device``."""
    if is_dataflow(options):
        check_dataflow(options)
        if device is not None:
            check_device(options, device)
    check_workers(runner_name(options), options)


def check_reachable(inputs: Sequence[str], output: str | None, truth: str | None = None) -> None:
    """Refuse local paths, all normalised, where other machines do the work.

    Raise ``ConfigError`` if a path is local, or there is no output.
    """
    if output is None:
        raise ConfigError(
            "no output is given, and the runner works on other machines; give a URL that they can "
            "reach (--output gs://…), or --runner=FnApiRunner."
        )
    tables = [] if truth is None else [("--truth", truth)]
    for name, url in (("--output", output), *(("INPUT", url) for url in inputs), *tables):
        if urls.is_local(url):
            raise ConfigError(
                f"{name} is the local path {url}, and the runner works on other machines; "
                "give a URL that they can reach (gs://…), or --runner=FnApiRunner."
            )


def check_model_reachable(model: ModelSpec) -> None:
    """Raise ``ModelError`` for a model in a local folder, where other machines do the work."""
    if model.source in ("folder", "original") and urls.is_local(model.location):
        raise ModelError(
            f"model {model.name} is on this machine, and the runner works on others; copy it to "
            "where they can reach it (--model gs://…), or name one from the hub."
        )


@contextlib.contextmanager
def temporary_files_in_scratch() -> Iterator[None]:
    """Let ``tempfile`` make files in this process's scratch folder within the ``with`` block.

    Beam's local runners stage files in folders that remain when the run is killed.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(scratch_folder())
    try:
        yield
    finally:
        tempfile.tempdir = before
