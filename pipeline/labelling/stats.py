"""``earmark stats``: what to normalise a dataset's features with.

    units ─▶ decode ─▶ cut ─▶ MeasureFeatures ─▶ sum ─▶ a file that the command reads back

The same reading, decoding and cutting as ``earmark label``. Nothing is committed on the way: the
figures are small, and a job that is interrupted starts anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.config.label import RunConfig, given_inputs
from pipeline.labelling.backlog import count_found_items, find_backlog
from pipeline.labelling.plan import (
    counted,
    describe_inputs,
    make_decode_settings,
    make_source_settings,
)
from pipeline.labelling.run import (
    EXIT_DONE,
    EXIT_TOO_MANY_FAILED,
    check_reachable,
    check_runner,
    is_in_process,
    is_remote,
    pipeline_options,
)
from pipeline.runners.dataflow import follow, is_left_running
from pipeline.terminal.progress import LiveReader, ProgressDisplay, format_audio, format_duration
from pipeline.terminal.std_streams import answer, say
from transforms.decoding.pool import DecodeAudio, DecodeSettings
from transforms.errors import ConfigError, InputError, OutputError
from transforms.features.fbank import FbankSettings
from transforms.features.statistics import (
    FeatureStatistics,
    MeasureFeatures,
    mean_and_std,
    sum_statistics,
)
from transforms.features.windows import CutWindows, WindowSettings
from transforms.label_audio import read_items
from transforms.models.ast.feature_extractor import ASTFeatureExtractor
from transforms.models.ast.files import FEATURES_NAME
from transforms.process.temp_folders import scratch_folder, sweep, temporary_files_in_scratch
from transforms.records import WorkUnit
from transforms.sources.read_unit import Found, SourceSettings, find_inputs, limit_items
from transforms.storage import filesystem as storage

AUDIOSET = FbankSettings()  # its defaults are AudioSet's mean and standard deviation


@dataclass(frozen=True)
class StatsPlan:
    """Everything the job needs to know before it starts.

    Attributes:
        inputs: What was given, as absolute paths or URLs without signatures.
        output: The folder for ``preprocessor_config.json``, or None.
        found: What the inputs hold.
        units: The work.
        decode: How to decode.
        sources: How to read.
        windows: How to cut.
        fbank: What features to make.
        as_original: As the script does that the published figures were made with.
        num_processes: Processes that share this machine's cores.
    """

    inputs: tuple[str, ...]
    output: str | None
    found: Found
    units: tuple[WorkUnit, ...]
    decode: DecodeSettings
    sources: SourceSettings
    windows: WindowSettings
    fbank: FbankSettings
    as_original: bool
    num_processes: int


@dataclass(frozen=True)
class DatasetStatistics:
    """What came of it; ``feature_statistics.FeatureStatistics`` without what is only added up.

    Attributes:
        mean: Of the log-mel values.
        std: Their standard deviation.
        windows: Windows measured.
        clips: Clips read to their end.
        audio_s: Their length in seconds.
        failures: Items that could not be measured.
        broken_containers: Of the failures, containers that could not be read to their end.
        example: One of the failures in words, or None.
    """

    mean: float | None
    std: float | None
    windows: int
    clips: int
    audio_s: float
    failures: int
    broken_containers: int
    example: str | None

    @staticmethod
    def of(statistics: FeatureStatistics) -> DatasetStatistics:
        """The figures themselves; no mean where nothing was measured."""
        names = [name.name for name in dataclasses.fields(DatasetStatistics)]
        counts = {name: getattr(statistics, name) for name in names[2:]}
        figures = mean_and_std(statistics) if statistics.windows else (None, None)
        return DatasetStatistics(*figures, **counts)


@dataclass(frozen=True)
class WriteStatistics:
    """The graph's last step: leave the figures where the command finds them.

    Attributes:
        url: The file.
    """

    url: str

    def __call__(self, statistics: FeatureStatistics) -> None:
        """Write them as JSON."""
        figures = dataclasses.asdict(DatasetStatistics.of(statistics))
        storage.write_bytes(self.url, json.dumps(figures).encode())


def run_stats(config: RunConfig, beam_options: list[str], *, as_original: bool = False) -> int:
    """Measure the inputs, print the figures, and write them where ``--output`` says.

    Returns:
        The exit code: 0 done, 3 done but with more failures than allowed or a broken container.

    Raises:
        UsageError: Something is wrong with the command; nothing was written.
        InputError: Nothing in the input could be measured.
    """
    options = pipeline_options(config, beam_options)
    check_runner(options)
    if is_remote(options):
        check_waited_for(options)
    sweep()
    plan = make_stats_plan(config, as_original=as_original)
    if is_remote(options):
        check_reachable(plan.inputs, plan.output)
    for line in describe_inputs(plan.found):
        say(line, quiet=config.quiet)
    began_s = time.monotonic()
    with ProgressDisplay(
        read=LiveReader(),
        total_windows=sum(unit.estimated_windows for unit in plan.units),
        total_items=count_found_items(plan.found),
        doing="measuring",
        quiet=config.quiet or not is_in_process(options),
    ):
        statistics = measure(plan, options)
    elapsed_s = time.monotonic() - began_s
    if statistics.mean is None or statistics.std is None:
        raise InputError(
            f"none of {counted(statistics.failures, 'item')} could be measured; one of them: "
            f"{statistics.example}"
        )
    for line in describe_statistics(statistics, as_original=as_original):
        answer(line)
    if plan.output is not None:
        url = write_features(plan.output, plan.fbank, statistics, overwrite=config.overwrite)
        answer(f"Written: {storage.public_uri(url)}")
    say(f"Took {format_duration(elapsed_s)}.", quiet=config.quiet)
    return _exit_code(statistics, config.max_failed)


def check_waited_for(options: PipelineOptions) -> None:
    """Refuse not to wait for the job.

    Raises:
        ConfigError: It is not to be waited for.
    """
    if is_left_running(options):
        raise ConfigError(
            "earmark stats prints what its job measures, and so waits for it; leave out "
            "no_wait_until_finish and template_location."
        )


def make_stats_plan(config: RunConfig, *, as_original: bool) -> StatsPlan:
    """Find the inputs and settle the settings.

    Raises:
        UsageError: The config, an input or the output is not right.
    """
    inputs = [storage.normalise(text) for text in given_inputs(config)]
    output = None if config.output is None else storage.normalise(config.output)
    fbank = FbankSettings(
        num_mel_bins=config.model.num_mel_bins or AUDIOSET.num_mel_bins,
        num_frames=config.model.max_length or AUDIOSET.num_frames,
    )
    if output is not None and not config.overwrite:
        check_writable(output)
    windows = WindowSettings.from_seconds(
        length_s=config.window.length_s,
        hop_s=config.window.hop_s,
        min_tail_ratio=config.window.min_tail,
        num_frames=fbank.num_frames,
        sample_rate_hz=fbank.sample_rate_hz,
    )
    sources = dataclasses.replace(
        make_source_settings(config),
        window_s=windows.window_samples / windows.sample_rate_hz,
        hop_s=windows.hop_samples / windows.sample_rate_hz,
    )
    found = find_inputs(inputs, max_page_bytes=config.read.max_page_bytes)
    if config.limit is not None:
        found = limit_items(found, config.limit, sources)
    return StatsPlan(
        inputs=tuple(storage.public_uri(url) for url in inputs),
        output=output,
        found=found,
        units=find_backlog(found, {}, sources, retry_from=None).units,
        decode=make_decode_settings(config.decode),
        sources=sources,
        windows=windows,
        fbank=fbank,
        as_original=as_original,
        num_processes=config.inference.workers,
    )


def check_writable(output: str) -> None:
    """Refuse to replace figures that are there.

    Raises:
        OutputError: There are.
    """
    url = storage.join(output, FEATURES_NAME)
    if storage.exists(url):
        raise OutputError(
            f"{storage.public_uri(url)} is there already, and would be replaced; give another "
            "--output, or --overwrite."
        )


def build_stats_graph(pipeline: beam.Pipeline, plan: StatsPlan, url: str) -> None:
    """Draw the job; its figures end in the file at ``url``."""
    _ = (
        pipeline
        | "List units" >> beam.Create(plan.units)
        | "Decode" >> DecodeAudio(plan.decode, functools.partial(read_items, settings=plan.sources))
        | "Cut into windows" >> CutWindows(plan.windows)
        | "Measure"
        >> MeasureFeatures(
            plan.fbank, as_original=plan.as_original, num_processes=plan.num_processes
        )
        | "Sum up" >> beam.CombineGlobally(sum_statistics)
        | "Write figures" >> beam.Map(WriteStatistics(url))
    )


def measure(plan: StatsPlan, options: PipelineOptions) -> DatasetStatistics:
    """Run the job to its end."""
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder, temporary_files_in_scratch():
        # Other machines cannot see this one's temporary folder; what is not local can be seen.
        is_shared = plan.output is not None and not storage.is_local(plan.output)
        place = str(plan.output) if is_shared else folder
        url = storage.join(place, f"stats-{uuid.uuid4().hex}.json")
        pipeline = beam.Pipeline(options=options)
        build_stats_graph(pipeline, plan, url)
        follow(pipeline.run(), None, options)
        figures: Mapping[str, Any] = json.loads(storage.read_bytes(url))
        storage.remove(url)
    return DatasetStatistics(**figures)


def describe_statistics(statistics: DatasetStatistics, *, as_original: bool) -> list[str]:
    """The figures in words."""
    mean, std = statistics.mean or 0.0, statistics.std or 0.0
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


def write_features(
    output: str, fbank: FbankSettings, statistics: DatasetStatistics, *, overwrite: bool
) -> str:
    """Write ``preprocessor_config.json``, as transformers has it; gives its URL.

    Raises:
        OutputError: There is one already.
    """
    if not overwrite:
        check_writable(output)
    extractor = ASTFeatureExtractor(
        sampling_rate=fbank.sample_rate_hz,
        num_mel_bins=fbank.num_mel_bins,
        max_length=fbank.num_frames,
        mean=statistics.mean or 0.0,
        std=statistics.std or 1.0,
    )
    url = storage.join(output, FEATURES_NAME)
    text = json.dumps(extractor.to_dict(), indent=2, sort_keys=True)
    storage.write_bytes(url, text.encode() + b"\n")
    return url


def _exit_code(statistics: DatasetStatistics, max_failed: float) -> int:
    items = statistics.clips + statistics.failures
    if statistics.broken_containers or statistics.failures > max_failed * items:
        return EXIT_TOO_MANY_FAILED
    return EXIT_DONE
