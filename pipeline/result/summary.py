"""``earmark summary DIR``: what is in a result, on one screen.

A clip counts for its best label, and so does each second of audio, by the best label of its window.
Rows are read unit by unit, without their embeddings, so that the results of earlier versions are
counted like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.result.state import ResultState, read_result
from pipeline.terminal.count_report import describe_errors, describe_warnings, totals_record
from pipeline.terminal.std_streams import answer
from pipeline.terminal.wording import counted, format_audio
from transforms.errors import InputError, OutputError
from transforms.results.commits import RUN_FILE, Commit, UnitTotals, read_part
from transforms.results.counts import (
    CLIP_COLUMNS,
    ERROR_COLUMNS,
    RowCounts,
    best_labels,
    count_rows,
)
from transforms.sources.clip_ids import for_terminal
from transforms.storage import urls
from transforms.storage.secrets import public_uri

NUM_LABELS = 20
THREADS = 8
PIPE_WIDTH = 200  # more than the table needs

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Summary:
    """What the rows of a result say.

    Attributes:
        totals: Summed over the units that could be read.
        counts: Of their rows.
        audio_s: Seconds of audio by the best label of their window.
        scores: By label: the score of each clip whose best label it is.
        unread: Units whose rows cannot be read, with the reason.
    """

    totals: UnitTotals = field(default_factory=UnitTotals)
    counts: RowCounts = field(default_factory=RowCounts)
    audio_s: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, FloatArray] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)


def run_summary(folder: str) -> int:
    """Print what is in a result, and return the exit code.

    Raises:
        InputError: The folder holds no result of Earmark's.
        OutputError: The result cannot be read, or has another schema.
    """
    output = urls.normalise(folder)
    state = read_result(output)
    if not state.is_result:
        raise InputError(
            f"{public_uri(output)} holds no result of Earmark: no {RUN_FILE} and no commits. "
            "Give the folder that was --output."
        )
    summary = summarise(output, state.commits.values())
    for line in describe_state(state, summary):
        answer(line)
    if summary.counts.labels:
        print_labels(summary)
        answer(describe_scores(np.concatenate([*summary.scores.values()])))
    totals = totals_record(summary.totals, summary.counts)
    for line in (*describe_warnings(totals), *describe_errors(totals)):
        answer(line)
    return 0


def summarise(output: str, commits: Iterable[Commit]) -> Summary:
    """Read and count the rows of some units."""
    totals, counts = UnitTotals(), RowCounts()
    audio_s: dict[str, float] = defaultdict(float)
    scores: dict[str, list[FloatArray]] = defaultdict(list)
    unread: dict[str, str] = {}
    commits = list(commits)
    with ThreadPoolExecutor(THREADS, "earmark-summary") as threads:
        units = threads.map(lambda commit: _read_unit(output, commit), commits)
        for commit, unit in zip(commits, units, strict=True):
            if isinstance(unit, str):
                unread[commit.unit_id] = unit
                continue
            totals += unit.totals
            counts += unit.counts
            for name, seconds in unit.audio_s.items():
                audio_s[name] += seconds
            for name, values in unit.scores.items():
                scores[name].append(values)
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    return Summary(totals, counts, audio_s, joined, unread)


def _read_unit(output: str, commit: Commit) -> Summary | str:
    """Count the rows of a unit; returns the reason if they cannot be read."""
    kinds = [name for name in commit.optional_columns if name == "warning_kinds"]
    columns = ["clip_id", "duration_s", *CLIP_COLUMNS, *kinds]
    try:
        clips = read_part(output, "clips", commit.unit_id, columns)
        errors = None
        if "errors" in commit.parts:
            errors = read_part(output, "errors", commit.unit_id, list(ERROR_COLUMNS))
        if commit.totals.windows == commit.totals.clips:  # each clip is a window
            start_s = pa.array(np.zeros(clips.num_rows))
            windows = clips.select(["clip_id", "labels"])
            windows = windows.append_column("start_s", start_s)
            windows = windows.append_column("end_s", clips["duration_s"])
        else:
            columns = ["clip_id", "start_s", "end_s", "labels"]
            windows = read_part(output, "windows", commit.unit_id, columns)
    except OSError as error:
        return error.strerror or str(error)
    except (pa.ArrowException, OutputError) as error:
        return str(error)
    best = best_labels(clips["labels"])
    names = pc.struct_field(best, "name")
    values = pc.struct_field(best, "score").to_numpy(zero_copy_only=False)
    return Summary(
        totals=commit.totals,
        counts=count_rows(clips, errors),
        audio_s=seconds_by_label(windows),
        scores={
            name: values[pc.equal(names, name).to_numpy(zero_copy_only=False)]
            for name in pc.unique(names).to_pylist()
        },
    )


def seconds_by_label(windows: pa.Table) -> dict[str, float]:
    """Return the seconds of audio by the best label of their window.

    Where windows of a clip overlap, a second belongs to the one that starts last.

    Args:
        windows: ``clip_id``, ``start_s``, ``end_s`` and ``labels``, in any order.
    """
    windows = windows.filter(pc.greater(pc.list_value_length(windows["labels"]), 0))
    clip = windows["clip_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    start_s, end_s = (windows[name].to_numpy() for name in ("start_s", "end_s"))
    order = np.lexsort((start_s, clip))
    clip, start_s, end_s = clip[order], start_s[order], end_s[order]
    is_followed = clip[1:] == clip[:-1]
    end_s[:-1][is_followed] = np.minimum(end_s[:-1], start_s[1:])[is_followed]
    names = pc.struct_field(best_labels(windows["labels"]), "name").dictionary_encode()
    labels = names.indices.to_numpy()[order]
    seconds = np.bincount(labels, weights=end_s - start_s, minlength=len(names.dictionary))
    return dict(zip(names.dictionary.to_pylist(), seconds.tolist(), strict=True))


def describe_state(state: ResultState, summary: Summary) -> Iterator[str]:
    """Yield what the result is, how much it holds, and whether it is whole."""
    name, totals = public_uri(state.output), summary.totals
    made_by = ""
    if state.run is not None:
        model = state.run.get("model", {})
        made_by = f", labelled by {model.get('name')} ({model.get('num_labels')} labels)"
    yield (
        f"{name}{made_by}: {counted(totals.clips, 'clip')}, {format_audio(totals.audio_s)} of "
        f"audio, {counted(totals.windows, 'window')}; {counted(totals.failures, 'failure')}."
    )
    damaged = {**state.damaged, **state.unreadable, **summary.unread}
    if damaged:
        unit_id, reason = next(iter(damaged.items()))
        yield (
            f"Damaged, and not counted here: {counted(len(damaged), 'unit')}, such as {unit_id}: "
            f"{reason}. Run earmark verify {name}."
        )
    if state.run is None:
        yield f"Damaged: {RUN_FILE} is missing. Run earmark verify {name}."
    elif not state.succeeded:
        yield (
            "Unfinished: the last run did not come to its end, or is still on. This is what is "
            "committed so far."
        )


def describe_scores(scores: FloatArray) -> str:
    """Describe how the scores of clips' best labels are distributed."""
    low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9))
    return (
        f"Scores of the best labels: half of the clips above {middle:.2f}, a tenth above "
        f"{high:.2f}, a tenth below {low:.2f}."
    )


def print_labels(summary: Summary) -> None:
    """Print the labels that most clips have as their best, as a table."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(highlight=False, width=PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("best label", overflow="fold")
    for heading in ("clips", "audio", "median score"):
        table.add_column(heading, justify="right", no_wrap=True)
    # A label may be the best of windows and of no clip.
    names = {*summary.counts.labels, *summary.audio_s}
    ordered = sorted(names, key=lambda n: (-_clips(summary, n), -summary.audio_s.get(n, 0.0), n))
    num_shown = NUM_LABELS if len(ordered) > NUM_LABELS + 1 else len(ordered)
    for name in ordered[:num_shown]:
        table.add_row(Text(for_terminal(name)), *_figures(summary, [name]))
    if others := ordered[num_shown:]:
        words = f"{counted(len(others), 'other label')}"
        table.add_row(Text(words, style="italic"), *_figures(summary, others))
    console.print(table)


def _clips(summary: Summary, name: str) -> int:
    return summary.counts.labels.get(name, 0)


def _figures(summary: Summary, names: Sequence[str]) -> tuple[str, str, str]:
    """Return clips, audio and median score of some labels together."""
    scores = [summary.scores[name] for name in names if name in summary.scores]
    return (
        f"{sum(_clips(summary, name) for name in names):,}",
        format_audio(sum(summary.audio_s.get(name, 0.0) for name in names)),
        f"{np.median(np.concatenate(scores)):.2f}" if scores else "",
    )
