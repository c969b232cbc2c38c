"""``earmark plan``: how much audio there is, and how long this machine would take to label it.

The audio comes from a sample of headers (``sample.py``). The model and the features are timed on
one batch, and decoding on a few clips.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pipeline.config.label import RunConfig
from pipeline.exit_codes import EXIT_DONE
from pipeline.labelling.calibration import calibrate, thinned
from pipeline.labelling.plan import RunPlan, describe_plan, make_plan
from pipeline.labelling.sample import Amount, WorkEstimate, take_sample
from pipeline.runners.options import is_remote, pipeline_options
from pipeline.terminal.std_streams import answer
from pipeline.terminal.wording import counted, format_audio, format_duration
from transforms.decoding.pool import DecodePool
from transforms.features.fbank import extract_fbank
from transforms.features.threads import feature_threads
from transforms.inference.backbones import (
    makes_features_on_device,
    resolve_batch_size,
    resolve_device,
)
from transforms.inference.engine import Engine
from transforms.inference.handler import ASTModelHandler
from transforms.label_audio import LabelSettings, read_items
from transforms.process.limits import usable_cores
from transforms.process.stage_times import stage_clocks
from transforms.records import EncodedClip, Failure, Waveform, WorkUnit

# The model and the features are timed for about this long, decoding on this many clips.
TIMING_S = 1.0
MIN_TIMINGS, MAX_TIMINGS = 3, 50
TIMED_UNITS, TIMED_CLIPS = 4, 4
TIMED_AUDIO_S = 30.0

ELSEWHERE = (
    "The runner works on other machines, whose time cannot be measured here; docs/dataflow.md has "
    "a formula for the cost."
)


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
        answer(ELSEWHERE if is_elsewhere else describe_time(estimate.total, plan))
    return EXIT_DONE


def estimate_work(plan: RunPlan) -> WorkEstimate:
    """Estimate the audio and windows of the units to do from a sample of their clips."""
    label = plan.resolved.label
    sample = take_sample(plan.units, plan.found, label.sources, label.decode)
    return WorkEstimate(plan.units, plan.found, label.sources, sample)


def describe_estimate(estimate: WorkEstimate) -> list[str]:
    """Describe an estimate, in a few lines."""
    total, sample = estimate.total, estimate.sample
    lines = [
        f"Estimate from {counted(sample.num_clips, 'clip')}: {format_audio(total.audio_s)} of "
        f"audio, {counted(round(total.windows), 'window')}.",
    ]
    if sample.num_failed:
        lines.append(
            f"{sample.num_failed} of the clips tried could not be decoded; "
            "they would be rows in errors."
        )
    return lines


@dataclass(frozen=True)
class Costs:
    """What labelling costs on this machine, measured on a few windows.

    Attributes:
        model_s: Seconds of a window in the model.
        fbank_s: Seconds of a core for the features of a window; 0 where the device makes them.
        decode_s: Seconds of a core for a second of audio; 0 if not known.
        shares_cores: Whether the model computes on the cores that decode.
    """

    model_s: float
    fbank_s: float
    decode_s: float
    shares_cores: bool

    def total_s(self, amount: Amount, num_cores: int) -> float:
        """Return the seconds that labelling takes once it has begun."""
        model_s = amount.windows * self.model_s
        others_s = amount.windows * self.fbank_s + amount.audio_s * self.decode_s
        others_s /= num_cores
        return model_s + others_s if self.shares_cores else max(model_s, others_s)


def describe_time(amount: Amount, plan: RunPlan) -> str:
    """Describe how long this machine would take."""
    label = plan.resolved.label
    engine = ASTModelHandler(label.model, label.inference).load_model()
    costs = measure_costs(engine, label, plan.units)
    total_s = costs.total_s(amount, usable_cores())
    return (
        f"Time on this machine: about {format_duration(total_s)} "
        f"({total_s / amount.windows:.3g} s a window, {engine.name})."
        if amount.windows
        else "Time on this machine: none, because nothing can be decoded."
    )


def measure_costs(engine: Engine, label: LabelSettings, units: Sequence[WorkUnit]) -> Costs:
    """Time the model, the features and the decoders, each alone and for about a second."""
    device = resolve_device(label.inference.device)
    return Costs(
        model_s=_time_model(engine, label, device),
        fbank_s=0.0 if makes_features_on_device(label.inference) else _time_fbank(label),
        decode_s=_time_decoding(units, label),
        shares_cores=device == "cpu",
    )


def _time_model(engine: Engine, label: LabelSettings, device: str) -> float:
    """Return the median seconds a window over several batches, after one to warm up."""
    size = resolve_batch_size(label.inference.batch_size, device)
    batch = np.zeros((size, label.fbank.num_frames, label.fbank.num_mel_bins), np.float32)
    engine.predict_safely(batch)
    return _median_s(lambda: engine.predict_safely(batch)) / size


def _time_fbank(label: LabelSettings) -> float:
    generator = np.random.default_rng(0)
    samples = generator.standard_normal(label.windows.window_samples, dtype=np.float32)
    threads = feature_threads(label.inference.num_processes)
    threads.submit(extract_fbank, samples, label.fbank).result()
    return _median_s(lambda: threads.submit(extract_fbank, samples, label.fbank).result())


def _median_s(work: Callable[[], object]) -> float:
    """Return the median time of some work, repeated for about a second."""
    times: list[float] = []
    while len(times) < MIN_TIMINGS or (sum(times) < TIMING_S and len(times) < MAX_TIMINGS):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _time_decoding(units: Sequence[WorkUnit], label: LabelSettings) -> float:
    """Return the decoders' seconds for a second of audio, by the beginnings of a few clips."""
    audio_s = 0.0
    chosen = units[:: max(1, len(units) // TIMED_UNITS)][:TIMED_UNITS]
    stage_clocks.lap()
    with DecodePool(label.decode) as pool:
        for unit in chosen:
            some = islice(read_items(thinned(unit, TIMED_CLIPS), label.sources), TIMED_CLIPS)
            for piece in pool.stream(unit.unit_id, (_beginning(clip) for clip in some)):
                if isinstance(piece, Waveform) and piece.facts is not None:
                    audio_s += piece.facts.duration_s
    lap = stage_clocks.lap()
    return (lap.open_s + lap.decode_s + lap.resample_s) / audio_s if audio_s else 0.0


def _beginning(clip: EncodedClip | Failure) -> EncodedClip | Failure:
    start_s = clip.item.start_s or 0.0
    if isinstance(clip, Failure) or clip.item.end_s is not None:
        return clip
    item = dataclasses.replace(clip.item, start_s=start_s, end_s=start_s + TIMED_AUDIO_S)
    return dataclasses.replace(clip, item=item)
