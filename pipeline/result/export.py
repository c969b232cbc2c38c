"""Write the labels of a result with their times, for the tools in which people review audio.

Only committed units are read, batch by batch and without their embeddings. ``csv`` and ``list`` are
one file that grows with the batches, or standard output. ``audacity`` and ``raven`` are one file
per source, so memory holds the labels of one unit and those of sources that continue in other
units. The files go to a folder of their own (``DIR/export/<format>`` by default), which is not part
of the result.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.result.export_sources import Source, name_files, source_of
from pipeline.terminal.std_streams import answer_bytes, say
from pipeline.terminal.wording import counted
from transforms.errors import InputError, OutputError, UsageError, in_words
from transforms.results.commits import COMMITS, PARTS, channel_numbers, part_url, read_part
from transforms.results.read import read_batches, read_current_commits
from transforms.sources.clip_ids import make_clip_id, original_name
from transforms.storage import filesystem, urls, writing
from transforms.storage.secrets import public_uri

logger = logging.getLogger(__name__)

ExportFormat = Literal["csv", "audacity", "raven", "list"]
Write = Callable[[bytes], object]

STANDARD_OUTPUT = "-"
UPLOAD_THREADS = 16

# The range of the model's mel filters at 16,000 Hz.
LOW_FREQUENCY_HZ = 20.0
HIGH_FREQUENCY_HZ = 8000.0

CLIP_COLUMNS = ("clip_id", "uri", "member", "row")
WINDOW_COLUMNS = ("start_s", "end_s")
LABEL_COLUMNS = ("label_index", "label_id", "label", "score")
# What the input says of a clip; ``path`` is the original name of a Parquet row.
INPUT_COLUMNS = ("path", "truth", "metadata")
CSV_COLUMNS = (*CLIP_COLUMNS, *WINDOW_COLUMNS, *LABEL_COLUMNS, *INPUT_COLUMNS)
RAVEN_HEADER = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
    "\tAnnotation\tScore"
)
RAVEN_FILE_COLUMNS = "\tBegin Path\tBegin File\tFile Offset (s)"

# The names of the formats of one file, in a folder.
_FILE_NAMES = {"csv": "labels.csv", "list": "paths.txt", "raven": "labels.selections.txt"}


@dataclass(frozen=True)
class ExportSettings:
    """Which labels are exported.

    Attributes:
        threshold: Smallest score; None for all stored labels.
        top_k: Largest number of labels per window, best first; None for all stored labels.
        labels: Names of the labels; all if empty.
        per: ``window`` for the labels of windows, ``clip`` for those of clips.
    """

    threshold: float | None = None
    top_k: int | None = None
    labels: tuple[str, ...] = ()
    per: str = "window"

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold is {self.threshold:g}; must be in [0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k is {self.top_k}; must be at least 1")
        if self.per not in ("window", "clip"):
            raise UsageError(f"--per is {self.per}; must be clip or window")

    @property
    def takes_all(self) -> bool:
        """Whether no label is left out."""
        return self.threshold is None and self.top_k is None and not self.labels


def label_rows(
    windows: pa.Table, clips: pa.Table, settings: ExportSettings, *, each_channel: bool = False
) -> pa.Table:
    """Make a row per window and label, in the windows' order, best label first.

    Args:
        windows: ``clip_id``, ``WINDOW_COLUMNS`` and ``labels`` of some windows, or of some clips.
        clips: ``CLIP_COLUMNS`` and any others, of every clip of their unit.
        settings: Which labels to take.
        each_channel: Whether each channel of an item is a clip.

    Returns:
        A table of the columns of ``clips``, ``WINDOW_COLUMNS`` and ``LABEL_COLUMNS``, and
        ``channel``, which is null if clips are whole items.

    Raises:
        OutputError: A window's clip is not in ``clips``.
    """
    lists = windows["labels"].combine_chunks()
    if settings.top_k is not None:
        lists = pc.list_slice(lists, 0, settings.top_k)
    window = pc.list_parent_indices(lists)
    labels = pc.list_flatten(lists)
    for wanted in _wanted(labels, settings):
        window, labels = window.filter(wanted), labels.filter(wanted)
    position = pc.index_in(windows["clip_id"], value_set=clips["clip_id"].combine_chunks())
    if position.null_count:
        lost = windows["clip_id"].filter(pc.is_null(position))[0].as_py()
        raise OutputError(f"{lost}: has windows and no row in clips; run earmark verify")
    clip = position.combine_chunks().take(window)
    channel = channel_numbers(clips["clip_id"], each_channel=each_channel)
    return pa.table(
        {
            **{name: clips[name].take(clip) for name in clips.column_names},
            **{name: windows[name].take(window) for name in WINDOW_COLUMNS},
            **dict(zip(LABEL_COLUMNS, labels.flatten(), strict=True)),
            "channel": channel.take(clip),
        }
    )


def _wanted(labels: pa.StructArray, settings: ExportSettings) -> Iterator[pa.BooleanArray]:
    """Yield at most one mask of the labels to take."""
    masks = []
    if settings.threshold is not None:
        threshold = pa.scalar(settings.threshold, pa.float32())
        masks.append(pc.greater_equal(pc.struct_field(labels, "score"), threshold))
    if settings.labels:
        names = pa.array(settings.labels, pa.string())
        masks.append(pc.is_in(pc.struct_field(labels, "name"), value_set=names))
    if masks:
        yield masks[0] if len(masks) == 1 else pc.and_(*masks)


def audacity_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make an Audacity label track: ``start<TAB>end<TAB>label (score)`` per line, in seconds.

    If each channel is a clip, the score has its channel beside it.
    Source: manual.audacityteam.org, "Importing and Exporting Labels".
    """
    lines = []
    for row in rows:
        channel = "" if row["channel"] is None else f", channel {row['channel']}"
        label = f"{_one_line(row['label'])} ({row['score']:.2f}{channel})"
        lines.append(f"{row['start_s']:.6f}\t{row['end_s']:.6f}\t{label}\n")
    return "".join(lines)


def raven_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make a Raven Pro selection table: tab-separated, with a header, selections from 1."""
    lines = [RAVEN_HEADER, *(_raven_line(number, row) for number, row in enumerate(rows, start=1))]
    return "\n".join(lines) + "\n"


def _raven_line(number: int, row: Mapping[str, Any], offset_s: float = 0.0) -> str:
    """Make a line of a selection table.

    Raven requires the columns up to ``High Freq (Hz)``; the others are annotations. A selection is
    on its clip's channel, or on the first if the clip is the whole item. Its frequencies are the
    part of the source's range that the model covers.
    """
    high = min(HIGH_FREQUENCY_HZ, row["sample_rate_hz"] / 2)
    return (
        f"{number}\tSpectrogram 1\t{row.get('channel') or 1}"
        f"\t{offset_s + row['start_s']:.6f}\t{offset_s + row['end_s']:.6f}"
        f"\t{LOW_FREQUENCY_HZ:.1f}\t{high:.1f}\t{_one_line(row['label'])}\t{row['score']:.4f}"
    )


def _one_line(text: str) -> str:
    """Remove what separates columns and lines."""
    return " ".join(text.split())


# The formats of one text file per source: the suffix of their files, and how they are made.
_TEXT_FORMATS = {
    "audacity": (".txt", audacity_text),
    "raven": (".selections.txt", raven_text),
}


class _Result:
    """The committed part of a result, for reading."""

    def __init__(self, folder: str) -> None:
        self.folder = urls.normalise(folder)
        name = public_uri(self.folder)
        try:
            self.commits = read_current_commits(self.folder)
        except OSError as error:
            raise OutputError(
                f"{in_words(error)}. Check the folder {name} and the rights to it."
            ) from error
        if not self.commits:
            raise InputError(f"{name} {_why_empty(self.folder)}")
        self.unit_ids = list(self.commits)

    def clips(self, unit_id: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of a unit's clips."""
        with self._reading("clips", unit_id):
            return read_part(self.folder, "clips", unit_id, columns)

    def sources(self, unit_id: str) -> dict[str, Source]:
        """Read the source of each of a unit's clips, by ``clip_id``."""
        rows = self.clips(unit_id, CLIP_COLUMNS).to_pylist()
        return {row["clip_id"]: source_of(**row) for row in rows}

    def label_rows(
        self, unit_id: str, settings: ExportSettings, others: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """Read a unit's labels, batch by batch, with other columns of their clips.

        ``path`` is one of them: the original name of a Parquet row. See ``label_rows``.
        """
        stored = [name for name in others if name != "path"]
        if "path" in others and "metadata" not in stored:
            stored.append("metadata")
        if settings.per == "clip":
            stored += ["start_s", "duration_s", "labels"]
        clips = self.clips(unit_id, [*CLIP_COLUMNS, *stored])
        if "path" in others:
            clips = clips.append_column("path", _original_names(clips))
        windows = _whole_clips(clips) if settings.per == "clip" else None
        clips = clips.select([*CLIP_COLUMNS, *others])
        each_channel = self.commits[unit_id].each_channel
        if windows is not None:
            yield label_rows(windows, clips, settings, each_channel=each_channel)
            return
        columns = ["clip_id", *WINDOW_COLUMNS, "labels"]
        with self._reading("windows", unit_id):
            for batch in read_batches(self.folder, "windows", unit_id, columns):
                yield label_rows(batch, clips, settings, each_channel=each_channel)

    def tracks(
        self, settings: ExportSettings, others: Sequence[str] = ()
    ) -> Iterator[list[tuple[Source, list[dict[str, Any]]]]]:
        """Yield the sources that are complete after each unit, with their labels in time order."""
        units_left = Counter(
            source for unit_id in self.unit_ids for source in set(self.sources(unit_id).values())
        )
        waiting: dict[Source, list[dict[str, Any]]] = {}
        for unit_id in self.unit_ids:
            sources = self.sources(unit_id)
            for rows in self.label_rows(unit_id, settings, others):
                for row in rows.to_pylist():
                    waiting.setdefault(sources[row["clip_id"]], []).append(row)
            units_left.subtract(set(sources.values()))
            complete = [s for s in sorted(set(sources.values())) if not units_left[s]]
            # Sorting by time keeps the labels of a window best first.
            yield [
                (s, sorted(waiting.pop(s, []), key=itemgetter(*WINDOW_COLUMNS))) for s in complete
            ]

    def lengths_s(self) -> dict[Source, float]:
        """Return where the last clip of each source ends, in seconds."""
        ends: dict[Source, float] = defaultdict(float)
        for unit_id in self.unit_ids:
            for row in self.clips(unit_id, [*CLIP_COLUMNS, "start_s", "duration_s"]).to_pylist():
                end_s = (row.pop("start_s") or 0.0) + row.pop("duration_s")
                source = source_of(**row)
                ends[source] = max(ends[source], end_s)
        return ends

    def known_labels(self) -> list[dict[str, Any]]:
        """Return the model's labels; empty if the result does not tell."""
        for unit_id in self.unit_ids:
            known = (self.clips(unit_id, ["clip_id"]).schema.metadata or {}).get(b"earmark.labels")
            if known:
                return list(json.loads(known))
        return []

    def resolve_labels(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of labels that are given by name or id.

        Raises:
            UsageError: The model does not have one.
        """
        known = self.known_labels()
        by_id = {label["id"]: label["name"] for label in known if label["id"]}
        resolved = tuple(by_id.get(name, name) for name in names)
        own = [label["name"] for label in known]
        for name in resolved:
            if known and name not in own:
                close = difflib.get_close_matches(name, own, 1, cutoff=0.5)
                some = ", ".join(own[:10]) + (" …" if len(own) > 10 else "")
                hint = f"did you mean {close[0]!r}?" if close else f"it has {some}"
                raise UsageError(f"--label is {name!r}, which the model does not have; {hint}")
        return resolved

    def check_top_k(self, top_k: int) -> None:
        """Refuse a ``--top-k`` beyond the stored labels.

        Raises:
            UsageError: Windows hold fewer, and the model has more.
        """
        for unit_id in self.unit_ids:
            clips = self.clips(unit_id, ["labels"])
            known = (clips.schema.metadata or {}).get(b"earmark.labels")
            if clips.num_rows and known:
                stored = len(clips["labels"][0])
                if top_k > stored and stored < len(json.loads(known)):
                    raise UsageError(
                        f"--top-k is {top_k}; must be at most {stored}, the number of labels that "
                        f"the result holds per window. Label again with --top-k {top_k} for more"
                    )
                return

    @contextlib.contextmanager
    def _reading(self, part: str, unit_id: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            url = part_url(self.folder, part, unit_id)
            raise OutputError(
                f"{public_uri(url)}: committed and not readable ({error}); run earmark verify"
            ) from error


def _why_empty(folder: str) -> str:
    """Say why a folder has no commits, and what to do."""
    # Imports Beam, which an export does not need otherwise.
    from pipeline.result.state import read_run

    if not filesystem.exists(folder):
        return "does not exist; give the --output folder of earmark label"
    with contextlib.suppress(OutputError):  # the run.json of something else
        if read_run(folder) is not None:
            return (
                "is unfinished and has nothing to export yet: no unit is committed; "
                "run the same earmark label command again"
            )
    return (
        f"holds no result of Earmark (no {COMMITS}/*.json); give the --output folder of "
        "earmark label"
    )


def _original_names(clips: pa.Table) -> pa.Array:
    """Return the ``path`` that the metadata of Parquet rows gives, else null."""
    rows = zip(clips["row"].to_pylist(), clips["metadata"].to_pylist(), strict=True)
    return pa.array([original_name(row, metadata) for row, metadata in rows], pa.string())


def _whole_clips(clips: pa.Table) -> pa.Table:
    """Return clips as windows: each from its start to its end."""
    start_s = pc.fill_null(clips["start_s"], 0.0)
    return pa.table(
        {
            "clip_id": clips["clip_id"],
            "start_s": start_s,
            "end_s": pc.add(start_s, clips["duration_s"]),
            "labels": clips["labels"],
        }
    )


# One file, or standard output


def _write_csv(result: _Result, settings: ExportSettings, write: Write) -> int:
    """Write a CSV; returns the number of labels."""
    write((",".join(CSV_COLUMNS) + "\n").encode())
    num_labels = 0
    for unit_id in result.unit_ids:
        for rows in result.label_rows(unit_id, settings, INPUT_COLUMNS):
            truth = pc.binary_join(rows["truth"], ";")
            rows = rows.set_column(rows.column_names.index("truth"), "truth", truth)
            sink = pa.BufferOutputStream()
            pyarrow.csv.write_csv(
                rows.select(CSV_COLUMNS), sink, pyarrow.csv.WriteOptions(include_header=False)
            )
            write(sink.getvalue().to_pybytes())
            num_labels += rows.num_rows
    return num_labels


def _write_list(result: _Result, settings: ExportSettings, end: str, write: Write) -> int:
    """Write the path of each file with a clip that has one of the labels, once; returns how many.

    What lies in a tar or Parquet file has its clip id, which names the container.
    """
    settings = replace(settings, per="clip")
    if settings.threshold is None and settings.top_k is None and settings.labels:
        settings = replace(settings, top_k=1)  # nearly every label is stored with some score
    seen: set[str] = set()
    num_inside = 0
    for unit_id in result.unit_ids:
        if settings.takes_all:
            tables = iter([result.clips(unit_id, CLIP_COLUMNS)])
        else:
            tables = result.label_rows(unit_id, settings)
        for table in tables:
            for row in table.select(CLIP_COLUMNS).to_pylist():
                path = _path_of(row)
                if path not in seen:
                    seen.add(path)
                    num_inside += row["member"] is not None or row["row"] is not None
                    write(f"{path}{end}".encode("utf-8", "surrogateescape"))
    if num_inside:
        say(f"{num_inside:,} of these lie in tars or Parquet files, named by their clip ids.")
    return len(seen)


def _path_of(row: Mapping[str, Any]) -> str:
    if row["member"] is None and row["row"] is None:
        return urls.normalise(row["uri"])  # a name that is not UTF-8 has its own bytes again
    source = source_of(**{name: row[name] for name in CLIP_COLUMNS})
    return make_clip_id(source.uri, row["member"], source.occurrence, row["row"])


def _write_raven_table(result: _Result, settings: ExportSettings, write: Write) -> int:
    """Write one selection table for all sources; returns the number of labels.

    Raven opens the files as one sequence: ``Begin Time (s)`` counts from the start of the first
    file, ``File Offset (s)`` from that of ``Begin Path``. So the files come one after another.
    """
    write(f"{RAVEN_HEADER}{RAVEN_FILE_COLUMNS}\n".encode())
    lengths_s = result.lengths_s()
    number, offset_s = 0, 0.0
    for complete in result.tracks(settings, ("sample_rate_hz", "path")):
        for source, rows in complete:
            for row in rows:
                number += 1
                path = _one_line(_path_of(row))
                name = _one_line((row["path"] or path).rpartition("/")[2])
                line = _raven_line(number, row, offset_s)
                line = f"{line}\t{path}\t{name}\t{row['start_s']:.6f}\n"
                write(line.encode("utf-8", "surrogateescape"))
            offset_s += lengths_s[source]
    return number


def _write_file(place: str, write_all: Callable[[Write], int]) -> int:
    """Write one file, whole, or to standard output; returns what ``write_all`` does."""
    if place == STANDARD_OUTPUT:
        return write_all(answer_bytes)
    folder = urls.parent(place)
    writing.make_folder(folder)
    # Beside a local target, so that moving it into place is a rename.
    beside = urls.local_path(folder) if urls.is_local(folder) else None
    with tempfile.TemporaryDirectory(prefix=".earmark-", dir=beside) as staging:
        path = Path(staging) / "export"
        with path.open("wb") as file:
            count = write_all(file.write)
        writing.put_file(str(path), place)
    return count


# A file per source


def _write_tracks(
    result: _Result,
    folder: str,
    settings: ExportSettings,
    suffix: str,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> tuple[int, int]:
    """Write one file per source, even without labels; returns the numbers of files and labels."""
    names = name_files(
        {source for unit_id in result.unit_ids for source in result.sources(unit_id).values()},
        suffix,
    )
    writing.make_folder(folder)
    num_labels = 0
    with ThreadPoolExecutor(UPLOAD_THREADS, "earmark-export") as threads:
        for complete in result.tracks(settings, ("sample_rate_hz",)):
            num_labels += sum(len(rows) for _, rows in complete)
            contents = (render(rows).encode("utf-8", "surrogatepass") for _, rows in complete)
            targets = (urls.join(folder, names[source]) for source, _ in complete)
            # Collecting the results raises the errors of the threads.
            list(threads.map(writing.write_bytes, targets, contents))
    return len(names), num_labels


def _export_place(result: _Result, format: str, output: str | None, is_one_file: bool) -> str:
    """Return the file or folder to export to; ``-`` is standard output.

    Raises:
        OutputError: It lies among the result's own files, or is a file where many are written.
    """
    if output is None:
        if format == "list":
            return STANDARD_OUTPUT
        folder = urls.join(result.folder, "export", format)
        return urls.join(folder, _FILE_NAMES[format]) if is_one_file else folder
    is_file = output == STANDARD_OUTPUT or urls.names_file(output)
    if is_file and not is_one_file:
        raise OutputError(
            f"--output is {public_uri(output)}, and {format} writes a file per recording; give a "
            "folder" + (", or --one-table" if format == "raven" else "")
        )
    if output == STANDARD_OUTPUT:
        return output
    place = urls.normalise(output)
    folder = urls.parent(place) if is_file else place
    own = [urls.join(result.folder, name) for name in (*PARTS, COMMITS)]
    if folder == result.folder or any(f"{folder}/".startswith(f"{path}/") for path in own):
        raise OutputError(
            f"--output is {public_uri(folder)}, which holds the result itself; "
            "give another folder, or leave --output out"
        )
    return urls.join(place, _FILE_NAMES[format]) if is_one_file and not is_file else place


def run_export(
    folder: str,
    format: str,
    output: str | None = None,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    labels: Sequence[str] = (),
    per: str | None = None,
    null: bool = False,
    one_table: bool = False,
    quiet: bool = False,
) -> int:
    """Export a result's labels (``earmark export``), and return the exit code.

    Args:
        folder: The result's folder.
        format: An ``ExportFormat``.
        output: Folder to write to, or for one file its name, or ``-`` for standard output; None
            for ``export/<format>`` in the result's folder, and standard output for ``list``.
        threshold: As in ``ExportSettings``.
        top_k: As in ``ExportSettings``.
        labels: Names or ids of labels.
        per: As in ``ExportSettings``; only with ``csv``.
        null: Whether paths end with NUL; only with ``list``.
        one_table: Whether all sources go into one file; only with ``raven``.
        quiet: Print nothing but what goes to standard output.

    Raises:
        UsageError: ``folder`` is no result, or an argument does not fit it.
    """
    if format not in get_args(ExportFormat):
        raise UsageError(f"--format is {format}; must be {', '.join(get_args(ExportFormat))}")
    for flag, given, owner in (
        ("--per", per is not None, "csv"),
        ("--null", null, "list"),
        ("--one-table", one_table, "raven"),
    ):
        if given and format != owner:
            raise UsageError(f"{flag} is for --format {owner}, and --format is {format}")
    settings = ExportSettings(threshold, top_k, per=per or "window")
    result = _Result(folder)
    settings = replace(settings, labels=result.resolve_labels(labels))
    if top_k is not None:
        result.check_top_k(top_k)
    is_one_file = format in ("csv", "list") or one_table
    place = _export_place(result, format, output, is_one_file)
    if not filesystem.exists(urls.join(result.folder, "_SUCCESS")):
        logger.warning(
            "%s: the last run has not finished; exporting the %d units committed so far",
            public_uri(result.folder),
            len(result.unit_ids),
        )
    if not is_one_file:
        num_files, num_labels = _write_tracks(result, place, settings, *_TEXT_FORMATS[format])
        files = counted(num_files, "file")
        say(f"exported {num_labels:,} labels to {files} in {public_uri(place)}", quiet=quiet)
        return 0
    what = "path" if format == "list" else "label"
    count = _write_file(place, _writer(result, settings, format, null))
    if place != STANDARD_OUTPUT:
        say(f"exported {counted(count, what)} to {public_uri(place)}", quiet=quiet)
    elif not count:
        say("no clip has such a label", quiet=quiet)
    return 0


def _writer(
    result: _Result, settings: ExportSettings, format: str, null: bool
) -> Callable[[Write], int]:
    """Return the function that writes a format of one file."""
    if format == "csv":
        return lambda write: _write_csv(result, settings, write)
    if format == "raven":
        return lambda write: _write_raven_table(result, settings, write)
    end = "\0" if null else "\n"
    return lambda write: _write_list(result, settings, end, write)
