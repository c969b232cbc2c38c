"""Decoding of a training's clips, and the choice of their labels."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence

from pipeline.config.train import TrainConfig
from pipeline.terminal.std_streams import say
from pipeline.terminal.wording import counted
from pipeline.training.data.clip_cache import CachedClips, cache_clips
from pipeline.training.data.dataset import ClipSet, ClipSets, make_clip_sets
from pipeline.training.display import DecodingDisplay
from pipeline.training.output import ERRORS_NAME
from pipeline.training.plan import TrainPlan
from pipeline.training.settle import Head, settle_head
from transforms.errors import InputError
from transforms.records import ItemFailure
from transforms.sources.read_unit import Found


def prepare_clips(plan: TrainPlan, config: TrainConfig) -> tuple[ClipSets, list[ItemFailure], Head]:
    """Decode the clips that are not in the cache yet, and settle the labels and the head.

    Returns also the items that could not be decoded. Raise ``InputError`` if the labels
    or the audio cannot be learnt from.
    """
    caches = [_cache(plan, plan.found, config)]
    if plan.found_validation is not None:
        caches.append(_cache(plan, plan.found_validation, config, " for validation"))
    texts = {text for clip in caches[0].clips for text in clip.item.truth or ()}
    head = settle_head(config, plan.initial, sorted(texts))
    sets = make_clip_sets(
        *caches,
        hold_out=config.hold_out,
        label_names=plan.initial.labels if head.is_kept else plan.initial.wanted_labels,
        loss=config.training.loss,
        max_failed=config.max_failed,
    )
    if sets.validation is not None:
        check_metric(sets.validation, config.training.metric)
    say(describe_clips(sets), quiet=config.quiet)
    failures = [failure for cached in caches for failure in cached.failures]
    for line in (*sets.warnings, *describe_failures(failures)):
        say(line)  # even if the run is to be quiet
    return sets, failures, head


def _cache(plan: TrainPlan, found: Found, config: TrainConfig, purpose: str = "") -> CachedClips:
    decode = plan.settings.decode
    with contextlib.ExitStack() as stack:
        display = DecodingDisplay(found, decode.sample_rate_hz, purpose, stack, quiet=config.quiet)
        cached = cache_clips(
            found,
            plan.cache,
            decode=decode,
            sources=plan.settings.sources,
            dtype=config.cache.dtype,
            on_clip=display.on_clip,
            on_kept=display.on_kept,
        )
    if cached.is_reused:
        clips = counted(len(cached.clips), "clip")
        say(f"Already decoded{purpose}: {clips}.", quiet=config.quiet)
    return cached


def digest_clips(clips: ClipSet) -> str:
    """Return a digest of what training depends on, which does not include where the clips lie."""
    digest = hashlib.sha256(json.dumps(clips.label_names).encode())
    for clip in clips.clips:
        segment = [clip.item.start_s, clip.item.end_s, clip.num_samples, list(clip.labels)]
        digest.update(json.dumps([clip.content_sha256, *segment]).encode())
    return digest.hexdigest()[:16]


def check_metric(clips: ClipSet, metric: str) -> None:
    """Raise ``InputError`` before the first epoch if the validation clips cannot give a metric."""
    others = [clip for clip in clips.clips if len(clip.labels) != 1]
    if metric == "accuracy" and others:
        raise InputError(
            f"training.metric is accuracy, which needs exactly one label per clip; {len(others):,} "
            f"of {counted(len(clips), 'validation clip')} have more or none, such as "
            f"{others[0].item.clip_id}. Give --set training.metric=mean_average_precision."
        )
    if not any(clip.labels for clip in clips.clips):
        raise InputError(
            f"none of {counted(len(clips), 'validation clip')} has a label, so {metric} cannot be "
            "measured; validate with clips that have labels."
        )


def describe_clips(sets: ClipSets) -> str:
    """Say how much there is to learn from, in one line."""
    held = "none" if sets.validation is None else counted(len(sets.validation), "clip")
    return (
        f"Training on {counted(len(sets.train), 'clip')} with "
        f"{counted(len(sets.train.label_names), 'label')}; for validation: {held}."
    )


def describe_failures(failures: Sequence[ItemFailure]) -> list[str]:
    """Describe the failures, in a line; no line if nothing failed."""
    if not failures:
        return []
    first = failures[0].failure
    return [
        f"{counted(len(failures), 'item')} could not be decoded, listed in {ERRORS_NAME}; one of "
        f"them: {first.item.clip_id}: {first.message}"
    ]
