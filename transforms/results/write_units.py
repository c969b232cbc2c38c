"""Write a unit's rows as Parquet parts, and commit the unit once it is complete.

The sink counts, and assumes no order. Once it has as many clips and failures as the unit holds,
and as many windows as its clips have, it writes the parts to a staging folder, puts them in place
whole, and then writes the commit. After that, it removes the commits of the units that this one
replaces, then their parts. Whatever happens in between, a part without a commit does not count, and
a replaced commit that still exists is recognised by the one that names it.

A runner may run a unit twice at the same time. The attempt that finds a valid commit of the other
drops its own parts, and counts the unit from that commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.typehints.decorators import IOTypeHints

from transforms.errors import AccountingError
from transforms.process.progress_counts import live_counts, live_units
from transforms.process.stage_times import stage_clocks, timed
from transforms.records import (
    ClipRow,
    ItemFailure,
    UnitEnd,
    UnitEvent,
    WindowRow,
    WorkUnit,
    make_channel_id,
)
from transforms.results.commits import (
    PARTS,
    CheckFigures,
    Commit,
    Ledger,
    LedgerItem,
    LedgerSlice,
    PartInfo,
    UnitSummary,
    UnitTotals,
    add_checks,
    commit_url,
    container_version,
    count_items,
    find_commit,
    hold_commits,
    item_ids,
    item_version,
    part_url,
    read_commit,
    read_part,
    remove_unit,
    schema_version,
)
from transforms.results.counts import CLIP_COLUMNS, ERROR_COLUMNS, count_rows
from transforms.results.rows import (
    RowSettings,
    clips_table,
    errors_schema,
    errors_table,
    windows_schema,
    windows_table,
)
from transforms.storage import filesystem, writing
from transforms.storage.writing import writing_to

# Window rows kept in memory before they go to the staging file as a row group: about 25 MB of
# AST base's embeddings and scores.
ROW_GROUP_ROWS = 4096


@dataclass(frozen=True)
class CommitSettings:
    """Where and how units are written.

    Attributes:
        output: The result's folder, a local path or URL.
        run_id: Name of this run's staging folder.
        fingerprint: Digest of everything that changes results.
        model_sha256: The checkpoint's hash, for the footers.
        each_channel: Whether each channel of an item is a clip.
    """

    output: str
    run_id: str
    fingerprint: str
    model_sha256: str
    rows: RowSettings
    each_channel: bool = False

    @functools.cached_property
    def footer(self) -> dict[str, str]:
        """The key-value metadata of every part."""
        return {
            "earmark.fingerprint": self.fingerprint,
            "earmark.model_sha256": self.model_sha256,
            "earmark.schema_version": str(schema_version(self.rows.optional_columns)),
            "earmark.labels": json.dumps([dataclasses.asdict(label) for label in self.rows.labels]),
        }


class _PartWriter(pq.ParquetWriter):  # type: ignore[misc]
    """A writer of a file of any name; by itself, Arrow opens only names in UTF-8."""

    def __init__(self, path: Path, schema: pa.Schema, **options: object) -> None:
        self._file = path.open("wb")
        super().__init__(self._file, schema, **options)

    def close(self) -> None:
        """Write the footer, and close the file."""
        try:
            super().close()
        finally:
            self._file.close()


class OpenUnit:
    """A unit that is not complete yet; ``staging`` is for files that are not in place yet."""

    def __init__(self, settings: CommitSettings, staging: Path, unit_id: str) -> None:
        self._settings = settings
        self._staging = staging
        self._unit_id = unit_id
        self._windows: list[WindowRow] = []
        self._windows_of: Counter[tuple[int, int | None]] = Counter()  # by item and channel
        self._writer: pq.ParquetWriter | None = None
        self._clips: list[ClipRow] = []
        self._failures: list[ItemFailure] = []
        self._engines: set[str] = set()
        self._checks: dict[str, CheckFigures] = {}
        self._end: UnitEnd | None = None
        self.audio = AudioProgress()

    def add(self, event: UnitEvent) -> None:
        """Add a row, a failure or the unit's end."""
        if isinstance(event, WindowRow):
            self._windows.append(event)
            self._windows_of[event.item_index, event.channel] += 1
            self._engines.add(event.prediction.engine)
            if event.prediction.check is not None:
                figures = CheckFigures.of(event.prediction.check)
                self._checks = add_checks(self._checks, {event.prediction.engine: figures})
            if len(self._windows) >= ROW_GROUP_ROWS:
                self._flush_windows()
        elif isinstance(event, ClipRow):
            self._clips.append(event)
        elif isinstance(event, ItemFailure):
            self._failures.append(event)
        else:
            self._end = event

    @property
    def is_complete(self) -> bool:
        """Whether all of the unit has been added."""
        if self._end is None:
            return False
        num_ends = len(self._clips) + len(self._failures)
        if num_ends < self._end.num_items + self._end.num_more_clips:
            return False
        return all(
            self._windows_of[clip.item_index, clip.channel] == clip.num_windows
            for clip in self._clips
        )

    def describe(self) -> str:
        """Describe what has been added so far, for errors."""
        expected = "an unknown number of" if self._end is None else self._end.num_items
        return (
            f"unit {self._unit_id}: {len(self._clips)} clips with "
            f"{sum(self._windows_of.values())} windows and {len(self._failures)} failures of "
            f"{expected} items"
        )

    def commit(self) -> Commit:
        """Write the parts, put them in place, commit, and remove what this unit replaces.

        Returns:
            The unit's commit; that of another attempt if it was first.

        Raises:
            AccountingError: The unit is not complete, or its rows do not add up.
        """
        end = self._end
        if end is None:
            raise AccountingError(f"{self.describe()}: cannot be committed before its end")
        unit = end.unit
        num_listed = len(unit.items) + len(unit.failures)
        if unit.kind == "files" and end.num_items != num_listed:
            raise AccountingError(
                f"{self.describe()}: it lists {num_listed} items, and {end.num_items} "
                "came out of it; nothing was committed"
            )
        output = self._settings.output
        # Before anything is written: the replaced unit's rows and ledger go into this commit.
        replaced = read_commit(output, unit.carried.unit_id) if unit.carried else None
        staged = self._write_parts(unit)
        parts = {part: _part_info(path) for part, path in staged.items()}
        kinds = set(self._settings.rows.optional_columns) & {"warning_kinds"}
        columns = ["clip_id", "duration_s", "num_windows", *CLIP_COLUMNS, *kinds]
        clips = _read_columns(staged["clips"], columns)
        errors = None
        if "errors" in staged:
            errors = _read_columns(staged["errors"], ERROR_COLUMNS)
        commit = Commit(
            unit_id=self._unit_id,
            fingerprint=self._settings.fingerprint,
            replaces=unit.replaces,
            ledger=_ledger(unit, replaced),
            parts=parts,
            totals=self._totals(parts, clips),
            engines=tuple(sorted(self._engines.union(replaced.engines if replaced else ()))),
            checks=add_checks(self._checks, replaced.checks if replaced else {}),
            each_channel=self._settings.each_channel,
            optional_columns=self._settings.rows.optional_columns,
            counts=count_rows(clips, errors),
        )
        earlier = find_commit(output, self._unit_id, commit.fingerprint)
        if earlier is not None:
            self.discard()
            commit = earlier
        else:
            for part, path in staged.items():
                writing.put_file(str(path), part_url(output, part, self._unit_id))
            writing.write_bytes(commit_url(output, self._unit_id), commit.to_json())
        for replaced_id in unit.replaces:
            remove_unit(output, replaced_id)
        return commit

    def discard(self) -> None:
        """Close and remove the unit's staged files."""
        with contextlib.suppress(OSError):  # on a full disk closing fails; it was reported
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        for part in PARTS:
            with contextlib.suppress(OSError):  # heal removes what cannot be removed now
                self._staged_path(part).unlink(missing_ok=True)

    def _staged_path(self, part: str) -> Path:
        return self._staging / f"{self._unit_id}.{part}.parquet"

    def _flush_windows(self) -> None:
        if self._writer is None:
            self._writer = self._open_writer("windows", windows_schema(self._settings.rows))
        self._writer.write_table(windows_table(self._windows, self._settings.rows))
        self._windows = []

    def _open_writer(self, part: str, schema: pa.Schema) -> pq.ParquetWriter:
        self._staging.mkdir(parents=True, exist_ok=True)
        return _PartWriter(
            self._staged_path(part),
            schema.with_metadata(self._settings.footer),
            compression="zstd",
            # Embeddings never repeat: trying a dictionary for them only costs time.
            use_dictionary=[
                name for name in schema.names if name not in ("embedding", "scores", "metadata")
            ],
        )

    def _write_parts(self, unit: WorkUnit) -> dict[str, Path]:
        rows = self._settings.rows
        # Of several channels that fail, the first says why the item has.
        failed = {event.item_index: event.failure for event in reversed(self._failures)}
        dropped = {
            make_channel_id(failed[index].item.clip_id, channel)
            for index, channel in self._windows_of
            if index in failed
        }
        self._windows = [row for row in self._windows if row.item_index not in failed]
        self._flush_windows()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        carried = dict(self._carried_tables(unit))
        if carried or dropped:
            self._rewrite_windows(dropped, carried.get("windows"))
        whole = [row for row in self._clips if row.item_index not in failed]
        clips = sorted(whole, key=lambda row: (row.item_index, row.channel or 0))
        tables = {
            "clips": clips_table(clips, rows),
            "errors": errors_table([failed[index] for index in sorted(failed)], self._unit_id),
        }
        staged = {"windows": self._staged_path("windows")}
        for part, own in tables.items():
            both = [table for table in (carried.get(part), own) if table is not None]
            if part == "errors" and not any(table.num_rows for table in both):
                continue
            staged[part] = self._staged_path(part)
            with self._open_writer(part, own.schema) as writer:
                for table in both:
                    writer.write_table(table)
        return staged

    def _rewrite_windows(self, dropped: set[str], carried: pa.Table | None) -> None:
        """Rewrite the staged windows: rows carried over first, then all but those of dropped clips.

        Needed only if a clip failed after some of its windows had been labelled, or if the unit
        carries rows over.
        """
        staged = self._staged_path("windows")
        source = staged.with_suffix(".all")
        staged.rename(source)
        with (
            self._open_writer("windows", windows_schema(self._settings.rows)) as writer,
            source.open("rb") as stream,
            pq.ParquetFile(stream) as file,
        ):
            if carried is not None:
                writer.write_table(carried)
            for index in range(file.num_row_groups):
                table = file.read_row_group(index)
                keep = pc.invert(pc.is_in(table["clip_id"], pa.array(sorted(dropped), pa.string())))
                writer.write_table(table.filter(keep))
        source.unlink()

    def _carried_tables(self, unit: WorkUnit) -> Iterator[tuple[str, pa.Table]]:
        """Yield the rows of a replaced unit that this one carries over, part by part."""
        if unit.carried is None:
            return
        wanted = unit.carried.clip_ids
        # A retry carries every good row over and tries every failed item again.
        for part in PARTS if wanted is not None else ("windows", "clips"):
            output, unit_id = self._settings.output, unit.carried.unit_id
            if part == "errors" and not filesystem.exists(part_url(output, part, unit_id)):
                continue
            table = read_part(output, part, unit_id).replace_schema_metadata(None)
            if wanted is not None:
                of_channels = self._settings.each_channel and part != "errors"
                items = item_ids(table["clip_id"], each_channel=of_channels)
                table = table.filter(pc.is_in(items, pa.array(sorted(wanted), pa.string())))
            if part == "errors":
                column = table.schema.get_field_index("unit_id")
                own = pa.array([self._unit_id] * table.num_rows, pa.string())
                table = table.set_column(column, errors_schema().field("unit_id"), own)
            yield part, table

    def _totals(self, parts: Mapping[str, PartInfo], clips: pa.Table) -> UnitTotals:
        num_rows = {part: info.num_rows for part, info in parts.items()}
        windows_of_clips = pc.sum(clips["num_windows"]).as_py() or 0
        if windows_of_clips != num_rows["windows"]:
            raise AccountingError(
                f"{self.describe()}: its clips have {windows_of_clips} windows, and "
                f"{num_rows['windows']} were written; nothing was committed"
            )
        failures = num_rows.get("errors", 0)
        labelled = count_items(clips["clip_id"], each_channel=self._settings.each_channel)
        return UnitTotals(
            items=labelled + failures,
            clips=num_rows["clips"],
            failures=failures,
            broken_containers=sum(event.failure.is_container for event in self._failures),
            windows=num_rows["windows"],
            audio_s=pc.sum(clips["duration_s"]).as_py() or 0.0,
        )


def _read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read by a stream: Arrow takes no path that is not UTF-8."""
    with path.open("rb") as stream:
        return pq.ParquetFile(stream).read(columns=list(columns), use_threads=False)


def _ledger_slice(unit: WorkUnit) -> LedgerSlice | None:
    container = unit.container
    if container is None:
        return None
    version = container_version(container.size, container.version)
    return LedgerSlice(container.uri, version, container.start, container.stop)


def _ledger(unit: WorkUnit, replaced: Commit | None) -> Ledger:
    """Return what a unit covers: its own items or slice, and the items that it carries over."""
    items = (*unit.items, *(failure.item for failure in unit.failures))
    own = tuple(LedgerItem(item.clip_id, item_version(item)) for item in items)
    if unit.carried is None or replaced is None:
        return Ledger(unit.kind, _ledger_slice(unit), own)
    wanted = unit.carried.clip_ids
    if wanted is None and not replaced.ledger.items:
        return replaced.ledger  # still the whole slice, whichever items were tried again
    mine = {item.clip_id for item in own}
    others = (
        item
        for item in replaced.ledger.items
        if item.clip_id not in mine and (wanted is None or item.clip_id in wanted)
    )
    return Ledger(unit.kind, _ledger_slice(unit), (*others, *own))


def _part_info(path: Path) -> PartInfo:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_rows = int(pq.read_metadata(file).num_rows)
    return PartInfo(path.stat().st_size, digest, num_rows)


class AudioProgress:
    """Seconds of audio of an open unit, counted while its clips are still being labelled.

    A clip's row corrects the count of its windows; a failure takes it back. If windows come out of
    order, the count is slightly off until then.
    """

    def __init__(self) -> None:
        # Up to where each clip has been counted, by item and channel.
        self._reached_s: dict[tuple[int, int | None], float] = {}
        self._counted_s: dict[tuple[int, int | None], float] = {}

    def add(self, event: UnitEvent) -> float:
        """Take the unit's next event; return the seconds to add, negative to take some back."""
        if isinstance(event, UnitEnd):
            return 0.0
        clip = (event.item_index, event.channel)
        if isinstance(event, WindowRow):
            start_s = max(event.start_s, self._reached_s.get(clip, event.start_s))
            new_s = max(0.0, event.end_s - start_s)
            self._reached_s[clip] = start_s + new_s
            self._counted_s[clip] = self._counted_s.get(clip, 0.0) + new_s
            return new_s
        self._reached_s[clip] = math.inf  # windows that come late count for nothing
        duration_s = event.facts.duration_s if isinstance(event, ClipRow) else 0.0
        return duration_s - self._counted_s.pop(clip, 0.0)


class SkipCommitted(
    beam.PTransform[PCollection[WorkUnit], tuple[PCollection[WorkUnit], PCollection[UnitSummary]]]
):
    """Separate the units to do from those that another attempt has committed.

    In: ``WorkUnit``. Out: a tuple of ``WorkUnit``s to do and ``UnitSummary``s of those done.
    """

    def __init__(self, settings: CommitSettings) -> None:
        super().__init__()
        self._settings = settings

    def default_type_hints(self) -> IOTypeHints:
        """What Beam checks what goes in and comes out against."""
        return (
            IOTypeHints.empty().with_input_types(WorkUnit).with_output_types(WorkUnit, UnitSummary)
        )

    def expand(
        self, units: PCollection[WorkUnit]
    ) -> tuple[PCollection[WorkUnit], PCollection[UnitSummary]]:
        """Apply the transform."""
        step = beam.ParDo(_SkipCommittedFn(self._settings))
        step = step.with_output_types(WorkUnit, done=UnitSummary)
        divided = units | step.with_outputs("done", main="to_do")
        return divided.to_do, divided.done


class _SkipCommittedFn(beam.DoFn):
    def __init__(self, settings: CommitSettings) -> None:
        self._settings = settings

    def process(self, unit: WorkUnit) -> Iterator[WorkUnit | TaggedOutput[str, UnitSummary]]:
        commit = find_commit(self._settings.output, unit.unit_id, self._settings.fingerprint)
        if commit is None:
            yield unit
        else:
            yield TaggedOutput("done", UnitSummary.of(commit))


@beam.typehints.with_input_types(UnitEvent)
@beam.typehints.with_output_types(UnitSummary)
class CommitUnits(beam.PTransform[PCollection[UnitEvent], PCollection[UnitSummary]]):
    """Write rows as parts, and commit each unit once it is complete.

    In: ``WindowRow | ClipRow | ItemFailure | UnitEnd``. Out: ``UnitSummary`` per unit. All of a
    unit must come in one bundle, which holds as long as reading and committing are one stage. A
    unit that is still open at the bundle's end raises.
    """

    def __init__(self, settings: CommitSettings) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, events: PCollection[UnitEvent]) -> PCollection[UnitSummary]:
        """Apply the transform."""
        # Explicit type hints: Beam cannot read postponed annotations.
        step = beam.ParDo(_CommitUnitsFn(self._settings))
        step = step.with_input_types(UnitEvent).with_output_types(UnitSummary)
        summaries: PCollection[UnitSummary] = events | "Write and commit" >> step
        return summaries


class _CommitUnitsFn(beam.DoFn):
    def __init__(self, settings: CommitSettings) -> None:
        self._settings = settings
        self._open: dict[str, OpenUnit] = {}
        self._counters = {
            name: Metrics.counter("earmark", name)
            for name in ("units_committed", "clips_labelled", "items_failed", "windows_labelled")
        }

    def setup(self) -> None:
        settings = self._settings
        self._workspace = contextlib.ExitStack()  # the hold on the result, and the staging folder
        with writing_to(settings.output):
            hold = hold_commits(settings.output)
            if hold is not None:
                self._workspace.callback(os.close, hold)
            # Several instances of a step may write at once: each has its own folder.
            name = f"{settings.run_id}-{uuid.uuid4().hex[:8]}"
            self._staging = Path(writing.staging_path(settings.output, name))
            self._workspace.callback(shutil.rmtree, self._staging, ignore_errors=True)

    def start_bundle(self) -> None:
        self._discard_open()

    def process(self, event: UnitEvent) -> Iterator[UnitSummary]:
        unit_id = event.unit.unit_id if isinstance(event, UnitEnd) else event.unit_id
        unit = self._open.get(unit_id)
        if unit is None:
            unit = OpenUnit(self._settings, self._staging, unit_id)
            self._open[unit_id] = unit
        with timed("write"), writing_to(self._settings.output):
            unit.add(event)
            commit = unit.commit() if unit.is_complete else None
        _count_live(event, unit_id, unit.audio)
        if commit is not None:
            del self._open[unit_id]
            live_units.commit(unit_id)
            self._count(commit)
            yield UnitSummary.of(commit, stage_clocks.lap())

    def _count(self, commit: Commit) -> None:
        live_counts.units += 1
        self._counters["windows_labelled"].inc(commit.totals.windows)
        self._counters["units_committed"].inc()
        self._counters["clips_labelled"].inc(commit.totals.clips)
        self._counters["items_failed"].inc(commit.totals.failures)

    def finish_bundle(self) -> None:
        if self._open:
            described = "; ".join(unit.describe() for unit in list(self._open.values())[:3])
            self._discard_open()
            raise AccountingError(
                f"units are incomplete at the end of a bundle ({described}): a runner or a change "
                "to the graph has split the stage from reading to commit; see graph.py"
            )

    def teardown(self) -> None:
        self._discard_open()
        self._workspace.close()

    def _discard_open(self) -> None:
        for unit_id, unit in self._open.items():
            unit.discard()
            live_units.discard(unit_id)
        self._open = {}


def _count_live(event: UnitEvent, unit_id: str, audio: AudioProgress) -> None:
    live_counts.audio_s += audio.add(event)
    if isinstance(event, WindowRow):
        live_counts.windows += 1
    elif isinstance(event, ClipRow):
        # An item whose channels are clips counts once, with the last of them.
        is_last = event.channel in (None, event.facts.channels)
        live_counts.clips += is_last
        live_counts.clip_windows += event.num_windows
        if is_last:
            live_units.add_item(unit_id)
    elif isinstance(event, ItemFailure):
        live_counts.failures += 1
        live_units.add_item(unit_id)
