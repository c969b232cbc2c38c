"""``earmark evaluate``: compare the labels of a result with the truth.

If ``--scores`` stored every class's score, they are read. Else they are computed from the windows'
embeddings and the model's head, exactly as in the run. Several results of the same clips and labels
are evaluated as an ensemble: their scores are averaged. Results without a clip in common, such as
the folds of a cross-validation, are pooled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pipeline.config.label import ManifestSection, RunConfig
from pipeline.evaluation.metrics import ClassMetrics, Metrics, compute_metrics
from pipeline.evaluation.mistakes import (
    MISTAKES_FILE,
    Mistake,
    describe_mistakes,
    find_mistakes,
    mistakes_table,
)
from pipeline.labelling.plan import make_overrides, table_settings
from pipeline.labelling.truth import (
    JoinedBy,
    Matches,
    Place,
    Truth,
    TruthRow,
    describe_joined,
    match_rows,
    place_of,
    read_truth,
    some,
    why_none_is_joined,
)
from pipeline.result.state import ResultState, read_result
from pipeline.terminal.wording import counted
from transforms.errors import InputError, ModelError, OutputError
from transforms.inference.engine import score_embeddings
from transforms.models.ast.checkpoints import load_model, resolve_model
from transforms.models.labels import Label, find_label
from transforms.results.commits import open_part, read_part
from transforms.results.read import read_batches
from transforms.sources.clip_ids import for_terminal, printable
from transforms.storage import urls, writing
from transforms.storage.secrets import public_uri

JSON_FILE = "evaluation.json"
PICTURE_FILE = "evaluation.png"
# Of more classes, only the best and worst are shown; the JSON has them all.
MAX_SHOWN_CLASSES = 40
NUM_BEST_AND_WORST = 10

_PLACE_COLUMNS = ["clip_id", "uri", "member", "row", "start_s", "end_s", "metadata"]


@dataclass(frozen=True, eq=False)
class ScoredClips:
    """Every class's score of every clip of a result.

    Attributes:
        places: Names by which each clip's truth is found.
        truth: The labels that the result itself gives each clip, or None.
        scores: Shape (clips, labels), float32.
        failed: As ``places``, of items that could not be labelled.
        combined: How several results were combined, in words; empty for one.
    """

    folder: str
    model: str
    labels: tuple[Label, ...]
    places: tuple[Place, ...]
    truth: tuple[tuple[str, ...] | None, ...]
    scores: npt.NDArray[np.float32]
    failed: tuple[Place, ...]
    combined: str = ""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of an evaluation; ``truth`` and ``scores`` have shape (clips, labels).

    Attributes:
        joined: How many clips found their row by what.
        notes: What did not match, in words.
        counts: The same in numbers.
        mistakes: The clips whose best label is not true, the surest first.
    """

    metrics: Metrics
    truth: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float32]
    joined: Mapping[JoinedBy, int]
    notes: tuple[str, ...]
    counts: Mapping[str, int]
    mistakes: tuple[Mistake, ...]


def run_evaluate(
    folders: Sequence[str],
    *,
    truth: str | None = None,
    model: str | None = None,
    output: str | None = None,
    known_labels_only: bool = False,
    quiet: bool = False,
    tables: ManifestSection | None = None,
) -> int:
    """Evaluate results; print the figures, write JSON, a picture and the mistakes; return 0.

    Args:
        folders: Results. Scores of the same clips are averaged; results of different clips are
            pooled.
        truth: A manifest or AudioSet's segments CSV; None for the results' own ``truth``.
        model: The model of the results, if it has moved since.
        output: Folder to write to; None for ``evaluation`` below the first result.
        known_labels_only: Ignore labels of the truth that the model does not know.
        quiet: Print no table of classes.
        tables: How the truth is read, if it is a table.

    Raises:
        UsageError: A result, the truth or the model is not right.
    """
    results = [read_scores(folder, model) for folder in folders]
    scored = combine_results(results)
    settings = table_settings(tables or ManifestSection())
    known = own_truth(scored) if truth is None else read_truth(truth, settings)
    evaluation = evaluate(scored, known, source=truth, known_labels_only=known_labels_only)
    console = Console(highlight=False, soft_wrap=True)
    for line in describe_evaluation(evaluation, scored):
        console.print(for_terminal(line), markup=False)
    if not quiet:
        Console(highlight=False).print(class_table(evaluation.metrics))
        for line in describe_mistakes(evaluation.mistakes):
            console.print(for_terminal(line), markup=False)
    place = urls.normalise(output) if output else urls.join(results[0].folder, "evaluation")
    for url in write_evaluation(place, evaluation, scored, results, truth):
        console.print(for_terminal(f"Written: {public_uri(url)}"), markup=False)
    return 0


# --- Scores --------------------------------------------------------------------------------


def read_scores(folder: str, model: str | None = None) -> ScoredClips:
    """Read or compute every class's score of every clip of a result.

    Raises:
        InputError: There is no result.
        OutputError: It is damaged.
        ModelError: The scores were not stored, and their model is not available.
    """
    state = read_result(urls.normalise(folder))
    if state.run is None or not (state.commits or state.unreadable):
        raise InputError(
            f"{public_uri(folder)} holds no result of Earmark; give the --output of earmark label"
        )
    if state.damaged or state.unreadable:
        raise OutputError(
            f"{public_uri(folder)} is damaged; see earmark verify {public_uri(folder)}"
        )
    with open_part(state.output, "clips", min(state.commits)) as file:
        schema = file.schema_arrow
    labels = tuple(Label(**entry) for entry in json.loads(schema.metadata[b"earmark.labels"]))
    score = _make_scorer(state, model, is_stored="scores" in schema.names)
    places: list[Place] = []
    truth: list[tuple[str, ...] | None] = []
    scores, failed = [], []
    for unit_id in sorted(state.commits):
        clips = read_part(state.output, "clips", unit_id, [*_PLACE_COLUMNS, "truth"]).to_pylist()
        labels_of = [row.pop("truth") for row in clips]
        truth += [None if names is None else tuple(names) for names in labels_of]
        places += [place_of(**row) for row in clips]
        scores.append(score(unit_id, [row["clip_id"] for row in clips]))
        if "errors" in state.commits[unit_id].parts:
            rows = read_part(state.output, "errors", unit_id, _PLACE_COLUMNS).to_pylist()
            failed += [place_of(**row) for row in rows]
    return ScoredClips(
        folder=state.output,
        model=state.run["model"]["name"],
        labels=labels,
        places=tuple(places),
        truth=tuple(truth),
        scores=np.concatenate(scores),
        failed=tuple(failed),
    )


_ScoresOfUnit = Callable[[str, list[str]], npt.NDArray[np.float32]]


def _make_scorer(state: ResultState, model: str | None, *, is_stored: bool) -> _ScoresOfUnit:
    """Make a function from a unit and its clip ids to the clips' scores, in their order."""
    if is_stored:
        return lambda unit_id, _: _matrix(
            read_part(state.output, "clips", unit_id, ["scores"])["scores"]
        )
    run = state.run or {}
    if not run["scores_from_embedding"]:
        raise ModelError(
            f"{public_uri(state.output)} holds neither every class's score nor the "
            "embedding that they come from (embedding.pooling is not pooler_output); label again "
            "with --scores"
        )
    head, activation = _load_head(run, model), run["model"]["activation"]

    def score(unit_id: str, clip_ids: list[str]) -> npt.NDArray[np.float32]:
        index_of = {clip_id: index for index, clip_id in enumerate(clip_ids)}
        total = np.zeros((len(clip_ids), run["model"]["num_labels"]))
        counts = np.zeros(len(clip_ids))
        for rows in read_batches(state.output, "windows", unit_id, ["clip_id", "embedding"]):
            scores = score_embeddings(head, _matrix(rows["embedding"]), activation)
            clips = [index_of[clip_id] for clip_id in rows["clip_id"].to_pylist()]
            # As rows.ClipAggregate does.
            if activation == "sigmoid":
                np.maximum.at(total, clips, scores)
            else:
                np.add.at(total, clips, scores)
            np.add.at(counts, clips, 1)
        return (total if activation == "sigmoid" else total / counts[:, None]).astype(np.float32)

    return score


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    values: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), -1)


def _load_head(run: Mapping[str, Any], model: str | None) -> Any:
    config = RunConfig.model_validate(run["config"])
    # The result itself holds what these files say, so they may be gone.
    kept = config.model.model_copy(update={"preprocessor": None, "labels": None})
    config = config.model_copy(update={"model": kept})
    # Without --model, a run took the default one and recorded its name.
    name = model or config.model.name or str(run["model"]["name"])
    revision = run["model"]["revision"]
    if model is None and revision and "@" not in name:
        name = f"{name}@{revision}"
    spec = resolve_model(name, make_overrides(config))
    if spec.sha256 != run["model"]["sha256"]:
        raise ModelError(
            f"{spec.name} is not the model that the result was made with: its weights have the "
            f"sha256 {spec.sha256[:12]}…, and the result's {run['model']['sha256'][:12]}…. Pass "
            "the right one as --model, or label again with --scores"
        )
    return load_model(spec).classifier


def combine_results(results: Sequence[ScoredClips]) -> ScoredClips:
    """Combine results into one: the mean of their scores, or all of their clips.

    Raise ``InputError`` if their labels differ, or some share clips and others do not.
    """
    first = results[0]
    for other in results[1:]:
        if [label.name for label in other.labels] != [label.name for label in first.labels]:
            raise InputError(
                f"{public_uri(other.folder)} has other labels than "
                f"{public_uri(first.folder)}; only results of the same labels, in the same "
                "order, can be evaluated together"
            )
    if len(results) == 1:
        return first
    clip_ids = [place.clip_id for result in results for place in result.places]
    return pool_results(results) if len(set(clip_ids)) == len(clip_ids) else average_scores(results)


def pool_results(results: Sequence[ScoredClips]) -> ScoredClips:
    """Pool the clips of results that have none in common, such as folds of a cross-validation."""
    return dataclasses.replace(
        results[0],
        places=tuple(place for result in results for place in result.places),
        truth=tuple(labels for result in results for labels in result.truth),
        scores=np.concatenate([result.scores for result in results]),
        failed=tuple(place for result in results for place in result.failed),
        combined=f"{len(results)} results without a clip in common, taken together",
    )


def average_scores(results: Sequence[ScoredClips]) -> ScoredClips:
    """Average the scores of the clips that all results have; ``InputError`` if there are none."""
    first = results[0]
    indices = [{place.clip_id: i for i, place in enumerate(r.places)} for r in results]
    shared = [place for place in first.places if all(place.clip_id in index for index in indices)]
    if not shared:
        raise InputError(
            "some of the results share clips, but none is in all of them; their clip_ids must be "
            "the same to average scores, or all different to pool folds"
        )
    left_out = len({clip_id for index in indices for clip_id in index}) - len(shared)
    taken = [
        result.scores[[index[place.clip_id] for place in shared]]
        for result, index in zip(results, indices, strict=True)
    ]
    return dataclasses.replace(
        first,
        places=tuple(shared),
        truth=tuple(first.truth[indices[0][place.clip_id]] for place in shared),
        scores=np.stack(taken).mean(axis=0, dtype=np.float64).astype(np.float32),
        combined=f"the scores of {len(results)} results are averaged, clip by clip; evaluate each "
        "of them alone to compare them"
        + (f"; {counted(left_out, 'clip')} not in all of them left out" if left_out else ""),
    )


# --- Truth ---------------------------------------------------------------------------------


def own_truth(scored: ScoredClips) -> Truth:
    """Return the truth of the result's own column; raise ``InputError`` if it is empty."""
    rows = [
        TruthRow(place, labels, "its truth column")
        for place, labels in zip(scored.places, scored.truth, strict=True)
        if labels is not None
    ]
    if not rows:
        raise InputError(
            f"{public_uri(scored.folder)} holds no truth of its own; pass --truth with a "
            "manifest that has labels"
        )
    return Truth(tuple(rows))


def evaluate(
    scored: ScoredClips,
    truth: Truth,
    *,
    source: str | None = None,
    known_labels_only: bool = False,
) -> Evaluation:
    """Compare scores with the truth, which ``source`` holds; None for the result itself.

    Raise ``InputError`` if nothing matches or a label is unknown.
    """
    named = dict.fromkeys(name for row in truth.rows for name in row.labels)
    class_of = {name: find_label(name, scored.labels) for name in named}
    unknown = sorted(name for name, index in class_of.items() if index is None)
    if unknown and not known_labels_only:
        raise InputError(
            f"the truth names {counted(len(unknown), 'label')} that {scored.model} does not know: "
            f"{some(unknown)}; its {len(scored.labels)} labels are such as "
            f"{some([label.name for label in scored.labels])}. Correct the names, or pass "
            "--known-labels-only to leave them out"
        )
    matches = match_rows(truth.rows, scored.places)
    kept, rows = [], []
    for clip, index in enumerate(matches.row_of_clip):
        if index is None:
            continue
        classes = [class_of[name] for name in truth.rows[index].labels]
        known = [number for number in classes if number is not None]
        if known or not classes:  # a clip with only unknown labels cannot be judged
            kept.append(clip)
            rows.append(known)
    if not kept:
        raise InputError(
            f"no clip of {public_uri(scored.folder)} has a row in the truth: "
            f"{why_none_is_joined(source, truth.rows, scored.places)}"
        )
    positives = np.zeros((len(kept), len(scored.labels)), np.bool_)
    for number, known in enumerate(rows):
        positives[number, known] = True
    scores = scored.scores[kept]
    metrics = compute_metrics(positives, scores, [label.name for label in scored.labels])
    notes, counts = _unmatched(scored, truth, matches, unknown)
    if source is not None:
        notes = (describe_joined(matches, truth.rows, scored.places), *notes)
    return Evaluation(
        metrics=metrics,
        truth=positives,
        scores=scores,
        joined=matches.counts,
        notes=notes,
        counts={"clips": len(kept), **counts},
        mistakes=find_mistakes(
            [scored.places[clip].shown for clip in kept],
            [label.name for label in scored.labels],
            positives,
            scores,
        ),
    )


def _unmatched(
    scored: ScoredClips, truth: Truth, matches: Matches, unknown: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    clips = [
        str(place.clip_id)
        for place, index in zip(scored.places, matches.row_of_clip, strict=True)
        if index is None
    ]
    lost = [truth.rows[index] for index in matches.rows_without_clip]
    failed = {index for index in match_rows(lost, scored.failed).row_of_clip if index is not None}
    absent = [row.place.shown for index, row in enumerate(lost) if index not in failed]
    kinds = {
        "clips_without_truth": (clips, "of the result's clips without a row in the truth"),
        "rows_that_failed": (
            [lost[index].place.shown for index in sorted(failed)],
            "of the truth's rows are items that could not be labelled",
        ),
        "rows_without_clip": (absent, "of the truth's rows without a clip in the result"),
        "rows_without_label": ([""] * truth.unlabelled, "of the truth's rows have no label"),
        "unreadable_rows": (list(truth.unreadable), "of the truth's lines cannot be read"),
        "unknown_labels": (list(unknown), "of the truth's labels are unknown to the model"),
        "ambiguous_names": (
            list(matches.ambiguous),
            "of the truth's names fit several clips or rows",
        ),
    }
    notes = [
        f"Left out: {len(names):,} {words}" + (f", such as {some(names)}." if names[0] else ".")
        for names, words in kinds.values()
        if names
    ]
    counts = {name: len(names) for name, (names, _) in kinds.items()}
    return (*truth.notes, *notes), counts


# --- Output --------------------------------------------------------------------------------


def describe_evaluation(evaluation: Evaluation, scored: ScoredClips) -> list[str]:
    """Describe the figures in words."""
    metrics = evaluation.metrics
    with_figure = sum(entry.average_precision is not None for entry in metrics.classes)
    lines = [
        f"{scored.model}: {counted(metrics.clips, 'clip')}, "
        f"{with_figure} of {len(metrics.classes)} classes in the truth"
        + (f"; {scored.combined}." if scored.combined else "."),
        *([f"accuracy {metrics.accuracy:.4f}"] if metrics.accuracy is not None else []),
        f"mAP {_number(metrics.mean_average_precision)}"
        + (
            f" ({metrics.mean_average_precision_all:.4f} if those without a clip count as 0)"
            if with_figure < len(metrics.classes)
            else ""
        ),
        f"AUC {_number(metrics.mean_auc)}",
        f"d' {_number(metrics.d_prime)}",
    ]
    return [*lines, *evaluation.notes]


def class_table(metrics: Metrics) -> Table:
    """Make a table with a row per class, best first; of many classes, the best and the worst."""
    entries = sorted(
        (entry for entry in metrics.classes if entry.positives),
        key=lambda entry: entry.average_precision or 0.0,
        reverse=True,
    )
    titles = ["class", "clips", "AP", "AUC"]
    if metrics.accuracy is not None:
        titles += ["recall", "precision"]
    table = Table(*titles[:1], box=None, pad_edge=False)
    for title in titles[1:]:
        table.add_column(title, justify="right")
    is_long = len(entries) > MAX_SHOWN_CLASSES
    for entry in entries[:NUM_BEST_AND_WORST] if is_long else entries:
        table.add_row(*_cells(entry, metrics))
    if is_long:
        table.add_row("…")
        for entry in entries[-NUM_BEST_AND_WORST:]:
            table.add_row(*_cells(entry, metrics))
    return table


def _cells(entry: ClassMetrics, metrics: Metrics) -> list[str]:
    figures = [entry.average_precision, entry.auc]
    if metrics.accuracy is not None:
        figures += [entry.recall, entry.precision]
    name = for_terminal(entry.name)
    return [name, f"{entry.positives:,}", *(_number(figure) for figure in figures)]


def _number(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"


def write_evaluation(
    place: str,
    evaluation: Evaluation,
    scored: ScoredClips,
    results: Sequence[ScoredClips],
    truth: str | None,
) -> list[str]:
    """Write the JSON, the mistakes and the picture, or raise ``OutputError``; return their URLs."""
    from pipeline.evaluation.picture import draw_evaluation  # imports matplotlib

    contents = {
        JSON_FILE: printable(
            json.dumps(as_json(evaluation, scored, results, truth), indent=1, ensure_ascii=False)
        ).encode(),
        MISTAKES_FILE: mistakes_table(evaluation.mistakes),
        PICTURE_FILE: draw_evaluation(evaluation.metrics, evaluation.truth, evaluation.scores),
    }
    written = []
    for name, data in contents.items():
        written.append(urls.join(place, name))
        try:
            writing.write_bytes(written[-1], data)
        except OSError as error:
            raise OutputError(
                f"{public_uri(place)} cannot be written: {error}. Give another --output."
            ) from error
    return written


def as_json(
    evaluation: Evaluation,
    scored: ScoredClips,
    results: Sequence[ScoredClips],
    truth: str | None,
) -> dict[str, Any]:
    """Return the evaluation as JSON allows it: no infinity, no NaN."""
    metrics = evaluation.metrics
    return {
        "results": [public_uri(result.folder) for result in results],
        "models": [result.model for result in results],
        "truth": None if truth is None else public_uri(urls.normalise(truth)),
        "combined": scored.combined or None,
        "joined": dict(evaluation.joined) if truth is not None else None,
        "counts": dict(evaluation.counts),
        "notes": list(evaluation.notes),
        "mistakes": len(evaluation.mistakes),
        "accuracy": metrics.accuracy,
        "mean_average_precision": metrics.mean_average_precision,
        "mean_average_precision_all": metrics.mean_average_precision_all,
        "mean_auc": metrics.mean_auc,
        "d_prime": _finite(metrics.d_prime),
        "classes": [
            {
                **dataclasses.asdict(entry),
                "id": label.id,
                "recall": entry.recall,
                "precision": entry.precision,
            }
            for entry, label in zip(metrics.classes, scored.labels, strict=True)
        ],
        "confusion": None if metrics.confusion is None else metrics.confusion.tolist(),
    }


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None
