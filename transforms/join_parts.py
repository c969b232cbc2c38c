"""Join the parts of a long file: its rows, and its commit, as if it had been labelled in one go.

The parts lie in ``_parts/<unit_id>/``, labelled and committed (``long_files``). Their windows are
the file's own, with their indices and times, and are taken over row group by row group; the clip's
row is made of them as ever; what decoding found is added up. Then the long unit is committed like
any other, and its parts go. Where a file ends before its header says, or is damaged, parts count up
to there: the first that ended early is the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection

from transforms.decoding.decode import BOUND_ERRORS, LEVEL_FRAME_S
from transforms.errors import AccountingError, OutputError, in_words
from transforms.features.windows import WindowSettings
from transforms.process.progress_counts import live_counts
from transforms.records import (
    ClipFacts,
    Failure,
    Item,
    ItemFailure,
    Prediction,
    UnitEnd,
    Window,
    WindowRow,
    WorkUnit,
)
from transforms.results.commits import (
    Commit,
    UnitSummary,
    UnitTotals,
    commit_url,
    find_change,
    open_part,
    part_url,
    read_commit,
    read_failures,
    read_part,
    remove_long_file,
    remove_unit,
)
from transforms.results.rows import ClipAggregate
from transforms.results.write_units import CommitSettings, Desk, OpenUnit
from transforms.storage import filesystem
from transforms.storage.secrets import public_uri
from transforms.storage.writing import writing_to

# What a part says that lies behind the end of the audio.
_BEHIND_THE_END = frozenset({"BadSegment", "TooShort"})

_FACTS = [field.name for field in dataclasses.fields(ClipFacts)]


@dataclass(frozen=True)
class LabelledPart:
    """What came of a part.

    Attributes:
        unit: The part.
        commit: Its commit.
        first_index: The index that its first window has in the file.
        num_windows: How many windows it has from there on.
        reaches_end: Whether they go as far as it was to go; false of the file's last.
        facts: What decoding found; None where it failed.
        failure: Why it failed, or None.
    """

    unit: WorkUnit
    commit: Commit
    first_index: int
    num_windows: int
    reaches_end: bool
    facts: ClipFacts | None
    failure: Failure | None

    @property
    def item(self) -> Item:
        """Its stretch of the file."""
        return self.unit.items[0]

    @property
    def asked_s(self) -> float:
        """Seconds that it was to have."""
        return math.inf if self.item.end_s is None else self.item.end_s - (self.item.start_s or 0)


@dataclass(frozen=True)
class JoinedClip:
    """What the parts are together.

    Attributes:
        parts: Those that give windows, in order.
        facts: Of the whole clip.
    """

    parts: tuple[LabelledPart, ...]
    facts: ClipFacts


def read_unchanged(output: str, parts: Sequence[WorkUnit]) -> list[Commit]:
    """The commits of parts, whose rows are held against what these vouch for; all are read.

    Raises:
        AccountingError: Some have changed; these parts have been taken out, to be labelled again.
        OSError: They cannot be read.
    """
    commits, changes = [], []
    for part in parts:
        try:
            commits.append(_read_unchanged(output, part.unit_id))
        except (OutputError, FileNotFoundError) as error:
            changes.append(in_words(error) if isinstance(error, OSError) else str(error))
            remove_unit(output, part.unit_id)
    if changes:
        raise AccountingError(
            f"{len(changes)} of {len(parts)} parts of {parts[0].items[0].clip_id} were not as they "
            f"had been committed, and have been removed ({changes[0]}); run the "
            "same command again, and it labels them again"
        )
    return commits


def _read_unchanged(output: str, unit_id: str) -> Commit:
    commit = read_commit(output, unit_id)
    for name, info in commit.parts.items():
        url = part_url(output, name, unit_id)
        if change := find_change(url, info):
            raise OutputError(f"{public_uri(url)}: {change}")
    return commit


def read_labelled_part(
    output: str, unit: WorkUnit, commit: Commit, windows: WindowSettings
) -> LabelledPart:
    """What came of a part that is committed.

    Raises:
        AccountingError: It has not the windows that it must have.
        OSError: It cannot be read.
    """
    rate_hz, item = windows.sample_rate_hz, unit.items[0]
    first_index = round((item.start_s or 0.0) * rate_hz) // windows.hop_samples
    table = read_part(output, "windows", unit.unit_id, ["window_index", "end_s"])
    ends_s = {
        index: end_s
        for index, end_s in zip(
            table["window_index"].to_pylist(), table["end_s"].to_pylist(), strict=True
        )
        if index >= first_index
    }
    if sorted(ends_s) != list(range(first_index, first_index + len(ends_s))):
        raise AccountingError(
            f"part {unit.unit_id} of {item.clip_id} has not the windows from {first_index} on, "
            "each once"
        )
    reaches_end = False
    if item.end_s is not None and item.part is not None:
        beyond = round(item.end_s * rate_hz) + item.part.after_samples
        reaches_end = round(max(ends_s.values(), default=0.0) * rate_hz) >= beyond
    clips = read_part(output, "clips", unit.unit_id, _FACTS).to_pylist()
    failure = None
    if not clips:
        row = read_failures(output, unit.unit_id)[0]
        failure = Failure(item, row["stage"], row["error_type"], row["message"])
    return LabelledPart(
        unit=unit,
        commit=commit,
        first_index=first_index,
        num_windows=len(ends_s),
        reaches_end=reaches_end,
        facts=ClipFacts(**clips[0]) if clips else None,
        failure=failure,
    )


def join_clip(parts: Sequence[LabelledPart], overlap_s: float) -> JoinedClip | Failure:
    """What the parts are together, or why the file could not be labelled.

    Args:
        parts: All of a file, in order.
        overlap_s: Seconds beyond its end that the last window of a part reaches.
    """
    taken: list[LabelledPart] = []
    facts: list[ClipFacts] = []
    notes: list[str] = []
    is_open = True  # whether the clip goes on
    for part in parts:
        if part.facts is None:
            if is_open and (not taken or _costs_the_clip(part.failure)):
                return _required(part.failure)
            if is_open and part.failure and part.failure.error_type not in _BEHIND_THE_END:
                decoded_s = sum(one.duration_s for one in facts)
                notes.append(f"decoded {decoded_s:.1f} s, then stopped: {part.failure.message}")
            break
        if not is_open and part.facts.duration_s > overlap_s:
            break  # the part before broke off where this one did not
        notes += (part.facts.warning or "").split("; ")
        if part.facts.duration_s > 0:
            facts.append(part.facts)
        if is_open:
            taken.append(part)
            is_open = part.reaches_end
        if part.facts.duration_s < part.asked_s:
            break
    # As of a file that is decoded in one go: what was decoded first, then what else is to be said.
    words = sorted(_once(notes), key=lambda note: not note.startswith("decoded "))
    return JoinedClip(tuple(taken), add_facts(facts, "; ".join(words) or None))


def _once(notes: Sequence[str]) -> list[str]:
    """The notes, each once; libsndfile has several words for one damage, by where it came from."""
    by_place: dict[str, str] = {}
    for note in filter(None, notes):
        by_place.setdefault(note.split(" (libsndfile: ")[0], note)
    return list(by_place.values())


def _costs_the_clip(failure: Failure | None) -> bool:
    """Whether a file that was labelled in one go would be a failure, whatever came before."""
    return failure is not None and (failure.stage != "decode" or failure.error_type in BOUND_ERRORS)


def _required(failure: Failure | None) -> Failure:
    if failure is None:
        raise AccountingError("a part has neither a clip nor a failure")
    return failure


def add_facts(parts: Sequence[ClipFacts], warning: str | None) -> ClipFacts:
    """The facts of a clip from those of its parts, in order; at least one."""
    first = parts[0]
    values = [one.duration_s * one.sample_rate_hz * one.channels for one in parts]
    frames = [
        math.ceil(round(one.duration_s * one.sample_rate_hz) / max(1, _frame(one.sample_rate_hz)))
        for one in parts
    ]
    power = _mean([10.0 ** (one.rms_dbfs / 10.0) for one in parts], values)
    return ClipFacts(
        duration_s=math.fsum(one.duration_s for one in parts),
        sample_rate_hz=first.sample_rate_hz,
        channels=first.channels,
        peak_dbfs=max(one.peak_dbfs for one in parts),
        rms_dbfs=10.0 * math.log10(power) if power > 0.0 else -math.inf,
        clipped_ratio=_mean([one.clipped_ratio for one in parts], values),
        silent_ratio=_mean([one.silent_ratio for one in parts], frames),
        content_sha256=first.content_sha256,
        warning=warning,
    )


def _frame(rate_hz: int) -> int:
    return round(LEVEL_FRAME_S * rate_hz)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    sum_ = math.fsum(value * weight for value, weight in zip(values, weights, strict=True))
    return sum_ / total if total else 0.0


def read_predictions(
    settings: CommitSettings, part: LabelledPart
) -> Iterator[tuple[int, float, float, Prediction]]:
    """Index, start and end in seconds, and prediction of each of a part's windows."""
    engine = next(iter(part.commit.engines), "")
    with open_part(settings.output, "windows", part.unit.unit_id) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, use_threads=False)
            embeddings = _matrix(table["embedding"], settings.rows.hidden_size)
            scores = _matrix(table["scores"], len(settings.rows.labels))
            places = zip(
                *(table[name].to_pylist() for name in ("window_index", "start_s", "end_s")),
                strict=True,
            )
            for (index, start_s, end_s), embedding, score in zip(
                places, embeddings, scores, strict=True
            ):
                if index >= part.first_index:
                    yield index, start_s, end_s, Prediction(embedding, score, engine)


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    flat = column.combine_chunks().flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, width)


def join_parts(
    settings: CommitSettings,
    windows: WindowSettings,
    staging: Path,
    unit: WorkUnit,
    parts: Sequence[WorkUnit],
) -> Commit:
    """Commit a long unit from its parts, and remove them; harmless where that has been done.

    Args:
        settings: Where and how to write.
        windows: How windows were cut.
        staging: A local folder for files that are not in place yet.
        unit: The long unit.
        parts: Its parts, all committed, in order.

    Raises:
        AccountingError: The parts are not the whole of the file, or not as they were committed.
        OSError: They cannot be read.
        WriteError: The output cannot be written.
    """
    output = settings.output
    if filesystem.exists(commit_url(output, unit.unit_id)):  # by an attempt before this one
        remove_long_file(output, unit.unit_id)
        return read_commit(output, unit.unit_id)
    _check_whole(unit, parts)
    labelled = [
        read_labelled_part(output, part, commit, windows)
        for part, commit in zip(parts, read_unchanged(output, parts), strict=True)
    ]
    overlap = windows.window_samples - windows.hop_samples
    joined = join_clip(labelled, overlap / windows.sample_rate_hz)
    with writing_to(output):
        rows = OpenUnit(settings, staging, unit.unit_id)
        try:
            _add_rows(rows, settings, unit, joined)
            for part in labelled if isinstance(joined, Failure) else joined.parts:
                rows.add_made(part.commit.engines, part.commit.checks)
            rows.add(UnitEnd(unit, 1))
            commit = rows.commit()
        except BaseException:
            rows.discard()
            raise
        remove_long_file(output, unit.unit_id)
    counted = sum((part.commit.totals for part in labelled), UnitTotals())
    live_counts.units += 1
    live_counts.windows += commit.totals.windows - counted.windows
    live_counts.clips += commit.totals.clips
    live_counts.failures += commit.totals.failures
    live_counts.audio_s += commit.totals.audio_s - counted.audio_s
    return commit


def _check_whole(unit: WorkUnit, parts: Sequence[WorkUnit]) -> None:
    starts = [part.items[0].start_s for part in parts]
    ends = [part.items[0].end_s for part in parts]
    if not parts or starts != [0.0, *ends[:-1]] or ends[-1] is not None:
        raise AccountingError(
            f"unit {unit.unit_id}: {len(parts)} parts came to be joined, and they are not the "
            "whole of the file; run the same command again"
        )


def _add_rows(
    rows: OpenUnit, settings: CommitSettings, unit: WorkUnit, joined: JoinedClip | Failure
) -> None:
    """Give the unit its windows and its clip, as ``AssembleRows`` does, or why there are none."""
    item = unit.items[0]
    if isinstance(joined, Failure):
        rows.add(ItemFailure(unit.unit_id, 0, dataclasses.replace(joined, item=item)))
        return
    num_windows = sum(part.num_windows for part in joined.parts)
    clip = ClipAggregate(item, settings.rows)
    num_seen = 0
    for part in joined.parts:
        for index, start_s, end_s, prediction in read_predictions(settings, part):
            num_seen += 1
            is_last = num_seen == num_windows
            window = Window(
                unit_id=unit.unit_id,
                item_index=0,
                item=item,
                window_index=index,
                start_s=start_s,
                end_s=end_s,
                data=None,
                facts=joined.facts if is_last else None,
                num_windows=num_windows if is_last else None,
            )
            clip.add(window, prediction)
            rows.add(WindowRow(unit.unit_id, 0, item.clip_id, index, start_s, end_s, prediction))
    row = clip.result(unit.unit_id, 0)
    if row is None:
        raise AccountingError(
            f"unit {unit.unit_id}: its parts have {num_seen} windows, and {num_windows} were "
            "counted; nothing was committed"
        )
    rows.add(row)


@beam.typehints.with_input_types(UnitSummary)
@beam.typehints.with_output_types(UnitSummary)
class JoinParts(beam.PTransform[PCollection[UnitSummary], PCollection[UnitSummary]]):
    """Join the parts of long files that are committed.

    In: ``UnitSummary`` of any units. Out: that of each long unit whose parts were among them.

    Args:
        settings: Where and how to write.
        windows: How windows were cut.
    """

    def __init__(self, settings: CommitSettings, windows: WindowSettings) -> None:
        super().__init__()
        self._settings = settings
        self._windows = windows

    def expand(self, summaries: PCollection[UnitSummary]) -> PCollection[UnitSummary]:
        """Apply the transform."""
        by_unit = beam.FlatMap(_by_long_unit).with_output_types(tuple[str, WorkUnit])
        join = beam.ParDo(_JoinPartsFn(self._settings, self._windows))
        joined: PCollection[UnitSummary] = (
            summaries
            | "Parts alone" >> by_unit
            | "Parts by file" >> beam.GroupByKey()
            | "Join each file" >> join.with_output_types(UnitSummary)
        )
        return joined


def _by_long_unit(summary: UnitSummary) -> Iterator[tuple[str, WorkUnit]]:
    if summary.part is not None and summary.part.part_of is not None:
        yield summary.part.part_of.unit_id, summary.part


class _JoinPartsFn(beam.DoFn):
    def __init__(self, settings: CommitSettings, windows: WindowSettings) -> None:
        self._settings = settings
        self._windows = windows
        self._desk = Desk(settings)

    def setup(self) -> None:
        self._desk.open()

    def process(self, keyed: tuple[str, Iterable[WorkUnit]]) -> Iterator[UnitSummary]:
        by_id = {part.unit_id: part for part in keyed[1]}
        parts = sorted(by_id.values(), key=lambda part: part.items[0].start_s or 0.0)
        unit = parts[0].part_of
        if unit is None:
            raise AccountingError(f"part {parts[0].unit_id} is a part of nothing")
        commit = join_parts(self._settings, self._windows, self._desk.open(), unit, parts)
        Metrics.counter("earmark", "units_committed").inc()
        Metrics.counter("earmark", "clips_labelled").inc(commit.totals.clips)
        Metrics.counter("earmark", "items_failed").inc(commit.totals.failures)
        yield UnitSummary.of(commit)

    def teardown(self) -> None:
        self._desk.close()
