"""Calibration of a model for int8 on the audio that is to be labelled, before the work starts.

The precision of int8 depends on the audio that its scales are fitted to, so they are fitted to the
user's own. A result keeps its calibration: ``run.json`` names it, and a resumed run uses the model
that was made then, as long as this machine still has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.labelling.plan import RunPlan
from pipeline.labelling.remaining import find_units
from transforms.decoding.pool import DecodePool
from transforms.errors import FeatureError, InputError
from transforms.features.fbank import extract_fbank
from transforms.features.windows import WindowCutter
from transforms.inference.backbones import QuantisedModel
from transforms.inference.openvino import find_quantised, quantise
from transforms.label_audio import LabelSettings, read_items
from transforms.models.ast.checkpoints import load_model
from transforms.process.temp_folders import scratch_folder
from transforms.records import EncodedClip, FloatArray, ItemFailure, WorkUnit

logger = logging.getLogger(__name__)

# Units to take windows from; each costs the start of a download.
MAX_UNITS = 32


def calibrate(plan: RunPlan, num_windows: int) -> RunPlan:
    """Return the plan with a model in int8, if that is asked for and there is work to do.

    The model is calibrated on at most ``num_windows`` windows.

    Raises:
        InputError: The inputs give no window.
        RuntimeError: The model cannot be quantised.
    """
    resolved = plan.resolved
    inference = resolved.label.inference
    if inference.precision != "int8":
        return plan
    before = (resolved.state.run or {}).get("calibration") if plan.kept.units else None
    if not plan.units:
        return _with(plan, resolved.label, before)
    quantised = _find_earlier(plan, before) or _quantise(plan, num_windows)
    if before is not None and before["digest"] != quantised.digest:
        logger.warning(
            "The int8 model that this result was begun with is not on this machine, and the inputs "
            "have changed since: the remaining work uses a newly calibrated one. To use one model "
            "for everything: --overwrite"
        )
    label = dataclasses.replace(
        resolved.label, inference=dataclasses.replace(inference, quantised=quantised)
    )
    return _with(plan, label, {"digest": quantised.digest, "windows": quantised.windows})


def _with(plan: RunPlan, label: LabelSettings, record: Mapping[str, Any] | None) -> RunPlan:
    run = {**plan.resolved.run, "calibration": record}
    return dataclasses.replace(
        plan, resolved=dataclasses.replace(plan.resolved, label=label, run=run)
    )


def _find_earlier(plan: RunPlan, before: Mapping[str, Any] | None) -> QuantisedModel | None:
    if before is None:
        return None
    label = plan.resolved.label
    return find_quantised(label.model, label.inference.pooling, before["digest"], before["windows"])


def _quantise(plan: RunPlan, num_windows: int) -> QuantisedModel:
    # Everything found, not only the remaining work, so that a resumed run finds the same model.
    label = plan.resolved.label
    units = find_units(plan.found, label.sources)
    windows = sample_windows(units, label, num_windows)
    if not len(windows):
        raise InputError(
            "inference.precision is int8, and no clip to calibrate it on can be decoded; see "
            "earmark plan, or use --precision auto."
        )
    logger.info("calibrating the model for int8 on %d windows", len(windows))
    transformer = load_model(label.model).audio_spectrogram_transformer
    return quantise(transformer, label.model, label.inference.pooling, windows, scratch_folder())


def sample_windows(
    units: Sequence[WorkUnit], settings: LabelSettings, num_windows: int
) -> FloatArray:
    """Sample features of windows, spread evenly over units and the items that they list.

    One window of each clip; if there are few clips, further ones from their beginnings. Shape
    (windows, num_frames, num_mel_bins), float32; at most ``num_windows``.
    """
    chosen = units[:: max(1, math.ceil(len(units) / MAX_UNITS))]
    per_unit = math.ceil(num_windows / max(1, len(chosen)))
    features: list[FloatArray] = []
    with DecodePool(settings.decode) as pool:
        for unit in chosen:
            features += _sample_unit(pool, thinned(unit, per_unit), settings, per_unit)
    shape = (settings.fbank.num_frames, settings.fbank.num_mel_bins)
    return np.stack(features[:num_windows]) if features else np.empty((0, *shape), np.float32)


def thinned(unit: WorkUnit, num_items: int) -> WorkUnit:
    """Return the unit with at most about so many of its listed items, spread evenly."""
    step = max(1, len(unit.items) // num_items)
    return dataclasses.replace(unit, items=unit.items[::step])


def _sample_unit(
    pool: DecodePool, unit: WorkUnit, settings: LabelSettings, num_windows: int
) -> list[FloatArray]:
    firsts: list[FloatArray] = []
    others: list[FloatArray] = []
    for clip in read_items(unit, settings.sources):
        if not isinstance(clip, EncodedClip):
            continue
        most = num_windows - len(others)
        windows = list(_clip_features(pool, unit.unit_id, clip, settings, most))
        firsts += windows[:1]
        others += windows[1:]
        if len(firsts) >= num_windows:
            break
    return [*firsts, *others][:num_windows]


def _clip_features(
    pool: DecodePool, unit_id: str, clip: EncodedClip, settings: LabelSettings, most: int
) -> Iterator[FloatArray]:
    """Yield features of a clip's first windows, without decoding it any further."""
    cutter = WindowCutter(settings.windows)
    stream = pool.stream(unit_id, [clip])
    with contextlib.closing(stream):
        for piece in stream:
            if isinstance(piece, ItemFailure):
                return
            cuts = cutter.push(piece.samples)
            if piece.facts is not None:
                cuts.append(cutter.finish())
                cutter = WindowCutter(settings.windows)  # for the next channel, if each is a clip
            for cut in cuts[:most]:
                with contextlib.suppress(FeatureError):
                    yield extract_fbank(cut.samples, settings.fbank)
            most -= len(cuts)
            if most <= 0:
                return
