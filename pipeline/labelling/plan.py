"""What a run will do: resolve the settings, find the items, leave out what is done.

    INPUT… ─find─▶ items, containers ─compare with commits─▶ units to do
                                          ├─▶ kept: committed and unchanged
                                          ├─▶ redone: units that hold a changed item
                                          └─▶ vanished: committed, not in this input

Nothing is written here; ``earmark plan`` stops after it, ``earmark label`` goes on with ``run``.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.label import (
    DecodeSection,
    ReadSection,
    RunConfig,
    given_inputs,
    given_output,
)
from pipeline.graph import RunTotals
from pipeline.labelling.backlog import (
    Backlog,
    count_found_items,
    count_vanished_failures,
    find_uncut_backlog,
)
from pipeline.result.state import (
    RUN_SCHEMA_VERSION,
    FinishRun,
    ResultState,
    check_removable,
    check_same_results,
    make_fingerprint,
    read_result,
    software_versions,
)
from pipeline.terminal.time_report import Startup
from transforms.decoding.pool import DecodeSettings
from transforms.errors import ConfigError, ModelError
from transforms.features.fbank import FEATURES_VERSION
from transforms.inference.backbones import InferenceSettings
from transforms.inference.engines import check_settings
from transforms.label_audio import LabelSettings, make_settings
from transforms.models.ast.bundled import DEFAULT_MODEL, describe_default
from transforms.models.ast.checkpoints import (
    ModelOverrides,
    ModelSpec,
    load_features,
    resolve_model,
)
from transforms.models.ast.files import FEATURES_NAME
from transforms.records import WorkUnit
from transforms.results.commits import UnitSummary
from transforms.results.write_units import CommitSettings
from transforms.sources.file_kinds import guess_duration_s
from transforms.sources.read_unit import (
    Found,
    ReadLimits,
    SourceSettings,
    cut_containers,
    find_inputs,
    limit_items,
)
from transforms.storage import filesystem as storage

# The fields of a config that the forward pass depends on; others (dropouts, what to return) may
# differ between two folders of the same model.
SHAPE_OF_A_MODEL = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "qkv_bias",
    "layer_norm_eps",
    "head_layer_norm_eps",
    "patch_size",
    "frequency_stride",
    "time_stride",
    "max_length",
    "num_mel_bins",
)

# Longer files are named, with the command that divides them into segments of this length.
LONG_FILE_S = 900

KIND_NAMES = {"tar": "tar archive", "parquet": "audio-Parquet file"}


@dataclass(frozen=True)
class RunFrame:
    """What a run knows before its inputs are listed; workers may do that (``deferred``).

    Attributes:
        urls: What was given, as absolute paths or URLs; may carry signatures.
        output: The result's folder.
        state: What lies there now.
        label: The settings of every step.
        commit: Where and how to write.
        run: ``run.json`` as far as it is known.
        limit: How many items to do at most; None for all.
        keeps: Whether what is committed stays: not with ``--overwrite``.
        retry_failed: Whether failed items are tried again.
    """

    urls: tuple[str, ...] = field(repr=False)
    output: str
    state: ResultState
    label: LabelSettings
    commit: CommitSettings
    run: Mapping[str, Any]
    limit: int | None
    keeps: bool
    retry_failed: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """What was given, without signatures."""
        return tuple(storage.public_uri(url) for url in self.urls)


@dataclass(frozen=True)
class RunPlan:
    """Everything a run needs to know before it starts.

    Attributes:
        inputs: What was given, as absolute paths or URLs without signatures.
        output: The result's folder.
        state: What lies there now.
        label: The settings of every step.
        commit: Where and how to write.
        run: ``run.json`` as far as it is known.
        found: What the inputs hold.
        backlog: What of it is to be done, and what is done already.
        vanished_failures: Failures in the result of items that are not in the input.
    """

    inputs: tuple[str, ...]
    output: str
    state: ResultState
    label: LabelSettings
    commit: CommitSettings
    run: Mapping[str, Any]
    found: Found
    backlog: Backlog
    vanished_failures: int

    @property
    def units(self) -> tuple[WorkUnit, ...]:
        """The units to do."""
        return self.backlog.units

    @property
    def kept(self) -> RunTotals:
        """Totals of the committed units that stay."""
        total = RunTotals()
        for unit_id in self.backlog.kept_units:
            total += RunTotals.of(UnitSummary.of(self.state.commits[unit_id]))
        return total


def make_plan(config: RunConfig, *, is_remote: bool = False, needs_output: bool = True) -> RunPlan:
    """Plan a run; everything that can be wrong with the command is found here.

    Arguments and errors are those of ``make_frame``.
    """
    return find_plan(make_frame(config, is_remote=is_remote, needs_output=needs_output))


def make_frame(
    config: RunConfig, *, is_remote: bool = False, needs_output: bool = True
) -> RunFrame:
    """Everything of a plan but what the inputs hold.

    Args:
        config: What to do.
        is_remote: Other machines will do it, so that this one's devices say nothing.
        needs_output: There must be an output; without one, nothing is done already.

    Raises:
        UsageError: The config, the model or the output is not right.
    """
    urls = [storage.normalise(text) for text in given_inputs(config)]
    wants_output = needs_output or config.output is not None
    output = storage.normalise(given_output(config)) if wants_output else ""
    model = choose_model(config)
    label = make_label_settings(config, model)
    if not is_remote:
        check_settings(label.inference)
    elif label.inference.precision == "int8":
        raise ConfigError(
            "inference.precision is int8, which is calibrated on this machine, and the runner "
            "works on others; use --precision bf16, or --runner=FnApiRunner."
        )
    results = what_changes_results(config, label)
    state = read_result(output) if output else ResultState(output)
    if config.overwrite:
        check_removable(state)
    else:
        check_same_results(state, results, model.name)
    public_inputs = tuple(storage.public_uri(url) for url in urls)
    return RunFrame(
        urls=tuple(urls),
        output=output,
        state=state,
        label=label,
        commit=CommitSettings(
            output=output,
            run_id=uuid.uuid4().hex[:12],
            fingerprint=make_fingerprint(results),
            model_sha256=model.sha256,
            rows=label.rows,
        ),
        run=_run_record(config, public_inputs, label, results),
        limit=config.limit,
        keeps=not config.overwrite,
        retry_failed=config.retry_failed,
    )


def find_plan(frame: RunFrame, max_listed: int | None = None) -> RunPlan:
    """List the inputs, and divide what is to be done into units.

    Arguments and errors are those of ``find_work``.
    """
    plan = find_work(frame, max_listed)
    backlog = plan.backlog
    units = (*backlog.units, *cut_containers(backlog.rests, frame.label.sources))
    return dataclasses.replace(plan, backlog=dataclasses.replace(backlog, units=units, rests=()))


def find_work(frame: RunFrame, max_listed: int | None = None) -> RunPlan:
    """List the inputs, and divide what is to be done into units, but for new containers.

    Args:
        frame: What is known already.
        max_listed: How many files may be listed; None for any number.

    Raises:
        TooManyListedError: There are more.
        InputError: An input is not right.
    """
    sources = frame.label.sources
    found = find_inputs(
        frame.urls,
        exclude=frame.output or None,
        max_page_bytes=sources.limits.max_page_bytes,
        max_listed=max_listed,
    )
    if frame.limit is not None:
        found = limit_items(found, frame.limit, sources)
    commits = frame.state.commits if frame.keeps else {}
    retry_from = frame.output if frame.retry_failed else None
    return RunPlan(
        inputs=frame.inputs,
        output=frame.output,
        state=frame.state,
        label=frame.label,
        commit=frame.commit,
        run={**frame.run, "input": _input_record(found)},
        found=found,
        backlog=find_uncut_backlog(found, commits, sources, retry_from=retry_from),
        vanished_failures=count_vanished_failures(found, commits, frame.output),
    )


def make_finish(plan: RunPlan, startup: Startup) -> FinishRun:
    """The last step of a run, which holds what comes of it against the plan.

    Args:
        plan: What is to be done.
        startup: What starting has taken.
    """
    kept, backlog = plan.kept, plan.backlog
    return FinishRun(
        output=plan.output,
        run=plan.run,
        startup=startup,
        kept=kept,
        num_units=len(plan.units),
        found_kept_items=backlog.found_kept_items,
        vanished_kept_items=backlog.vanished_kept_items,
        vanished_carried_items=backlog.vanished_carried_items,
        retried_carried_items=backlog.retried_carried_items,
        vanished_failures=plan.vanished_failures,
        num_found_items=count_found_items(plan.found),
        num_commits=kept.units + len(plan.units),
    )


def choose_model(config: RunConfig) -> ModelSpec:
    """The checkpoint that is named; where none is, the one that ships, with a note that says so.

    Raises:
        ModelError: It cannot be found, or does not say what must be known.
    """
    overrides = make_overrides(config)
    if config.model.name is not None:
        return resolve_model(config.model.name, overrides)
    note = describe_default()  # first: it knows best what is wrong where there is none
    return dataclasses.replace(resolve_model(DEFAULT_MODEL, overrides), notes=(note,))


def make_overrides(config: RunConfig) -> ModelOverrides:
    """What the config says of the model instead of the checkpoint.

    Raises:
        ModelError: ``model.preprocessor`` cannot be read.
    """
    values = config.model.model_dump(exclude={"name", "preprocessor"})
    if config.model.preprocessor is not None:
        features = read_features(config.model.preprocessor)
        for name in ("mean", "std"):
            values[name] = features[name] if values[name] is None else values[name]
    return ModelOverrides(**values)


def read_features(place: str) -> Mapping[str, Any]:
    """The settings in a ``preprocessor_config.json``, which may be named by its folder.

    Raises:
        ModelError: There is none, or it holds no mean and std.
    """
    folder = place.removesuffix(f"/{FEATURES_NAME}") if place != FEATURES_NAME else "."
    features = load_features(folder)
    for name in ("mean", "std"):
        if not isinstance(features.get(name), int | float):
            raise ModelError(
                f"{storage.public_uri(place)} holds no {name}; expected a "
                f"{FEATURES_NAME} as earmark stats writes it"
            )
    return features


def make_label_settings(config: RunConfig, model: ModelSpec) -> LabelSettings:
    """The settings of every step from the config and the checkpoint.

    Raises:
        ConfigError: They cannot be met, or not by this machine.
    """
    inference = InferenceSettings(
        precision=config.inference.precision,
        device=config.inference.device,
        engine=config.inference.engine,
        batch_size=config.inference.batch_size,
        pooling=config.embedding.pooling,
        embedding_dtype=config.embedding.dtype,
        compile=config.inference.compile,
        check_windows=config.inference.check_windows,
        features_on=config.inference.features_on,
        num_processes=config.inference.workers,
    )
    return make_settings(
        model,
        decode=make_decode_settings(config.decode),
        inference=inference,
        window_s=config.window.length_s,
        hop_s=config.window.hop_s,
        min_tail_ratio=config.window.min_tail,
        top_k=config.labels.top_k,
        store_scores=config.labels.scores,
        sources=make_source_settings(config),
    )


def make_decode_settings(section: DecodeSection) -> DecodeSettings:
    """How to decode; the rate is the model's, and set where the model is known."""
    return DecodeSettings(
        num_processes=section.processes or 0,
        clips_ahead=section.clips_ahead or 0,
        stall_timeout_s=section.stall_timeout_s,
        max_item_bytes=section.max_item_bytes,
        max_item_s=section.max_item_s,
        max_decode_ratio=section.max_decode_ratio,
        max_decoder_bytes=section.max_decoder_bytes,
    )


def make_read_limits(decode: DecodeSection, read: ReadSection) -> ReadLimits:
    """What reading an input may take."""
    return ReadLimits(
        max_item_bytes=decode.max_item_bytes,
        max_page_bytes=read.max_page_bytes,
        max_expansion=read.max_expansion,
    )


def make_source_settings(config: RunConfig) -> SourceSettings:
    """How to cut inputs into units and read them; windows are set where they are known."""
    return SourceSettings(
        windows_per_unit=config.units.windows,
        limits=make_read_limits(config.decode, config.read),
    )


def what_changes_results(config: RunConfig, label: LabelSettings) -> dict[str, Any]:
    """Everything that changes results, by name; its digest is the fingerprint."""
    model = label.model
    return {
        "model_sha256": model.sha256,
        "model_config": {name: getattr(model.config, name) for name in SHAPE_OF_A_MODEL},
        "labels": [[entry.id, entry.name] for entry in model.labels],
        "mean": model.mean,
        "std": model.std,
        "activation": model.activation,
        "sample_rate_hz": model.sampling_rate,
        "window_samples": label.windows.window_samples,
        "hop_samples": label.windows.hop_samples,
        "min_tail_samples": label.windows.min_tail_samples,
        "top_k": label.rows.top_k,
        "scores": label.rows.store_scores,
        "pooling": label.inference.pooling,
        "embedding_dtype": label.inference.embedding_dtype,
        "precision": config.inference.precision,
        "features_version": FEATURES_VERSION,
    }


def _run_record(
    config: RunConfig,
    inputs: tuple[str, ...],
    label: LabelSettings,
    results: Mapping[str, Any],
) -> dict[str, Any]:
    model = label.model
    return {
        "schema_version": RUN_SCHEMA_VERSION,
        "status": "running",
        "fingerprint": make_fingerprint(results),
        "model": {
            "name": model.name,
            "source": model.source,
            "revision": model.revision,
            "sha256": model.sha256,
            "license": model.license,
            "activation": model.activation,
            "num_labels": model.num_labels,
            "hidden_size": model.hidden_size,
            "window_s": model.window_s,
            "notes": list(model.notes),
        },
        "scores_from_embedding": label.inference.pooling == "pooler_output",
        "versions": software_versions(),
        "config": {
            **config.resolved(),
            "inputs": list(inputs),
            "output": storage.public_uri(storage.normalise(config.output))
            if config.output
            else None,
        },
        "results": dict(results),
        "totals": None,
    }


def _input_record(found: Found) -> dict[str, Any]:
    return {
        "duplicates": found.duplicates,
        "skipped_by_extension": dict(found.skipped_by_extension),
        "notes": list(found.notes),
    }


def describe_plan(plan: RunPlan) -> list[str]:
    """What a run is going to do, in a few lines."""
    backlog = plan.backlog
    lines = [*describe_model(plan.label), *describe_inputs(plan.found)]
    if plan.state.commits:
        lines.append(describe_done(plan))
    for unit_id, reason in list(plan.state.damaged.items())[:5]:
        lines.append(f"Unit {unit_id} is damaged and done again: {reason}.")
    if backlog.units:
        windows_to_do = sum(unit.estimated_windows for unit in backlog.units)
        lines.append(
            f"To do: {counted(len(backlog.units), 'unit')}, about "
            f"{counted(windows_to_do, 'window')}."
        )
        lines += describe_long_files(backlog.units)
    else:
        lines.append("Nothing to do: everything found is done.")
    return lines


def describe_long_files(units: Iterable[WorkUnit]) -> list[str]:
    """Name files that are long by their size, and the command that divides them: a line, or none.

    A file is one item of one unit: a run that is killed inside it labels it again from its start.
    """
    long = [
        item
        for unit in units
        for item in unit.items
        if (item.start_s, item.end_s, item.member, item.row) == (None,) * 4
        and guess_duration_s(item.uri, item.size) > LONG_FILE_S
    ]
    if not long:
        return []
    others = f" and {counted(len(long) - 1, 'other')}" if len(long) > 1 else ""
    return [
        f"{long[0].uri}{others}: probably longer than {LONG_FILE_S // 60} minutes, and labelled in "
        f"one go; to divide: earmark plan INPUT… --segment-s {LONG_FILE_S} --manifest "
        "segments.jsonl"
    ]


def describe_model(label: LabelSettings) -> list[str]:
    """What a run labels with, in a few lines."""
    model, windows = label.model, label.windows
    return [
        f"Model: {model.name}, {model.num_labels} labels ({model.activation}), windows of "
        f"{windows.window_samples / windows.sample_rate_hz:g} s every "
        f"{windows.hop_samples / windows.sample_rate_hz:g} s.",
        *model.notes,
    ]


def counted(number: int, noun: str) -> str:
    """A number and its noun: ``1 unit``, ``2,000 units``, ``3 files or segments``."""
    if number != 1:
        noun = " or ".join(f"{word}s" for word in noun.split(" or "))
    return f"{number:,} {noun}"


def describe_inputs(found: Found) -> list[str]:
    """What the inputs hold, in a few lines."""
    lines = [f"Found: {describe_found(found)}."]
    if found.duplicates:
        lines.append(
            f"Listed again, and counted once: {counted(found.duplicates, 'item')}, such as "
            f"{', '.join(found.duplicate_examples)}."
        )
    if found.skipped_by_extension:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.skipped_by_extension.most_common(8))
        lines.append(f"Files of other kinds, left aside: {kinds}.")
    return [*lines, *found.notes]


def describe_found(found: Found) -> str:
    """The items and containers found."""
    kinds = Counter(container.kind for container in found.containers)
    parts = [counted(len(found.items), "file or segment")] if found.items else []
    parts += [counted(count, KIND_NAMES[kind]) for kind, count in kinds.items()]
    if found.failures:
        parts.append(f"{len(found.failures):,} that cannot be read")
    return ", ".join(parts) or "nothing"


def describe_done(plan: RunPlan) -> str:
    """What an earlier run has done."""
    backlog = plan.backlog
    text = f"Done already: {counted(backlog.found_kept_items, 'item')}"
    text += f" in {counted(len(backlog.kept_units), 'unit')}"
    if backlog.vanished_items:
        text += f"; {backlog.vanished_items:,} more are not in this input"
    if backlog.num_redone:
        text += f"; done again for changed items: {counted(backlog.num_redone, 'unit')}"
    if backlog.num_retried:
        text += f"; tried again: {counted(backlog.num_retried, 'failed item')}"
    return f"{text}."
