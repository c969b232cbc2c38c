"""``earmark train``: teach a model the labels of one's own clips.

    inputs ─find─▶ clips, decoded once ─labels─▶ stages of epochs ─▶ a model's folder
                                                      ▲
      a checkpoint, ImageNet's weights, or nothing ───┘

The output is a folder that ``--model`` and transformers take:

    config.json, model.safetensors, preprocessor_config.json   the weights that training.keep names
    best/  averaged/  last/    the same three files of other weights, where there are such
    train.json                 settings, data, versions, and what came of it
    history.csv  curves.png    the figures of every epoch
    validation.jsonl           a manifest of the clips that were held out
    errors.parquet             a row per clip that could not be used, where there is one
    cache/                     decoded audio, until the training is done; --cache keeps it elsewhere

``loop`` keeps the state of an unfinished training; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from pipeline.config.label import given_output
from pipeline.config.train import TrainConfig
from pipeline.labelling.backlog import count_found_items
from pipeline.labelling.plan import counted, describe_inputs, make_decode_settings, make_read_limits
from pipeline.result.lock import hold_output
from pipeline.result.state import (
    describe_differences,
    make_fingerprint,
    software_versions,
    utc_now,
)
from pipeline.terminal.progress import LiveReader, ProgressDisplay, format_duration
from pipeline.terminal.std_streams import answer, say
from pipeline.training.data.augmentation import Augment
from pipeline.training.data.batches import BatchSettings
from pipeline.training.data.clip_cache import CachedClips, cache_clips, cache_key, write_errors
from pipeline.training.data.dataset import ClipSet, ClipSets, check_found, make_clip_sets
from pipeline.training.display import EpochDisplay
from pipeline.training.history import CURVES_NAME, HISTORY_NAME, draw_curves, history_table
from pipeline.training.initial import Initial, build_model, measure_statistics, resolve_initial
from pipeline.training.stages.finetuning import (
    Best,
    FinetuningSettings,
    FinetuningStage,
    copy_for_saving,
)
from pipeline.training.stages.loop import STATE_NAME, Progress, Row, Stage, run_stages
from pipeline.training.stages.pretraining import PretrainingStage
from pipeline.training.stages.validation import Scorer
from transforms.decoding.pool import DecodeSettings
from transforms.errors import ConfigError, InputError, OutputError
from transforms.features.fbank import KaldiFbank
from transforms.features.fbank_settings import FbankSettings, without_normalising
from transforms.features.windows import WindowSettings
from transforms.inference.backbones import resolve_device, resolve_precision
from transforms.models.ast.checkpoints import save_pretrained
from transforms.models.ast.files import CONFIG_NAME, FEATURES_NAME, WEIGHTS_NAME
from transforms.models.ast.model import ASTForAudioClassification
from transforms.process.progress_counts import live_counts
from transforms.process.temp_folders import sweep
from transforms.records import ItemFailure
from transforms.sources.read_unit import Found, SourceSettings, find_inputs, limit_items
from transforms.storage import filesystem as storage

TRAIN_NAME = "train.json"
VALIDATION_NAME = "validation.jsonl"
ERRORS_NAME = "errors.parquet"
CACHE_NAME = "cache"
TRAIN_SCHEMA_VERSION = 1

_MODEL_FILES = (CONFIG_NAME, WEIGHTS_NAME, FEATURES_NAME)
_WEIGHTS = ("best", "averaged", "last")
# All that a training writes, which --overwrite removes; the cache is named by what is in it.
_WRITTEN = (
    *(f"{folder}/{name}" for folder in _WEIGHTS for name in _MODEL_FILES),
    *_MODEL_FILES,
    *(STATE_NAME, HISTORY_NAME, CURVES_NAME, VALIDATION_NAME, ERRORS_NAME, TRAIN_NAME),
)
_MAX_LOADERS = 8
_CURVES_EVERY_S = 30.0

# Where none is given: with these a few hundred clips are learnt within the default epochs. What a
# checkpoint knows is soon lost at the rate that fresh weights need.
_LEARNING_RATES = {"scratch": 1e-3, "checkpoint": 1e-4, "image": 1e-4}

# Sections of the configuration that the result depends on.
_DECISIVE = (
    *("model", "architecture", "training", "optimizer", "schedule", "augmentation", "averaging"),
    *("pretraining", "window", "cache", "hold_out", "limit"),
)
# Keys in them that it does not depend on, or that stand elsewhere with more precision.
_INDECISIVE = {
    *(("training", "device"), ("training", "loader_processes")),
    *(("model", "name"), ("cache", "folder")),
}


@dataclass(frozen=True)
class TrainPlan:
    """What is settled before anything is decoded.

    Attributes:
        output: The model's folder, as ``storage.normalise`` gives it.
        found: What the training inputs hold.
        found_validation: What the validation inputs hold; None without any.
        initial: What training starts from.
        decode: How to decode.
        sources: How to read.
        windows: How clips are cut.
        cache: The folder of decoded audio.
        learning_rate: At its highest, of the teaching of labels.
        results: What the result depends on; ``data`` is among it once the clips are known.
        device: That the model is trained on.
        precision: Of the forward pass.
    """

    output: str
    found: Found
    found_validation: Found | None
    initial: Initial
    decode: DecodeSettings
    sources: SourceSettings
    windows: WindowSettings
    cache: str
    learning_rate: float
    results: Mapping[str, Any]
    device: str
    precision: str

    @property
    def fingerprint(self) -> str:
        """Digest of what the result depends on."""
        return make_fingerprint(self.results)

    @property
    def inputs_digest(self) -> str:
        """Of what the inputs are without reading them: places, sizes, times, given labels."""
        digest = hashlib.sha256()
        for found in (self.found, self.found_validation):
            if found is not None:
                containers = [item for entry in found.containers for item in entry.items]
                given = [[item.truth, item.metadata] for item in (*found.items, *containers)]
                key = cache_key(found, self.sources, self.decode, "float32")
                digest.update(json.dumps([key, given]).encode())
        return digest.hexdigest()

    def with_data(self, clips: PreparedClips) -> TrainPlan:
        """The plan, with the clips among what the result depends on."""
        return dataclasses.replace(self, results={**self.results, "data": dict(clips.digests)})


@dataclass(frozen=True)
class PreparedClips:
    """Clips that are decoded and labelled.

    Attributes:
        sets: To learn from, and to measure on.
        digests: What they hold: ``train`` and ``validation``.
        caches: Where they lie, and what could not be decoded.
    """

    sets: ClipSets
    digests: Mapping[str, str | None]
    caches: tuple[CachedClips, ...]


def run_train(config: TrainConfig) -> int:
    """Train a model as the configuration says.

    Returns:
        The exit code: 0.

    Raises:
        UsageError: Something is wrong with the command or the data; no training was changed.
        TrainingError: The loss is not a number any more.
        WriteError: The disk is full or fails; the last whole state stays.
    """
    sweep()
    output = local_output(config)
    with hold_output(output):
        plan = make_train_plan(config, output)
        for line in describe_train_plan(plan):
            say(line, quiet=config.quiet)
        if config.overwrite:
            check_removable(plan)
        record = None if config.overwrite else find_training(plan)
        if record is not None and is_done(record) and record["inputs"] == plan.inputs_digest:
            return say_done(output)
        clips = prepare_clips(plan, config)
        plan = plan.with_data(clips)
        if record is not None:
            check_same_training(plan, record)
        if config.overwrite:
            remove_training(output)
        if record is None or not is_done(record):
            train(plan, clips, config, record)
        else:
            say_done(output)
        if config.cache.folder is None:
            remove_caches(clips.caches)
    return 0


def local_output(config: TrainConfig) -> str:
    """The folder, which must be on this machine.

    Raises:
        OutputError: It is elsewhere.
    """
    output = storage.normalise(given_output(config))
    if not storage.is_local(output):
        raise OutputError(
            f"--output is {storage.public_uri(output)}; expected a folder on this machine, because "
            "a training writes its whole state after every epoch. Copy the model when it is done."
        )
    return output


# --- Planning ------------------------------------------------------------------------------


def make_train_plan(config: TrainConfig, output: str) -> TrainPlan:
    """Find the inputs and settle the settings; decodes nothing.

    Raises:
        UsageError: The config, the model, an input or the output is not right.
    """
    device = resolve_device(config.training.device, "training.device")
    precision = resolve_precision(config.training.precision, device)
    keeps_head = config.training.head == "keep"
    initial = resolve_initial(config.model, config.architecture, keeps_head=keeps_head)
    shape = initial.config
    check_possible(config, device, shape.num_hidden_layers)
    sample_rate_hz = FbankSettings().sample_rate_hz
    windows = WindowSettings.from_seconds(
        length_s=config.window.length_s,
        hop_s=config.window.hop_s,
        min_tail_ratio=config.window.min_tail,
        num_frames=shape.max_length,
        sample_rate_hz=sample_rate_hz,
    )
    decode = dataclasses.replace(make_decode_settings(config.decode), sample_rate_hz=sample_rate_hz)
    sources = dataclasses.replace(
        SourceSettings(limits=make_read_limits(config.decode, config.read)),
        window_s=windows.window_samples / windows.sample_rate_hz,
        hop_s=windows.hop_samples / windows.sample_rate_hz,
    )
    found = _find(config.train, config, output, sources)
    found_validation = (
        _find(config.validation, config, output, sources) if config.validation else None
    )
    check_found(found, "training", config.hold_out)
    if found_validation is not None:
        check_found(found_validation, "validation")
    cache = config.cache.folder or storage.join(output, CACHE_NAME)
    learning_rate = config.optimizer.learning_rate or _LEARNING_RATES[initial.kind]
    return TrainPlan(
        output=output,
        found=found,
        found_validation=found_validation,
        initial=initial,
        decode=decode,
        sources=sources,
        windows=windows,
        cache=storage.normalise(cache),
        learning_rate=learning_rate,
        results=what_changes_training(config, initial, precision, learning_rate),
        device=device,
        precision=precision,
    )


def check_possible(config: TrainConfig, device: str, num_layers: int) -> None:
    """Refuse what neither the config alone nor the model alone shows to be impossible.

    Raises:
        ConfigError: Half precision that this device has not, or more layers than the model.
    """
    if config.training.precision == "fp16" and device == "cpu":
        raise ConfigError(
            "training.precision is fp16, and the device is the CPU, where it cannot be trained in; "
            "expected auto, fp32 or bf16. Give another --precision, or a --device that is there."
        )
    trained = config.training.trained_layers
    if trained is not None and trained > num_layers:
        raise ConfigError(
            f"training.trained_layers is {trained}; the model has {num_layers} layers. Give at "
            "most that many, or null to train all of it."
        )


def _find(
    inputs: tuple[str, ...], config: TrainConfig, output: str, sources: SourceSettings
) -> Found:
    found = find_inputs(
        [storage.normalise(text) for text in inputs],
        exclude=output,
        max_page_bytes=config.read.max_page_bytes,
    )
    return found if config.limit is None else limit_items(found, config.limit, sources)


def what_changes_training(
    config: TrainConfig, initial: Initial, precision: str, learning_rate: float
) -> dict[str, Any]:
    """Everything in the settings that the trained weights depend on, by name."""
    resolved = config.resolved()
    values: dict[str, Any] = {}
    for name in _DECISIVE:
        section = resolved[name]
        if isinstance(section, dict):
            section = {k: v for k, v in section.items() if (name, k) not in _INDECISIVE}
        values[name] = section
    values["training"]["precision"] = precision
    values["optimizer"]["learning_rate"] = learning_rate
    return {**values, "initial": initial.name, "initial_sha256": initial.sha256}


def describe_train_plan(plan: TrainPlan) -> list[str]:
    """What is going to be trained, in a few lines."""
    shape, initial = plan.initial.config, plan.initial
    lines = [
        f"Model: {initial.described}, {shape.num_hidden_layers} layers of {shape.hidden_size}, "
        f"windows of {plan.windows.window_samples / plan.windows.sample_rate_hz:g} s; on "
        f"{plan.device} in {plan.precision}, learning rate {plan.learning_rate:g}.",
        *initial.notes,
        *describe_inputs(plan.found),
    ]
    if plan.found_validation is not None:
        lines += [f"For validation: {line}" for line in describe_inputs(plan.found_validation)]
    return lines


# --- What is there already -----------------------------------------------------------------


def find_training(plan: TrainPlan) -> Mapping[str, Any] | None:
    """The record of this training from an earlier run; None if there is none.

    Raises:
        OutputError: The folder holds another training, or what no training wrote.
    """
    url = storage.join(plan.output, TRAIN_NAME)
    if not storage.exists(url):
        foreign = sorted(set(storage.list_names(plan.output)) - {CACHE_NAME})
        if foreign:
            raise OutputError(
                f"{plan.output} holds {counted(len(foreign), 'other thing')}, such as "
                f"{foreign[0]}, and no {TRAIN_NAME}; expected a new folder, or one that earmark "
                "train wrote. Give another --output."
            )
        return None
    try:
        record: Mapping[str, Any] = json.loads(storage.read_bytes(url))
        before = {**record["results"], "data": None}
        _ = record["status"], record["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{url} is no record of a training ({type(error).__name__}: {error}); give another "
            "--output, or start anew with --overwrite."
        ) from error
    _check_same(plan, before, {**plan.results, "data": None})
    return record


def check_same_training(plan: TrainPlan, record: Mapping[str, Any]) -> None:
    """Refuse to go on with other clips than those that a training began with.

    Raises:
        OutputError: They are others.
    """
    _check_same(plan, record["results"], plan.results)


def _check_same(plan: TrainPlan, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = describe_differences(before, now)
    if differences:
        raise OutputError(
            f"{plan.output} holds another training:\n"
            + "\n".join(differences)
            + "\nGive another --output, go back to those settings, or start anew with --overwrite."
        )


def is_done(record: Mapping[str, Any]) -> bool:
    """Whether a training has come to its end."""
    return bool(record["status"] == "done")


def say_done(output: str) -> int:
    """Say that there is nothing to do; gives the exit code."""
    answer(
        f"{output} is trained already, with these settings on these clips; --overwrite starts anew."
    )
    return 0


def check_removable(plan: TrainPlan) -> None:
    """Refuse to remove what no training wrote, or what this one starts from.

    Raises:
        OutputError: The output holds such a file.
    """
    written = [name for name in _WRITTEN if storage.exists(storage.join(plan.output, name))]
    if written and TRAIN_NAME not in written:
        raise OutputError(
            f"{plan.output} holds {written[0]} and no {TRAIN_NAME}, so that no training of Earmark "
            "wrote it, and --overwrite does not remove it. Give another --output, or remove it "
            "yourself."
        )
    source = plan.initial.folder
    if written and source is not None:
        output = Path(storage.local_path(plan.output)).resolve()
        if Path(source).resolve().is_relative_to(output):
            raise OutputError(
                f"--model {plan.initial.name} lies in {plan.output}, which --overwrite removes "
                "before it is read. Give another --output."
            )


def remove_training(output: str) -> None:
    """Remove what a training wrote, and nothing else."""
    for name in _WRITTEN:
        url = storage.join(output, name)
        if storage.exists(url):
            storage.remove(url)
    for folder in _WEIGHTS:
        storage.remove_empty_folder(storage.join(output, folder))


# --- Clips ---------------------------------------------------------------------------------


def prepare_clips(plan: TrainPlan, config: TrainConfig) -> PreparedClips:
    """Decode what is not in the cache yet, and sort out labels.

    Raises:
        InputError: Labels or audio are not such that they can be learnt.
    """
    caches = [_cache(plan, plan.found, config)]
    if plan.found_validation is not None:
        caches.append(_cache(plan, plan.found_validation, config, " for validation"))
    keeps_head = config.training.head == "keep"
    sets = make_clip_sets(
        *caches,
        hold_out=config.hold_out,
        label_names=plan.initial.labels if keeps_head else plan.initial.wanted_labels,
        loss=config.training.loss,
        max_failed=config.max_failed,
    )
    if sets.validation is not None:
        check_metric(sets.validation, config.training.metric)
    say(describe_clips(sets), quiet=config.quiet)
    # Said aloud, however quiet the run is to be.
    failures = [failure for cached in caches for failure in cached.failures]
    for line in (*sets.warnings, *describe_failures(failures)):
        say(line)
    contents = {
        clip.item.clip_id: clip.content_sha256 for cached in caches for clip in cached.clips
    }
    return PreparedClips(
        sets,
        {
            "train": _digest(sets.train, contents),
            "validation": None if sets.validation is None else _digest(sets.validation, contents),
        },
        tuple(caches),
    )


def _digest(clips: ClipSet, contents: Mapping[str, str]) -> str:
    """What clips hold, as far as training depends on it; not where they lie."""
    digest = hashlib.sha256(json.dumps(clips.label_names).encode())
    for clip in clips.clips:
        segment = [clip.item.start_s, clip.item.end_s, clip.num_samples, list(clip.labels)]
        digest.update(json.dumps([contents[clip.item.clip_id], *segment]).encode())
    return digest.hexdigest()[:16]


def check_metric(clips: ClipSet, metric: str) -> None:
    """Find out before the first epoch whether the metric can be had from the validation clips.

    Raises:
        InputError: It cannot.
    """
    others = [clip for clip in clips.clips if len(clip.labels) != 1]
    if metric == "accuracy" and others:
        raise InputError(
            f"training.metric is accuracy, and {len(others):,} of "
            f"{counted(len(clips), 'validation clip')} have not exactly one label, such as "
            f"{others[0].item.clip_id}. Give --set training.metric=mean_average_precision."
        )
    if not any(clip.labels for clip in clips.clips):
        raise InputError(
            f"none of {counted(len(clips), 'validation clip')} has a label of its own, so that "
            f"there is no {metric} to measure; validate with clips that have some."
        )


def describe_clips(sets: ClipSets) -> str:
    """What there is to learn from, in a line."""
    held = "none" if sets.validation is None else counted(len(sets.validation), "clip")
    return (
        f"Training on {counted(len(sets.train), 'clip')} with "
        f"{counted(len(sets.train.label_names), 'label')}; for validation: {held}."
    )


def describe_failures(failures: Sequence[ItemFailure]) -> list[str]:
    """What could not be decoded, in a line if there is any."""
    if not failures:
        return []
    first = failures[0].failure
    return [
        f"{counted(len(failures), 'item')} could not be decoded and go to {ERRORS_NAME}; one "
        f"of them: {first.item.clip_id}: {first.message}"
    ]


class _DecodingDisplay:
    """Shows decoding from its first clip on; where nothing is decoded, nothing. A context.

    Args:
        found: What is to be decoded.
        sample_rate_hz: Of what it is decoded to.
        purpose: What for, with a space before it; or nothing.
        quiet: Show nothing.
    """

    def __init__(self, found: Found, sample_rate_hz: int, purpose: str, *, quiet: bool) -> None:
        self._total, self._sample_rate_hz = count_found_items(found), sample_rate_hz
        self._purpose, self._quiet = purpose, quiet
        self._num_kept = 0
        self._shown: ProgressDisplay | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def on_kept(self, num_items: int) -> None:
        """An earlier process has done so many."""
        self._num_kept = num_items
        done = f"{counted(num_items, 'item')} done before"
        say(f"Going on with decoding{self._purpose}: {done}.", quiet=self._quiet)

    def on_clip(self, num_samples: int, failed: bool) -> None:
        """Another one is done."""
        if self._shown is None:
            self._shown = ProgressDisplay(
                read=LiveReader(),
                total_items=None if self._total is None else self._total - self._num_kept,
                doing=f"decoding{self._purpose}",
                has_windows=False,
                quiet=self._quiet,
            )
            self._stack.enter_context(self._shown)
        live_counts.failures += failed
        live_counts.clips += not failed
        live_counts.audio_s += num_samples / self._sample_rate_hz


def _cache(plan: TrainPlan, found: Found, config: TrainConfig, purpose: str = "") -> CachedClips:
    rate_hz = plan.decode.sample_rate_hz
    with _DecodingDisplay(found, rate_hz, purpose, quiet=config.quiet) as display:
        cached = cache_clips(
            found,
            plan.cache,
            decode=plan.decode,
            sources=plan.sources,
            dtype=config.cache.dtype,
            on_clip=display.on_clip,
            on_kept=display.on_kept,
        )
    if cached.is_reused:
        clips = counted(len(cached.clips), "clip")
        say(f"Decoded already{purpose}: {clips}.", quiet=config.quiet)
    return cached


def remove_caches(caches: Sequence[CachedClips]) -> None:
    """Remove decoded audio that nobody has asked to keep."""
    for folder in {Path(cached.folder) for cached in caches}:
        shutil.rmtree(folder)
        storage.remove_empty_folder(storage.normalise(str(folder.parent)))


def validation_manifest(clips: ClipSet) -> bytes:
    """A manifest of clips with their labels, for ``earmark label`` and ``earmark evaluate``."""
    lines = []
    for clip in clips.clips:
        item = clip.item
        place = {
            "clip_id": item.clip_id,
            "uri": item.uri,
            "member": item.member,
            "row": item.row,
            "start_s": item.start_s,
            "end_s": item.end_s,
        }
        labels = [clips.label_names[index] for index in clip.labels]
        values = {name: value for name, value in place.items() if value is not None}
        lines.append(json.dumps({**values, "labels": labels}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


# --- Training ------------------------------------------------------------------------------


def _write(url: str, content: bytes) -> None:
    with storage.writing_to(url):
        storage.write_bytes(url, content)


class Recorder:
    """Keeps the output up to date: the record, the figures, the weights.

    Args:
        plan: What is trained.
        record: ``train.json`` as far as it is known.
        statistics: Mean and standard deviation that features are normalised with.
        dtype: That weights are saved in.
        quiet: Say nothing.
    """

    def __init__(
        self,
        plan: TrainPlan,
        record: dict[str, Any],
        statistics: tuple[float, float],
        dtype: torch.dtype,
        *,
        quiet: bool,
    ) -> None:
        self._plan, self._record, self._quiet = plan, record, quiet
        self._statistics, self._dtype = statistics, dtype
        self._drawn_s = -_CURVES_EVERY_S

    def write_record(self, **more: Any) -> None:
        """Write ``train.json`` with what has become known."""
        self._record |= more
        text = json.dumps(self._record, indent=2, ensure_ascii=False)
        _write(storage.join(self._plan.output, TRAIN_NAME), text.encode() + b"\n")

    def write_history(self, history: list[Row], *, draw: bool) -> None:
        """Write the table, and the curves if it is time."""
        _write(storage.join(self._plan.output, HISTORY_NAME), history_table(history))
        if draw or time.monotonic() - self._drawn_s >= _CURVES_EVERY_S:
            curves = draw_curves(history)
            _write(storage.join(self._plan.output, CURVES_NAME), curves)
            self._drawn_s = time.monotonic()

    def write_model(self, model: ASTForAudioClassification, folder: str = "") -> None:
        """Write a model's folder: the output itself, or one in it."""
        place = storage.join(self._plan.output, folder) if folder else self._plan.output
        mean, std = self._statistics
        with storage.writing_to(place):
            save_pretrained(copy_for_saving(model), place, mean=mean, std=std, dtype=self._dtype)


def train(
    plan: TrainPlan,
    prepared: PreparedClips,
    config: TrainConfig,
    record: Mapping[str, Any] | None,
) -> None:
    """Run the stages and write what comes of them.

    Args:
        plan: What is trained.
        prepared: The clips.
        config: As given.
        record: What an earlier run has written of this very training; None if there is none.
    """
    began_s = time.monotonic()
    clips = prepared.sets
    device = torch.device(plan.device)
    statistics = settle_statistics(plan, clips.train, record, quiet=config.quiet)
    recorder = Recorder(
        plan,
        _record(plan, clips, config, statistics),
        statistics,
        getattr(torch, config.training.saved_dtype),
        quiet=config.quiet,
    )
    recorder.write_record()
    errors = storage.join(plan.output, ERRORS_NAME)
    with storage.writing_to(errors):
        write_errors(prepared.caches, errors)
    if clips.validation is not None:
        manifest = validation_manifest(clips.validation)
        _write(storage.join(plan.output, VALIDATION_NAME), manifest)
    model = build_model(
        plan.initial,
        clips.train.label_names,
        config.training.loss,
        config.training.seed,
        keeps_head=config.training.head == "keep",
    ).to(device)
    stages, teaching = make_stages(plan, clips, config, model, statistics)
    with EpochDisplay(stages, config.training.metric, quiet=config.quiet) as display:

        def on_resume(stage: Stage, num_epochs: int) -> None:
            done = f"{num_epochs} of {counted(stage.epochs, 'epoch')} done"
            say(f"Going on with {stage.name}: {done} before.", quiet=config.quiet)

        def on_epoch(stage: Stage, row: Row, history: list[Row]) -> None:
            recorder.write_history(history, draw=False)
            display.on_epoch(stage, row, teaching.best)

        def on_saved(stage: Stage, num_epochs: int) -> None:
            # The state of an epoch has its weights, too: a kill between both is made good here.
            if stage is teaching and teaching.best and teaching.best.epoch == num_epochs:
                recorder.write_model(teaching.model, "best")

        progress = run_stages(
            stages,
            plan.output,
            plan.fingerprint,
            on_resume=on_resume,
            on_step=display.on_step,
            on_epoch=on_epoch,
            on_saved=on_saved,
        )
    finish(plan, config, recorder, teaching, progress)
    for line in describe_training(config, teaching, progress):
        answer(line)
    answer(f"Written: {plan.output}; earmark label INPUT… --model {plan.output} uses it.")
    say(f"Took {format_duration(time.monotonic() - began_s)}.", quiet=config.quiet)


def settle_statistics(
    plan: TrainPlan, clips: ClipSet, record: Mapping[str, Any] | None, *, quiet: bool
) -> tuple[float, float]:
    """Mean and standard deviation to normalise with: given, measured before, or measured now."""
    if plan.initial.statistics is not None:
        return plan.initial.statistics
    if record is not None and {"mean", "std"} <= record.keys():
        return float(record["mean"]), float(record["std"])
    about = counted(len(clips), "clip")
    say(f"Measuring mean and standard deviation of {about}…", quiet=quiet)
    return measure_statistics(clips, plan.windows, plan.initial.config)


def make_stages(
    plan: TrainPlan,
    clips: ClipSets,
    config: TrainConfig,
    model: ASTForAudioClassification,
    statistics: tuple[float, float],
) -> tuple[list[Stage], FinetuningStage]:
    """The stages in order; the last one teaches labels."""
    device = torch.device(plan.device)
    fbank = FbankSettings(
        sample_rate_hz=plan.windows.sample_rate_hz,
        num_mel_bins=model.config.num_mel_bins,
        num_frames=model.config.max_length,
        mean=statistics[0],
        std=statistics[1],
    )
    log_mel = KaldiFbank(without_normalising(fbank)).to(device)
    augment = Augment(config.augmentation, fbank)
    num_loaders = config.training.loader_processes
    if num_loaders is None:
        num_loaders = 0 if plan.device == "cpu" else min(_MAX_LOADERS, os.cpu_count() or 1)
    batches = BatchSettings(
        batch_size=config.training.batch_size,
        window_samples=plan.windows.window_samples,
        sampler=config.training.sampler,
        seed=config.training.seed,
        stage=1,
    )
    teaching = FinetuningStage(
        model,
        clips.train,
        clips.validation,
        augment,
        log_mel,
        Scorer(
            KaldiFbank(fbank).to(device),
            plan.windows,
            config.training.batch_size,
            "softmax" if config.training.loss == "cross_entropy" else "sigmoid",
            plan.precision,  # type: ignore[arg-type]
        ),
        batches,
        FinetuningSettings(
            epochs=config.training.epochs,
            loss=config.training.loss,
            optimizer=config.optimizer,
            learning_rate=plan.learning_rate,
            schedule=config.schedule,
            averaging=config.averaging,
            trained_layers=config.training.trained_layers,
            precision=plan.precision,  # type: ignore[arg-type]
            validate_every=config.training.validate_every,
            metric=config.training.metric,
        ),
        num_loaders=num_loaders,
    )
    if not config.pretraining.epochs:
        return [teaching], teaching
    pretraining = PretrainingStage(
        model,
        clips.train,
        augment,
        log_mel,
        dataclasses.replace(
            batches, batch_size=config.pretraining.batch_size, sampler="shuffle", stage=0
        ),
        config.pretraining,
        precision=plan.precision,  # type: ignore[arg-type]
        num_loaders=num_loaders,
    )
    return [pretraining, teaching], teaching


def finish(
    plan: TrainPlan,
    config: TrainConfig,
    recorder: Recorder,
    teaching: FinetuningStage,
    progress: Progress,
) -> None:
    """Write the weights that are kept, close the record, and drop the state."""
    recorder.write_history(progress.history, draw=True)
    recorder.write_model(teaching.model, "last")
    averaged = teaching.averages.model
    if averaged is not None:
        recorder.write_model(averaged, "averaged")
    kept = storage.join(plan.output, config.training.keep)
    for name in (FEATURES_NAME, WEIGHTS_NAME, CONFIG_NAME):  # in the order that they are saved in
        content = storage.read_bytes(storage.join(kept, name))
        _write(storage.join(plan.output, name), content)
    best = teaching.best
    recorder.write_record(
        status="done",
        finished=utc_now(),
        best=None
        if best is None
        else {"epoch": best.epoch, config.training.metric: best.figure, "loss": best.loss},
        last=progress.history[-1],
    )
    storage.remove(storage.join(plan.output, STATE_NAME))


def describe_training(
    config: TrainConfig, teaching: FinetuningStage, progress: Progress
) -> list[str]:
    """What came of it, in words."""
    metric, last = config.training.metric, progress.history[-1]
    name = "accuracy" if metric == "accuracy" else "mAP"
    best = teaching.best
    lines = [
        f"Trained {counted(teaching.epochs, 'epoch')}. The model has {describe_kept(config, best)}."
    ]
    if best is not None:
        lines.append(
            f"Validation {name}: {best.figure:.4f} at best (epoch {best.epoch}), "
            f"{last[f'validation_{metric}']:.4f} in the last epoch."
        )
    averaged = last.get(f"averaged_{metric}")
    if averaged is not None:
        lines.append(f"Validation {name} of the averaged weights: {averaged:.4f}.")
    return lines


def describe_kept(config: TrainConfig, best: Best | None) -> str:
    """Which weights the output's model has, in words."""
    averaging = config.averaging
    if config.training.keep == "best" and best is not None:
        return f"the weights of the best epoch ({best.epoch})"
    if config.training.keep == "last":
        return f"the weights of the last epoch ({config.training.epochs})"
    if averaging.moving_decay is not None:
        return f"the moving average of the weights (decay {averaging.moving_decay:g} per step)"
    return (
        f"the average of the weights after the epochs {averaging.first_epoch} to "
        f"{averaging.last_epoch}"
    )


def _record(
    plan: TrainPlan, clips: ClipSets, config: TrainConfig, statistics: tuple[float, float]
) -> dict[str, Any]:
    validation = clips.validation
    return {
        "schema_version": TRAIN_SCHEMA_VERSION,
        "status": "running",
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs_digest,
        "initial": {"name": plan.initial.name, "sha256": plan.initial.sha256},
        "labels": list(clips.train.label_names),
        "clips": {
            "train": len(clips.train),
            "validation": 0 if validation is None else len(validation),
        },
        "clips_per_label": clips.train.counts(),
        "mean": statistics[0],
        "std": statistics[1],
        "device": plan.device,
        "precision": plan.precision,
        "versions": software_versions(),
        "started": utc_now(),
        "config": config.resolved(),
        "results": dict(plan.results),
    }
