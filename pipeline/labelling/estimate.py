"""``earmark plan``: how much audio there is, and how long this machine would take to label it.

A sample of clips is decoded. Its seconds of audio per encoded byte, by kind of file, are applied to
the rest. The model is timed on one batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.config.label import RunConfig
from pipeline.exit_codes import EXIT_DONE
from pipeline.labelling.calibration import calibrate, thinned
from pipeline.labelling.plan import RunPlan, describe_plan, make_plan
from pipeline.runners.options import is_remote, pipeline_options
from pipeline.terminal.std_streams import answer
from pipeline.terminal.wording import format_audio, format_duration
from transforms.decoding.pool import DecodePool
from transforms.inference.backbones import resolve_batch_size, resolve_device
from transforms.inference.engine import Engine
from transforms.inference.handler import ASTModelHandler
from transforms.label_audio import LabelSettings, read_items
from transforms.records import EncodedClip, Failure, ItemFailure, WorkUnit
from transforms.sources.file_kinds import WindowEstimate, extension
from transforms.sources.read_unit import SourceSettings

SAMPLED_UNITS = 8
SAMPLED_CLIPS = 32

# Larger clips are not sampled: decoding a recording of hours would make planning slow.
MAX_SAMPLED_BYTES = 64 << 20

ELSEWHERE = (
    "The runner works on other machines, whose time cannot be measured here; docs/dataflow.md has "
    "a formula for the cost."
)


@dataclass(frozen=True)
class Sample:
    """Totals of the decoded clips of one kind of file; ``num_bytes`` are encoded bytes."""

    clips: int = 0
    num_bytes: int = 0
    audio_s: float = 0.0
    windows: int = 0

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.clips + other.clips,
            self.num_bytes + other.num_bytes,
            self.audio_s + other.audio_s,
            self.windows + other.windows,
        )


@dataclass(frozen=True)
class Estimate:
    """An estimate of the audio and windows to label, and the clips decoded for it."""

    sampled_clips: int
    failed_clips: int
    audio_s: float
    windows: int


def run_plan(config: RunConfig, beam_options: list[str]) -> int:
    """Print what ``earmark label`` would do and how long it would take; write nothing."""
    is_elsewhere = is_remote(pipeline_options(config, beam_options))
    plan = make_plan(config, is_remote=is_elsewhere, needs_output=False)
    for line in describe_plan(plan):
        answer(line)
    if plan.units:
        plan = calibrate(plan, config.inference.calibration_windows)
        estimate = estimate_work(plan)
        for line in describe_estimate(estimate):
            answer(line)
        answer(ELSEWHERE if is_elsewhere else describe_time(estimate, plan.resolved.label))
    return EXIT_DONE


def describe_time(estimate: Estimate, label: LabelSettings) -> str:
    """Describe how long this machine would take, from the time of a batch."""
    engine = ASTModelHandler(label.model, label.inference).load_model()
    window_s = time_window(engine, label)
    return (
        f"Time on this machine: about {format_duration(estimate.windows * window_s)} "
        f"({window_s:.3g} s a window, {engine.name})."
    )


def describe_estimate(estimate: Estimate) -> list[str]:
    """Describe an estimate, in a few lines."""
    lines = [
        f"Estimate from {estimate.sampled_clips} clips: {format_audio(estimate.audio_s)} of audio, "
        f"{estimate.windows:,} windows.",
    ]
    if estimate.failed_clips:
        lines.append(
            f"{estimate.failed_clips} of the clips tried could not be decoded; "
            "they would be rows in errors."
        )
    return lines


def estimate_work(plan: RunPlan) -> Estimate:
    """Estimate the audio and windows of the units to do from a sample of their clips."""
    label = plan.resolved.label
    windows = label.windows
    rate_hz = windows.sample_rate_hz
    guess = WindowEstimate(windows.window_samples / rate_hz, windows.hop_samples / rate_hz)
    samples, failed = sample_units(plan.units, label, guess)
    everything = sum(samples.values(), Sample())
    audio_s, num_windows = 0.0, 0.0
    for unit in plan.units:
        for kind, num_bytes in unit_bytes(unit):
            sample = samples.get(kind) or everything
            if not sample.num_bytes or num_bytes is None:
                # Without a sample, only the plan's own estimate is left.
                audio_s += unit.estimated_windows * guess.hop_s
                num_windows += unit.estimated_windows
                continue
            duration_s = num_bytes * sample.audio_s / sample.num_bytes
            audio_s += duration_s
            if unit.container is None:
                num_windows += guess.of_duration(duration_s)
            else:
                num_windows += num_bytes * sample.windows / sample.num_bytes
    return Estimate(everything.clips, failed, audio_s, round(num_windows))


def windows_of_first(units: Sequence[WorkUnit]) -> Callable[[int], float]:
    """Return a function from a number of items to their estimated windows, in the plan's order."""
    items = np.cumsum([0, *(len(unit.items) + len(unit.failures) for unit in units)])
    windows = np.cumsum([0, *(unit.estimated_windows for unit in units)])
    return lambda num_items: float(np.interp(num_items, items, windows))


def unit_bytes(unit: WorkUnit) -> Iterator[tuple[str, int | None]]:
    """Yield the kind and bytes of each file, or of a slice of a container; None if not known."""
    container = unit.container
    if container is None:
        for item in unit.items:
            yield extension(item.uri), item.size or 0
    elif unit.kind == "tar" and not unit.items and container.size is not None:
        yield unit.kind, (container.stop or container.size) - container.start
    else:
        yield unit.kind, None


def sample_units(
    units: Sequence[WorkUnit], settings: LabelSettings, guess: WindowEstimate
) -> tuple[dict[str, Sample], int]:
    """Decode a few clips of a few units, spread evenly.

    Return the samples by kind of file, and the number of clips that could not be decoded.
    """
    samples: dict[str, Sample] = defaultdict(Sample)
    failed = 0
    chosen = units[:: max(1, len(units) // SAMPLED_UNITS)][:SAMPLED_UNITS]
    clips_per_unit = max(1, SAMPLED_CLIPS // max(1, len(chosen)))
    with DecodePool(settings.decode) as pool:
        for unit in chosen:
            small = _small_clips(thinned(unit, clips_per_unit), settings.sources)
            clips = list(islice(small, clips_per_unit))
            for result in pool.stream(unit.unit_id, clips):
                if isinstance(result, ItemFailure):
                    failed += 1
                elif result.facts is not None:
                    clip = clips[result.item_index]
                    kind = unit.kind if unit.container else extension(result.item.uri)
                    duration_s = result.facts.duration_s
                    # Where each channel is a clip, the bytes are those of all of them.
                    is_first = result.channel in (None, 1)
                    num_bytes = _num_bytes(clip) if is_first else 0
                    samples[kind] += Sample(
                        int(is_first), num_bytes, duration_s, guess.of_duration(duration_s)
                    )
    return dict(samples), failed


def _small_clips(unit: WorkUnit, sources: SourceSettings) -> Iterator[EncodedClip | Failure]:
    for clip in read_items(unit, sources):
        if _num_bytes(clip) <= MAX_SAMPLED_BYTES:
            yield clip
        elif isinstance(clip, EncodedClip) and clip.delete_path:
            Path(str(clip.path)).unlink(missing_ok=True)


def _num_bytes(clip: EncodedClip | Failure) -> int:
    if isinstance(clip, EncodedClip) and clip.data is not None:
        return len(clip.data)
    return clip.item.size or 0


def time_window(engine: Engine, settings: LabelSettings) -> float:
    """Return the seconds per window of one batch, after one to warm up."""
    device = resolve_device(settings.inference.device)
    size = resolve_batch_size(settings.inference.batch_size, device)
    batch = np.zeros((size, settings.fbank.num_frames, settings.fbank.num_mel_bins), np.float32)
    engine.predict_safely(batch)
    began = time.perf_counter()
    engine.predict_safely(batch)
    return (time.perf_counter() - began) / size
