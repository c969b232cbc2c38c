"""The plan of a run: its settings, the items found, and the units that remain to be done.

Planning writes nothing. ``earmark plan`` stops after it; ``earmark label`` continues with the run.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from pipeline.config.label import ManifestSection, RunConfig, given_inputs, given_output
from pipeline.config.train import TrainConfig
from pipeline.graph import RunTotals
from pipeline.labelling.remaining import (
    RemainingWork,
    count_found_items,
    count_vanished_failures,
    find_remaining,
)
from pipeline.labelling.same_bytes import count_renewed, find_renewed
from pipeline.labelling.truth import with_truth
from pipeline.result.state import (
    FinishRun,
    ResultState,
    check_removable,
    check_same_results,
    make_fingerprint,
    read_result,
    software_versions,
)
from pipeline.terminal.count_report import list_largest
from pipeline.terminal.time_report import Startup
from pipeline.terminal.wording import counted
from transforms.decoding.settings import DecodeSettings
from transforms.errors import ConfigError, ModelError, OutputError
from transforms.features.fbank import FEATURES_VERSION
from transforms.inference.backbones import InferenceSettings
from transforms.inference.engines import choose_engine
from transforms.label_audio import LabelSettings, make_settings
from transforms.models.ast.bundled import DEFAULT_MODEL, describe_default
from transforms.models.ast.checkpoints import ModelOverrides, ModelSpec, resolve_model
from transforms.models.ast.config_files import load_features
from transforms.models.ast.files import FEATURES_NAME
from transforms.records import WorkUnit
from transforms.results.commits import OPTIONAL_COLUMNS, Commit, UnitSummary, schema_version
from transforms.results.write_units import CommitSettings
from transforms.sources.file_kinds import guess_duration_s
from transforms.sources.read_unit import (
    Found,
    ReadLimits,
    SourceSettings,
    TableSettings,
    find_inputs,
    limit_items,
)
from transforms.storage import urls
from transforms.storage.secrets import public_uri

# The fields of a model's config that change the forward pass. Others (dropout, output flags) may
# differ between two folders of the same model.
SHAPE_OF_A_MODEL = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "qkv_bias", "layer_norm_eps", "head_layer_norm_eps"),
    *("patch_size", "frequency_stride", "time_stride", "max_length", "num_mel_bins"),
)

# Longer files are named, with the command that divides them into segments of this length.
LONG_FILE_S = 900

MAX_KINDS = 8  # of files left aside, by name

KIND_NAMES = {"tar": "tar archive", "parquet": "audio-Parquet file"}


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose settings are resolved and whose inputs are not listed yet.

    Attributes:
        urls: The inputs as absolute paths or URLs; may carry signatures.
        state: The existing result; its ``output`` is empty if there is none.
        run: ``run.json`` without the totals; planning adds the inputs' content.
        truth: A table of what is true of the inputs, or None; may carry a signature.
        limit: Maximum number of items; None for all.
        keeps: Whether committed units stay; False with ``--overwrite``.
    """

    urls: tuple[str, ...] = field(repr=False)
    state: ResultState
    label: LabelSettings
    commit: CommitSettings
    run: Mapping[str, Any]
    truth: str | None = field(repr=False)
    limit: int | None
    keeps: bool
    retry_failed: bool


@dataclass(frozen=True)
class RunPlan:
    """Everything a run needs before it starts.

    ``vanished_failures`` counts failed items of the existing result that are not in the input.
    ``renewed`` are commits of files with other times and the same bytes, to be written.
    """

    resolved: ResolvedRun
    found: Found
    remaining: RemainingWork
    vanished_failures: int
    renewed: Mapping[str, Commit] = field(default_factory=dict)

    @property
    def units(self) -> tuple[WorkUnit, ...]:
        """Units to do."""
        return self.remaining.units

    @property
    def kept(self) -> RunTotals:
        """Totals of the committed units that stay."""
        total = RunTotals()
        for unit_id in self.remaining.kept_units:
            total += RunTotals.of(UnitSummary.of(self.resolved.state.commits[unit_id]))
        return total


def make_plan(config: RunConfig, *, is_remote: bool = False, needs_output: bool = True) -> RunPlan:
    """Plan a run. Arguments and errors are those of ``resolve_run`` and ``find_work``."""
    return find_plan(resolve_run(config, is_remote=is_remote, needs_output=needs_output))


def resolve_run(
    config: RunConfig, *, is_remote: bool = False, needs_output: bool = True
) -> ResolvedRun:
    """Resolve the settings of a run against the model and the existing result.

    If ``is_remote``, other machines do the work and this machine's devices do not matter. Without
    an output, which ``needs_output`` requires, nothing counts as done. Raise ``UsageError`` if the
    config, the model or the output is not valid.
    """
    inputs = tuple(urls.normalise(text) for text in given_inputs(config))
    wants_output = needs_output or config.output is not None
    output = urls.normalise(given_output(config.output)) if wants_output else ""
    model = choose_model(config)
    label = make_label_settings(config, model)
    if not is_remote:
        choose_engine(label.inference)  # an error now, before any work
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
    fingerprint = make_fingerprint(results)
    optional = OPTIONAL_COLUMNS if config.overwrite else _existing_columns(state)
    return ResolvedRun(
        urls=inputs,
        state=state,
        label=label,
        commit=CommitSettings(
            output=output,
            run_id=uuid.uuid4().hex[:12],
            fingerprint=fingerprint,
            model_sha256=model.sha256,
            rows=dataclasses.replace(label.rows, optional_columns=optional),
            each_channel=label.decode.channel == "each",
        ),
        run={
            "schema_version": schema_version(optional),
            "status": "running",
            "fingerprint": fingerprint,
            "model": _model_record(model),
            "scores_from_embedding": label.inference.pooling == "pooler_output",
            "versions": software_versions(),
            "config": {
                **config.resolved(),
                "inputs": [public_uri(url) for url in inputs],
                "output": public_uri(output) if config.output else None,
            },
            "results": results,
            "totals": None,
        },
        truth=None if config.truth is None else urls.normalise(config.truth),
        limit=config.limit,
        keeps=not config.overwrite,
        retry_failed=config.retry_failed,
    )


def _existing_columns(state: ResultState) -> tuple[str, ...]:
    """Return the optional columns of a result: it has one schema, whatever is added to it.

    Raises:
        OutputError: A later version has added one.
    """
    if not state.commits:
        return OPTIONAL_COLUMNS
    columns = min(commit.optional_columns for commit in state.commits.values())
    unknown = sorted(set(columns).difference(OPTIONAL_COLUMNS))
    if unknown:
        raise OutputError(
            f"{public_uri(state.output)} has a column {unknown[0]}, which this version of Earmark "
            "does not know; continue it with the version that wrote it (run.json names it), or "
            "give another --output."
        )
    return columns


def find_plan(resolved: ResolvedRun, max_listed: int | None = None) -> RunPlan:
    """List the inputs and divide what remains into units. Arguments as for ``find_work``."""
    plan = find_work(resolved, max_listed)
    return dataclasses.replace(plan, remaining=plan.remaining.cut(resolved.label.sources))


def find_work(resolved: ResolvedRun, max_listed: int | None = None) -> RunPlan:
    """List the inputs and divide what remains into units, except for new containers.

    Raises:
        TooManyListedError: There are more than ``max_listed`` files.
        InputError: An input is not valid.
    """
    sources, output = resolved.label.sources, resolved.state.output
    found = find_items(
        resolved.urls,
        resolved.limit,
        sources,
        truth=resolved.truth,
        exclude=output or None,
        max_listed=max_listed,
    )
    commits = resolved.state.commits if resolved.keeps else {}
    retry_from = output if resolved.retry_failed else None
    renewed = find_renewed(found, commits, output)
    content = {
        "duplicates": found.duplicates,
        "skipped_by_extension": dict(found.skipped_by_extension),
        "notes": list(found.notes),
        "warnings": list(found.warnings),
    }
    return RunPlan(
        resolved=dataclasses.replace(resolved, run={**resolved.run, "input": content}),
        found=found,
        remaining=find_remaining(found, commits, sources, retry_from=retry_from, renewed=renewed),
        vanished_failures=count_vanished_failures(found, commits, output),
        renewed=renewed,
    )


def find_items(
    inputs: Sequence[str],
    limit: int | None,
    sources: SourceSettings,
    *,
    truth: str | None = None,
    exclude: str | None = None,
    max_listed: int | None = None,
) -> Found:
    """List the content of the inputs, up to the limit, with the labels that a table gives them.

    Errors are those of ``find_inputs`` and ``with_truth``.
    """
    found = find_inputs(
        inputs,
        exclude=exclude,
        max_page_bytes=sources.limits.max_page_bytes,
        max_listed=max_listed,
        tables=sources.tables,
    )
    if truth is not None:
        found = with_truth(found, truth, sources.tables)
    return found if limit is None else limit_items(found, limit, sources)


def make_finish(plan: RunPlan, startup: Startup) -> FinishRun:
    """Return the last step of a run, which checks the result against the plan."""
    remaining = plan.remaining
    return FinishRun(
        output=plan.resolved.state.output,
        run=plan.resolved.run,
        startup=startup,
        kept=plan.kept,
        num_units=len(plan.units),
        carried_items=remaining.vanished_carried_items + remaining.found_carried_items,
        vanished_items=remaining.vanished_items,
        vanished_failures=plan.vanished_failures,
        num_found_items=count_found_items(plan.found),
    )


def choose_model(config: RunConfig) -> ModelSpec:
    """Return the named checkpoint; without a name, the bundled one, with a note that says so.

    Raise ``ModelError`` if the checkpoint cannot be found or is not complete.
    """
    overrides = make_overrides(config)
    if config.model.name is not None:
        return resolve_model(config.model.name, overrides)
    note = describe_default()  # first: its error explains best why there is no bundled model
    return dataclasses.replace(resolve_model(DEFAULT_MODEL, overrides), notes=(note,))


def make_overrides(config: RunConfig) -> ModelOverrides:
    """Return the config's values that replace the checkpoint's."""
    values = config.model.model_dump(exclude={"name", "preprocessor"})
    if config.model.preprocessor is not None:
        features = read_features(config.model.preprocessor)
        for name in ("mean", "std"):
            values[name] = features[name] if values[name] is None else values[name]
    return ModelOverrides(**values)


def read_features(place: str) -> Mapping[str, Any]:
    """Read a ``preprocessor_config.json`` (file or folder); ``ModelError`` without mean and std."""
    folder = place.removesuffix(f"/{FEATURES_NAME}") if place != FEATURES_NAME else "."
    features = load_features(folder)
    for name in ("mean", "std"):
        if not isinstance(features.get(name), int | float):
            raise ModelError(
                f"{public_uri(place)} holds no {name}; expected a "
                f"{FEATURES_NAME} as earmark stats writes it"
            )
    return features


def make_label_settings(config: RunConfig, model: ModelSpec) -> LabelSettings:
    """Make the settings of every step; ``ConfigError`` if window or hop do not fit the model."""
    inference = InferenceSettings(
        pooling=config.embedding.pooling,
        embedding_dtype=config.embedding.dtype,
        num_processes=config.inference.workers,
        **config.inference.model_dump(exclude={"workers", "calibration_windows"}),
    )
    return make_settings(
        model,
        inference=inference,
        top_k=config.labels.top_k,
        store_scores=config.labels.scores,
        **input_options(config),
    )


class InputOptions(TypedDict):
    """Arguments of ``make_settings`` and ``make_input_settings`` that a config gives."""

    decode: DecodeSettings
    window_s: float | None
    hop_s: float | None
    min_tail_ratio: float
    sources: SourceSettings


def input_options(config: RunConfig | TrainConfig) -> InputOptions:
    """Return a config's options of reading, decoding and cutting."""
    decode = config.decode
    sources = SourceSettings(
        limits=ReadLimits(**config.read.model_dump(), max_item_bytes=decode.max_item_bytes),
        tables=table_settings(config.manifest, config.labels.from_),
    )
    if isinstance(config, RunConfig):
        sources = dataclasses.replace(sources, windows_per_unit=config.units.windows)
    return InputOptions(
        decode=DecodeSettings(
            num_processes=decode.processes or 0,
            clips_ahead=decode.clips_ahead or 0,
            **decode.model_dump(exclude={"processes", "clips_ahead"}),
        ),
        window_s=config.window.length_s,
        hop_s=config.window.hop_s,
        min_tail_ratio=config.window.min_tail,
        sources=sources,
    )


def table_settings(
    manifest: ManifestSection, labels_from: Literal["folder"] | None = None
) -> TableSettings:
    """Return how tables are read."""
    values = manifest.model_dump(exclude={"columns"})
    return TableSettings(**values, columns=manifest.pairs(), labels_from=labels_from)


def what_changes_results(config: RunConfig, label: LabelSettings) -> dict[str, Any]:
    """Return everything that changes results, by name. The fingerprint is its digest."""
    model = label.model
    results = {
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
    # Results from before there was a choice are continued.
    if label.decode.channel != "mix":
        results["channel"] = label.decode.channel
    return results


def _model_record(model: ModelSpec) -> dict[str, Any]:
    names = (
        *("name", "source", "revision", "sha256", "license"),
        *("activation", "num_labels", "hidden_size", "window_s"),
    )
    return {name: getattr(model, name) for name in names} | {"notes": list(model.notes)}


def describe_plan(plan: RunPlan) -> list[str]:
    """Describe what a run will do, in a few lines."""
    remaining, state = plan.remaining, plan.resolved.state
    lines = [*describe_model(plan.resolved.label), *describe_inputs(plan.found)]
    if state.commits:
        lines.append(describe_done(plan))
    lines += describe_missing_columns(plan.resolved)
    for unit_id, reason in list(state.damaged.items())[:5]:
        lines.append(f"Unit {unit_id} is damaged and will be redone: {reason}.")
    if remaining.units:
        lines.append(f"To do: {counted(len(remaining.units), 'unit')}.")
        lines += describe_long_files(remaining.units)
    else:
        lines.append("Nothing to do: everything found is done.")
    return lines


def describe_missing_columns(resolved: ResolvedRun) -> list[str]:
    """Say which columns a result lacks that an earlier version began: a line, or none."""
    missing = [
        name for name in OPTIONAL_COLUMNS if name not in resolved.commit.rows.optional_columns
    ]
    if not missing:
        return []
    return [
        "An earlier version of Earmark began this result, and it is continued without the new "
        f"columns of clips: {', '.join(missing)}. To have them: --overwrite, or another --output."
    ]


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
    """Describe the model and the windows, in a few lines."""
    model, windows = label.model, label.windows
    return [
        f"Model: {model.name}, {model.num_labels} labels ({model.activation}), windows of "
        f"{windows.window_samples / windows.sample_rate_hz:g} s every "
        f"{windows.hop_samples / windows.sample_rate_hz:g} s.",
        *model.notes,
    ]


def describe_inputs(found: Found) -> list[str]:
    """Describe the content of the inputs, in a few lines."""
    lines = [f"Found: {describe_found(found)}."]
    if found.duplicates:
        lines.append(
            f"Listed twice, counted once: {counted(found.duplicates, 'item')}, such as "
            f"{', '.join(found.duplicate_examples)}."
        )
    if found.skipped_by_extension:
        kinds = list_largest(found.skipped_by_extension, MAX_KINDS, "kind")
        lines.append(f"Skipped files of other kinds: {kinds}.")
    return [*lines, *found.notes, *found.warnings]


def describe_found(found: Found) -> str:
    """Describe the number of items and containers found."""
    kinds = Counter(container.kind for container in found.containers)
    parts = [counted(len(found.items), "file or segment")] if found.items else []
    parts += [counted(count, KIND_NAMES[kind]) for kind, count in kinds.items()]
    if found.failures:
        parts.append(f"{len(found.failures):,} that cannot be read")
    return ", ".join(parts) or "nothing"


def describe_done(plan: RunPlan) -> str:
    """Describe what earlier runs have done."""
    remaining = plan.remaining
    text = f"Already done: {counted(remaining.found_kept_items, 'item')}"
    text += f" in {counted(len(remaining.kept_units), 'unit')}"
    if remaining.vanished_items:
        text += f"; {remaining.vanished_items:,} more are not in this input"
    if plan.renewed:
        num_files = count_renewed(plan.resolved.state.commits, plan.renewed)
        text += f"; with another time and the same bytes: {counted(num_files, 'file')}"
    if remaining.num_redone:
        text += f"; to redo for changed items or truth: {counted(remaining.num_redone, 'unit')}"
    if remaining.num_retried:
        text += f"; to retry: {counted(remaining.num_retried, 'failed item')}"
    return f"{text}."
