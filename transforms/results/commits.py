"""Commits: what vouches for a unit's parts, and where they lie; written by ``commit``, read by all.

    DIR/windows/<unit_id>.parquet   a row per window
    DIR/clips/<unit_id>.parquet     a row per clip
    DIR/errors/<unit_id>.parquet    a row per item that could not be labelled, if there is one
    DIR/_commits/<unit_id>.json     written last: with it, the unit is done

A commit holds the size, hash and row count of each part, what the unit held, and its **ledger**:
the items, or the slice of a container, that need not be done again as long as their version is
the same.

A **part** of a long file (``long_files``) is a unit like any other, but that its files lie in a
result of their own until it is joined, under ``_parts/<unit_id of the long file>/``: its name has
that unit's name in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.errors import OutputError
from transforms.process.locks import lock_shared, try_lock
from transforms.process.stage_times import NO_SECONDS, StageSeconds
from transforms.records import (
    Item,
    UnitKind,
    WindowCheck,
    WorkUnit,
)
from transforms.storage import filesystem, listing, reading, writing
from transforms.storage import urls as storage_urls
from transforms.storage.secrets import public_uri

# Of run.json, the parts and the commits. A result that names no version has the first.
SCHEMA_VERSION = 1

RUN_FILE = "run.json"
PARTS = ("windows", "clips", "errors")
COMMITS = "_commits"
LONG_FILES = "_parts"

# As ``make_unit_id`` and ``make_part_id`` write them.
_LONG_ID = re.compile(r"[0-9a-f]{16,64}")
_PART_ID = re.compile(r"(?P<long_id>[0-9a-f]{16,64})\.[0-9a-f]{20}")
_PART_FILE = re.compile(r"[0-9a-f]{20}\.(parquet|json)")


@dataclass(frozen=True)
class PartInfo:
    """A part as its commit describes it.

    Attributes:
        num_bytes: Size of the file.
        sha256: Hex digest of the file.
        num_rows: Rows in it.
    """

    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class UnitTotals:
    """What a unit held.

    Attributes:
        items: Items found in it: clips plus failures.
        clips: Items labelled.
        failures: Items that could not be labelled, a broken container's own row included.
        broken_containers: Of the failures, containers that could not be read to their end.
        windows: Windows labelled.
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
    """How far an engine's answers were from plain torch in float32; adds up over windows and units.

    Attributes:
        windows: Windows that were checked.
        reused: Of them, those that an earlier run had measured.
        same_top: Of them, those with the same best class.
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
        """The figures of one window."""
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
    """The sum of figures, engine by engine."""
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
    """An item that a commit covers.

    Attributes:
        clip_id: Its name.
        version: ``item_version`` at the time.
    """

    clip_id: str
    version: str


@dataclass(frozen=True)
class Ledger:
    """What a commit covers: a whole slice of a container, or the items listed."""

    kind: UnitKind
    container: LedgerSlice | None = None
    items: tuple[LedgerItem, ...] = ()


@dataclass(frozen=True)
class Commit:
    """A committed unit: proof that its parts are whole.

    Attributes:
        unit_id: The unit.
        fingerprint: Of the run that wrote it.
        replaces: Units whose content this one redid.
        ledger: What it covers.
        parts: By name; ``errors`` only where there is one.
        totals: What it held.
        engines: What computed it: engine, device and precision.
        checks: How far they were from float32, where that was looked at.
    """

    unit_id: str
    fingerprint: str
    replaces: tuple[str, ...]
    ledger: Ledger
    parts: Mapping[str, PartInfo]
    totals: UnitTotals
    engines: tuple[str, ...]
    checks: Checks = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The commit file's content."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_json(text: bytes) -> Commit:
        """Read a commit file's content.

        Raises:
            ValueError: It is not one.
        """
        try:
            raw = json.loads(text)
            ledger = raw["ledger"]
            container = ledger["container"]
            return Commit(
                unit_id=raw["unit_id"],
                fingerprint=raw["fingerprint"],
                replaces=tuple(raw["replaces"]),
                ledger=Ledger(
                    kind=ledger["kind"],
                    container=LedgerSlice(**container) if container else None,
                    items=tuple(LedgerItem(**item) for item in ledger["items"]),
                ),
                parts={name: PartInfo(**part) for name, part in raw["parts"].items()},
                totals=UnitTotals(**raw["totals"]),
                engines=tuple(raw["engines"]),
                checks={  # commits of earlier versions have none
                    name: CheckFigures(**figures) for name, figures in raw.get("checks", {}).items()
                },
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a commit of Earmark: {type(error).__name__}: {error}") from error


def item_version(item: Item) -> str:
    """What tells a changed item from an unchanged one: size, etag or time, and a digest.

    The digest is of where the item lies and of what is said of it: under a clip id that a manifest
    gives, another file or segment may stand; and truth and metadata are part of a row.
    """
    place = (item.uri, item.member, item.row, item.start_s, item.end_s)
    facts = json.dumps([*place, item.truth, item.metadata])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return f"{item.size}:{item.version}:{digest}"


def container_version(size: int | None, version: str | None) -> str:
    """What tells a changed container from an unchanged one."""
    return f"{size}:{version}"


def make_part_id(long_id: str, fingerprint: str, start_s: float, end_s: float | None) -> str:
    """The name of a part of a long unit, from what is in it and what makes its rows."""
    content = json.dumps([long_id, fingerprint, start_s, end_s])
    return f"{long_id}.{hashlib.sha256(content.encode()).hexdigest()[:20]}"


def long_id_of(unit_id: str) -> str | None:
    """The long unit that a unit is a part of, or None."""
    match = _PART_ID.fullmatch(unit_id)
    return None if match is None else match["long_id"]


def _place(output: str, unit_id: str) -> tuple[str, str]:
    """The result that a unit's files lie in, and what they are called there."""
    long_id = long_id_of(unit_id)
    if long_id is None:
        return output, unit_id
    return storage_urls.join(output, LONG_FILES, long_id), unit_id.removeprefix(f"{long_id}.")


def part_url(output: str, part: str, unit_id: str) -> str:
    """Where a unit's part lies."""
    folder, name = _place(output, unit_id)
    return storage_urls.join(folder, part, f"{name}.parquet")


def commit_url(output: str, unit_id: str) -> str:
    """Where a unit's commit lies."""
    folder, name = _place(output, unit_id)
    return storage_urls.join(folder, COMMITS, f"{name}.json")


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
    """The units that have a commit file."""
    names = listing.list_names(storage_urls.join(output, COMMITS))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_commits(output: str) -> tuple[dict[str, Commit], dict[str, OutputError | OSError]]:
    """Every commit of a result.

    Returns:
        The commits by unit, and why there is none of the other units: ``OutputError`` where the
        file is damaged, ``OSError`` where the store does not give it out.

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
        run = json.loads(reading.read_bytes(storage_urls.join(output, RUN_FILE)))
    except (FileNotFoundError, ValueError):  # other checks report a damaged file
        return
    if isinstance(run, dict):
        _check_schema_version(run.get("schema_version", 1), output)


def _check_schema_version(version: object, place: str) -> None:
    if str(version) != str(SCHEMA_VERSION):
        raise OutputError(
            f"{public_uri(place)} has schema version {version}, and this version of Earmark has "
            f"{SCHEMA_VERSION}; use the version of Earmark that wrote it (run.json names it), or "
            "label into a new folder."
        )


def hold_commits(output: str) -> int | None:
    """Say that this process may commit, for as long as the descriptor that is returned is open.

    A run's workers may outlive it by some seconds. The lock is the system's and ends with the
    process, however that ends; a remote output has none.
    """
    if not storage_urls.is_local(output):
        return None
    folder = storage_urls.join(output, COMMITS)
    writing.make_folder(folder)
    descriptor = os.open(storage_urls.local_path(folder), os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # some network file systems have no locks
        lock_shared(descriptor)
    return descriptor


def are_commits_held(output: str) -> bool:
    """Whether a process lives that may commit here; False where that cannot be known."""
    if not storage_urls.is_local(output):
        return False
    try:
        folder = storage_urls.local_path(storage_urls.join(output, COMMITS))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # not there, or not readable: who reads the result will say so
        return False
    try:
        return not try_lock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def remove_unit(output: str, unit_id: str) -> None:
    """Take a unit out of a result: its commit first, so that it never vouches for less."""
    writing.remove(commit_url(output, unit_id))
    for part in PARTS:
        writing.remove(part_url(output, part, unit_id))


def is_whole(output: str, commit: Commit) -> bool:
    """Whether a commit's parts are there, in the size that it vouches for."""
    urls = [part_url(output, part, commit.unit_id) for part in commit.parts]
    try:
        return [filesystem.stat(url).size for url in urls] == [
            info.num_bytes for info in commit.parts.values()
        ]
    except FileNotFoundError:
        return False


def find_change(url: str, info: PartInfo) -> str | None:
    """How a part's file differs from what was committed, or None; all of it is read."""
    with reading.open_read(url) as file:
        digest = file_sha256(file)
    if digest == info.sha256:
        return None
    return f"its content has changed: sha256 is {digest}, and {info.sha256} was committed"


def list_long_files(output: str, long_id: str | None = None) -> dict[str, list[str]]:
    """The files of parts of long units that have not been removed, by long unit.

    What does not have the name and place of such a file is somebody else's, and left alone.

    Args:
        output: The result.
        long_id: The only long unit to look for; None for all.
    """
    root = storage_urls.join(output, LONG_FILES)
    found: dict[str, list[str]] = {}
    for url in _list_there(root if long_id is None else storage_urls.join(root, long_id)):
        unit_id, *inside = url.removeprefix(f"{root}/").split("/")
        if _LONG_ID.fullmatch(unit_id) and _is_of_part(inside):
            found.setdefault(unit_id, []).append(url)
    return found


def _is_of_part(inside: Sequence[str]) -> bool:
    if len(inside) != 2 or inside[0] not in (*PARTS, COMMITS):
        return False
    return _PART_FILE.fullmatch(inside[1]) is not None or writing.is_temporary_name(inside[1])


def _list_there(folder: str) -> list[str]:
    """The files below a folder that another process may be removing."""

    def ignore_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    if not filesystem.exists(folder):
        return []
    return [file.url for file in listing.list_files(folder, ignore_gone)]


def list_part_ids(output: str) -> list[str]:
    """The parts of long units that have a commit file."""
    return part_ids_of(list_long_files(output))


def part_ids_of(long_files: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of the files that ``list_long_files`` has found."""
    return [
        f"{long_id}.{storage_urls.file_name(url).removesuffix('.json')}"
        for long_id, urls in long_files.items()
        for url in urls
        if url.endswith(".json")
    ]


def remove_long_file(output: str, long_id: str, urls: Sequence[str] | None = None) -> None:
    """Remove the parts of a long unit, their commits first.

    Args:
        output: The result.
        long_id: The long unit.
        urls: Their files, where these are known.
    """
    folder = storage_urls.join(output, LONG_FILES, long_id)
    if urls is None:
        urls = list_long_files(output, long_id).get(long_id, ())
    commits = storage_urls.join(folder, COMMITS)
    for url in sorted(urls, key=lambda url: storage_urls.parent(url) != commits):
        writing.remove(url)
    for name in (*PARTS, COMMITS):
        writing.remove_empty_folder(storage_urls.join(folder, name))
    writing.remove_empty_folder(folder)
    writing.remove_empty_folder(storage_urls.parent(folder))


def read_failures(output: str, unit_id: str) -> list[dict[str, Any]]:
    """The rows of a unit's ``errors`` part."""
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
    """The rows of a unit's part.

    Arrow's own threads let go of what they read from a Python stream whenever they like, and
    abort the process if it is ending just then: so none are used.
    """
    with open_part(output, part, unit_id) as file:
        return file.read(columns=columns, use_threads=False)


def file_sha256(file: BinaryIO) -> str:
    """Hex digest of the rest of a file, read in bounded memory."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class UnitSummary:
    """What is left of a unit once it is committed; small enough to cross stages.

    Attributes:
        unit_id: The unit.
        totals: What it held.
        engines: What computed it.
        checks: How far they were from float32.
        seconds: Where the time went that it took; none where it was committed before.
        part: Of a part of a long unit, the part itself; else None.
    """

    unit_id: str
    totals: UnitTotals
    engines: tuple[str, ...] = ()
    checks: Checks = field(default_factory=dict)
    seconds: StageSeconds = NO_SECONDS
    part: WorkUnit | None = None

    @staticmethod
    def of(
        commit: Commit, seconds: StageSeconds = NO_SECONDS, unit: WorkUnit | None = None
    ) -> UnitSummary:
        """The summary of a commit; of that of a part, with the part."""
        part = None if unit is None or unit.part_of is None else unit
        return UnitSummary(
            commit.unit_id, commit.totals, commit.engines, commit.checks, seconds, part
        )
