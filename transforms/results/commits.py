"""Commits: what vouches for a unit's parts. Written by ``write_units``, read by everything else.

    DIR/windows/<unit_id>.parquet   a row per window
    DIR/clips/<unit_id>.parquet     a row per clip
    DIR/errors/<unit_id>.parquet    a row per item that could not be labelled, if there is one
    DIR/_commits/<unit_id>.json     written last: with it, the unit is done

A commit holds the size, hash and row count of each part, the unit's totals, and its **ledger**: the
items, or the slice of a container, that need not be done again as long as their version is the
same.

An item is one clip, or with ``decode.channel: each`` (``Commit.each_channel``) one for each of its
channels, with an id that ends in ``!1``, ``!2`` … The ledger, ``errors`` and ``UnitTotals.items``
are about items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from transforms.errors import OutputError
from transforms.process.locks import lock_shared, try_lock
from transforms.process.stage_times import NO_SECONDS, StageSeconds
from transforms.records import Item, UnitKind, WindowCheck
from transforms.results.counts import RowCounts
from transforms.storage import filesystem, listing, reading, urls, writing
from transforms.storage.secrets import public_uri

# Columns that not every result has: a result begun without one continues without it. Its commits
# name those that it has.
OPTIONAL_COLUMNS = ("warning_kinds",)

# Of run.json, the parts and the commits. The first has none of the optional columns; a result that
# names no version has it.
FIRST_SCHEMA_VERSION = 1
SCHEMA_VERSION = 2

RUN_FILE = "run.json"
PARTS = ("windows", "clips", "errors")
COMMITS = "_commits"


@dataclass(frozen=True)
class PartInfo:
    """A part's file as its commit describes it."""

    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class UnitTotals:
    """Counts of what a unit held.

    Attributes:
        items: Items found in it: those of the clips plus failures.
        clips: Rows in ``clips``; an item has several if each of its channels is a clip.
        failures: Items that could not be labelled, including a broken container's own row.
        broken_containers: Those failures that are containers not read to their end.
        audio_s: Seconds of audio labelled.
    """

    items: int = 0
    clips: int = 0
    failures: int = 0
    broken_containers: int = 0
    windows: int = 0
    audio_s: float = 0.0

    def __add__(self, other: UnitTotals) -> UnitTotals:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return UnitTotals(*(a + b for a, b in zip(mine, others, strict=True)))


@dataclass(frozen=True)
class CheckFigures:
    """How far an engine's answers were from plain torch in float32, summed over windows and units.

    Attributes:
        windows: Windows that were checked.
        reused: Those of them that an earlier run had measured.
        same_top: Those of them with the same best class.
        max_score_difference: The largest absolute difference of a class's score.
        min_cosine: The smallest cosine of two embeddings.
        sum_cosine: The sum of the cosines.
        oldest_utc: When the first of them was measured, in ISO 8601; empty if none was.
        error: Why windows could not be checked, or None.
    """

    windows: int = 0
    reused: int = 0
    same_top: int = 0
    max_score_difference: float = 0.0
    min_cosine: float = 1.0
    sum_cosine: float = 0.0
    oldest_utc: str = ""
    error: str | None = None

    def __add__(self, other: CheckFigures) -> CheckFigures:
        return CheckFigures(
            windows=self.windows + other.windows,
            reused=self.reused + other.reused,
            same_top=self.same_top + other.same_top,
            max_score_difference=max(self.max_score_difference, other.max_score_difference),
            min_cosine=min(self.min_cosine, other.min_cosine),
            sum_cosine=self.sum_cosine + other.sum_cosine,
            oldest_utc=min(filter(None, (self.oldest_utc, other.oldest_utc)), default=""),
            error=self.error or other.error,
        )

    @staticmethod
    def of(check: WindowCheck) -> CheckFigures:
        """Return the figures of one window."""
        if check.error is not None:
            return CheckFigures(error=check.error)
        return CheckFigures(
            windows=1,
            reused=int(check.reused),
            same_top=int(check.same_top),
            max_score_difference=check.score_difference,
            min_cosine=check.cosine,
            sum_cosine=check.cosine,
            oldest_utc=check.measured_utc,
        )


Checks = Mapping[str, CheckFigures]  # by the engine's name


def add_checks(*several: Checks) -> dict[str, CheckFigures]:
    """Sum figures, engine by engine."""
    total: dict[str, CheckFigures] = {}
    for checks in several:
        for engine, figures in checks.items():
            total[engine] = total.get(engine, CheckFigures()) + figures
    return total


@dataclass(frozen=True)
class LedgerSlice:
    """The part of a container that a commit covers; units as in ``ContainerSlice``."""

    uri: str
    version: str
    start: int
    stop: int | None


@dataclass(frozen=True)
class LedgerItem:
    """An item that a commit covers, with its ``item_version`` at the time."""

    clip_id: str
    version: str


@dataclass(frozen=True)
class Ledger:
    """What a commit covers: a slice of a container as a whole, or the items listed."""

    kind: UnitKind
    container: LedgerSlice | None = None
    items: tuple[LedgerItem, ...] = ()


@dataclass(frozen=True)
class Commit:
    """A committed unit: proof that its parts are whole.

    Attributes:
        fingerprint: That of the run that wrote it.
        replaces: Units whose content this one redid.
        parts: By name; ``errors`` only if there is one.
        engines: What computed it: engine, device and precision.
        checks: How far they were from float32, where that was measured.
        each_channel: Whether each channel of an item is a clip.
        optional_columns: Those of ``OPTIONAL_COLUMNS`` that its parts have.
        counts: What its rows say; empty if an earlier version wrote it.
    """

    unit_id: str
    fingerprint: str
    replaces: tuple[str, ...]
    ledger: Ledger
    parts: Mapping[str, PartInfo]
    totals: UnitTotals
    engines: tuple[str, ...]
    checks: Checks = field(default_factory=dict)
    each_channel: bool = False
    optional_columns: tuple[str, ...] = ()
    counts: RowCounts = field(default_factory=RowCounts)

    def to_json(self) -> bytes:
        """Return the commit file's content."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_json(text: bytes) -> Commit:
        """Read a commit file's content.

        Raises:
            ValueError: It is not one.
        """
        try:
            return _COMMIT.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"not a commit of Earmark: {place}: {first['msg']}") from error


_COMMIT = TypeAdapter(Commit)


def item_ids(clip_ids: pa.ChunkedArray, *, each_channel: bool) -> pa.ChunkedArray:
    """Return the ids of the items of clips: without ``!2`` where each channel is a clip.

    Rows of ``errors`` name items already: of an item whose own id ends so, nothing must be taken.
    """
    return pc.replace_substring_regex(clip_ids, r"![0-9]+$", "") if each_channel else clip_ids


def count_items(clip_ids: pa.ChunkedArray, *, each_channel: bool) -> int:
    """Return how many items clips are of."""
    if not each_channel:
        return len(clip_ids)
    return int(pc.count_distinct(item_ids(clip_ids, each_channel=True)).as_py())


def channel_numbers(clip_ids: pa.ChunkedArray, *, each_channel: bool) -> pa.ChunkedArray:
    """Return the channel of each clip, from 1; null if clips are whole items."""
    if not each_channel:
        return pa.chunked_array([pa.nulls(len(clip_ids), pa.int32())])
    numbers = pc.struct_field(pc.extract_regex(clip_ids, r"!(?P<channel>[0-9]+)$"), "channel")
    return numbers.cast(pa.int32())


def item_version(item: Item) -> str:
    """Return what tells a changed item from an unchanged one: size, etag or time, and a digest.

    The digest covers where the item lies and what the input says of it. A manifest may give the
    same clip id to another file or segment, and truth and metadata are part of a row.
    """
    place = (item.uri, item.member, item.row, item.start_s, item.end_s)
    facts = json.dumps([*place, item.truth, item.metadata])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return f"{item.size}:{item.version}:{digest}"


def container_version(size: int | None, version: str | None) -> str:
    """Return what tells a changed container from an unchanged one."""
    return f"{size}:{version}"


def part_url(output: str, part: str, unit_id: str) -> str:
    """Return the URL of a unit's part."""
    return urls.join(output, part, f"{unit_id}.parquet")


def commit_url(output: str, unit_id: str) -> str:
    """Return the URL of a unit's commit."""
    return urls.join(output, COMMITS, f"{unit_id}.json")


def read_commit(output: str, unit_id: str) -> Commit:
    """Read one commit.

    Raises:
        OutputError: The file is not a commit.
        OSError: The file cannot be read.
    """
    url = commit_url(output, unit_id)
    try:
        return Commit.from_json(reading.read_bytes(url))
    except ValueError as error:
        raise OutputError(f"{public_uri(url)}: {error}") from error


def list_unit_ids(output: str) -> list[str]:
    """List the units that have a commit file."""
    names = listing.list_names(urls.join(output, COMMITS))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_commits(output: str) -> tuple[dict[str, Commit], dict[str, OutputError | OSError]]:
    """Read every commit of a result.

    Returns:
        The commits by unit, and the errors of the units whose commit could not be read:
        ``OutputError`` for a damaged file, ``OSError`` for one that the store does not return.

    Raises:
        OutputError: The result has another schema.
        OSError: The commits cannot be listed.
    """
    check_schema(output)
    unit_ids = list_unit_ids(output)

    def read(unit_id: str) -> Commit | OutputError | OSError:
        try:
            return read_commit(output, unit_id)
        except (OutputError, OSError) as error:
            return error

    commits: dict[str, Commit] = {}
    errors: dict[str, OutputError | OSError] = {}
    with ThreadPoolExecutor(16) as threads:
        for unit_id, found in zip(unit_ids, threads.map(read, unit_ids), strict=True):
            if isinstance(found, Commit):
                commits[unit_id] = found
            else:
                errors[unit_id] = found
    return commits, errors


def check_schema(output: str) -> None:
    """Refuse a result whose ``run.json`` names another schema than this version of Earmark has.

    Raises:
        OutputError: It does.
        OSError: The file cannot be read.
    """
    try:
        run = json.loads(reading.read_bytes(urls.join(output, RUN_FILE)))
    except (FileNotFoundError, ValueError):  # other checks report a damaged file
        return
    if isinstance(run, dict):
        _check_schema_version(run.get("schema_version", 1), output)


def schema_version(optional_columns: Sequence[str]) -> int:
    """Return the schema version of a result with these optional columns."""
    return SCHEMA_VERSION if optional_columns else FIRST_SCHEMA_VERSION


def _check_schema_version(version: object, place: str) -> None:
    if str(version) not in (str(FIRST_SCHEMA_VERSION), str(SCHEMA_VERSION)):
        raise OutputError(
            f"{public_uri(place)} has schema version {version}, and this version of Earmark reads "
            f"{FIRST_SCHEMA_VERSION} and {SCHEMA_VERSION}; use the version of Earmark that wrote "
            "it (run.json names it), or label into a new folder."
        )


def hold_commits(output: str) -> int | None:
    """Mark this process as one that may commit, while the returned descriptor is open.

    A run's workers may outlive it by some seconds. The operating system's lock ends with the
    process, however that ends. A remote output has no lock.
    """
    if not urls.is_local(output):
        return None
    folder = urls.join(output, COMMITS)
    writing.make_folder(folder)
    descriptor = os.open(urls.local_path(folder), os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # some network file systems have no locks
        lock_shared(descriptor)
    return descriptor


def are_commits_held(output: str) -> bool:
    """Return whether a living process may commit here; False where that cannot be known."""
    if not urls.is_local(output):
        return False
    try:
        folder = urls.local_path(urls.join(output, COMMITS))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # absent or unreadable: reading the result reports it
        return False
    try:
        return not try_lock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def remove_unit(output: str, unit_id: str) -> None:
    """Remove a unit from a result: its commit first, so that it never vouches for missing parts."""
    writing.remove(commit_url(output, unit_id))
    for part in PARTS:
        writing.remove(part_url(output, part, unit_id))


def find_commit(output: str, unit_id: str, fingerprint: str) -> Commit | None:
    """Return a unit's commit if it is valid: of these settings, with all parts in place.

    Raises:
        OSError: The store does not tell.
    """
    try:
        commit = read_commit(output, unit_id)
        for part, info in commit.parts.items():
            if filesystem.stat(part_url(output, part, unit_id)).size != info.num_bytes:
                return None
    except (OutputError, FileNotFoundError):
        return None
    return commit if commit.fingerprint == fingerprint else None


def read_failures(output: str, unit_id: str) -> list[dict[str, Any]]:
    """Read the rows of a unit's ``errors`` part."""
    return cast(list[dict[str, Any]], read_part(output, "errors", unit_id).to_pylist())


@contextlib.contextmanager
def open_part(output: str, part: str, unit_id: str) -> Iterator[pq.ParquetFile]:
    """Open a unit's part for reading.

    Raises:
        OutputError: It has another schema.
    """
    url = part_url(output, part, unit_id)
    with reading.open_read(url) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False)
        footer = file.metadata.metadata or {}
        _check_schema_version(footer.get(b"earmark.schema_version", b"1").decode(), url)
        yield file


def read_part(
    output: str, part: str, unit_id: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the rows of a unit's part.

    Without Arrow's own threads: they release what they read from a Python stream at any time, and
    abort the process if it is ending at that moment.
    """
    with open_part(output, part, unit_id) as file:
        return file.read(columns=columns, use_threads=False)


@dataclass(frozen=True)
class UnitSummary:
    """The summary of a committed unit; small enough to cross stages.

    ``seconds`` says where the time for it went, and is zero if it was committed before.
    """

    unit_id: str
    totals: UnitTotals
    engines: tuple[str, ...] = ()
    checks: Checks = field(default_factory=dict)
    seconds: StageSeconds = NO_SECONDS
    counts: RowCounts = field(default_factory=RowCounts)

    @staticmethod
    def of(commit: Commit, seconds: StageSeconds = NO_SECONDS) -> UnitSummary:
        """Return the summary of a commit."""
        return UnitSummary(
            commit.unit_id, commit.totals, commit.engines, commit.checks, seconds, commit.counts
        )
