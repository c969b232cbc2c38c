"""``earmark train``: teach a model the labels of one's own clips.

The output is a folder that ``--model`` and transformers take:

    config.json, model.safetensors, preprocessor_config.json   the weights that training.keep names
    best/  averaged/  last/    the same three files with other weights, where there are such
    train.json                 settings, data, versions and result
    history.csv  curves.png    the figures of every epoch
    validation.jsonl           a manifest of the clips that were held out
    errors.parquet             a row per clip that could not be used, if there is one
    _resume.pt                 the whole state, to resume with or to extend by more epochs
    cache/                     decoded audio, until the training is done; --cache keeps it elsewhere

The same command resumes an unfinished training, and extends an ended one with more --epochs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.config.train import TrainConfig
from pipeline.result.lock import hold_output
from pipeline.result.state import utc_now
from pipeline.terminal.std_streams import answer, say
from pipeline.terminal.wording import counted, format_duration
from pipeline.training.clips import digest_clips, prepare_clips
from pipeline.training.data.augmentation import Augment
from pipeline.training.data.batches import BatchSettings
from pipeline.training.data.clip_cache import remove_cache
from pipeline.training.data.dataset import ClipSet, ClipSets
from pipeline.training.data.failures import write_errors
from pipeline.training.display import EpochDisplay
from pipeline.training.history import METRIC_NAMES
from pipeline.training.initial import build_model, measure_statistics
from pipeline.training.output import (
    ERRORS_NAME,
    MODEL_FILES,
    VALIDATION_NAME,
    Recorder,
    check_epochs,
    check_removable,
    check_same_training,
    find_training,
    is_done,
    make_record,
    remove_training,
    validation_manifest,
    write_file,
)
from pipeline.training.plan import (
    TrainPlan,
    describe_train_plan,
    local_output,
    make_train_plan,
    what_changes_training,
)
from pipeline.training.settle import (
    Settled,
    Start,
    describe_start,
    describe_steps,
    measure_start,
    settle_training,
    warn_of_few_steps,
    warn_of_result,
)
from pipeline.training.stages.finetuning import FinetuningStage
from pipeline.training.stages.loop import STATE_NAME, Progress, Row, Stage, run_stages
from pipeline.training.stages.pretraining import PretrainingStage, predictable
from pipeline.training.stages.steps import InputLoader
from pipeline.training.stages.validation import Scorer
from transforms.features.fbank import KaldiFbank
from transforms.features.fbank_settings import without_normalising
from transforms.models.ast.model import ASTForAudioClassification
from transforms.process.devices import threads_of
from transforms.process.limits import usable_cores
from transforms.process.temp_folders import sweep
from transforms.records import ItemFailure
from transforms.storage import filesystem, reading, urls, writing

_MAX_LOADERS = 8


def run_train(config: TrainConfig) -> int:
    """Train a model as the configuration says, and return the exit code, 0.

    Raises:
        UsageError: The command or the data is not right; no training was changed.
        TrainingError: The loss has become NaN or infinite.
        WriteError: The disk is full or fails; the last whole state stays.
    """
    sweep()
    output = local_output(config)
    with hold_output(output):
        plan = make_train_plan(config, output)
        for line in describe_train_plan(plan):
            say(line, quiet=config.quiet and not line.endswith(plan.warnings))
        if config.overwrite:
            check_removable(plan)
        record = None if config.overwrite else find_training(plan)
        epochs_before = None if record is None else check_epochs(output, record, config)
        is_over = (
            record is not None
            and is_done(record)
            and (config.training.epochs in (None, epochs_before))
        )
        if record is not None and is_over and record["inputs"] == plan.inputs_digest:
            return _say_done(output)
        clips, failures, head = prepare_clips(plan, config)
        settled = settle_training(
            config.training,
            len(clips.train),
            keeps_head=head.is_kept,
            epochs_before=epochs_before,
        )
        config = settled.put_into(config)
        for line in filter(None, (head.note, describe_steps(settled, len(clips.train)))):
            say(line, quiet=config.quiet)
        for line in warn_of_few_steps(settled, len(clips.train)):
            say(line)
        validation = None if clips.validation is None else digest_clips(clips.validation)
        data = {"train": digest_clips(clips.train), "validation": validation}
        results = what_changes_training(config, plan.initial, plan.precision, plan.learning_rate)
        plan = dataclasses.replace(plan, results={**results, "data": data})
        if record is not None:
            check_same_training(plan, record["results"], plan.results)
        if config.overwrite:
            remove_training(output)
        if is_over:
            _say_done(output)
        else:
            train(plan, clips, failures, config, settled, record)
        if config.cache.folder is None:
            remove_cache(plan.cache)
    return 0


def _say_done(output: str) -> int:
    answer(
        f"{output} is already trained with these settings on these clips; --overwrite starts again."
    )
    return 0


def train(
    plan: TrainPlan,
    clips: ClipSets,
    failures: Sequence[ItemFailure],
    config: TrainConfig,
    settled: Settled,
    earlier: Mapping[str, Any] | None,
) -> None:
    """Run the stages and write the results; ``earlier`` is the record that this run resumes.

    ``config`` has what was ``settled``.
    """
    torch.set_num_threads(threads_of(1))
    began_s = time.monotonic()
    statistics = settle_statistics(plan, clips.train, earlier, quiet=config.quiet)
    record = make_record(plan, clips, config, statistics, earlier)
    recorder = Recorder(plan, record, getattr(torch, config.training.saved_dtype))
    recorder.write_record()
    errors = urls.join(plan.output, ERRORS_NAME)
    with writing.writing_to(errors):
        write_errors(failures, errors)
    if clips.validation is not None:
        write_file(plan, VALIDATION_NAME, validation_manifest(clips.validation))
    model = build_model(
        plan.initial,
        clips.train.label_names,
        config.training.loss,
        config.training.seed,
        keeps_head=settled.head == "keep",
    ).to(torch.device(plan.device))
    stages, teaching = make_stages(plan, clips, config, settled, model, statistics)
    start = begin(plan, config, recorder, teaching, earlier)
    if start is not None:
        num_clips = len(clips.validation or ())
        say(describe_start(config, start, num_clips), quiet=config.quiet)
    with EpochDisplay(stages, config.training.metric, quiet=config.quiet) as display:

        def on_resume(stage: Stage, num_epochs: int) -> None:
            done = f"{num_epochs} of {counted(stage.epochs, 'epoch')} already done"
            say(f"Resuming {stage.name}: {done}.", quiet=config.quiet)

        def on_epoch(stage: Stage, row: Row, history: list[Row]) -> None:
            recorder.write_history(history, draw=False)
            display.on_epoch(stage, row, teaching.best)

        def on_saved(stage: Stage, num_epochs: int) -> None:
            # The saved state has these weights, too: resuming writes them after a kill in between.
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
    last = progress.history[-1]
    warnings = warn_of_result(config, start, teaching.best, last, plan.learning_rate)
    finish(plan, config, recorder, teaching, progress, warnings)
    for line in (*describe_training(config, teaching, progress), *warnings):
        answer(line)
    answer(f"Written: {plan.output}; earmark label INPUT… --model {plan.output} uses it.")
    say(f"Took {format_duration(time.monotonic() - began_s)}.", quiet=config.quiet)


def begin(
    plan: TrainPlan,
    config: TrainConfig,
    recorder: Recorder,
    teaching: FinetuningStage,
    earlier: Mapping[str, Any] | None,
) -> Start | None:
    """Measure the start, or take it from the run that this one resumes; see ``measure_start``.

    Where training starts with this very model, it is epoch 0 for the choice of the best.
    """
    if earlier is not None and "start" in earlier:
        start = None if earlier["start"] is None else Start(**earlier["start"])
    else:
        start = measure_start(
            config, plan.initial, teaching.model, teaching.validation, teaching.scorer
        )
    recorder.write_record(start=None if start is None else dataclasses.asdict(start))
    if start is not None:
        teaching.best = start.as_best(config.training.metric)
    has_state = filesystem.exists(urls.join(plan.output, STATE_NAME))
    if teaching.best is not None and not has_state:
        recorder.write_model(teaching.model, "best")
    return start


def settle_statistics(
    plan: TrainPlan, clips: ClipSet, earlier: Mapping[str, Any] | None, *, quiet: bool
) -> tuple[float, float]:
    """Return mean and standard deviation to normalise with: given, measured before, or now."""
    if plan.initial.statistics is not None:
        return plan.initial.statistics
    if earlier is not None and {"mean", "std"} <= earlier.keys():
        return float(earlier["mean"]), float(earlier["std"])
    about = counted(len(clips), "clip")
    say(f"Measuring mean and standard deviation of {about}…", quiet=quiet)
    return measure_statistics(clips, plan.settings.windows, plan.fbank)


def make_stages(
    plan: TrainPlan,
    clips: ClipSets,
    config: TrainConfig,
    settled: Settled,
    model: ASTForAudioClassification,
    statistics: tuple[float, float],
) -> tuple[list[Stage], FinetuningStage]:
    """Make the stages in order; the last one, given again, teaches labels."""
    device = torch.device(plan.device)
    windows, training = plan.settings.windows, config.training
    fbank = dataclasses.replace(plan.fbank, mean=statistics[0], std=statistics[1])
    log_mel = KaldiFbank(without_normalising(fbank)).to(device)
    augment = Augment(config.augmentation, fbank)
    num_loaders = training.loader_processes
    if num_loaders is None:
        num_loaders = 0 if plan.device == "cpu" else min(_MAX_LOADERS, usable_cores())
    batches = BatchSettings(
        batch_size=settled.batch_size,
        window_samples=windows.window_samples,
        sampler=training.sampler,
        seed=training.seed,
        stage=1,
    )
    scorer = Scorer(
        KaldiFbank(fbank).to(device),
        windows,
        settled.batch_size,
        "softmax" if training.loss == "cross_entropy" else "sigmoid",
        plan.precision,
    )
    teaching = FinetuningStage(
        model,
        InputLoader(model, clips.train, augment, log_mel, batches, num_loaders),
        clips.validation,
        scorer,
        config,
        settled.epochs,
        plan.learning_rate,
        plan.precision,
    )
    section = config.pretraining
    if not section.epochs:
        return [teaching], teaching
    batches = dataclasses.replace(
        batches, batch_size=section.batch_size, sampler="shuffle", stage=0
    )
    inputs = InputLoader(model, clips.train, predictable(augment), log_mel, batches, num_loaders)
    return [PretrainingStage(model, inputs, section, plan.precision), teaching], teaching


def finish(
    plan: TrainPlan,
    config: TrainConfig,
    recorder: Recorder,
    teaching: FinetuningStage,
    progress: Progress,
    warnings: Sequence[str],
) -> None:
    """Write the weights that are kept, and close the record; the state stays, to be extended."""
    recorder.write_history(progress.history, draw=True)
    recorder.write_model(teaching.model, "last")
    averaged = teaching.averages.model
    if averaged is not None:
        recorder.write_model(averaged, "averaged")
    for name in MODEL_FILES:
        kept = urls.join(plan.output, config.training.keep, name)
        write_file(plan, name, reading.read_bytes(kept))
    best = teaching.best
    recorder.write_record(
        status="done",
        finished=utc_now(),
        best=None
        if best is None
        else {"epoch": best.epoch, config.training.metric: best.figure, "loss": best.loss},
        last=progress.history[-1],
        warnings=list(warnings),
    )


def describe_training(
    config: TrainConfig, teaching: FinetuningStage, progress: Progress
) -> list[str]:
    """Describe the result of a training, in a few lines."""
    metric, last = config.training.metric, progress.history[-1]
    name, best = METRIC_NAMES[metric], teaching.best
    lines = [
        f"Trained {counted(teaching.epochs, 'epoch')}. The model has "
        f"{describe_kept(config, teaching)}."
    ]
    if best is not None:
        when = f"epoch {best.epoch}" if best.epoch else "before training"
        lines.append(
            f"Validation {name}: {best.figure:.4f} at best ({when}), "
            f"{last[f'validation_{metric}']:.4f} in the last epoch."
        )
    averaged = last.get(f"averaged_{metric}")
    if averaged is not None:
        lines.append(f"Validation {name} of the averaged weights: {averaged:.4f}.")
    return lines


def describe_kept(config: TrainConfig, teaching: FinetuningStage) -> str:
    """Say which weights the model in the output has."""
    averaging, best = config.averaging, teaching.best
    if config.training.keep == "best" and best is not None and best.epoch == 0:
        return "the weights that it started with"
    if config.training.keep == "best" and best is not None:
        return f"the weights of the best epoch ({best.epoch})"
    if config.training.keep == "last":
        return f"the weights of the last epoch ({teaching.epochs})"
    if averaging.moving_decay is not None:
        return f"the moving average of the weights (decay {averaging.moving_decay:g} per step)"
    return (
        f"the average of the weights after the epochs {averaging.first_epoch} to "
        f"{averaging.last_epoch}"
    )
