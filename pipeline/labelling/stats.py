"""``earmark stats``: measure the mean and standard deviation of a dataset's features.

Reading, decoding and cutting are those of ``earmark label``. Nothing is committed on the way: a job
that is interrupted starts again.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.config.label import RunConfig, given_inputs
from pipeline.exit_codes import EXIT_DONE, EXIT_INCOMPLETE
from pipeline.labelling.forecast import PlanForecast, show_progress
from pipeline.labelling.plan import describe_inputs, find_items, input_options
from pipeline.labelling.remaining import find_units
from pipeline.runners.dataflow import follow, is_left_running
from pipeline.runners.options import (
    check_reachable,
    check_runner,
    is_in_process,
    is_remote,
    pipeline_options,
    temporary_files_in_scratch,
)
from pipeline.terminal.progress import LiveReader
from pipeline.terminal.std_streams import answer, say
from pipeline.terminal.wording import counted, format_audio, format_duration
from transforms.decoding.decode_audio import DecodeAudio
from transforms.errors import ConfigError, InputError, OutputError
from transforms.features.fbank import FbankSettings
from transforms.features.statistics import (
    FeatureStatistics,
    MeasureFeatures,
    mean_and_std,
    sum_statistics,
)
from transforms.features.windows import CutWindows
from transforms.label_audio import InputSettings, make_input_settings, read_items
from transforms.models.ast.feature_extractor import ASTFeatureExtractor
from transforms.models.ast.files import FEATURES_NAME
from transforms.process.temp_folders import scratch_folder, sweep
from transforms.records import WorkUnit
from transforms.sources.read_unit import Found
from transforms.storage import filesystem, reading, urls, writing
from transforms.storage.secrets import public_uri

AUDIOSET = FbankSettings()  # its defaults are AudioSet's mean and standard deviation


@dataclass(frozen=True)
class StatsPlan:
    """The inputs, units and settings, before the job starts.

    Attributes:
        inputs: The inputs as absolute paths or URLs without signatures.
        output: The folder for ``preprocessor_config.json``, or None.
        as_original: Whether to measure like the script behind the published figures.
        num_processes: Processes that share this machine's cores.
    """

    inputs: tuple[str, ...]
    output: str | None
    found: Found
    units: tuple[WorkUnit, ...]
    settings: InputSettings
    fbank: FbankSettings
    as_original: bool
    num_processes: int


@dataclass(frozen=True)
class DatasetStatistics:
    """The measured figures; ``mean`` and ``std`` are NaN if no window was measured."""

    mean: float
    std: float
    windows: int
    clips: int
    audio_s: float
    failures: int
    broken_containers: int
    example: str | None


def write_figures(statistics: FeatureStatistics, url: str) -> None:
    """Write the figures to a file for the command, as the graph's last step."""
    mean, std = mean_and_std(statistics) if statistics.windows else (math.nan, math.nan)
    names = ("windows", "clips", "audio_s", "failures", "broken_containers", "example")
    counts = {name: getattr(statistics, name) for name in names}
    figures = {"mean": mean, "std": std, **counts}
    writing.write_bytes(url, json.dumps(figures).encode())


def run_stats(config: RunConfig, beam_options: list[str], *, as_original: bool = False) -> int:
    """Measure the inputs, print the figures, and write them where ``--output`` says.

    Return 0, or 3 if more items failed than allowed or a container broke off.

    Raises:
        UsageError: The command is not valid; nothing was written.
        InputError: Nothing in the input could be measured.
    """
    options = pipeline_options(config, beam_options)
    check_runner(options)
    if is_remote(options) and is_left_running(options):
        raise ConfigError(
            "earmark stats prints what its job measures, so it has to wait for it; leave out "
            "no_wait_until_finish and template_location."
        )
    sweep()
    plan = make_stats_plan(config, as_original=as_original)
    if is_remote(options):
        check_reachable(plan.inputs, plan.output)
    for line in describe_inputs(plan.found):
        say(line, quiet=config.quiet)
    began_s = time.monotonic()
    settings = plan.settings
    forecast = PlanForecast(
        plan.units, plan.found, settings.sources, settings.decode, doing="measuring"
    )
    is_quiet = config.quiet or not is_in_process(options)
    with show_progress(LiveReader(), forecast, quiet=is_quiet):
        statistics = measure(plan, options)
    elapsed_s = time.monotonic() - began_s
    if not statistics.windows:
        raise InputError(
            f"none of {counted(statistics.failures, 'item')} could be measured; one of them: "
            f"{statistics.example}"
        )
    for line in describe_statistics(statistics, as_original=as_original):
        answer(line)
    if plan.output is not None:
        url = write_features(plan.output, plan.fbank, statistics)
        answer(f"Written: {public_uri(url)}")
    say(f"Took {format_duration(elapsed_s)}.", quiet=config.quiet)
    items = statistics.clips + statistics.failures
    if statistics.broken_containers or statistics.failures > config.max_failed * items:
        return EXIT_INCOMPLETE
    return EXIT_DONE


def make_stats_plan(config: RunConfig, *, as_original: bool) -> StatsPlan:
    """Find the inputs and resolve the settings."""
    inputs = [urls.normalise(text) for text in given_inputs(config)]
    output = None if config.output is None else urls.normalise(config.output)
    fbank = FbankSettings(
        num_mel_bins=config.model.num_mel_bins or AUDIOSET.num_mel_bins,
        num_frames=config.model.max_length or AUDIOSET.num_frames,
    )
    if output is not None and not config.overwrite:
        url = urls.join(output, FEATURES_NAME)
        if filesystem.exists(url):
            raise OutputError(
                f"{public_uri(url)} exists, and would be replaced; give another --output, or "
                "--overwrite."
            )
    settings = make_input_settings(fbank, **input_options(config))
    found = find_items(inputs, config.limit, settings.sources)
    return StatsPlan(
        inputs=tuple(public_uri(url) for url in inputs),
        output=output,
        found=found,
        units=find_units(found, settings.sources),
        settings=settings,
        fbank=fbank,
        as_original=as_original,
        num_processes=config.inference.workers,
    )


def build_stats_graph(pipeline: beam.Pipeline, plan: StatsPlan, url: str) -> None:
    """Build the graph; its figures end up in the file at ``url``."""
    settings = plan.settings
    _ = (
        pipeline
        | "List units" >> beam.Create(plan.units)
        | "Decode"
        >> DecodeAudio(settings.decode, functools.partial(read_items, settings=settings.sources))
        | "Cut into windows" >> CutWindows(settings.windows)
        | "Measure"
        >> MeasureFeatures(
            plan.fbank, as_original=plan.as_original, num_processes=plan.num_processes
        )
        | "Sum up" >> beam.CombineGlobally(sum_statistics)
        | "Write figures" >> beam.Map(write_figures, url)
    )


def measure(plan: StatsPlan, options: PipelineOptions) -> DatasetStatistics:
    """Run the job to its end."""
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder, temporary_files_in_scratch():
        # Other machines cannot see this one's temporary folder, but they can see a remote output.
        is_shared = plan.output is not None and not urls.is_local(plan.output)
        place = str(plan.output) if is_shared else folder
        url = urls.join(place, f"stats-{uuid.uuid4().hex}.json")
        pipeline = beam.Pipeline(options=options)
        build_stats_graph(pipeline, plan, url)
        follow(pipeline.run(), None, options)
        figures: Mapping[str, Any] = json.loads(reading.read_bytes(url))
        writing.remove(url)
    return DatasetStatistics(**figures)


def describe_statistics(statistics: DatasetStatistics, *, as_original: bool) -> list[str]:
    """Describe the figures in a few lines."""
    mean, std = statistics.mean, statistics.std
    how = "as the original script computes them" if as_original else "padding left out"
    lines = [
        f"mean {mean!r}",
        f"std {std!r}",
        f"AudioSet's are {AUDIOSET.mean} and {AUDIOSET.std}: these lie {mean - AUDIOSET.mean:+.4f} "
        f"and {std - AUDIOSET.std:+.4f} away.",
        f"From {counted(statistics.clips, 'clip')}, {counted(statistics.windows, 'window')}, "
        f"{format_audio(statistics.audio_s)} of audio; {how}.",
    ]
    if statistics.failures:
        lines.append(
            f"{counted(statistics.failures, 'item')} could not be measured; one of them: "
            f"{statistics.example}"
        )
    return lines


def write_features(output: str, fbank: FbankSettings, statistics: DatasetStatistics) -> str:
    """Write ``preprocessor_config.json`` as transformers has it, and return its URL."""
    extractor = ASTFeatureExtractor(
        sampling_rate=fbank.sample_rate_hz,
        num_mel_bins=fbank.num_mel_bins,
        max_length=fbank.num_frames,
        mean=statistics.mean,
        std=statistics.std,
    )
    url = urls.join(output, FEATURES_NAME)
    text = json.dumps(extractor.to_dict(), indent=2, sort_keys=True)
    writing.write_bytes(url, text.encode() + b"\n")
    return url
