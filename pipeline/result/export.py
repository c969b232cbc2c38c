"""Write the labels of a result with their times, for the tools in which people review audio.

Only committed units are read, batch by batch and without their embeddings. ``csv`` is one file that
grows with the batches. ``audacity`` and ``raven`` are one file per source, so memory holds the
labels of one unit and those of sources that continue in other units. The files go to a folder of
their own (``DIR/export/<format>`` by default), which is not part of the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.terminal.std_streams import say
from transforms.errors import InputError, OutputError, UsageError, in_words
from transforms.results.commits import COMMITS, PARTS, channel_numbers, part_url, read_part
from transforms.results.read import read_batches, read_current_commits
from transforms.sources.clip_ids import make_clip_id
from transforms.storage import filesystem, urls, writing
from transforms.storage.secrets import public_uri

logger = logging.getLogger(__name__)

ExportFormat = Literal["csv", "audacity", "raven"]

UPLOAD_THREADS = 16

# The range of the model's mel filters at 16,000 Hz.
LOW_FREQUENCY_HZ = 20.0
HIGH_FREQUENCY_HZ = 8000.0

CLIP_COLUMNS = ("clip_id", "uri", "member", "row")
WINDOW_COLUMNS = ("start_s", "end_s")
LABEL_COLUMNS = ("label_index", "label_id", "label", "score")
CSV_COLUMNS = (*CLIP_COLUMNS, *WINDOW_COLUMNS, *LABEL_COLUMNS)
RAVEN_HEADER = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
    "\tAnnotation\tScore"
)

# Characters that are reserved in file names on a common system, and control characters.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_MAX_NAME_BYTES = 180


@dataclass(frozen=True)
class ExportSettings:
    """Which labels are exported.

    Attributes:
        threshold: Smallest score; None for all stored labels.
        top_k: Largest number of labels per window, best first; None for all stored labels.
    """

    threshold: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold is {self.threshold:g}; must be in [0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k is {self.top_k}; must be at least 1")


def label_rows(
    windows: pa.Table, clips: pa.Table, settings: ExportSettings, *, each_channel: bool = False
) -> pa.Table:
    """Make a row per window and label, in the windows' order, best label first.

    Args:
        windows: ``clip_id``, ``WINDOW_COLUMNS`` and ``labels`` of some windows.
        clips: ``CLIP_COLUMNS`` and ``sample_rate_hz`` of every clip of their unit.
        settings: Which labels to take.
        each_channel: Whether each channel of an item is a clip.

    Returns:
        A table of ``CSV_COLUMNS``, ``sample_rate_hz`` and ``channel``, which is null if clips are
        whole items.

    Raises:
        OutputError: A window's clip is not in ``clips``.
    """
    lists = windows["labels"].combine_chunks()
    if settings.top_k is not None:
        lists = pc.list_slice(lists, 0, settings.top_k)
    window = pc.list_parent_indices(lists)
    labels = pc.list_flatten(lists)
    score = pc.struct_field(labels, "score")
    if settings.threshold is not None:
        wanted = pc.greater_equal(score, pa.scalar(settings.threshold, pa.float32()))
        window, labels = window.filter(wanted), labels.filter(wanted)
    position = pc.index_in(windows["clip_id"], value_set=clips["clip_id"].combine_chunks())
    if position.null_count:
        lost = windows["clip_id"].filter(pc.is_null(position))[0].as_py()
        raise OutputError(f"{lost}: has windows and no row in clips; run earmark verify")
    clip = position.combine_chunks().take(window)
    channel = channel_numbers(clips["clip_id"], each_channel=each_channel)
    return pa.table(
        {
            **{name: clips[name].take(clip) for name in CLIP_COLUMNS},
            **{name: windows[name].take(window) for name in WINDOW_COLUMNS},
            **dict(zip(LABEL_COLUMNS, labels.flatten(), strict=True)),
            "sample_rate_hz": clips["sample_rate_hz"].take(clip),
            "channel": channel.take(clip),
        }
    )


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
    """Make a Raven Pro selection table: tab-separated, with a header, selections from 1.

    Raven requires the columns up to ``High Freq (Hz)``; the others are annotations. A selection is
    on its clip's channel, or on the first if the clip is the whole item. Its frequencies are the
    part of the source's range that the model covers.
    """
    lines = [RAVEN_HEADER]
    for number, row in enumerate(rows, start=1):
        high = min(HIGH_FREQUENCY_HZ, row["sample_rate_hz"] / 2)
        lines.append(
            f"{number}\tSpectrogram 1\t{row.get('channel') or 1}"
            f"\t{row['start_s']:.6f}\t{row['end_s']:.6f}"
            f"\t{LOW_FREQUENCY_HZ:.1f}\t{high:.1f}\t{_one_line(row['label'])}\t{row['score']:.4f}"
        )
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """Remove what separates columns and lines."""
    return " ".join(text.split())


# The formats of one text file per source: the suffix of their files, and how they are made.
_TEXT_FORMATS = {
    "audacity": (".txt", audacity_text),
    "raven": (".selections.txt", raven_text),
}


@dataclass(frozen=True, order=True)
class Source:
    """The recording of a clip; all segments of one recording share it, whatever their ids.

    Attributes:
        uri: The file or container.
        member: Name inside the tar, or "".
        occurrence: Number of the member among those of its name, from 1.
        row: Row of the Parquet file, or -1.
    """

    uri: str
    member: str = ""
    occurrence: int = 1
    row: int = -1

    def path_parts(self) -> list[str]:
        """Return the parts of its path; a member or row lies below its container."""
        parts = [part for part in f"{self.uri}/{self.member}".split("/") if part]
        if self.row >= 0:
            parts.append(f"row={self.row}")
        if self.occurrence > 1:
            parts[-1] += f"~{self.occurrence}"
        return parts

    def folder(self) -> tuple[str, ...]:
        """Return the folder of its file or container."""
        return tuple(part for part in self.uri.split("/") if part)[:-1]


def source_of(clip_id: str, uri: str, member: str | None, row: int | None) -> Source:
    """Return the recording of a clip from its row in ``clips``.

    A manifest may give clips any id. So the id is used only if it is made of the other columns, and
    only for the number of the member among those of its name (``#name~2``).
    """
    if member is None:
        return Source(uri, row=-1 if row is None else row)
    # A byte that is not UTF-8 is %XX in every column; its % must not be encoded again here.
    name, clip_id = (text.replace("%25", "%") for text in (make_clip_id(uri, member), clip_id))
    match = re.match(re.escape(name) + r"~(\d+)(?:[@!]|$)", clip_id)
    return Source(uri, member, int(match.group(1)) if match else 1)


def name_files(sources: Iterable[Source], suffix: str) -> dict[Source, str]:
    """Name a file for every source: its path below the shared folder, made safe and unique.

    A tar member or Parquet row lies in a folder with its container's name. Reserved characters are
    percent-encoded. Long names are cut and end in a hash, and so do names that would collide, also
    where upper and lower case are the same.
    """
    ordered = sorted(set(sources))
    folders = {source.folder() for source in ordered}
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    names: dict[Source, str] = {}
    taken: set[str] = set()
    for source in ordered:
        *above, last = source.path_parts()[depth:]
        # A folder must not have the name of another source's file.
        safe = [f"{name}_" if name.endswith(suffix) else name for name in map(_safe_name, above)]
        path = "/".join([*safe, _safe_name(last) + suffix])
        if path.casefold() in taken:
            path = "/".join([*safe, f"{_safe_name(last)}~{_short_hash(repr(source))}{suffix}"])
        taken.add(path.casefold())
        names[source] = path
    return names


def _safe_name(name: str) -> str:
    name = _UNSAFE.sub(lambda match: f"%{ord(match.group()):02X}", name)
    if name in (".", ".."):
        name = name.replace(".", "%2E")
    encoded = name.encode("utf-8", "surrogatepass")
    if len(encoded) > _MAX_NAME_BYTES:
        name = f"{encoded[: _MAX_NAME_BYTES - 11].decode('utf-8', 'ignore')}~{_short_hash(name)}"
    return name


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


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

    def label_rows(self, unit_id: str, settings: ExportSettings) -> Iterator[pa.Table]:
        """Read a unit's labels, batch by batch; see ``label_rows``."""
        clips = self.clips(unit_id, [*CLIP_COLUMNS, "sample_rate_hz"])
        columns = ["clip_id", *WINDOW_COLUMNS, "labels"]
        each_channel = self.commits[unit_id].each_channel
        with self._reading("windows", unit_id):
            for windows in read_batches(self.folder, "windows", unit_id, columns):
                yield label_rows(windows, clips, settings, each_channel=each_channel)

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


def _write_csv(result: _Result, folder: str, settings: ExportSettings) -> tuple[int, int]:
    """Write ``labels.csv``; returns the numbers of files and labels."""
    num_labels = 0
    # Beside a local target, so that moving it into place is a rename.
    beside = urls.local_path(folder) if urls.is_local(folder) else None
    with tempfile.TemporaryDirectory(prefix=".earmark-", dir=beside) as staging:
        path = Path(staging) / "labels.csv"
        with path.open("wb") as file:
            file.write((",".join(CSV_COLUMNS) + "\n").encode())
            for unit_id in result.unit_ids:
                for rows in result.label_rows(unit_id, settings):
                    pyarrow.csv.write_csv(
                        rows.select(CSV_COLUMNS),
                        file,
                        pyarrow.csv.WriteOptions(include_header=False),
                    )
                    num_labels += rows.num_rows
        writing.put_file(str(path), urls.join(folder, "labels.csv"))
    return 1, num_labels


def _write_text(
    result: _Result,
    folder: str,
    settings: ExportSettings,
    suffix: str,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> tuple[int, int]:
    """Write one file per source, even without labels; returns numbers as ``_write_csv`` does."""
    units_left: Counter[Source] = Counter()
    for unit_id in result.unit_ids:
        units_left.update(set(result.sources(unit_id).values()))
    names = name_files(units_left, suffix)
    waiting: dict[Source, list[dict[str, Any]]] = {}
    num_labels = 0
    with ThreadPoolExecutor(UPLOAD_THREADS, "earmark-export") as threads:
        for unit_id in result.unit_ids:
            sources = result.sources(unit_id)
            for rows in result.label_rows(unit_id, settings):
                num_labels += rows.num_rows
                for row in rows.to_pylist():
                    waiting.setdefault(sources[row["clip_id"]], []).append(row)
            units_left.subtract(set(sources.values()))
            complete = [s for s in sorted(set(sources.values())) if not units_left[s]]
            # Sorting by time keeps the labels of a window best first.
            tracks = (sorted(waiting.pop(s, []), key=itemgetter(*WINDOW_COLUMNS)) for s in complete)
            contents = (render(rows).encode("utf-8", "surrogatepass") for rows in tracks)
            targets = (urls.join(folder, names[source]) for source in complete)
            # Collecting the results raises the errors of the threads.
            list(threads.map(writing.write_bytes, targets, contents))
    return len(names), num_labels


def _export_folder(result: _Result, format: str, output: str | None) -> str:
    """Return the folder to export to.

    Raises:
        OutputError: It lies among the result's own files.
    """
    if output is None:
        return urls.join(result.folder, "export", format)
    folder = urls.normalise(output)
    own = [urls.join(result.folder, name) for name in (*PARTS, COMMITS)]
    if folder == result.folder or any(f"{folder}/".startswith(f"{path}/") for path in own):
        raise OutputError(
            f"--output is {public_uri(folder)}, which holds the result itself; "
            "give another folder, or leave --output out"
        )
    return folder


def run_export(
    folder: str,
    format: str,
    output: str | None = None,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    quiet: bool = False,
) -> int:
    """Export a result's labels (``earmark export``), and return the exit code.

    Args:
        folder: The result's folder.
        format: An ``ExportFormat``.
        output: Folder to write to; None for ``export/<format>`` in the result's folder.
        threshold: As in ``ExportSettings``.
        top_k: As in ``ExportSettings``.
        quiet: Print nothing.

    Raises:
        UsageError: ``folder`` is no result, or an argument does not fit it.
    """
    if format not in get_args(ExportFormat):
        raise UsageError(f"--format is {format}; must be {', '.join(get_args(ExportFormat))}")
    settings = ExportSettings(threshold, top_k)
    result = _Result(folder)
    if top_k is not None:
        result.check_top_k(top_k)
    target = _export_folder(result, format, output)
    writing.make_folder(target)
    if not filesystem.exists(urls.join(result.folder, "_SUCCESS")):
        logger.warning(
            "%s: the last run has not finished; exporting the %d units committed so far",
            public_uri(result.folder),
            len(result.unit_ids),
        )
    if format == "csv":
        num_files, num_labels = _write_csv(result, target, settings)
    else:
        num_files, num_labels = _write_text(result, target, settings, *_TEXT_FORMATS[format])
    if not quiet:
        files = "1 file" if num_files == 1 else f"{num_files:,} files"
        place = public_uri(target)
        say(f"exported {num_labels:,} labels to {files} in {place}")
    return 0
